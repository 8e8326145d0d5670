"""Scripts that compile kernels for GPUs there may be none of, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def said(script: str, *words: str) -> Any:
    """Return what a script of these tests prints, where Triton compiles and interprets nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"plugins.triton.tests.{script}", *words]
    root = Path(__file__).parents[3]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)
