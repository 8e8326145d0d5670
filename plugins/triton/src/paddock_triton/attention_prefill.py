"""Prefill attention: chunks of any length over pages, causal. A KV head's query heads are rows of one tile, so no ratio pads.

Row r of a sequence and a KV head is token r // G, query head r % G. M rows of a tile, N keys of a tile, D head size padded to a
power of two, G query heads of a KV head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from paddock.layers import AttentionInputs, AttentionParams, LayerKV
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
from paddock_triton.launch import launch


@named("prefill", fix=OTHER_ATTENTION)
def prefill(
    out_THD: Tensor, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, units: Units, params: AttentionParams, tile: Tile
) -> None:
    """Write the attention of the prefills, whose tokens follow the decodes', into `out_THD`."""
    spec = Spec.of(q_THD, kv, params, tile)
    launch(  # in one: a second dimension ends at 65,535
        _prefill,
        (spec.num_kv_heads * units.count,),
        out_THD,
        q_THD,
        *spec.sources(kv),
        inputs.block_tables_SM,
        units.units_U8,
        inputs.query_start_S1,
        params.q_scale,
        params.k_scale,
        params.v_scale,
        params.alibi_slopes_H,
        inputs.block_tables_SM.stride(0),
        spec=spec,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **DEPENDENT,
    )


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables_ptr", "starts_ptr"])
def _prefill(
    out_ptr: tl.tensor, q_ptr: tl.tensor, k_source: tl.tensor, v_source: tl.tensor, tables_ptr: tl.tensor,
    units_ptr: tl.tensor, starts_ptr: tl.tensor, q_scale_ptr: tl.tensor, k_scale_ptr: tl.tensor, v_scale_ptr: tl.tensor,
    slopes_ptr: tl.tensor, table_stride: tl.tensor, spec: tl.constexpr,
) -> None:  # fmt: skip
    start_next()
    kv_head, unit = tl.program_id(0) % spec.num_kv_heads, tl.program_id(0) // spec.num_kv_heads
    wait()
    seq = tl.load(units_ptr + unit * UNIT)
    if seq < 0:
        return
    first_row, stop_row = tl.load(units_ptr + unit * UNIT + 1), tl.load(units_ptr + unit * UNIT + 2)
    start, length = tl.load(starts_ptr + seq), tl.load(units_ptr + unit * UNIT + 5)
    context = length - (tl.load(starts_ptr + seq + 1) - start)  # tokens before this step's
    row_M, d_D = first_row + tl.arange(0, spec.block_m), tl.arange(0, spec.pad)
    head_M, used_M = kv_head * spec.group + row_M % spec.group, row_M < stop_row
    token_M = start.to(tl.int64) + row_M // spec.group
    at_MD = (token_M * spec.heads + head_M)[:, None] * spec.head + d_D[None, :]
    used_MD = used_M[:, None] & (d_D < spec.head)[None, :]
    q_MD = load_queries(q_ptr, at_MD, used_MD, spec)
    slope_M = tl.full([spec.block_m], 0, tl.float32)
    if spec.alibi:
        slope_M = tl.load(slopes_ptr + head_M) * spec.scale2
    k_scale, v_scale = 1.0, 1.0
    if spec.fp8:
        k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    if spec.in_fp8:
        q_MD, q_scale_M = round_queries(q_MD, q_scale_ptr, spec)
        k_scale = k_scale * q_scale_M
    acc_MD, sum_M, _ = _sweep(
        q_MD,
        k_source,
        v_source,
        tables_ptr + seq.to(tl.int64) * table_stride,
        context + row_M // spec.group,
        context + first_row // spec.group,
        context + (stop_row - 1) // spec.group,
        kv_head,
        slope_M,
        k_scale,
        spec,
    )
    out_MD = acc_MD * (v_scale / sum_M)[:, None]
    tl.store(out_ptr + at_MD, out_MD.to(out_ptr.dtype.element_ty), mask=used_MD)


@triton.jit
def _sweep(
    q_MD: tl.tensor, k_source: tl.tensor, v_source: tl.tensor, table_ptr: tl.tensor, position_M: tl.tensor, lowest: tl.tensor,
    highest: tl.tensor, kv_head: tl.tensor, slope_M: tl.tensor, k_scale: tl.tensor, spec: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return (accumulator, sum, maximum) of rows at positions `lowest..highest`: first keys all rows see, then the rest."""
    state = empty_state(spec)
    end = highest + 1
    first = tl.maximum(lowest - spec.window + 1, 0) if spec.window else 0
    begin = first // spec.block_n * spec.block_n
    whole_end = begin if spec.window else (lowest + 1) // spec.block_n * spec.block_n
    first_M = position_M - spec.window + 1
    origin = position_M[:, None] if spec.in_fp8 else end
    page = find_page(table_ptr, begin, end, spec)
    for key_start in tl.range(begin, whole_end, spec.block_n):
        k_ND = load_rows(k_source, page, key_start, kv_head, first, end, False, 1, spec)
        v_ND = load_rows(v_source, page, key_start, kv_head, first, end, False, spec.words, spec)
        page = find_page(table_ptr, key_start + spec.block_n, end, spec)
        state = absorb(state, q_MD, k_ND, v_ND, key_start, first_M, position_M, slope_M, origin, k_scale, False, spec)
    for key_start in tl.range(whole_end, end, spec.block_n, num_stages=spec.tail_stages):
        k_ND = load_rows(k_source, page, key_start, kv_head, first, end, True, 1, spec)
        v_ND = load_rows(v_source, page, key_start, kv_head, first, end, True, spec.words, spec)
        page = find_page(table_ptr, key_start + spec.block_n, end, spec)
        state = absorb(state, q_MD, k_ND, v_ND, key_start, first_M, position_M, slope_M, origin, k_scale, True, spec)
    acc_MD, odd_MD, sum_M, max_M = state
    return whole(acc_MD, odd_MD, spec), sum_M, max_M
