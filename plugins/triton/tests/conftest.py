"""Where the kernels run: on a GPU, or element by element in Triton's interpreter, which catches wrong masks and addresses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins.triton.tests.interpreted import change_the_language_once, look_dtypes_up_once

from paddock.testing.kernels import AttentionCase, attention_case

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported and when a kernel is defined


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` leaves tests out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of the kernels with `gpu` where there is one: all of them run on it."""
    if ON_GPU:
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") is not None and not ON_GPU:
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return where the kernels run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def dtypes() -> list[torch.dtype]:
    """Return the dtypes to check: the interpreter cuts bfloat16 off instead of rounding it, so that one is for GPUs."""
    return [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


@pytest.fixture(scope="session")
def halves(dtypes: list[torch.dtype]) -> list[torch.dtype]:
    """Return those of the dtypes that attention takes."""
    return [dtype for dtype in dtypes if dtype != torch.float32]


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round to FP8 as GPUs do: left alone it cuts off, and rounds products before it adds to them."""
    if ON_GPU:
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    convert, fp8 = interpreter._convert_float, interpreter.tl.float8e4nv

    def rounded(data: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if wanted != fp8 or given.primitive_bitwidth != 32:
            return convert(data, given, wanted, mode)
        return torch.tensor(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        total = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(total.astype(z.data.dtype), x.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)


@pytest.fixture
def case(device: torch.device) -> Callable[..., AttentionCase]:
    """Return what makes a step to attend in, where the kernels run."""
    return partial(attention_case, device=device)


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    """Let the interpreter be quick, and take a loop's bound: Triton 3.6 keeps scalars as arrays, which numpy 2.4 refuses."""
    if ON_GPU:
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        change_the_language_once(interpreter, patch)
        look_dtypes_up_once(interpreter, patch)
        yield
