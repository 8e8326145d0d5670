"""Attention in FP8 arithmetic, in plain torch: the definition of it, and the way of a CPU.

Queries, keys, values and probabilities are FP8 e4m3 where they are multiplied; all else is float32. Rounded are

- a query, divided by its scale: the static one, or what maps the largest magnitude of a token and head to 448;
- a probability, as 256 * exp(logit - m), where m is the row's largest logit, rounded up to a whole power of two. The factor, the
  largest power of two below 448, has them reach down to 2^-17 of the largest. A power of two moves no rounding but of
  what is smaller than 2^-14: whichever tile of keys a kernel takes first, it rounds as this does.

Their sum, by which the output is divided, is that of the rounded probabilities: what looks at one key alone gets its value. With
the sum of those before, FP8 arithmetic cost stories15M four times the perplexity (docs/decisions/0069).

Q queries, H query heads, K KV heads, G = H / K, D head size, L keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paddock.layers import reference
from paddock.layers.attention import AttentionParams

LARGEST_EXPONENT = 8  # of a probability in FP8: 2^8


def attend_in_fp8(q_QHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, params: AttentionParams) -> Tensor:
    """Return causal attention [Q, H, D] in q's dtype of a sequence's last Q tokens, k and v in FP8 as pages hold them.

    A bias counts positions from the query's: from where shows in what is rounded.
    """
    num_queries, num_heads, head_dim = q_QHD.shape
    length = len(k_LKD)
    distance_QL = (
        torch.arange(length, device=q_QHD.device) - torch.arange(length - num_queries, length, device=q_QHD.device)[:, None]
    )
    unseen_QL = distance_QL > 0
    if params.window is not None:
        unseen_QL |= distance_QL <= -params.window
    values_QHD, q_scale = _queries(q_QHD, params.q_scale)
    scale = _number(params.k_scale, q_QHD) * params.scale
    q_KXD = values_QHD.view(num_queries, k_LKD.shape[1], -1, head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    logits_KXL = q_KXD.float() @ k_LKD.float().permute(1, 2, 0)
    logits_HQL = logits_KXL.view(num_heads, num_queries, -1) * (q_scale.expand(num_queries, num_heads, 1).transpose(0, 1) * scale)
    if params.softcap is not None:
        logits_HQL = params.softcap * torch.tanh(logits_HQL / params.softcap)
    if params.alibi_slopes_H is not None:
        logits_HQL = logits_HQL + params.alibi_slopes_H.view(-1, 1, 1) * params.scale * distance_QL
    powers_HQL = (logits_HQL * math.log2(math.e)).masked_fill(unseen_QL, -math.inf)
    p_HQL = torch.exp2(powers_HQL - powers_HQL.amax(-1, keepdim=True).ceil() + LARGEST_EXPONENT).to(reference.FP8).float()
    p_KXL = p_HQL.view(k_LKD.shape[1], -1, p_HQL.shape[-1])
    sum_HQD = (p_KXL @ v_LKD.float().transpose(0, 1)).view(num_heads, num_queries, head_dim)
    out_HQD = sum_HQD * (_number(params.v_scale, q_QHD) / p_HQL.sum(-1, keepdim=True))
    return out_HQD.transpose(0, 1).to(q_QHD.dtype)


def _queries(q_QHD: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return queries in FP8 and their scale: [] or [Q, H, 1]."""
    if scale is not None:
        quantised = reference.quantize_fp8_static(q_QHD, scale)
        return quantised.values_TI, scale
    quantised = reference.quantize_fp8_token(q_QHD)  # of the last axis, whatever is before it
    return quantised.values_TI, quantised.scale


def _number(scale: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones((), device=like.device) if scale is None else scale
