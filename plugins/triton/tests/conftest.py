"""Where the kernels run: on a GPU, or element by element in Triton's interpreter, which catches wrong masks and addresses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return where the kernels run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def dtypes() -> list[torch.dtype]:
    """Return the dtypes to check: the interpreter cuts bfloat16 off instead of rounding it, so that one is for GPUs."""
    return [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


@pytest.fixture(scope="session", autouse=True)
def _loop_bounds() -> Iterator[None]:
    """Let the interpreter take a loop's bound from the kernel: Triton 3.6 keeps scalars as arrays, which numpy 2.4 refuses."""
    if ON_GPU:
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield
