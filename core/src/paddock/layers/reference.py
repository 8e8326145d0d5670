"""Every op in plain torch: the definition, the CPU path and the oracle of every kernel of the same name.

T tokens, V vocabulary, E model size, I input features, O output features, F feed-forward size, H query heads, K KV heads,
G query heads of a KV head, D head size, J = D / 2, L positions, N pages, P tokens a page, R outputs of a piece
of a weight, D groups of Q inputs; or G groups of inputs, Q runs of outputs. Sums run in float32 whatever the dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from paddock.layers.attention import LayerKV
from paddock.layers.int4 import PIECE_BYTES, Int4Weight
from paddock.layers.op_marks import HEADS_APART, TWO_DELTAS, takes
from paddock.layers.quantized import QuantizedActivation

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)  # the floor of FBGEMM's row-wise scales
_CHUNK_BYTES = 64 << 20  # of an FP8 weight held in float32 at a time


def embed(token_ids_T: Tensor, table_VE: Tensor) -> Tensor:
    """Return the rows of the table [T, E] for token ids (int64)."""
    return nnf.embedding(token_ids_T, table_VE)


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x W^T [T, O] in x's dtype, summed in float32."""
    return nnf.linear(x_TI, weight_OI)


def linear_fp8(values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x W^T [T, O] in `dtype` for x and W in FP8 e4m3: x_scale * weight_scale * sum(x W), summed in float32, rounded once.

    `x_scale` float32 [] (static) or [T, 1] (per token); `weight_scale_O1` float32. A bounded piece of W is in float32 at a time.
    """
    x32_TI, y_TO = values_TI.float(), values_TI.new_empty((len(values_TI), len(weight_OI)), dtype=dtype)
    step = max(1, _CHUNK_BYTES // (4 * weight_OI.shape[1]))
    for start in range(0, len(weight_OI), step):
        rows = slice(start, start + step)
        y_TO[:, rows] = (x32_TI @ weight_OI[rows].float().T * (x_scale * weight_scale_O1[rows].T)).to(dtype)
    return y_TO


def linear_fp8_fast(values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `linear_fp8` does: an implementation may sum in fewer bits than float32, as the oracle says, and need not."""
    return linear_fp8(values_TI, x_scale, weight_OI, weight_scale_O1, dtype)


def linear_fp8_blocks(
    values_TI: Tensor,
    scale_TG: Tensor,
    weight_OI: Tensor,
    weight_scale_QG: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return x W^T [T, O] in `dtype` for x and W in FP8 e4m3 with scales of blocks, summed in float32, rounded once.

    A weight's scale covers `block` (outputs, inputs) and a token's as many inputs, float32; the last blocks may be smaller. A
    bounded piece of W is in float32 at a time.
    """
    (outs, ins), inputs = block, weight_OI.shape[1]
    x32_TI = values_TI.float() * scale_TG.repeat_interleave(ins, dim=1)[:, :inputs]
    y_TO = values_TI.new_empty((len(values_TI), len(weight_OI)), dtype=dtype)
    step = max(1, _CHUNK_BYTES // (4 * outs * inputs)) * outs
    for start in range(0, len(weight_OI), step):
        rows = slice(start, start + step)
        scale_QG = weight_scale_QG[start // outs : (start + step) // outs]
        scale_RI = scale_QG.repeat_interleave(outs, dim=0).repeat_interleave(ins, dim=1)
        weight32_RI = weight_OI[rows].float()
        y_TO[:, rows] = (x32_TI @ (weight32_RI * scale_RI[: len(weight32_RI), :inputs]).T).to(dtype)
    return y_TO


def linear_int4(x_TI: Tensor, weight: Int4Weight) -> Tensor:
    """Return x W^T [T, O] in x's dtype: the sum of x * (code - zero) * scale in float32, rounded once.

    A bounded piece of W is in float32 at a time. So for `linear_int4_fp8`.
    """
    x32_TI, y_TO = x_TI.float(), x_TI.new_empty((len(x_TI), weight.form.outputs))
    for rows in weight.pieces():
        y_TO[:, rows] = (x32_TI @ weight.dequantise(rows).T).to(x_TI.dtype)
    return y_TO


def linear_int4_fp8(values_TI: Tensor, scale_T1: Tensor, weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return x W^T [T, O] in `dtype` for x in FP8 e4m3 with a float32 scale a token: scale_T * sum over groups of scale * s.

    s is a group's sum of values * (code - zero), whose factors are exact in FP8; both sums are float32, rounded once.
    """
    form, y_TO = weight.form, values_TI.new_empty((len(values_TI), weight.form.outputs), dtype=dtype)
    x_DTQ = values_TI.float().reshape(-1, form.groups, form.group).transpose(0, 1)
    for rows in weight.pieces():
        numbers_DQR, scales_D1R = weight.numbers(rows).permute(1, 2, 0), weight.group_scales(rows).T.unsqueeze(1)
        sum_TR = x_DTQ.new_zeros((len(values_TI), numbers_DQR.shape[-1]))
        step = max(1, PIECE_BYTES[values_TI.device.type] // max(1, sum_TR.nbytes))  # groups whose sums are small enough to hold
        for start in range(0, form.groups, step):
            some = slice(start, start + step)
            sum_TR += (x_DTQ[some] @ numbers_DQR[some] * scales_D1R[some]).sum(0)
        y_TO[:, rows] = (sum_TR * scale_T1).to(dtype)
    return y_TO


def int4_to_fp8(weight: Int4Weight, row_scale_O1: Tensor) -> Tensor:
    """Return a 4-bit weight as FP8 e4m3 [O, I], each output divided by its scale: real = values * row_scale, and a rounding."""
    values_OI = torch.empty(weight.form.outputs, weight.form.inputs, dtype=FP8, device=weight.packed.device)
    for rows in weight.pieces():
        values_OI[rows] = (weight.dequantise(rows) / row_scale_O1[rows]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return values_OI


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Return x / rms(x), rounded to x's dtype and then multiplied by the weight, in Llama's order (arXiv 1910.07467)."""
    x32_TE = x_TE.float()
    scale_T1 = torch.rsqrt(x32_TE.square().mean(-1, keepdim=True).add_(eps))
    return (x32_TE * scale_T1).to(x_TE.dtype) * weight_E


def add_rms_norm(x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x + delta, its rms_norm)."""
    sum_TE = x_TE + delta_TE
    return sum_TE, rms_norm(sum_TE, weight_E, eps)


def layer_norm(x_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float) -> Tensor:
    """Return (x - mean) / std * weight + bias (arXiv 1607.06450), rounded once."""
    return nnf.layer_norm(x_TE, (x_TE.shape[-1],), weight_E, bias_E, eps)


@takes(TWO_DELTAS)
def add_layer_norm(
    x_TE: Tensor, delta_TE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float, *, more_TE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (x + delta, its layer_norm). `more_TE` is added to the delta first; both sums are rounded to x's dtype."""
    sum_TE = x_TE + (delta_TE if more_TE is None else delta_TE + more_TE)
    return sum_TE, layer_norm(sum_TE, weight_E, bias_E, eps)


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """Return silu(gate) * up for gate and up side by side."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return nnf.silu(gate_TF) * up_TF


def gelu(x_TF: Tensor) -> Tensor:
    """Return x * Phi(x), Phi the normal distribution exactly (erf), as Falcon's activation."""
    return nnf.gelu(x_TF)


def rms_norm_fp8(
    x_TE: Tensor,
    delta_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    scale: Tensor | None,
    bound: float | None,
    group: int | None = None,
) -> tuple[Tensor, QuantizedActivation]:
    """Return (x + delta, its rms_norm in FP8): the norm is rounded to x's dtype before it is quantised. No delta adds nothing.

    `scale` [] float32 is static; None gives each token its own, or with a group each token's run of so many
    features, of magnitudes up to `bound`. So for all of `_fp8`.
    """
    sum_TE = x_TE if delta_TE is None else x_TE + delta_TE
    return sum_TE, _quantized(rms_norm(sum_TE, weight_E, eps), scale, bound, group)


@takes(TWO_DELTAS)
def layer_norm_fp8(
    x_TE: Tensor,
    delta_TE: Tensor | None,
    weight_E: Tensor,
    bias_E: Tensor | None,
    eps: float,
    scale: Tensor | None,
    bound: float | None,
    group: int | None = None,
    *,
    more_TE: Tensor | None = None,
) -> tuple[Tensor, QuantizedActivation]:
    """Return (x + delta, its layer_norm in FP8), rounded to x's dtype in between. `more_TE` is added to the delta first."""
    if delta_TE is not None and more_TE is not None:
        delta_TE = delta_TE + more_TE
    sum_TE = x_TE if delta_TE is None else x_TE + delta_TE
    return sum_TE, _quantized(layer_norm(sum_TE, weight_E, bias_E, eps), scale, bound, group)


def silu_mul_fp8(gate_up_T2F: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None) -> QuantizedActivation:
    """Return silu(gate) * up in FP8, rounded to its input's dtype in between."""
    return _quantized(silu_mul(gate_up_T2F), scale, bound, group)


def gelu_fp8(x_TF: Tensor, scale: Tensor | None, bound: float | None, group: int | None = None) -> QuantizedActivation:
    """Return gelu(x) in FP8, rounded to x's dtype in between."""
    return _quantized(gelu(x_TF), scale, bound, group)


def linear_silu_mul_fp8(
    values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype, scale: Tensor
) -> QuantizedActivation:
    """Return silu(gate) * up in FP8 [T, O / 2] by the static `scale` [], for gate and up side by side in x W^T.

    The product is that of `linear_fp8`, arguments and all; it, silu and its product with up are rounded to `dtype`.
    """
    return silu_mul_fp8(linear_fp8(values_TI, x_scale, weight_OI, weight_scale_O1, dtype), scale, None)


def linear_silu_mul_fp8_fast(
    values_TI: Tensor, x_scale: Tensor, weight_OI: Tensor, weight_scale_O1: Tensor, dtype: torch.dtype, scale: Tensor
) -> QuantizedActivation:
    """Return what `linear_silu_mul_fp8` does, of the product of `linear_fp8_fast`."""
    return silu_mul_fp8(linear_fp8_fast(values_TI, x_scale, weight_OI, weight_scale_O1, dtype), scale, None)


@takes(HEADS_APART)
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
    """Return q [T, H, D] rotated to its positions; rotated k, and v, are in their slots afterwards. q may be [T, K, G, D].

    A row of `cos_sin_LD` holds D/2 cosines, then D/2 sines, float32 (arXiv 2104.09864; dimension j turns with j + D/2).
    """
    cos_T1J, sin_T1J = cos_sin_LD.index_select(0, positions_T).unsqueeze(1).chunk(2, dim=-1)
    cache_kv(_rotate(k_TKD, cos_T1J, sin_T1J), v_TKD, kv, slots_T, k_scale, v_scale)
    if q_THD.ndim == 3:
        return _rotate(q_THD, cos_T1J, sin_T1J)
    return _rotate(q_THD, cos_T1J.unsqueeze(1), sin_T1J.unsqueeze(1)).flatten(1, 2)


@takes(HEADS_APART)
def cache_kv(k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, slots_T: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Write k and v into their slots: in the pages' dtype, divided by the scales where the pages are FP8."""
    _store(kv.k_pages_NPKD, k_TKD, slots_T, k_scale)
    _store(kv.v_pages_NPKD, v_TKD, slots_T, v_scale)


def quantize_fp8_static(x_TI: Tensor, scale: Tensor) -> QuantizedActivation:
    """Return x / scale in FP8, saturated at 448; `scale` [] float32."""
    return QuantizedActivation(_saturate(x_TI.float() / scale), scale)


def fp8_scale(largest: Tensor) -> Tensor:
    """Return largest / 448, the quotient rounded once on every device: torch on a GPU multiplies by a number's reciprocal."""
    return largest / torch.full_like(largest, FP8_MAX)


def quantize_fp8_token(x_TI: Tensor, bound: float | None = None, group: int | None = None) -> QuantizedActivation:
    """Return x in FP8 with a scale [T, 1] that maps each token's largest magnitude, at most `bound`, to 448.

    With a group the scale is [T, G], one for each run of so many features; the last may be shorter.
    """
    if group is not None:
        width = x_TI.shape[-1]
        x_XI = nnf.pad(x_TI, (0, -width % group)).reshape(*x_TI.shape[:-1], -(-width // group), group)
        found = quantize_fp8_token(x_XI, bound)
        return QuantizedActivation(found.values_TI.flatten(-2)[..., :width].contiguous(), found.scale.squeeze(-1))
    amax_T1 = x_TI.abs().amax(-1, keepdim=True).float()
    if bound is not None:
        amax_T1 = amax_T1.clamp(max=bound)
    scale_T1 = fp8_scale(amax_T1).clamp(min=FP8_MIN_SCALE)
    return QuantizedActivation(_saturate(x_TI.float() / scale_T1), scale_T1)


def _quantized(x_TI: Tensor, scale: Tensor | None, bound: float | None, group: int | None) -> QuantizedActivation:
    return quantize_fp8_token(x_TI, bound, group) if scale is None else quantize_fp8_static(x_TI, scale)


def _rotate(x_THD: Tensor, cos_T1J: Tensor, sin_T1J: Tensor) -> Tensor:
    a_THJ, b_THJ = x_THD.float().chunk(2, dim=-1)
    rotated_THD = torch.cat((a_THJ * cos_T1J - b_THJ * sin_T1J, b_THJ * cos_T1J + a_THJ * sin_T1J), dim=-1)
    return rotated_THD.to(x_THD.dtype)


def _store(pages_NPKD: Tensor, x_TKD: Tensor, slots_T: Tensor, scale: Tensor | None) -> None:
    if pages_NPKD.dtype == FP8:
        x_TKD = _saturate(x_TKD.float() if scale is None else x_TKD.float() / scale)
        pages_NPKD, x_TKD = pages_NPKD.view(torch.uint8), x_TKD.view(torch.uint8)
    rows_RKD = pages_NPKD.view(-1, *pages_NPKD.shape[2:])
    rows_RKD.index_copy_(0, slots_T, x_TKD.to(pages_NPKD.dtype))


def _saturate(x: Tensor) -> Tensor:
    """Return x in FP8 with magnitudes above 448 clipped: casts alone turn them into NaN on some torch builds."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)
