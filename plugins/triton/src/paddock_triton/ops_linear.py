"""Products with a plain weight where few tokens make them a matter of reading it; larger ones are the library's.

T tokens, I input features, O output features; B output features and J input features of a block, M rows of tokens a tile has,
L lines fetched ahead.

One token is multiplied as the weight is read, by fused multiply-adds. From 2 to 64 are `linear_ring`'s where it serves a weight:
on compute capability 9, with inputs a multiple of 8. The kernel in blocks here does the rest. 32 layers of Llama-3.1-8B in one
graph on an H200, bfloat16, microseconds a layer (`python -m tests.bench.layer_tiles MODEL --rows T --context C`):

| tokens | keys of each | blocks | ring |
| ---: | ---: | ---: | ---: |
| 1 | 192 | 111.2 by multiply-adds | 114.7 |
| 2, 4 | 512 | 124.4, 126.3 | 117.7, 120.6 |
| 8 | 192 | 125.2 | 121.2 |
| 16, 32 | 512 | 132.0, 139.5 | 126.5, 135.2 |
| 64 | 512 | 177.1 | 148.7 |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor
from torch.nn import functional as nnf

from paddock_triton.dependence import DEPENDENT, fetch, start_next, wait
from paddock_triton.failures import named
from paddock_triton.launch import launch, launches_nothing
from paddock_triton.linear_ring import launch_ring_plain, serves, tile_for
from paddock_triton.rows import blocks_of, power_of_2, unit_stride

_MOST_TOKENS = 64  # above, cuBLAS is as quick
_HALVES = (torch.bfloat16, torch.float16)
# One token: 4 x 2048 on 8 warps 4,915 us; on 4 warps 4,973; 2 x 2048 on 8 or 4 4,950 and 4,970; 4 x 1024 on 4 5,162; 8 x 1024 on
# 8 5,088; 8 x 2048 on 16 5,154. By itself each product takes cuBLAS 10 to 40 % longer: 4096 x 4096 15.9 us against 11.3.
_ROWS, _COLUMNS, _WARPS = 4, 2048, 8


@frozen(kw_only=True)
class _Tile:
    """How a product of a few tokens is cut: features out and in of a block, and the blocks under way at once.

    `ahead` lines of each of a block's rows are fetched into the L2 while the kernel before still runs.
    """

    block_o: int
    block_i: int
    stages: int
    ahead: int


# By rows of tokens, on an H100, 32 layers of Llama-3.1-8B. 8 tokens, without lines ahead: 64 x 128 in 8 stages 5,446 us, 64 x 256
# in 4 5,409, 32 x 256 in 6 5,625, 32 x 128 in 8 5,759, 16 x 256 in 6 5,746, 16 x 512 in 4 5,761. Lines ahead, 2 tokens: 0 5,308,
# 4 5,262, 8 5,239, 16 5,265, 32 5,368. 24 tokens: 64 x 128 in 6 5,666. 64 tokens: 64 x 128 in 5 6,381 (4 ahead 6,317, 8 6,393),
# 64 x 64 in 8 6,539, 128 x 64 in 6 7,136.
_TILES = {
    16: _Tile(block_o=64, block_i=128, stages=8, ahead=8),
    32: _Tile(block_o=64, block_i=128, stages=6, ahead=4),
    64: _Tile(block_o=64, block_i=128, stages=5, ahead=4),
}
_LINE = tl.constexpr(64)  # elements of 2 bytes in a line of 128 bytes


@triton.jit
def _weights(
    at_BJ: tl.tensor, o_B: tl.tensor, at_J: tl.tensor, OUT: tl.constexpr, IN: tl.constexpr, EVEN: tl.constexpr
) -> tl.tensor:
    """Return a block of the weight [B, J], zeros beyond its edges; nothing is read twice, so the caches need not keep it."""
    if EVEN:
        block_BJ = tl.load(at_BJ, eviction_policy="evict_first")
    else:
        inside_BJ = (o_B < OUT)[:, None] & (at_J < IN)[None, :]
        block_BJ = tl.load(at_BJ, mask=inside_BJ, other=0.0, eviction_policy="evict_first")
    return block_BJ


@triton.jit
def _one_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of one token's outputs; the next block of the weight is on its way while one is multiplied."""
    start_next()
    o_B, j_J = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_J)
    at_BJ = weight_ptr + o_B.to(tl.int64)[:, None] * IN + j_J[None, :]
    even: tl.constexpr = OUT % BLOCK_B == 0 and IN % BLOCK_J == 0
    next_BJ = _weights(at_BJ, o_B, j_J, OUT, IN, even)
    wait()
    sum_BJ = tl.zeros([BLOCK_B, BLOCK_J], tl.float32)
    for start in range(0, IN, BLOCK_J):
        weight_BJ = next_BJ
        if start + BLOCK_J < IN:
            after = start + BLOCK_J
            next_BJ = _weights(at_BJ + after, o_B, after + j_J, OUT, IN, even)
        x_J = tl.load(x_ptr + start + j_J, mask=start + j_J < IN, other=0.0)
        sum_BJ += weight_BJ.to(tl.float32) * x_J.to(tl.float32)[None, :]
    tl.store(out_ptr + o_B, tl.sum(sum_BJ, 1).to(out_ptr.dtype.element_ty), mask=o_B < OUT)


