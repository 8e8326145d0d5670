"""Quantised checkpoints written by hand: each function stores one weight as its format says, and returns what it then means.

O outputs, I inputs, G groups of S inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from plugins.quant_awq.tests.written import AWQ_ORDER, words
from torch import Tensor

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
Stored = dict[str, Tensor]


@frozen(kw_only=True)
class Written:
    """A way to store checkpoints: the entry of config.json, tensors and meaning of a weight [O, I], how inputs are rounded."""

    entry: dict[str, Any]
    store: Callable[[Tensor], tuple[Stored, Tensor]]
    see: Callable[[Tensor], Tensor] = lambda x: x
    list_key: str = "modules_to_not_convert"
    first_layer: str = "model.layers.0"  # how the list spares a Llama's first layer


def _fp8(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def store_rows(weight_OI: Tensor) -> tuple[Stored, Tensor]:
    """Return an FP8 weight with a scale a row."""
    scale_O1 = (weight_OI.abs().amax(1, keepdim=True) / FP8_MAX).clamp(min=1 / (FP8_MAX * 512))
    stored = _fp8(weight_OI / scale_O1)
    return {"weight": stored, "weight_scale": scale_O1}, stored.float() * scale_O1


def store_tensor(weight_OI: Tensor) -> tuple[Stored, Tensor]:
    """Return an FP8 weight with one scale."""
    scale = weight_OI.abs().max() / FP8_MAX
    stored = _fp8(weight_OI / scale)
    return {"weight": stored, "weight_scale": scale.reshape(1)}, stored.float() * scale


def store_tensor_static(weight_OI: Tensor) -> tuple[Stored, Tensor]:
    """Return an FP8 weight with one scale, and the scale of its input."""
    stored, meaning_OI = store_tensor(weight_OI)
    return stored | {"input_scale": torch.tensor(STATIC_SCALE)}, meaning_OI


STATIC_SCALE = 0.01  # clips activations at 4.48


def see_token(x_TI: Tensor, bound: float = torch.inf) -> Tensor:
    """Return activations rounded to FP8 with a scale a token."""
    scale_T1 = (x_TI.abs().amax(-1, keepdim=True).clamp(max=bound) / FP8_MAX).clamp(min=1 / (FP8_MAX * 512))
    return _fp8(x_TI / scale_T1).float() * scale_T1


def see_static(x_TI: Tensor) -> Tensor:
    """Return activations rounded to FP8 with the stored scale."""
    return _fp8(x_TI / STATIC_SCALE).float() * STATIC_SCALE


def store_blocks(weight_OI: Tensor, block: tuple[int, int], name: str) -> tuple[Stored, Tensor]:
    """Return an FP8 weight with scales [ceil(O / outs), ceil(I / ins)] of blocks, the last ones smaller where need be."""
    (outs, ins), (rows, columns) = block, weight_OI.shape
    scales = torch.empty(-(-rows // outs), -(-columns // ins))
    stored, meaning_OI = torch.empty_like(weight_OI, dtype=FP8), torch.empty_like(weight_OI)
    for i, start in enumerate(range(0, rows, outs)):
        for j, left in enumerate(range(0, columns, ins)):
            place = slice(start, start + outs), slice(left, left + ins)
            scales[i, j] = weight_OI[place].abs().max() / FP8_MAX
            stored[place] = _fp8(weight_OI[place] / scales[i, j])
            meaning_OI[place] = stored[place].float() * scales[i, j]
    return {"weight": stored, name: scales}, meaning_OI


def see_groups(x_TI: Tensor, group: int) -> Tensor:
    """Return activations rounded to FP8 with a scale a token and group of inputs."""
    return torch.cat([see_token(part_TI) for part_TI in torch.split(x_TI, group, dim=-1)], dim=-1)


def store_half_rows(weight_OI: Tensor) -> tuple[Stored, Tensor]:
    """Return an FP8 weight with a scale a row, in bfloat16 and without an axis for inputs."""
    stored, _ = store_rows(weight_OI)
    scale_O = stored["weight_scale"][:, 0].bfloat16()
    return stored | {"weight_scale": scale_O}, stored["weight"].float() * scale_O.float()[:, None]


def store_awq(weight_OI: Tensor, group: int) -> tuple[Stored, Tensor]:
    """Return AutoAWQ's gemm tensors: each word holds eight outputs of one input, in the order 0 2 4 6 1 3 5 7."""
    outs, ins = weight_OI.shape
    grouped_OGS = weight_OI.view(outs, -1, ins if group == -1 else group)
    low_OG, high_OG = grouped_OGS.amin(-1), grouped_OGS.amax(-1)
    scales_OG = ((high_OG - low_OG).clamp(min=1e-5) / 15).half()
    zeros_OG = (-(low_OG / scales_OG.float()).round()).clamp(0, 15)
    numbers_OGS = ((grouped_OGS / scales_OG.float()[..., None]).round() + zeros_OG[..., None]).clamp(0, 15)
    meaning_OI = ((numbers_OGS - zeros_OG[..., None]) * scales_OG.float()[..., None]).view(outs, ins)
    stored = {
        "qweight": words(numbers_OGS.view(outs, ins).T, AWQ_ORDER),
        "qzeros": words(zeros_OG.T, AWQ_ORDER),
        "scales": scales_OG.T.contiguous(),
    }
    return stored, meaning_OI


