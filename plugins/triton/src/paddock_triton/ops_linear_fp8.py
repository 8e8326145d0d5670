"""Products of FP8 activations with FP8 weights: few tokens by kernels that stream the weight, more by cuBLAS.

T tokens, I input features, O output features; B output features and J input features of a block, M tokens of a tile, L lines
fetched ahead. Values and weights are e4m3, scales float32.

Up to 64 tokens are `linear_ring`'s where it serves a weight: on compute capability 9, with inputs a multiple of 16. The
kernel here does the rest, and what cuBLAS does not take.

The matrix unit of compute capability 9 keeps sums of FP8 products to 14 bits: over all of 8,192 or 28,672 inputs that alone would
err by 0.6 or 2.2 percent (modelled: the sum cut to 14 bits after each 32 inputs), where a rounding to bfloat16 errs by 0.2. So
what a block of at most 256 inputs gives is added up in float32 (0.02 percent), here and in cuBLAS (`use_fast_accum=False`).

`python -m tests.bench.fp8_variants` times tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from paddock_triton.attention_async import runs_on
from paddock_triton.dependence import DEPENDENT, fetch, start_next, wait
from paddock_triton.failures import named
from paddock_triton.launch import launch, launches_nothing
from paddock_triton.linear_ring import launch_ring, serves, tile_for
from paddock_triton.rows import blocks_of, power_of_2, unit_stride

MOST_TOKENS = 64  # above, cuBLAS takes over where it can
_CUBLAS_MULTIPLE = 16  # of features and addresses
_CUDA_WITH_MORE = 12, 9


@frozen(kw_only=True)
class FewTile:
    """How a product of a few tokens is cut; `ahead` lines of each of a block's rows are fetched while the kernel before runs."""

    rows: int
    block_o: int
    block_i: int
    stages: int
    ahead: int
    warps: int = 4


FEW = {
    16: FewTile(rows=16, block_o=64, block_i=256, stages=5, ahead=8),
    32: FewTile(rows=32, block_o=64, block_i=256, stages=4, ahead=4),
    64: FewTile(rows=64, block_o=64, block_i=256, stages=5, ahead=4),
}
_LINE = tl.constexpr(128)  # elements of a byte in a line


