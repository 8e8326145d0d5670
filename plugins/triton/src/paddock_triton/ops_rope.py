"""K and V into their pages, rotated first where the model has rotary positions; q is rotated by the same launch.

T tokens, H query heads, K KV heads, G = H / K query heads of a KV head, D head size, J = D / 2; L positions, N pages, P tokens a
page. B heads of a block. A program
takes a block of heads of one token, as its two halves [B, J']: J' is the power of two from J up.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import HEADS_APART, LayerKV, takes
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import named
from paddock_triton.fp8 import to_fp8
from paddock_triton.launch import launch
from paddock_triton.rows import blocks_of, power_of_2

# Element pairs (j, j + D/2) of a program. Percent of 4.3 TB/s for 4096 tokens of 64 + 8 heads of 128 on an H200, bf16 pages and
# FP8 pages, then microseconds for one token: 256 on 1 warp 76, 74, 1.6; 512 on 4 84, 77, 1.4; 1024 on 2 88, 87, 1.7;
# 1024 on 4 89, 87, 1.5; 2048 on 4 88, 89, 1.6.
_PAIRS, _WARPS = 1024, 4


@triton.jit
def _read(
    x_ptr: tl.tensor, group_stride: tl.tensor, head_stride: tl.tensor, block: tl.tensor, COUNT: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return both halves [B, J'] of a block of heads that lie in groups; all in one where GROUP is their COUNT."""
    head_B1 = block * HEADS + tl.arange(0, HEADS)[:, None]
    half_1J = tl.arange(0, LANES)[None, :]
    inside_BJ = (head_B1 < COUNT) & (half_1J < HALF)
    if GROUP == COUNT:
        at_BJ = x_ptr + head_B1 * head_stride + half_1J
    else:
        at_BJ = x_ptr + head_B1 // GROUP * group_stride + head_B1 % GROUP * head_stride + half_1J
    return tl.load(at_BJ, mask=inside_BJ, other=0.0), tl.load(at_BJ + HALF, mask=inside_BJ, other=0.0)


