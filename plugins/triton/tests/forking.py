"""Run modules, each in a process of its own that need not import torch and Triton again: a child of this one, which has.

Each line read is a JSON object: the module, its words, and the files for what it prints and for its errors. Each line printed is
the exit status of one. Nothing is computed here, so that every child begins with what importing makes.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from typing import Any, NoReturn

import torch._dynamo  # noqa: F401, torch itself imports it late
import triton.compiler

import paddock.assemble  # noqa: F401
import paddock_triton.plugin  # noqa: F401

assert not triton.knobs.runtime.interpret, "what is interpreted is not compiled"


def _run(request: dict[str, Any]) -> NoReturn:
    """Be the module's process."""
    for name, number, flags in (
        ("/dev/null", 0, os.O_RDONLY),
        (request["out"], 1, os.O_WRONLY),
        (request["errors"], 2, os.O_WRONLY),
    ):
        os.dup2(os.open(name, flags), number)
    sys.argv = [request["module"], *request["words"]]
    status: Any = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def main() -> None:
    """Run what is asked for, one after the other, until nothing is."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