@triton.jit
def load_weights(at: tl.tensor, inside: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    """Return a block of an FP8 weight, zeros beyond its edges; nothing is read twice, so the caches need not keep it."""
    if EVEN:
        block = tl.load(at, eviction_policy="evict_first")
    else:
        block = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
    return block


@triton.jit(do_not_specialize=["tokens"])  # 16, 32 and 64 tokens would each be a kernel more, compiled amid serving
def _few_kernel(
    x_ptr: tl.tensor, x_scale_ptr: tl.tensor, weight_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor,
    tokens: tl.tensor, x_stride: tl.tensor, PER_TOKEN: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of a few tokens' outputs, as W x^T: the weight takes the matrix unit's longer side."""
    start_next()
    o_B, m_M = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    even: tl.constexpr = OUT % BLOCK_B == 0 and IN % BLOCK_J == 0
    j_J, inside_B1, inside_M = tl.arange(0, BLOCK_J), (o_B < OUT)[:, None], m_M < tokens
    weight_B1 = weight_ptr + o_B.to(tl.int64)[:, None] * IN
    x_M1 = x_ptr + m_M.to(tl.int64)[:, None] * x_stride
    if IN >= AHEAD * _LINE:
        first_L = tl.arange(0, AHEAD) * _LINE
        fetch(tl.where(inside_B1, weight_B1 + first_L[None, :], weight_ptr))
    scale_B = tl.load(scale_ptr + o_B, mask=o_B < OUT, other=0.0)
    wait()
    sum_BM = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for start in tl.range(0, IN, BLOCK_J, num_stages=STAGES):
        at_J = start + j_J
        weight_BJ = load_weights(weight_B1 + at_J[None, :], inside_B1 & (at_J < IN)[None, :], even)
        x_MJ = tl.load(x_M1 + at_J[None, :], mask=inside_M[:, None] & (at_J < IN)[None, :], other=0.0)
        sum_BM += tl.dot(weight_BJ, tl.trans(x_MJ))
    x_scale_M = tl.load(x_scale_ptr + m_M * PER_TOKEN, mask=inside_M, other=0.0)
    y_BM = sum_BM * (x_scale_M[None, :] * scale_B[:, None])
    out_BM = out_ptr + m_M.to(tl.int64)[None, :] * OUT + o_B[:, None]
    tl.store(out_BM, y_BM.to(out_ptr.dtype.element_ty), mask=inside_B1 & inside_M[None, :])


@named("linear_fp8_fast")
def linear_fp8_fast(values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `linear_fp8` does; cuBLAS leaves its sums to the matrix unit, which keeps 14 bits of them."""
    return _product(values_TI, x_scale, weight_OI, weight_scale_O1, dtype, fast=True)


@named("linear_fp8")
def linear_fp8(values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x W^T [T, O] in `dtype`: x_scale * weight_scale * sum(x W), summed in float32, rounded once.

    More than 64 tokens are cuBLAS's where it takes them: features in and out multiples of 16, and bfloat16 out unless CUDA is
    12.9 or later. Else each 64 tokens read the weight, out of the L2 cache if it keeps it.
    """
    return _product(values_TI, x_scale, weight_OI, weight_scale_O1, dtype, fast=False)


def _product(
    values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    values_TI, weight_OI, weight_scale_O1 = unit_stride(values_TI), weight_OI.contiguous(), weight_scale_O1.contiguous()
    assert values_TI.dtype == weight_OI.dtype == torch.float8_e4m3fn, (values_TI.dtype, weight_OI.dtype)
    assert x_scale.ndim == 0 or x_scale.is_contiguous(), x_scale.stride()
    tokens = values_TI.shape[0]
    out_TO = values_TI.new_empty((tokens, weight_OI.shape[0]), dtype=dtype)
    if not tokens:
        return out_TO
    if serves(values_TI, weight_OI):
        launch_ring(out_TO, values_TI, x_scale, weight_OI, weight_scale_O1, tile_for(tokens, weight_OI))
    elif tokens <= MOST_TOKENS or not cublas_takes(values_TI, weight_OI, dtype):
        launch_few(out_TO, values_TI, x_scale, weight_OI, weight_scale_O1, FEW[min(max(16, power_of_2(tokens)), 64)])
    elif not launches_nothing():
        return cublas(values_TI, x_scale, weight_OI, weight_scale_O1, dtype, fast_accumulation=fast)
    return out_TO


def launch_few(
    out_TO: Tensor, values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, tile: FewTile
) -> None:
    """Multiply tokens by the matrix unit, `tile.rows` at a time."""
    (features, inputs), tokens = weight_OI.shape, values_TI.shape[0]
    launch(
        _few_kernel, (blocks_of(features, tile.block_o), blocks_of(tokens, tile.rows)),
        values_TI, x_scale, weight_OI, weight_scale_O1, out_TO, tokens, values_TI.stride(0), PER_TOKEN=int(x_scale.ndim > 0),
        OUT=features, IN=inputs, BLOCK_M=tile.rows, BLOCK_B=tile.block_o, BLOCK_J=tile.block_i, STAGES=tile.stages,
        AHEAD=tile.ahead, num_warps=tile.warps, **DEPENDENT,
    )  # fmt: skip


def cublas(
    values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype, *,
    fast_accumulation: bool = False,
) -> Tensor:  # fmt: skip
    """Return the product by cuBLAS, with a scale for each token and each row of the weight. A graph can hold it."""
    scale_T1 = x_scale.expand(values_TI.shape[0], 1).contiguous()
    return torch._scaled_mm(
        values_TI.contiguous(),
        weight_OI.T,
        scale_T1,
        weight_scale_O1.T,
        out_dtype=dtype,
        use_fast_accum=fast_accumulation,
    )


def cublas_takes(values_TI: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> bool:
    """Return whether cuBLAS has an FP8 product with scales of rows for these."""
    whole = all(size % _CUBLAS_MULTIPLE == 0 for size in (*weight_OI.shape, weight_OI.data_ptr()))
    return whole and (dtype == torch.bfloat16 or cublas_has_more(weight_OI.device))


def cublas_has_more(device: torch.device) -> bool:
    """Return whether cuBLAS has FP8 products with scales of blocks, and such that are not bfloat16: CUDA 12.9's, on Hopper."""
    return runs_on(device) and tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) >= _CUDA_WITH_MORE
