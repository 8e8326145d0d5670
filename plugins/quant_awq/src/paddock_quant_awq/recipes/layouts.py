"""How each format stores a rounded weight.

O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from attrs import frozen
from torch import Tensor

from paddock.layers.int4 import MIDDLE
from paddock.layers.reference import fp8_scale
from paddock_quant_awq.recipes.chosen import AUTOAWQ, COMPRESSED, MODELOPT, W4A8, Chosen
from paddock_quant_awq.recipes.rounding import Rounded, Rounding
from paddock_quant_awq.words import AWQ_ORDER, IN_ORDER, pack

Stored = dict[str, Tensor | None]


@frozen(kw_only=True)
class Layout:
    """A format: how it rounds, and `store`, from a checkpoint prefix and a rounded weight to its tensors; None drops one.

    `keeps_factors`: a linear may carry what its inputs are multiplied with. `static_inputs`: it carries a scale of its inputs in
    FP8, and one of its weights beside those of the groups.
    """

    rounding: Rounding
    store: Callable[[str, Rounded], Stored]
    keeps_factors: bool = False
    static_inputs: bool = False


def layout(chosen: Chosen, dtype: torch.dtype) -> Layout:
    """Return the format that was chosen, for a model stored in `dtype`."""

    def rounding(divisor: float | None, scale_dtype: torch.dtype) -> Rounding:
        return Rounding(group=chosen.group_size, divisor=divisor, scale_dtype=scale_dtype)

    if chosen.format == AUTOAWQ:
        return Layout(rounding=rounding(None, torch.float16), store=_autoawq)
    if chosen.format == COMPRESSED:
        return Layout(rounding=rounding(None if chosen.zero_points else 7.5, dtype), store=_compressed)
    assert chosen.format == MODELOPT, chosen.format
    static = chosen.scheme == W4A8
    return Layout(rounding=rounding(7.0, torch.float32), store=_modelopt, keeps_factors=True, static_inputs=static)


def static_scales(paths: Iterable[str], meanings: Iterable[Tensor], largest_input: Tensor) -> Stored:
    """Return ModelOpt's two scalars for the parts of one product: largest weight / 448, largest input / 448; 1 for zeros."""
    largest_weight = torch.stack([weight_OI.abs().amax() for weight_OI in meanings]).amax()
    named = {"weight_scale_2": largest_weight, "input_scale": largest_input}
    scales = {name: torch.where(each > 0, fp8_scale(each), torch.ones_like(each)).float() for name, each in named.items()}
    return {f"{path}.{name}": scale for path in paths for name, scale in scales.items()}


def _autoawq(path: str, r: Rounded) -> Stored:
    assert r.zeros_OG is not None, "the gemm layout has zero points"
    return {
        f"{path}.weight": None,
        f"{path}.qweight": pack(r.codes_OI.T, AWQ_ORDER),
        f"{path}.qzeros": pack(r.zeros_OG.T, AWQ_ORDER),
        f"{path}.scales": r.scales_OG.T,
    }


def _compressed(path: str, r: Rounded) -> Stored:
    stored: Stored = {
        f"{path}.weight": None,
        f"{path}.weight_packed": pack(r.codes_OI, IN_ORDER),
        f"{path}.weight_scale": r.scales_OG,
        f"{path}.weight_shape": torch.tensor(r.codes_OI.shape),
    }
    if r.zeros_OG is not None:  # words along the outputs
        stored[f"{path}.weight_zero_point"] = pack(r.zeros_OG.T, IN_ORDER).T.contiguous()
    return stored


def _modelopt(path: str, r: Rounded) -> Stored:
    nibbles_OI = r.codes_OI ^ MIDDLE  # less 8, in two's complement
    return {
        f"{path}.weight": nibbles_OI[0::2] | (nibbles_OI[1::2] << 4),
        f"{path}.weight_scale": r.scales_OG,
    }
