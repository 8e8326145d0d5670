"""The benchmarks of kernels to choose from, as far as they go without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

SAYS = r"^{name} +\d+ registers, 0 spills, \d+ bytes shared"


@pytest.mark.parametrize(
    ("module", "name", "more"),
    [
        ("prefill_variants", "64 x 64, 4 warps", "$"),
        ("prefill_variants", "fp8 arithmetic, 128 x 64, 8 warps", "$"),
        ("decode_variants", "decode 64 x 8k: 4 stages", "$"),
        ("block_variants", "one 2x8192 w8", "$"),
        ("fp8_variants", "one 2x4096 w4", r", cvt\.rn\.f16x2\.e4m3x2$"),
        ("int4_to_fp8_variants", "*o64 b1", ", 8 loads and 16 stores of 16 bytes$"),
        ("int4_variants", "*fp8 n128 h1 t2 c1 s6 r2048 shared late", r", wgmma\.mma_async\S*e4m3\.e4m3$"),
    ],
)
def test_a_variant_is_compiled_without_a_gpu(module: str, name: str, more: str) -> None:
    """Each says its registers, spills and shared memory; FP8 products their instruction."""
    command = [sys.executable, "-m", f"tests.bench.{module}", "--compile", "--only", name]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert re.search(SAYS.format(name=re.escape(name)) + more, run.stdout, re.MULTILINE)
