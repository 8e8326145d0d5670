"""The kernels compile for the GPUs they are for, wherever the tests run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_for_hopper.py"


def test_every_kernel_compiles_for_hopper_without_one() -> None:
    """Each op's kernel, and attention's in every tile shape, become machine code, of which the interpreter knows nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert all(found.values()), [name for name, kernels in found.items() if not kernels]
    assert {"_decode", "_prefill"} <= set(found["attention, FP8 pages of 64"])