@triton.jit(do_not_specialize=["tokens"])  # 16, 32 and 64 tokens would each be a kernel more, compiled amid serving
def _few_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor, tokens: tl.tensor, x_stride: tl.tensor, OUT: tl.constexpr,
    IN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of a few tokens' outputs, as W x^T: the weight takes the tensor core's longer side."""
    start_next()
    o_B, m_M, j_J = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_J)
    weight_B1 = weight_ptr + o_B.to(tl.int64)[:, None] * IN
    x_M1 = x_ptr + m_M.to(tl.int64)[:, None] * x_stride
    inside_M1 = (m_M < tokens)[:, None]
    even: tl.constexpr = OUT % BLOCK_B == 0 and IN % BLOCK_J == 0
    if IN >= AHEAD * _LINE:
        first_L = tl.arange(0, AHEAD) * _LINE
        fetch(tl.where((o_B < OUT)[:, None], weight_B1 + first_L[None, :], weight_ptr))
    wait()
    sum_BM = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for start in tl.range(0, IN, BLOCK_J, num_stages=STAGES):
        at_J = start + j_J
        weight_BJ = _weights(weight_B1 + at_J[None, :], o_B, at_J, OUT, IN, even)
        x_MJ = tl.load(x_M1 + at_J[None, :], mask=inside_M1 & (at_J < IN)[None, :], other=0.0)
        sum_BM = tl.dot(weight_BJ, tl.trans(x_MJ), sum_BM)
    out_BM = out_ptr + m_M.to(tl.int64)[None, :] * OUT + o_B[:, None]
    tl.store(out_BM, sum_BM.to(out_ptr.dtype.element_ty), mask=(o_B < OUT)[:, None] & (m_M < tokens)[None, :])


@named("linear")
def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x W^T [T, O] in x's dtype, summed in float32."""
    tokens = x_TI.shape[0]
    if not 0 < tokens <= _MOST_TOKENS or x_TI.dtype not in _HALVES or not weight_OI.is_contiguous():
        return x_TI.new_empty(tokens, weight_OI.shape[0]) if launches_nothing() else nnf.linear(x_TI, weight_OI)
    x_TI = unit_stride(x_TI)
    features, inputs = weight_OI.shape
    out_TO = x_TI.new_empty(tokens, features)
    if tokens == 1:
        block_j = min(_COLUMNS, power_of_2(inputs))
        launch(
            _one_kernel, (blocks_of(features, _ROWS),),
            x_TI, weight_OI, out_TO, OUT=features, IN=inputs, BLOCK_B=_ROWS, BLOCK_J=block_j, num_warps=_WARPS, **DEPENDENT
        )  # fmt: skip
        return out_TO
    if serves(x_TI, weight_OI):
        launch_ring_plain(out_TO, x_TI, weight_OI, tile_for(tokens, weight_OI))
    else:
        _launch_few(out_TO, x_TI, weight_OI)
    return out_TO


def _launch_few(out_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    """Multiply tokens in blocks of the weight."""
    (features, inputs), tokens = weight_OI.shape, len(x_TI)
    rows = max(16, power_of_2(tokens))
    tile = _TILES[rows]
    launch(
        _few_kernel, (blocks_of(features, tile.block_o),),
        x_TI, weight_OI, out_TO, tokens, x_TI.stride(0), OUT=features, IN=inputs, BLOCK_M=rows, BLOCK_B=tile.block_o,
        BLOCK_J=tile.block_i, STAGES=tile.stages, AHEAD=tile.ahead, num_warps=4, **DEPENDENT,
    )  # fmt: skip
