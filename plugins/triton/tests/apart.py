"""Scripts that compile kernels for GPUs there may be none of, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

from attrs import frozen


@frozen
class Ran:
    """What a process printed, what it said of errors, and its exit status."""

    stdout: str
    stderr: str
    returncode: int


@cache
def _forking() -> tuple[IO[str], IO[str]]:
    """Return where modules are asked for, and where their ends are said: `forking` imports once for all of them.

    It ends with this process, whose end of the pipe is closed then.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "plugins.triton.tests.forking"]
    root, pipe = Path(__file__).parents[3], subprocess.PIPE
    process = subprocess.Popen(command, env=environment, cwd=root, stdin=pipe, stdout=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def run(module: str, *words: str, environment: Mapping[str, str] | None = None) -> Ran:
    """Run a module in a process of its own, from the repository's root, where Triton compiles and interprets nothing.

    What is given of an environment is added to this process's own.
    """
    asked, ends = _forking()
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as errors:
        request = {"module": module, "words": words, "environment": {**(environment or {})}}
        print(json.dumps(request | {"out": out.name, "errors": errors.name}), file=asked, flush=True)
        status = ends.readline()
        assert status, "the process that forks has ended"
        return Ran(Path(out.name).read_text(), Path(errors.name).read_text(), int(status))


def said(script: str, *words: str) -> Any:
    """Return what a script of these tests prints, where Triton compiles and interprets nothing."""
    result = run(f"plugins.triton.tests.{script}", *words)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)