@triton.jit
def _write(
    out_ptr: tl.tensor, a_BJ: tl.tensor, b_BJ: tl.tensor, scale_ptr: tl.tensor, block: tl.tensor, COUNT: tl.constexpr,
    HALF: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Write both halves of a block of heads to rows of contiguous heads, in the rows' dtype."""
    head_B1 = block * HEADS + tl.arange(0, HEADS)[:, None]
    half_1J = tl.arange(0, LANES)[None, :]
    inside_BJ = (head_B1 < COUNT) & (half_1J < HALF)
    at_BJ = out_ptr + head_B1 * (2 * HALF) + half_1J
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        scale = tl.full((), 1.0, tl.float32) if scale_ptr is None else tl.load(scale_ptr)
        a_BJ, b_BJ = to_fp8(a_BJ.to(tl.float32), scale), to_fp8(b_BJ.to(tl.float32), scale)
    tl.store(at_BJ, a_BJ.to(out_ptr.dtype.element_ty), mask=inside_BJ)
    tl.store(at_BJ + HALF, b_BJ.to(out_ptr.dtype.element_ty), mask=inside_BJ)


@triton.jit
def _angles(
    cos_sin_ptr: tl.tensor, positions_ptr: tl.tensor, token: tl.tensor, HALF: tl.constexpr, LANES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return cosines and sines [1, J'] of the token's position."""
    half_1J = tl.arange(0, LANES)[None, :]
    row_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF)
    cos_1J = tl.load(row_ptr + half_1J, mask=half_1J < HALF, other=0.0)
    return cos_1J, tl.load(row_ptr + HALF + half_1J, mask=half_1J < HALF, other=0.0)


@triton.jit
def _rotated(a_BJ: tl.tensor, b_BJ: tl.tensor, cos_1J: tl.tensor, sin_1J: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the halves turned by the angles, rounded to their dtype."""
    a32_BJ, b32_BJ = a_BJ.to(tl.float32), b_BJ.to(tl.float32)
    return (a32_BJ * cos_1J - b32_BJ * sin_1J).to(a_BJ.dtype), (b32_BJ * cos_1J + a32_BJ * sin_1J).to(b_BJ.dtype)


@triton.jit
def _keep(
    k_ptr: tl.tensor, v_ptr: tl.tensor, cos_1J: tl.tensor | None, sin_1J: tl.tensor | None,
    k_pages_ptr: tl.tensor, v_pages_ptr: tl.tensor, slot: tl.tensor, k_scale_ptr: tl.tensor, v_scale_ptr: tl.tensor,
    k_stride: tl.tensor, k_head: tl.tensor, v_stride: tl.tensor, v_head: tl.tensor, token: tl.tensor, block: tl.tensor,
    COUNT: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Store a block of keys, rotated if there are angles, and its values in the token's slot."""
    row = slot * (2 * HALF * COUNT)
    a_BJ, b_BJ = _read(k_ptr + token * k_stride, 0, k_head, block, COUNT, COUNT, HALF, HEADS, LANES)
    c_BJ, d_BJ = _read(v_ptr + token * v_stride, 0, v_head, block, COUNT, COUNT, HALF, HEADS, LANES)
    if cos_1J is not None:
        a_BJ, b_BJ = _rotated(a_BJ, b_BJ, cos_1J, sin_1J)
    _write(k_pages_ptr + row, a_BJ, b_BJ, k_scale_ptr, block, COUNT, HALF, HEADS, LANES)
    _write(v_pages_ptr + row, c_BJ, d_BJ, v_scale_ptr, block, COUNT, HALF, HEADS, LANES)


@triton.jit
def _rope_and_cache_kernel(
    q_ptr: tl.tensor, out_ptr: tl.tensor, q_stride: tl.tensor, q_group: tl.tensor, q_head: tl.tensor,
    k_ptr: tl.tensor, v_ptr: tl.tensor, cos_sin_ptr: tl.tensor, positions_ptr: tl.tensor,
    k_pages_ptr: tl.tensor, v_pages_ptr: tl.tensor, slots_ptr: tl.tensor, k_scale_ptr: tl.tensor, v_scale_ptr: tl.tensor,
    k_stride: tl.tensor, k_head: tl.tensor, v_stride: tl.tensor, v_head: tl.tensor,
    Q_HEADS: tl.constexpr, Q_GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate a block of query heads, or rotate and store a block of keys and store its values."""
    start_next()
    q_blocks: tl.constexpr = (Q_HEADS + Q_BLOCK - 1) // Q_BLOCK
    blocks: tl.constexpr = q_blocks + (KV_HEADS + KV_BLOCK - 1) // KV_BLOCK
    token, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    # Neither positions nor slots are written while a step runs: one after the other these loads take as long as all that follows.
    cos_1J, sin_1J = _angles(cos_sin_ptr, positions_ptr, token, HALF, LANES)
    slot = tl.load(slots_ptr + token)
    wait()
    if block < q_blocks:
        a_BJ, b_BJ = _read(q_ptr + token * q_stride, q_group, q_head, block, Q_HEADS, Q_GROUP, HALF, Q_BLOCK, LANES)
        a_BJ, b_BJ = _rotated(a_BJ, b_BJ, cos_1J, sin_1J)
        _write(out_ptr + token * (2 * HALF * Q_HEADS), a_BJ, b_BJ, None, block, Q_HEADS, HALF, Q_BLOCK, LANES)
    else:
        _keep(
            k_ptr, v_ptr, cos_1J, sin_1J, k_pages_ptr, v_pages_ptr, slot, k_scale_ptr, v_scale_ptr,
            k_stride, k_head, v_stride, v_head, token, block - q_blocks, KV_HEADS, HALF, KV_BLOCK, LANES,
        )  # fmt: skip


@triton.jit
def _cache_kv_kernel(
    k_ptr: tl.tensor, v_ptr: tl.tensor, k_pages_ptr: tl.tensor, v_pages_ptr: tl.tensor, slots_ptr: tl.tensor,
    k_scale_ptr: tl.tensor, v_scale_ptr: tl.tensor,
    k_stride: tl.tensor, k_head: tl.tensor, v_stride: tl.tensor, v_head: tl.tensor,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, KV_BLOCK: tl.constexpr, LANES: tl.constexpr,
) -> None:  # fmt: skip
    """Store a block of keys and values as they are."""
    start_next()
    blocks: tl.constexpr = (KV_HEADS + KV_BLOCK - 1) // KV_BLOCK
    token, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    slot = tl.load(slots_ptr + token)
    wait()
    _keep(
        k_ptr, v_ptr, None, None, k_pages_ptr, v_pages_ptr, slot, k_scale_ptr, v_scale_ptr,
        k_stride, k_head, v_stride, v_head, token, block, KV_HEADS, HALF, KV_BLOCK, LANES,
    )  # fmt: skip


@takes(HEADS_APART)
@named("rope_and_cache")
def rope_and_cache(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_sin_LD: Tensor,
    positions_T: Tensor,
    kv: LayerKV,
    slots_T: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """Return q [T, H, D] rotated to its positions; rotated k, and v, are in their slots afterwards. q may be [T, K, G, D]."""
    q_THD, k_TKD, v_TKD = _dense_heads(q_THD), _dense_heads(k_TKD), _dense_heads(v_TKD)
    (tokens, *groups, group, head_dim), (q_stride, *group_stride, q_head, _) = q_THD.shape, q_THD.stride()
    num_heads, num_kv_heads = math.prod(groups) * group, k_TKD.shape[1]  # without groups all heads are one
    out_THD = q_THD.new_empty((tokens, num_heads, head_dim))
    q_block, kv_block, lanes = _heads(num_heads, head_dim), _heads(num_kv_heads, head_dim), _lanes(head_dim)
    if tokens:
        blocks = blocks_of(num_heads, q_block) + blocks_of(num_kv_heads, kv_block)
        launch(
            _rope_and_cache_kernel, (tokens * blocks,),
            q_THD, out_THD, q_stride, *(group_stride or [0]), q_head, k_TKD, v_TKD, cos_sin_LD, positions_T,
            kv.k_pages_NPKD, kv.v_pages_NPKD, slots_T, k_scale, v_scale, *k_TKD.stride()[:2], *v_TKD.stride()[:2],
            Q_HEADS=num_heads, Q_GROUP=group, KV_HEADS=num_kv_heads, HALF=head_dim // 2, Q_BLOCK=q_block, KV_BLOCK=kv_block,
            LANES=lanes, num_warps=_WARPS, **DEPENDENT,
        )  # fmt: skip
    return out_THD


@takes(HEADS_APART)
@named("cache_kv")
def cache_kv(k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, slots_T: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Write k and v into their slots: in the pages' dtype, divided by the scales where the pages are FP8."""
    k_TKD, v_TKD = _dense_heads(k_TKD), _dense_heads(v_TKD)
    tokens, num_kv_heads, head_dim = k_TKD.shape
    kv_block, lanes = _heads(num_kv_heads, head_dim), _lanes(head_dim)
    if tokens:
        launch(
            _cache_kv_kernel, (tokens * blocks_of(num_kv_heads, kv_block),),
            k_TKD, v_TKD, kv.k_pages_NPKD, kv.v_pages_NPKD, slots_T, k_scale, v_scale, *k_TKD.stride()[:2], *v_TKD.stride()[:2],
            KV_HEADS=num_kv_heads, HALF=head_dim // 2, KV_BLOCK=kv_block, LANES=lanes, num_warps=_WARPS, **DEPENDENT,
        )  # fmt: skip


def _dense_heads(x_THD: Tensor) -> Tensor:
    """Return x itself where a head's elements lie side by side, as in a slice of a fused projection; else a copy."""
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


def _lanes(head_dim: int) -> int:
    """Return the power of two from half a head up."""
    assert head_dim % 2 == 0, head_dim
    return power_of_2(head_dim // 2)


def _heads(num_heads: int, head_dim: int) -> int:
    """Return the heads of a program's block."""
    return min(max(_PAIRS // _lanes(head_dim), 1), power_of_2(num_heads))
