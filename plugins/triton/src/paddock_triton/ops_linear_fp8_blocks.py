"""Products of FP8 activations with FP8 weights whose scales are of blocks: one a token and 128 inputs, one for 128 x 128 weights.

T tokens, I input features, O output features, G groups of inputs, Q runs of outputs; B output features and J input features of a
block, M tokens of a tile; a row's block as N runs of V features.

Sums of 128 products are multiplied by both scales and added up in float32, so that the 14 bits which the matrix unit of compute
capability 9 keeps of a sum never see more than a group.

There up to 64 tokens are `linear_ring`'s where it serves a weight, and more are cuBLAS's where it takes them. The kernels here do
the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from paddock.errors import KernelError
from paddock_triton.dependence import DEPENDENT, fetch, start_next, wait
from paddock_triton.failures import named
from paddock_triton.launch import launch, launches_nothing
from paddock_triton.linear_ring import launch_ring_blocks, serves, tile_for
from paddock_triton.linear_ring_spec import RingTile
from paddock_triton.ops_linear_fp8 import MOST_TOKENS, FewTile, cublas_has_more, cublas_takes, load_weights
from paddock_triton.rows import blocks_of, power_of_2, unit_stride

GROUP = 128


@frozen(kw_only=True)
class OneTile:
    """How a product of one token is cut: features out and in of a block, and its warps."""

    block_o: int
    block_i: int
    warps: int


# Of the shapes that products with a scale a row had before `linear_ring`, with one group of inputs a turn. `block_variants` times
# them. Compiled: see docs/decisions/0069.
ONE = OneTile(block_o=4, block_i=8192, warps=8)
FEW = {
    16: FewTile(rows=16, block_o=64, block_i=GROUP, stages=8, ahead=8),
    32: FewTile(rows=32, block_o=64, block_i=GROUP, stages=8, ahead=4),
    64: FewTile(rows=64, block_o=64, block_i=GROUP, stages=6, ahead=4),
    128: FewTile(rows=128, block_o=128, block_i=GROUP, stages=4, ahead=0, warps=8),
}
# Scales side by side, of tokens and of groups, that cuBLAS wants whole numbers of: 16 bytes.
_QUAD = 4
_LINE = tl.constexpr(128)  # elements of a byte in a line
_RUN = tl.constexpr(16)  # a thread's load: its products are added up before they meet the scales
_TOGETHER = tl.constexpr(8)  # tiles of tokens that read a weight's block one after the other, out of the L2 cache


@triton.jit
def _scales(
    x_scale_ptr: tl.tensor, scale_ptr: tl.tensor, o_B: tl.tensor, j_N: tl.tensor, OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_B: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return one token's scale times the weight's for runs of inputs from `j_N` on: [N, 1] where a block has one, else [N, B]."""
    groups: tl.constexpr = (IN + INS - 1) // INS
    inside_N = j_N < IN
    x_scale_N = tl.load(x_scale_ptr + j_N // INS, mask=inside_N, other=0.0)
    if OUTS % BLOCK_B == 0:
        run = tl.program_id(0) * BLOCK_B // OUTS
        scale_NX = tl.load(scale_ptr + run * groups + j_N // INS, mask=inside_N, other=0.0)[:, None]
    else:
        at_NB = (o_B // OUTS)[None, :] * groups + (j_N // INS)[:, None]
        scale_NX = tl.load(scale_ptr + at_NB, mask=inside_N[:, None] & (o_B < OUT)[None, :], other=0.0)
    return x_scale_N[:, None] * scale_NX


@triton.jit
def _block_one_kernel(
    x_ptr: tl.tensor, x_scale_ptr: tl.tensor, weight_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor,
    OUT: tl.constexpr, IN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of one token's outputs. Runs come first, as groups do in `ops_linear_fp8`."""
    start_next()
    o_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_N = tl.arange(0, BLOCK_J // _RUN) * _RUN
    j_NV = first_N[:, None] + tl.arange(0, _RUN)[None, :]
    at_NBV = weight_ptr + o_B.to(tl.int64)[None, :, None] * IN + j_NV[:, None, :]
    inside_B = (o_B < OUT)[None, :, None]
    even: tl.constexpr = OUT % BLOCK_B == 0 and IN % BLOCK_J == 0
    weight_NBV = load_weights(at_NBV, inside_B & (j_NV < IN)[:, None, :], even)
    wait()
    sum_NB = _scaled(weight_NBV, x_ptr, x_scale_ptr, scale_ptr, o_B, 0, j_NV, first_N, OUT, IN, BLOCK_B, OUTS, INS)
    for start in range(BLOCK_J, IN, BLOCK_J):
        weight_NBV = load_weights(at_NBV + start, inside_B & (start + j_NV < IN)[:, None, :], even)
        sum_NB += _scaled(weight_NBV, x_ptr, x_scale_ptr, scale_ptr, o_B, start, j_NV, first_N, OUT, IN, BLOCK_B, OUTS, INS)
    tl.store(out_ptr + o_B, tl.sum(sum_NB, 0).to(out_ptr.dtype.element_ty), mask=o_B < OUT)


@triton.jit
def _scaled(
    weight_NBV: tl.tensor, x_ptr: tl.tensor, x_scale_ptr: tl.tensor, scale_ptr: tl.tensor, o_B: tl.tensor, start: tl.tensor,
    j_NV: tl.tensor, first_N: tl.tensor, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_B: tl.constexpr, OUTS: tl.constexpr,
    INS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return each run's sum of products times its scales [N, B]."""
    x_NV = tl.load(x_ptr + start + j_NV, mask=start + j_NV < IN, other=0.0)
    sum_NB = tl.sum(weight_NBV.to(tl.float32) * x_NV.to(tl.float32)[:, None, :], 2)
    return sum_NB * _scales(x_scale_ptr, scale_ptr, o_B, start + first_N, OUT, IN, BLOCK_B, OUTS, INS)


@triton.jit
def _tile(tokens: tl.tensor, OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr) -> tl.tuple:
    """Return this program's block of outputs and tile of tokens: some tiles read a weight's block before the next is read."""
    blocks: tl.constexpr = (OUT + BLOCK_B - 1) // BLOCK_B
    tiles = (tokens + BLOCK_M - 1) // BLOCK_M
    first = tl.program_id(0) // (blocks * _TOGETHER) * _TOGETHER
    together = tl.minimum(tiles - first, _TOGETHER)
    place = tl.program_id(0) % (blocks * _TOGETHER)
    return place // together, first + place % together


@triton.jit(do_not_specialize=["tokens"])  # 16, 32 and 64 tokens would each be a kernel more, compiled amid serving
def _block_few_kernel(
    x_ptr: tl.tensor, x_scale_ptr: tl.tensor, weight_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor,
    tokens: tl.tensor, x_stride: tl.tensor, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr, OUTS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """Write a block of some tokens' outputs, as W x^T: the weight takes the matrix unit's longer side."""
    start_next()
    block, tile = _tile(tokens, OUT, BLOCK_M, BLOCK_B)
    o_B, j_J, m_M = block * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_J), tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_B, inside_M = o_B < OUT, m_M < tokens
    weight_B1 = weight_ptr + o_B.to(tl.int64)[:, None] * IN
    x_M1 = x_ptr + m_M.to(tl.int64)[:, None] * x_stride
    groups: tl.constexpr = (IN + BLOCK_J - 1) // BLOCK_J
    even: tl.constexpr = OUT % BLOCK_B == 0 and IN % BLOCK_J == 0
    if AHEAD > 0 and IN >= AHEAD * _LINE:
        first_L = tl.arange(0, AHEAD) * _LINE
        fetch(tl.where(inside_B[:, None], weight_B1 + first_L[None, :], weight_ptr))
    wait()
    sum_BM = tl.zeros([BLOCK_B, BLOCK_M], tl.float32)
    for group in tl.range(0, groups, num_stages=STAGES):
        at_J = group * BLOCK_J + j_J
        weight_BJ = load_weights(weight_B1 + at_J[None, :], inside_B[:, None] & (at_J < IN)[None, :], even)
        x_MJ = tl.load(x_M1 + at_J[None, :], mask=inside_M[:, None] & (at_J < IN)[None, :], other=0.0)
        x_scale_M = tl.load(x_scale_ptr + m_M * groups + group, mask=inside_M, other=0.0)
        if OUTS % BLOCK_B == 0:
            scale_M = x_scale_M * tl.load(scale_ptr + block * BLOCK_B // OUTS * groups + group)
            sum_BM += tl.dot(weight_BJ, tl.trans(x_MJ)) * scale_M[None, :]
        else:
            scale_B = tl.load(scale_ptr + o_B // OUTS * groups + group, mask=inside_B, other=0.0)
            sum_BM += tl.dot(weight_BJ, tl.trans(x_MJ)) * (x_scale_M[None, :] * scale_B[:, None])
    out_BM = out_ptr + m_M.to(tl.int64)[None, :] * OUT + o_B[:, None]
    tl.store(out_BM, sum_BM.to(out_ptr.dtype.element_ty), mask=inside_B[:, None] & inside_M[None, :])


@named("linear_fp8_blocks")
def linear_fp8_blocks(
    values_TI: Tensor,
    scale_TG: Tensor,
    weight_OI: Tensor,
    weight_scale_QG: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return x W^T [T, O] in `dtype`; a weight's scale covers `block` (outputs, 128 inputs), a token's 128 inputs.

    Raises KernelError for blocks of other widths.
    """
    values_TI, weight_OI = unit_stride(values_TI), weight_OI.contiguous()
    scale_TG, weight_scale_QG = scale_TG.contiguous(), weight_scale_QG.contiguous()
    assert values_TI.dtype == weight_OI.dtype == torch.float8_e4m3fn, (values_TI.dtype, weight_OI.dtype)
    if block[1] != GROUP:
        raise KernelError(
            f"no kernel multiplies blocks of {block[1]} inputs, only of {GROUP}",
            fix="choose the core's own in plain torch: --op linear_fp8_blocks=paddock (ops={'linear_fp8_blocks': 'paddock'})",
        )
    tokens = values_TI.shape[0]
    out_TO = values_TI.new_empty((tokens, weight_OI.shape[0]), dtype=dtype)
    given = (values_TI, scale_TG, weight_OI, weight_scale_QG, out_TO)
    if serves(values_TI, weight_OI) and block[0] % RingTile.rows == 0:
        launch_ring_blocks(out_TO, values_TI, scale_TG, weight_OI, weight_scale_QG, block[0], tile_for(tokens, weight_OI))
    elif tokens > MOST_TOKENS and _cublas_takes(values_TI, weight_OI, block, dtype):
        return out_TO if launches_nothing() else cublas_blocks(values_TI, scale_TG, weight_OI, weight_scale_QG, dtype)
    elif tokens == 1:
        launch_one(given, block[0], ONE)
    elif tokens:
        launch_few(given, block[0], FEW[min(max(16, power_of_2(tokens)), 128)])
    return out_TO


def _cublas_takes(values_TI: Tensor, weight_OI: Tensor, block: tuple[int, int], dtype: torch.dtype) -> bool:
    return block == (GROUP, GROUP) and cublas_has_more(weight_OI.device) and cublas_takes(values_TI, weight_OI, dtype)


def cublas_blocks(values_TI: Tensor, scale_TG: Tensor, weight_OI: Tensor, weight_scale_QG: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product by cuBLAS, with scales of 1 x 128 values and 128 x 128 weights. A graph can hold it."""
    tokens, groups = scale_TG.shape
    filled = blocks_of(tokens, _QUAD) * _QUAD
    scale_GM = scale_TG.new_empty(groups, filled)
    scale_GM[:, :tokens] = scale_TG.T
    if filled > tokens:  # what is beyond the last token gives rows that nobody sees
        values_MI = values_TI.new_empty(filled, values_TI.shape[1])
        values_MI[:tokens] = values_TI
        values_TI = values_MI
    if groups % _QUAD:
        weight_scale_QG = torch.nn.functional.pad(weight_scale_QG, (0, -groups % _QUAD))
    out_MO = scaled_mm(
        values_TI.contiguous(), weight_OI.T, scale_GM.T, ScalingType.BlockWise1x128, weight_scale_QG.T,
        ScalingType.BlockWise128x128, output_dtype=dtype,
    )  # fmt: skip
    return out_MO[:tokens]


Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def launch_one(given: Given, outs: int, tile: OneTile) -> None:
    """Multiply one token by fused multiply-adds."""
    features, inputs = given[2].shape
    block_j = max(min(tile.block_i, power_of_2(inputs)), 16)
    launch(
        _block_one_kernel, (blocks_of(features, tile.block_o),),
        *given, OUT=features, IN=inputs, BLOCK_B=tile.block_o, BLOCK_J=block_j, OUTS=outs, INS=GROUP, num_warps=tile.warps,
        **DEPENDENT,
    )  # fmt: skip


def launch_few(given: Given, outs: int, tile: FewTile) -> None:
    """Multiply tokens by the matrix unit, `tile.rows` at a time."""
    values_TI, _, weight_OI, _, _ = given
    (features, inputs), tokens = weight_OI.shape, values_TI.shape[0]
    launch(
        _block_few_kernel, (blocks_of(features, tile.block_o) * blocks_of(tokens, tile.rows),),
        *given, tokens, values_TI.stride(0), OUT=features, IN=inputs, BLOCK_M=tile.rows, BLOCK_B=tile.block_o,
        BLOCK_J=tile.block_i, OUTS=outs, STAGES=tile.stages, AHEAD=tile.ahead, num_warps=tile.warps, **DEPENDENT,
    )  # fmt: skip