def _awq(group: int) -> Written:
    entry = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Written(entry=entry, store=lambda weight_OI: store_awq(weight_OI, group))


def _compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> Written:
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {"targets": ["Linear"], "weights": eight | weights, "input_activations": None if inputs is None else eight | inputs}
    entry = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return Written(entry=entry | {"ignore": ["lm_head"]}, list_key="ignore", first_layer=r"re:model\.layers\.0\.", **more)


WRITTEN = {
    "fbgemm_fp8": Written(
        entry={"quant_method": "fbgemm_fp8", "activation_scale_ub": 2.0, "modules_to_not_convert": ["lm_head"]},
        store=store_rows,
        see=lambda x_TI: see_token(x_TI, 2.0),
    ),
    "fbgemm_fp8-half": Written(
        entry={"quant_method": "fbgemm_fp8", "modules_to_not_convert": None}, store=store_half_rows, see=see_token
    ),
    "fp8-static": Written(
        entry={"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        store=store_tensor_static,
        see=see_static,
        list_key="ignored_layers",
    ),
    "fp8-dynamic": Written(
        entry={"quant_method": "fp8", "activation_scheme": "dynamic"},
        store=store_tensor,
        see=see_token,
        list_key="ignored_layers",
    ),
    "fp8-block": Written(
        entry={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [20, 24]},
        store=lambda weight_OI: store_blocks(weight_OI, (20, 24), "weight_scale_inv"),
        see=lambda x_TI: see_groups(x_TI, 24),
    ),
    "fp8-block-128": Written(
        entry={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        store=lambda weight_OI: store_blocks(weight_OI, (128, 128), "weight_scale_inv"),
        see=lambda x_TI: see_groups(x_TI, 128),
    ),
    "modelopt": Written(
        entry={"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*lm_head*"]},
        store=store_tensor_static,
        see=see_static,
        list_key="ignore",
        first_layer="model.layers.0*",
    ),
    "compressed-row": _compressed(
        {"strategy": "channel"}, {"strategy": "token", "dynamic": True}, store=store_half_rows, see=see_token
    ),
    "compressed-block": _compressed(
        {"strategy": "block", "block_structure": [16, 24]},
        {"strategy": "group", "group_size": 16, "dynamic": True},
        store=lambda weight_OI: store_blocks(weight_OI, (16, 24), "weight_scale"),
        see=lambda x_TI: see_groups(x_TI, 16),
    ),
    "compressed-weights": _compressed({"strategy": "tensor"}, None, store=store_tensor),
    "awq-16": _awq(16),
    "awq-whole": _awq(-1),
}
