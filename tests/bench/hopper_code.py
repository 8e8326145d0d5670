"""Kernels compiled for compute capability 9.0 on a machine that may have no GPU, and what the assembler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction


def compile_only() -> list[Any]:
    """Have every launch compile and run nothing, of tensors of a CPU too, until the process ends.

    Returns the list that compiled kernels are added to.
    """
    from plugins.triton.tests.compile_for_hopper import Hopper

    made, run = list[Any](), JITFunction.run

    def compiled(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        made.append(run(self, *args, warmup=True, **options))
        return made[-1]

    triton.runtime.driver.set_active(Hopper())
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    JITFunction.run = compiled
    return made


def described(kernel: Any) -> str:
    """Return registers, instructions that spill, and shared memory of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers = re.findall(r"REG:(\d+)", usage)
    return f"{' '.join(registers)} registers, {len(re.findall('STL|LDL', code))} spills, {kernel.metadata.shared} bytes shared"
