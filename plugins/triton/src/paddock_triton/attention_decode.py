"""Decode attention: one query token a sequence, its keys split among programs, the last of which joins what they found.

G query heads of a KV head, M rows of a query tile (G of them used), D head size padded to a power of two, U units,
H query heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import AttentionParams, LayerKV
from paddock.layers.reference import FP8
from paddock_triton.attention_schedule import UNIT, Units
from paddock_triton.attention_tile import (
    Spec,
    Tile,
    absorb,
    empty_state,
    find_page,
    load_queries,
    load_rows,
    round_queries,
    whole,
)
from paddock_triton.dependence import DEPENDENT, start_next, wait
from paddock_triton.failures import OTHER_ATTENTION, named
from paddock_triton.fp8 import emitted
from paddock_triton.launch import launch


@named("decode", fix=OTHER_ATTENTION)
def decode(
    out_THD: Tensor, q_THD: Tensor, kv: LayerKV, tables_SM: Tensor, units: Units, params: AttentionParams, tile: Tile
) -> None:
    """Write the attention of the decodes, which are the first tokens, into `out_THD`, an FP8 one by `params.out_scale`."""
    spec = Spec.of(q_THD, kv, params, tile)
    blocks = triton.cdiv(spec.group, tile.block_m)
    found_UHD = torch.empty((units.count, spec.heads, spec.head), dtype=torch.float32, device=q_THD.device)
    weight_UH = torch.empty((units.count, spec.heads), dtype=torch.float32, device=q_THD.device)
    launch(
        _decode,
        (spec.num_kv_heads * blocks, units.count),
        out_THD,
        q_THD,
        *spec.sources(kv),
        tables_SM,
        units.units_U8,
        units.counters_S,
        found_UHD,
        weight_UH,
        params.q_scale,
        params.k_scale,
        params.v_scale,
        params.alibi_slopes_H,
        params.out_scale if out_THD.dtype == FP8 else None,
        tables_SM.stride(0),
        BLOCKS=blocks,
        spec=spec,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **DEPENDENT,
    )


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables_ptr"])
def _decode(
    out_ptr: tl.tensor, q_ptr: tl.tensor, k_source: tl.tensor, v_source: tl.tensor, tables_ptr: tl.tensor,
    units_ptr: tl.tensor, counters_ptr: tl.tensor, found_ptr: tl.tensor, weight_ptr: tl.tensor, q_scale_ptr: tl.tensor,
    k_scale_ptr: tl.tensor, v_scale_ptr: tl.tensor, slopes_ptr: tl.tensor, out_scale_ptr: tl.tensor, table_stride: tl.tensor,
    BLOCKS: tl.constexpr, spec: tl.constexpr,
) -> None:  # fmt: skip
    start_next()
    block, unit = tl.program_id(0), tl.program_id(1)
    unit_ptr = units_ptr + unit * UNIT
    # all of a unit is asked for at once: a wait for each would come before the first key is asked for
    seq, begin, end, pieces = tl.load(unit_ptr), tl.load(unit_ptr + 1), tl.load(unit_ptr + 2), tl.load(unit_ptr + 3)
    first_unit, length = tl.load(unit_ptr + 4), tl.load(unit_ptr + 5)
    kv_head, first_row = block // BLOCKS, block % BLOCKS * spec.block_m
    begin, end = tl.where(seq < 0, 0, begin), tl.where(seq < 0, 0, end)
    table_ptr = tables_ptr + tl.maximum(seq, 0).to(tl.int64) * table_stride
    # Asking for the first keys, too, while the kernel before runs was no quicker on an H200: 214.3 us a layer of 70B in FP8 at
    # one token instead of 212.8, 315.7 instead of 313.9 at 64 of 2,048.
    page = find_page(table_ptr, begin, end, spec)
    wait()
    if seq < 0:
        return
    row_M, d_D = first_row + tl.arange(0, spec.block_m), tl.arange(0, spec.pad)
    head_M = kv_head * spec.group + row_M
    at_MD = (seq.to(tl.int64) * spec.heads + head_M)[:, None] * spec.head + d_D[None, :]
    used_M = row_M < spec.group
    used_MD = used_M[:, None] & (d_D < spec.head)[None, :]
    q_MD = load_queries(q_ptr, at_MD, used_MD, spec)
    slope_M = tl.full([spec.block_m], 0, tl.float32)
    if spec.alibi:
        slope_M = tl.load(slopes_ptr + head_M, mask=used_M, other=0.0) * spec.scale2
    k_scale, v_scale = 1.0, 1.0
    if spec.fp8:
        k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    if spec.in_fp8:
        q_MD, q_scale_M = round_queries(q_MD, q_scale_ptr, spec)
        k_scale = k_scale * q_scale_M
    acc_MD, sum_M, max_M = _gather(
        q_MD, k_source, v_source, table_ptr, page, begin, end, length, kv_head, slope_M, k_scale, spec
    )  # fmt: skip
    found_MD = acc_MD * (v_scale / tl.where(sum_M > 0, sum_M, 1.0))[:, None]
    if pieces == 1:
        tl.store(out_ptr + at_MD, emitted(found_MD, q_ptr.dtype.element_ty, out_scale_ptr), mask=used_MD)
    else:
        found_at_MD = (unit.to(tl.int64) * spec.heads + head_M)[:, None] * spec.head + d_D[None, :]
        tl.store(found_ptr + found_at_MD, found_MD, mask=used_MD)
        tl.store(weight_ptr + unit * spec.heads + head_M, max_M + tl.log2(sum_M), mask=used_M)
        tl.debug_barrier()  # all of this program's stores come before it counts itself
        counter_ptr = counters_ptr + seq * tl.num_programs(0) + block
        if tl.atomic_add(counter_ptr, 1) == pieces - 1:
            dtype: tl.constexpr = q_ptr.dtype.element_ty
            _join(out_ptr, found_ptr, weight_ptr, out_scale_ptr, seq, first_unit, pieces, kv_head, first_row, dtype, spec)
            tl.store(counter_ptr, 0)


@triton.jit
def _gather(
    q_MD: tl.tensor, k_source: tl.tensor, v_source: tl.tensor, table_ptr: tl.tensor, page: tl.tensor, begin: tl.tensor,
    end: tl.tensor, length: tl.tensor, kv_head: tl.tensor, slope_M: tl.tensor, k_scale: tl.tensor, spec: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return (accumulator, sum, maximum) over the keys `begin..end` of a sequence of `length`; `page` is the first tile's."""
    first = tl.maximum(length - spec.window, 0) if spec.window else 0
    state = empty_state(spec)
    first_M = tl.full([spec.block_m], 0, tl.int32) + first
    last_M = tl.full([spec.block_m], 0, tl.int32) + (end - 1)
    whole_end = begin if spec.window or spec.masked else begin + (end - begin) // spec.block_n * spec.block_n
    for key_start in tl.range(begin, whole_end, spec.block_n):
        k_ND = load_rows(k_source, page, key_start, kv_head, first, end, False, 1, spec)
        v_ND = load_rows(v_source, page, key_start, kv_head, first, end, False, spec.words, spec)
        page = find_page(table_ptr, key_start + spec.block_n, end, spec)
        state = absorb(state, q_MD, k_ND, v_ND, key_start, first_M, last_M, slope_M, length - 1, k_scale, False, spec)
    stages: tl.constexpr = spec.decode_tail_stages
    masked_k: tl.constexpr = spec.fp8 or not spec.tma  # of keys without a mask the logits are replaced
    for key_start in tl.range(whole_end, end, spec.block_n, num_stages=stages):
        k_ND = load_rows(k_source, page, key_start, kv_head, first, end, masked_k, 1, spec)
        v_ND = load_rows(v_source, page, key_start, kv_head, first, end, True, spec.words, spec)
        page = find_page(table_ptr, key_start + spec.block_n, end, spec)
        state = absorb(state, q_MD, k_ND, v_ND, key_start, first_M, last_M, slope_M, length - 1, k_scale, True, spec)
    acc_MD, odd_MD, sum_M, max_M = state
    return whole(acc_MD, odd_MD, spec), sum_M, max_M


