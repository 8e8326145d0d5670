"""The attention backend of a Hopper GPU: decodes and prefills of one step, each by its own kernel, none padded to the other.

T tokens, S sequences, H query heads, K KV heads, D head size, P tokens a page.
"""

from __future__ import annotations

import torch
from attrs import field, frozen
from torch import Tensor

from paddock.layers import AttentionInputs, AttentionParams, LayerKV
from paddock.layers.reference import FP8
from paddock.plugins import AttentionNeeds
from paddock_triton.attention_async import UNIT_ROWS, prefill_async, runs_on, serves
from paddock_triton.attention_decode import decode
from paddock_triton.attention_prefill import prefill
from paddock_triton.attention_schedule import Units, decode_units, prefill_units
from paddock_triton.attention_tile import Tile
from paddock_triton.attention_tuning import decode_programs, decode_tile, prefill_tile, processors


def create(needs: AttentionNeeds, device: torch.device) -> TritonAttention:
    """Return the backend for a device."""
    return TritonAttention(device)


@frozen(eq=False)
class _Prepared:
    """Which program does what, found by the first layer that needs it and kept for the others."""

    decodes: dict[tuple[object, ...], Units] = field(factory=dict)
    prefills: dict[tuple[object, ...], Units] = field(factory=dict)


class TritonAttention:
    """Launches only what the shapes call for, waits for nothing: a graph can capture it."""

    def __init__(self, device: torch.device) -> None:
        """Take the device whose multiprocessors are to be kept busy."""
        self._processors = processors(device)
        self._asynchronous = runs_on(device)

    def prepare(self, inputs: AttentionInputs) -> _Prepared:
        """Return an empty schedule: what a layer's heads and window ask for is not known yet."""
        return _Prepared()

    def attend(self, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, params: AttentionParams) -> Tensor:
        """Return the attention output [T, H, D]: in FP8 by `params.out_scale` for a step of decodes alone, else in q's dtype."""
        assert isinstance(inputs.prepared, _Prepared), "prepare the inputs before the first layer"
        q_THD = q_THD.contiguous()
        in_fp8 = params.out_scale is not None and q_THD.shape[0] == inputs.num_decodes
        out_THD = torch.empty_like(q_THD, dtype=FP8 if in_fp8 else q_THD.dtype)
        if inputs.num_decodes:
            tile = decode_tile(q_THD, kv)
            decode(out_THD, q_THD, kv, inputs.block_tables_SM, self._decodes(q_THD, kv, inputs, params, tile), params, tile)
        if q_THD.shape[0] > inputs.num_decodes:
            self._prefill(out_THD, q_THD, kv, inputs, params)
        return out_THD

    def _prefill(self, out_THD: Tensor, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, params: AttentionParams) -> None:
        if self._asynchronous and serves(q_THD, kv, params):
            prefill_async(out_THD, q_THD, kv, inputs, self._prefills(q_THD, kv, inputs, UNIT_ROWS), params)
        else:
            tile = prefill_tile(q_THD, kv, in_fp8=params.in_fp8)
            prefill(out_THD, q_THD, kv, inputs, self._prefills(q_THD, kv, inputs, tile.block_m), params, tile)

    def _decodes(self, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, params: AttentionParams, tile: Tile) -> Units:
        made: dict[tuple[object, ...], Units] = inputs.prepared.decodes
        num_kv_heads = kv.k_pages_NPKD.shape[2]
        heads = num_kv_heads * -(-(q_THD.shape[1] // num_kv_heads) // tile.block_m)
        fp8 = kv.k_pages_NPKD.dtype == FP8
        key = (heads, params.window, tile, fp8)
        if key not in made:
            programs = decode_programs(self._processors, whole=inputs.num_decodes * heads, fp8=fp8)
            wanted = max(1, programs // heads)
            made[key] = decode_units(inputs, window=params.window, wanted=wanted, tile=tile.block_n, heads=heads)
        return made[key]

    def _prefills(self, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, rows: int) -> Units:
        made: dict[tuple[object, ...], Units] = inputs.prepared.prefills
        group = q_THD.shape[1] // kv.k_pages_NPKD.shape[2]
        key = (group, rows)
        if key not in made:
            made[key] = prefill_units(inputs, num_tokens=q_THD.shape[0], group=group, tile=rows)
        return made[key]
