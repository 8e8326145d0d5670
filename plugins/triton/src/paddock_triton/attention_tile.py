"""Pieces of the attention kernels that work on one tile of keys.

M rows of a query tile, N keys of a tile, D head size padded to a power of two. Logits are kept in base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from paddock.layers import AttentionParams, LayerKV
from paddock.layers.fp8_attention import LARGEST_EXPONENT
from paddock.layers.reference import FP8
from paddock_triton.fp8 import to_fp8, token_scale

LOG2E = math.log2(math.e)
_LARGEST_EXPONENT = tl.constexpr(LARGEST_EXPONENT)
HALF_MAX = tl.constexpr(65504.0)  # the largest finite float16


@frozen(kw_only=True)
class Tile:
    """Rows of queries and of keys a program holds, and how Triton is to schedule it.

    `tma` uses the copy engine where a tile lies within a page. `pairs` reads FP8 values two at a time, as 16-bit words: only
    those does the tensor core's transposing load know; single bytes cost a load each. A decode's tile that is `masked` masks all
    tiles of keys alike, so that the last, of fewer keys, is asked for ahead as the others are, and not behind them.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False
    pairs: bool = False
    masked: bool = False


@frozen(kw_only=True)
class Spec:
    """All that a kernel is compiled for. `scale` makes products natural logits but for the scales of FP8 keys and queries.

    With `in_fp8` queries and probabilities are rounded to FP8, as `paddock.layers.fp8_attention` defines.
    """

    head: int
    group: int
    num_kv_heads: int
    page: int
    block_m: int
    block_n: int
    tma: bool
    fp8: bool
    pairs: bool
    scale: float
    alibi: bool
    window: int
    softcap: float
    in_fp8: bool
    masked: bool
    stages: int

    @classmethod
    def of(cls, q_THD: Tensor, kv: LayerKV, params: AttentionParams, tile: Tile) -> Spec:
        """Return what to compile for these tensors and this tile; no window and no softcap are 0."""
        _, page, num_kv_heads, head = kv.k_pages_NPKD.shape
        fp8 = kv.k_pages_NPKD.dtype == FP8
        assert params.scale > 0, params.scale  # the running maximum is taken before scaling
        return cls(
            head=head,
            group=q_THD.shape[1] // num_kv_heads,
            num_kv_heads=num_kv_heads,
            page=page,
            block_m=tile.block_m,
            block_n=tile.block_n,
            tma=tile.tma and page % tile.block_n == 0 and head == triton.next_power_of_2(head),
            fp8=fp8,
            # from 64 rows on, products are warp-group ones, which read V from shared memory: there a kernel of pairs faulted
            pairs=tile.pairs and fp8 and kv.k_pages_NPKD.is_cuda and tile.block_m < 64,
            scale=params.scale,
            alibi=params.alibi_slopes_H is not None,
            window=params.window or 0,
            softcap=params.softcap or 0.0,
            in_fp8=params.in_fp8,
            masked=tile.masked,
            stages=tile.stages,
        )

    @property
    def pad(self) -> int:
        """Return the head size as tiles have it."""
        return int(triton.next_power_of_2(self.head))

    @property
    def rows(self) -> int:
        """Return rows of queries of a decode's tile that are used, rounded up to a power of two."""
        return min(self.block_m, int(triton.next_power_of_2(self.group)))

    @property
    def join(self) -> int:
        """Return how many pieces of a decode are loaded at a time: 8,192 values, 8 pieces at most."""
        return max(1, min(8, 8192 // (self.rows * self.pad)))

    @property
    def tail_stages(self) -> int:
        """Return the stages of a prompt's masked tiles' loop: few tiles, unless a window masks them all."""
        return 2 if self.window else 1

    @property
    def decode_tail_stages(self) -> int:
        """Return the stages of a decode's masked tiles' loop: few tiles, unless all are masked.

        Two stages of 16-bit keys, though the last tile is but one: its keys and its values are asked for together. On an H200, as
        `python -m tests.bench.layer_stack` measures an 8B model: 3,673 us against 3,710 for one sequence of 200, 7,170 against
        7,247 for 64 of 1,000.
        """
        if self.masked:
            return self.stages
        return self.tail_stages if self.fp8 else 2

    @property
    def heads(self) -> int:
        """Return H."""
        return self.group * self.num_kv_heads

    @property
    def one_page(self) -> bool:
        """Return whether a tile of keys never spans pages."""
        return self.page % self.block_n == 0

    @property
    def scale2(self) -> float:
        """Return what makes products base-2 logits."""
        return self.scale * LOG2E

    @property
    def softcap2(self) -> float:
        """Return the cap in base 2, by which capped logits are multiplied."""
        return self.softcap * LOG2E

    @property
    def tanh2(self) -> float:
        """Return what makes products exponents of 2 in tanh(scale * product / softcap)."""
        return 2 * self.scale2 / self.softcap

    @property
    def words(self) -> int:
        """Return how many values make a word of V as it is read."""
        return 2 if self.pairs else 1

    def sources(self, kv: LayerKV) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
        """Return what the kernel reads keys and values through: the pages, or how the copy engine sees them."""
        k_pages, v_pages = kv.k_pages_NPKD, kv.v_pages_NPKD
        if self.pairs:
            v_pages = v_pages.view(torch.int16)
        return (_described(k_pages, self), _described(v_pages, self)) if self.tma else (k_pages, v_pages)


def _described(pages_NPKW: Tensor, spec: Spec) -> TensorDescriptor:
    num_pages, page, heads, width = pages_NPKW.shape
    return TensorDescriptor(pages_NPKW, [num_pages * page, heads * width], [heads * width, 1], [spec.block_n, width])


@triton.jit
def load_queries(q_ptr: tl.tensor, at_MD: tl.tensor, used_MD: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Return rows of queries [M, D] in the type that tiles are multiplied in, or in float32 where they are yet to be rounded."""
    q_MD = tl.load(q_ptr + at_MD, mask=used_MD, other=0.0)
    if spec.in_fp8:
        q_MD = q_MD.to(tl.float32)
    elif spec.fp8:
        q_MD = tl.clamp(q_MD.to(tl.float32), -HALF_MAX, HALF_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    return q_MD


@triton.jit
def round_queries(q_MD: tl.tensor, q_scale_ptr: tl.tensor, spec: tl.constexpr) -> tl.tuple:
    """Return (queries as FP8 holds them, in float16, which holds each exactly; their scales [M])."""
    if q_scale_ptr is None:
        scale_M = token_scale(tl.max(tl.abs(q_MD), 1), None)
    else:
        scale_M = tl.full([spec.block_m], 0, tl.float32) + tl.load(q_scale_ptr)
    return to_fp8(q_MD, scale_M[:, None]).to(tl.float16), scale_M


@triton.jit
def find_page(table_ptr: tl.tensor, key_start: tl.tensor, end: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Return the page of a tile's keys: a scalar where one page holds them all, else [N]; page 0 from key `end` on."""
    if spec.one_page:
        page = tl.load(table_ptr + key_start // spec.page, mask=key_start < end, other=0)
    else:
        key_N = key_start + tl.arange(0, spec.block_n)
        page = tl.load(table_ptr + key_N // spec.page, mask=key_N < end, other=0)
    return page


@triton.jit
def load_rows(
    source: tl.tensor, page: tl.tensor, key_start: tl.tensor, head: tl.tensor, first: tl.tensor, end: tl.tensor,
    MASKED: tl.constexpr, WORDS: tl.constexpr, spec: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return one head's rows [N, D / WORDS] of a tile; where masked, rows outside `first..end` are zero, NaN or not."""
    width: tl.constexpr = spec.head // WORDS
    key_N, d_D = key_start + tl.arange(0, spec.block_n), tl.arange(0, spec.pad // WORDS)
    inside_N = (key_N >= first) & (key_N < end)
    if spec.tma:
        rows_ND = source.load([page * spec.page + key_start % spec.page, head * width])
        if MASKED:
            rows_ND = tl.where(inside_N[:, None], rows_ND, tl.zeros_like(rows_ND))
    else:
        page_at = page.to(tl.int64) * (spec.page * spec.num_kv_heads * width) + head * width  # [] or [N]
        row_N = key_N % spec.page * (spec.num_kv_heads * width)
        if spec.one_page:
            at_ND = source + page_at + (row_N[:, None] + d_D[None, :])
        else:
            at_ND = source + ((page_at + row_N)[:, None] + d_D[None, :])
        if MASKED:
            rows_ND = tl.load(at_ND, mask=inside_N[:, None] & (d_D[None, :] < width), other=0.0)
        elif spec.pad != spec.head:
            rows_ND = tl.load(at_ND, mask=d_D[None, :] < width, other=0.0)
        else:
            rows_ND = tl.load(at_ND)
    return rows_ND


@triton.jit
def halves(v_NW: tl.tensor) -> tl.tuple:
    """Return the even and the odd values [N, D / 2] of pairs of FP8 values, in float16: one byte shuffle and one conversion each.

    Two words at a time: bytes 0 and 2 are even values, 1 and 3 odd ones.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t; .reg .b16 e, o;
        prmt.b32 t, $2, 0, 0x3120;
        mov.b32 {e, o}, t;
        cvt.rn.f16x2.e4m3x2 $0, e;
        cvt.rn.f16x2.e4m3x2 $1, o;
        }
        """,
        "=r,=r,r",
        [v_NW],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def empty_state(spec: tl.constexpr) -> tl.tuple:
    """Return (accumulator of even columns or of all, of odd columns, sum, maximum) before the first tile."""
    acc_MD = tl.full([spec.block_m, spec.pad // spec.words], 0, tl.float32)
    sum_M, max_M = tl.full([spec.block_m], 0, tl.float32), tl.full([spec.block_m], float("-inf"), tl.float32)
    return acc_MD, acc_MD if spec.pairs else sum_M, sum_M, max_M


@triton.jit
def whole(acc_MD: tl.tensor, odd_MD: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Return the accumulator [M, D] of a state."""
    if spec.pairs:
        acc_MD = tl.reshape(tl.join(acc_MD, odd_MD), [spec.block_m, spec.pad])
    return acc_MD


@triton.jit
def _logits(
    q_MD: tl.tensor, k_ND: tl.tensor, key_start: tl.tensor, first_M: tl.tensor, last_M: tl.tensor, slope_M: tl.tensor,
    origin: tl.tensor, k_scale: tl.tensor, MASKED: tl.constexpr, spec: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return a tile's logits [M, N], minus infinity where a row does not see a key; `_factor` is yet to multiply them."""
    key_N = key_start + tl.arange(0, spec.block_n)
    logits_MN = tl.dot(q_MD, tl.trans(k_ND.to(q_MD.dtype)))
    if spec.softcap > 0:  # tanh(x) = 1 - 2 / (e^2x + 1), exact at both ends
        tanh2 = k_scale * spec.tanh2
        tanh2 = tanh2[:, None] if spec.in_fp8 else tanh2
        logits_MN = spec.softcap2 - 2 * spec.softcap2 / (tl.exp2(logits_MN * tanh2) + 1)
    if spec.alibi:
        wide = 1.0
        if spec.softcap == 0:
            wide = k_scale * spec.scale2
            wide = wide[:, None] if spec.in_fp8 else wide
        logits_MN = logits_MN * wide + slope_M[:, None] * (key_N[None, :] - origin).to(tl.float32)
    if MASKED:
        seen_MN = key_N[None, :] <= last_M[:, None]
        if spec.window:
            seen_MN &= key_N[None, :] >= first_M[:, None]
        logits_MN = tl.where(seen_MN, logits_MN, float("-inf"))
    return logits_MN


@triton.jit
def _factor(k_scale: tl.tensor, spec: tl.constexpr) -> tl.tensor:
    """Return what makes logits base 2, [] or in FP8 [M]: 1 where a softcap or slopes already did."""
    factor = 1.0
    if spec.softcap == 0 and not spec.alibi:
        factor = k_scale * spec.scale2
    return factor


@triton.jit
def _rescaled(max_M: tl.tensor, largest_M: tl.tensor, MASKED: tl.constexpr, spec: tl.constexpr) -> tl.tuple:
    """Return (the new maximum, what exponents are shifted by, what older sums are multiplied by) after logits of base 2."""
    if spec.in_fp8:  # whole powers of two: they move no rounding
        largest_M = tl.ceil(largest_M)
    new_max_M = tl.maximum(max_M, largest_M)
    shift_M = new_max_M
    if MASKED:  # a row may have seen nothing yet
        shift_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    alpha_M = tl.exp2(max_M - shift_M)
    if spec.in_fp8:
        shift_M -= _LARGEST_EXPONENT
    return new_max_M, shift_M, alpha_M


@triton.jit
def _probabilities(logits_MN: tl.tensor, factor: tl.tensor, shift_M: tl.tensor, spec: tl.constexpr) -> tl.tuple:
    """Return exponentials of logits as they meet V and as they are added up, in float32: in FP8 those that were rounded."""
    wide = factor
    if spec.in_fp8 and spec.softcap == 0 and not spec.alibi:
        wide = factor[:, None]
    p_MN = tl.exp2(logits_MN * wide - shift_M[:, None])
    added_MN = p_MN
    if spec.in_fp8:
        p_MN = p_MN.to(tl.float8e4nv)
        added_MN = p_MN.to(tl.float32)
    return p_MN, added_MN


@triton.jit
def _gathered(
    acc_MD: tl.tensor, odd_MD: tl.tensor, p_MN: tl.tensor, v_ND: tl.tensor, dtype: tl.constexpr, spec: tl.constexpr
) -> tl.tuple:
    """Return the accumulators with a tile's values added."""
    p_MN = p_MN.to(dtype)
    if spec.pairs:
        even_ND, odd_ND = halves(v_ND)
        acc_MD = tl.dot(p_MN, even_ND, acc_MD)
        odd_MD = tl.dot(p_MN, odd_ND, odd_MD)
    else:
        acc_MD = tl.dot(p_MN, v_ND.to(dtype), acc_MD)
    return acc_MD, odd_MD


@triton.jit
def absorb(
    state: tl.tuple, q_MD: tl.tensor, k_ND: tl.tensor, v_ND: tl.tensor, key_start: tl.tensor, first_M: tl.tensor,
    last_M: tl.tensor, slope_M: tl.tensor, origin: tl.tensor, k_scale: tl.tensor, MASKED: tl.constexpr, spec: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return the state after a tile of keys, of which row m sees `first_M..last_M`, both included.

    Slopes are in base 2 and count keys from `origin`, [] or [M, 1], which moves roundings to FP8 alone. In FP8 `k_scale` [M] is
    of keys and queries.
    """
    acc_MD, odd_MD, sum_M, max_M = state
    logits_MN = _logits(q_MD, k_ND, key_start, first_M, last_M, slope_M, origin, k_scale, MASKED, spec)
    factor = _factor(k_scale, spec)
    max_M, shift_M, alpha_M = _rescaled(max_M, tl.max(logits_MN, 1) * factor, MASKED, spec)
    p_MN, added_MN = _probabilities(logits_MN, factor, shift_M, spec)
    sum_M = sum_M * alpha_M + tl.sum(added_MN, 1)
    acc_MD = acc_MD * alpha_M[:, None]
    if spec.pairs:
        odd_MD = odd_MD * alpha_M[:, None]
    acc_MD, odd_MD = _gathered(acc_MD, odd_MD, p_MN, v_ND, q_MD.dtype, spec)
    return acc_MD, odd_MD, sum_M, max_M