@triton.jit
def _join(
    out_ptr: tl.tensor, found_ptr: tl.tensor, weight_ptr: tl.tensor, out_scale_ptr: tl.tensor, seq: tl.tensor,
    first_unit: tl.tensor, pieces: tl.tensor, kv_head: tl.tensor, first_row: tl.tensor, DTYPE: tl.constexpr, spec: tl.constexpr,
) -> None:  # fmt: skip
    """Write the mean of a sequence's pieces, each weighted by the sum it has seen. Loads of some pieces are under way at once."""
    at_once: tl.constexpr = spec.join
    g_G, d_D = tl.arange(0, spec.rows), tl.arange(0, spec.pad)
    row_G = first_row + g_G
    head_G, used_G = kv_head * spec.group + row_G, row_G < spec.group
    used_GD = used_G[:, None] & (d_D < spec.head)[None, :]
    acc_GD = tl.full([spec.rows, spec.pad], 0, tl.float32)
    sum_G, max_G = tl.full([spec.rows], 0, tl.float32), tl.full([spec.rows], float("-inf"), tl.float32)
    for start in tl.range(0, pieces, at_once):
        for j in tl.static_range(at_once):
            live = start + j < pieces
            at_G = (first_unit + start + j).to(tl.int64) * spec.heads + head_G
            weight_G = tl.load(weight_ptr + at_G, mask=used_G & live, other=float("-inf"), cache_modifier=".cg")
            found_at_GD = at_G[:, None] * spec.head + d_D[None, :]
            found_GD = tl.load(found_ptr + found_at_GD, mask=used_GD & live, other=0.0, cache_modifier=".cg")
            new_max_G = tl.maximum(max_G, weight_G)
            shift_G = tl.where(new_max_G == float("-inf"), 0.0, new_max_G)
            alpha_G, weight_G = tl.exp2(max_G - shift_G), tl.exp2(weight_G - shift_G)
            acc_GD = acc_GD * alpha_G[:, None] + found_GD * weight_G[:, None]
            sum_G, max_G = sum_G * alpha_G + weight_G, new_max_G
    out_at_GD = (seq.to(tl.int64) * spec.heads + head_G)[:, None] * spec.head + d_D[None, :]
    tl.store(out_ptr + out_at_GD, emitted(acc_GD / sum_G[:, None], DTYPE, out_scale_ptr), mask=used_GD)
