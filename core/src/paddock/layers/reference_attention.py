"""Causal attention over pages in plain torch: the definition, and the backend of a CPU.

A sequence's rows are gathered from its pages, then torch's fused attention runs: decodes of similar length in one call, each
prefill in its own. Grouped query heads are told apart by a view, so no KV head is repeated in memory.

T tokens, S sequences, H query heads, K KV heads, G = H / K query heads a KV head, D head size, Q queries of a call,
L keys gathered, N pages, P tokens a page, M pages a sequence at most, R = N * P rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from attrs import frozen
from torch import Tensor

from paddock.layers.attention import AttentionInputs, AttentionParams, LayerKV
from paddock.layers.reference import FP8
from paddock.plugins import AttentionNeeds

_QUERY_BLOCK = 256  # queries a call where a mask is needed: bounds the mask's memory


def create(needs: AttentionNeeds, device: torch.device) -> TorchAttention:
    """Return the backend; it serves any heads on any device."""
    return TorchAttention()


@frozen(eq=False)
class _Decodes:
    """Single-token sequences of similar length; `tokens_S` None means all tokens of the step, in order.

    Places beyond a sequence's end repeat its last row, so that nothing but its own rows is ever read.
    """

    tokens_S: Tensor | None
    rows_SL: Tensor
    lens_S: Tensor
    ragged: bool


@frozen(eq=False)
class _Prefill:
    """Tokens `start..stop` of the step: the last of a sequence of as many tokens as there are rows."""

    start: int
    stop: int
    rows_L: Tensor


@frozen(eq=False)
class _Prepared:
    decodes: tuple[_Decodes, ...]
    prefills: tuple[_Prefill, ...]


class TorchAttention:
    """Gathers pages, then runs `scaled_dot_product_attention`. Works on the host as it goes: no graph can capture it."""

    def prepare(self, inputs: AttentionInputs) -> _Prepared:
        """Return which rows each sequence reads, found once for all layers."""
        lens, starts = inputs.seq_lens_S.tolist(), inputs.query_start_S1.tolist()
        groups = _similar(lens[: inputs.num_decodes])
        decodes = [_decodes(inputs, group, lens, everything=len(group) == len(starts) - 1) for group in groups]
        prefills = [
            _Prefill(starts[s], starts[s + 1], _rows(inputs, s, lens[s]))
            for s in range(inputs.num_decodes, len(lens))
            if starts[s + 1] > starts[s]
        ]
        return _Prepared(tuple(decodes), tuple(prefills))

    def attend(self, q_THD: Tensor, kv: LayerKV, inputs: AttentionInputs, params: AttentionParams) -> Tensor:
        """Return the attention output [T, H, D]."""
        prepared = inputs.prepared
        assert isinstance(prepared, _Prepared), "prepare the inputs before the first layer"
        out_THD = torch.empty_like(q_THD)
        for decodes in prepared.decodes:
            if decodes.tokens_S is None:
                return _decode(q_THD, kv, decodes, params)
            out_THD[decodes.tokens_S] = _decode(q_THD[decodes.tokens_S], kv, decodes, params)
        for prefill in prepared.prefills:
            part = slice(prefill.start, prefill.stop)
            out_THD[part] = _prefill(q_THD[part], kv, prefill, params)
        return out_THD


def _similar(lens: list[int]) -> list[list[int]]:
    """Return the sequences in groups whose lengths differ by less than 2x, in order within each: padding stays below half."""
    groups: dict[int, list[int]] = {}
    for s, length in enumerate(lens):
        groups.setdefault(max(length, 64).bit_length(), []).append(s)
    return list(groups.values())


def _decodes(inputs: AttentionInputs, group: list[int], lens: list[int], *, everything: bool) -> _Decodes:
    members_S = torch.tensor(group, device=inputs.seq_lens_S.device)
    lens_S = inputs.seq_lens_S[members_S].long()
    longest = max(lens[s] for s in group)
    places_SL = torch.arange(longest, device=lens_S.device).minimum(lens_S[:, None] - 1)
    pages_SL = inputs.block_tables_SM[members_S].long().gather(1, places_SL // inputs.page_size)
    rows_SL = pages_SL * inputs.page_size + places_SL % inputs.page_size
    ragged = any(lens[s] < longest for s in group)
    return _Decodes(None if everything else members_S, rows_SL, lens_S, ragged)


def _rows(inputs: AttentionInputs, s: int, length: int) -> Tensor:
    places_L = torch.arange(length, device=inputs.block_tables_SM.device)
    pages_L = inputs.block_tables_SM[s].long()[places_L // inputs.page_size]
    return pages_L * inputs.page_size + places_L % inputs.page_size


def _decode(q_SHD: Tensor, kv: LayerKV, decodes: _Decodes, params: AttentionParams) -> Tensor:
    """Return attention for one query a sequence; a KV head's query heads stand where a prefill has its tokens."""
    num_seqs, num_heads, head_dim = q_SHD.shape
    k_SKLD = _gather(kv.k_pages_NPKD, decodes.rows_SL, params.k_scale, q_SHD.dtype).transpose(1, 2)
    v_SKLD = _gather(kv.v_pages_NPKD, decodes.rows_SL, params.v_scale, q_SHD.dtype).transpose(1, 2)
    q_SKGD = q_SHD.reshape(num_seqs, k_SKLD.shape[1], -1, head_dim)
    seen_S11L = None
    if decodes.ragged or params.window is not None:
        seen_S11L = _seen(decodes.lens_S[:, None] - 1, decodes.rows_SL.shape[1], params.window)[:, None, None]
    out_SKGD = _attention(q_SKGD, k_SKLD, v_SKLD, seen_S11L, _alibi(params, (1, *q_SKGD.shape[1:3], 1), k_SKLD.shape[2]), params)
    return out_SKGD.reshape(num_seqs, num_heads, head_dim)


