"""Where the kernels run: on a GPU, or element by element in Triton's interpreter, which catches wrong masks and addresses.

T tokens, S sequences, H query heads, K KV heads, D head size, N pages, P tokens a page, L keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from torch import Tensor

from paddock.layers import AttentionBackend, AttentionInputs, AttentionParams, LayerKV, reference
from paddock.plugins import AttentionNeeds
from paddock.testing.oracle import assert_close, dense_attention, poisoned
from paddock.testing.paging import Pages

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


@frozen(eq=False, kw_only=True)
class Case:
    """One step: random queries, keys and values, in pages that lie scattered and whose other rows are NaN.

    `chunks` says of each sequence how many tokens are new.
    """

    needs: AttentionNeeds
    pages: Pages
    kv: LayerKV
    q_THD: Tensor
    inputs: AttentionInputs
    chunks: list[tuple[str, int]]

    def params(self, *features: str, window: int = 9) -> AttentionParams:
        """Return parameters with these features, and with scales where the pages are FP8."""
        device, fp8 = self.q_THD.device, self.kv.k_pages_NPKD.dtype == reference.FP8
        slopes_H = torch.linspace(0.5, 0.01, self.needs.num_heads, device=device)
        return AttentionParams(
            scale=self.needs.head_dim**-0.5,
            alibi_slopes_H=slopes_H if "alibi" in features else None,
            window=window if "sliding_window" in features else None,
            softcap=2.0 if "softcap" in features else None,
            k_scale=torch.tensor(0.5, device=device) if fp8 else None,
            v_scale=torch.tensor(1.5, device=device) if fp8 else None,
        )

    def attend(self, backend: AttentionBackend, params: AttentionParams) -> Tensor:
        """Return what the backend gives, in memory that was NaN."""
        with poisoned():
            return backend.attend(self.q_THD, self.kv, evolve(self.inputs, prepared=backend.prepare(self.inputs)), params)

    def check(self, out_THD: Tensor, params: AttentionParams, at: str = "") -> None:
        """Hold every sequence's output to float64, each by itself: a long one must not hide a short one."""
        start = 0
        for name, count in self.chunks:
            part = slice(start, start + count)
            start += count
            k_LKD, v_LKD = (
                self.pages.rows(name, pages_NPKD).double() * (1.0 if scale is None else scale.double())
                for pages_NPKD, scale in ((self.kv.k_pages_NPKD, params.k_scale), (self.kv.v_pages_NPKD, params.v_scale))
            )
            expected = dense_attention(
                self.q_THD[part], k_LKD, v_LKD, scale=params.scale, slopes_H=params.alibi_slopes_H, window=params.window,
                softcap=params.softcap,
            )  # fmt: skip
            assert_close(out_THD[part], expected, op="attention", at=f"{at} sequence {name}: {count} new of {len(k_LKD)}")


def _case(
    batch: list[tuple[int, int]],
    heads: tuple[int, int, int],
    *,
    dtype: torch.dtype,
    page_size: int = 64,
    kv_dtype: torch.dtype | None = None,
) -> Case:
    """Return a step of sequences with (tokens already there, tokens of this step), single tokens first."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    num_heads, num_kv_heads, head_dim = heads
    pages = Pages(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_pages=sum((there + new) // page_size + 1 for there, new in batch) + 3,
        dtype=kv_dtype or dtype,
        device=device,
    )
    generator = torch.Generator(device).manual_seed(len(batch))
    (kv,), chunks = pages.layers, [(str(i), new) for i, (_, new) in enumerate(batch)]
    before = pages.inputs([(str(i), there) for i, (there, _) in enumerate(batch) if there])
    inputs = pages.inputs(chunks)
    for slots_T in (before.slots_T, inputs.slots_T):
        shape = (len(slots_T), num_kv_heads, head_dim)
        k_TKD, v_TKD = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
        reference.cache_kv(k_TKD, v_TKD, kv, slots_T, None, None)
    q_THD = torch.randn(len(inputs.slots_T), num_heads, head_dim, generator=generator, device=device).to(dtype)
    needs = AttentionNeeds(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    return Case(needs=needs, pages=pages, kv=kv, q_THD=q_THD, inputs=inputs, chunks=chunks)


@pytest.fixture
def case() -> Callable[..., Case]:
    """Return what makes a step to attend in."""
    return _case


@pytest.fixture(scope="session", autouse=True)
def _loop_bounds() -> Iterator[None]:
    """Let the interpreter take a loop's bound from the kernel: Triton 3.6 keeps scalars as arrays, which numpy 2.4 refuses."""
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
        yield