def _prefill(q_QHD: Tensor, kv: LayerKV, prefill: _Prefill, params: AttentionParams) -> Tensor:
    """Return attention for a sequence's last Q tokens over all its L tokens."""
    num_queries, num_heads, head_dim = q_QHD.shape
    length = len(prefill.rows_L)
    k_LKD = _gather(kv.k_pages_NPKD, prefill.rows_L, params.k_scale, q_QHD.dtype)
    v_LKD = _gather(kv.v_pages_NPKD, prefill.rows_L, params.v_scale, q_QHD.dtype)
    num_kv_heads = k_LKD.shape[1]
    q_KGQD = q_QHD.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k_K1LD, v_K1LD = (x_LKD.transpose(0, 1).unsqueeze(1) for x_LKD in (k_LKD, v_LKD))
    plain = params.alibi_slopes_H is None and params.window is None and params.softcap is None
    if plain and num_queries == length:
        out_KGQD = _fused(q_KGQD, k_K1LD, v_K1LD, params, causal=True)
        return out_KGQD.permute(2, 0, 1, 3).reshape(q_QHD.shape)
    blocks = []
    for start in range(0, num_queries, _QUERY_BLOCK):
        q_KGBD = q_KGQD[:, :, start : start + _QUERY_BLOCK]
        first = length - num_queries + start
        end = first + q_KGBD.shape[2]
        seen_BL = _seen(torch.arange(first, end, device=q_QHD.device)[:, None], end, params.window)
        bias = _alibi(params, (num_kv_heads, num_heads // num_kv_heads, 1, 1), end)
        blocks.append(_attention(q_KGBD, k_K1LD[:, :, :end], v_K1LD[:, :, :end], seen_BL, bias, params))
    return torch.cat(blocks, dim=2).permute(2, 0, 1, 3).reshape(q_QHD.shape)


def _gather(pages_NPKD: Tensor, rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the rows [..., K, D] in `dtype`, FP8 ones times their scale."""
    num_heads, head_dim = pages_NPKD.shape[2:]
    stored_RKD = pages_NPKD.view(-1, num_heads, head_dim)
    shape = (*rows.shape, num_heads, head_dim)
    if stored_RKD.dtype != FP8:
        return stored_RKD.index_select(0, rows.flatten()).view(shape).to(dtype)
    values = stored_RKD.view(torch.uint8).index_select(0, rows.flatten()).view(FP8).view(shape)
    return values.to(dtype) if scale is None else (values.float() * scale).to(dtype)


def _seen(position_B1: Tensor, length: int, window: int | None) -> Tensor:
    """Return which of `length` keys queries at these positions see [B, L]: none after them, `window` with their own."""
    key_L = torch.arange(length, device=position_B1.device)
    seen_BL = key_L <= position_B1
    return seen_BL if window is None else seen_BL & (key_L > position_B1 - window)


def _alibi(params: AttentionParams, shape: tuple[int, ...], length: int) -> Tensor | None:
    """Return slope * scale * position of the key, heads laid out as `shape`; counted from the last key, which changes nothing."""
    if params.alibi_slopes_H is None:
        return None
    key_L = torch.arange(1 - length, 1, device=params.alibi_slopes_H.device)
    return params.alibi_slopes_H.view(shape) * params.scale * key_L


def _attention(
    q_BHQD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, seen: Tensor | None, bias: Tensor | None, params: AttentionParams
) -> Tensor:
    """Return softmax(scale * q k^T + bias) v over the keys `seen`; both broadcast to [B, H, Q, L], None means all and none."""
    if params.softcap is not None:
        logits = (q_BHQD.float() @ k_BHLD.float().transpose(-1, -2)) * params.scale
        logits = params.softcap * torch.tanh(logits / params.softcap)
        logits = logits if bias is None else logits + bias
        logits = logits if seen is None else logits.masked_fill(~seen, -torch.inf)
        return (logits.softmax(-1) @ v_BHLD.float()).to(q_BHQD.dtype)
    if bias is None:
        return _fused(q_BHQD, k_BHLD, v_BHLD, params, mask=seen)
    mask = bias if seen is None else torch.where(seen, bias, -torch.inf)
    return _fused(q_BHQD, k_BHLD, v_BHLD, params, mask=mask.to(q_BHQD.dtype))


def _fused(
    q_BHQD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, params: AttentionParams, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    heads = q_BHQD.shape[1]
    k_BHLD, v_BHLD = (x.expand(-1, heads, -1, -1) for x in (k_BHLD, v_BHLD))
    return nnf.scaled_dot_product_attention(q_BHQD, k_BHLD, v_BHLD, attn_mask=mask, is_causal=causal, scale=params.scale)
