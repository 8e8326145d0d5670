"""4-bit checkpoints decoded by the letter of their formats, number by number; shares nothing with the code that writes them.

O outputs, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the number that each nibble of a word holds
_ENDINGS = {"compressed-tensors": ".weight_packed", "autoawq": ".qweight", "modelopt": ".weight_scale"}
_PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "qweight",
    "qzeros",
    "scales",
    "pre_quant_scale",
    "weight_scale_2",
)


def decoded(tensors: Tensors, format_: str) -> Tensors:
    """Return plain float32 tensors of a checkpoint: real = (number - zero) * scale, times what inputs are multiplied with."""
    ending = _ENDINGS[format_]
    paths = [name.removesuffix(ending) for name in tensors if name.endswith(ending)]
    plain = {f"{path}.weight": _DECODERS[format_](tensors, path) for path in paths}
    spent = {f"{path}.{part}" for path in paths for part in (*_PARTS, "input_scale", "weight")}
    return plain | {name: tensor.float() for name, tensor in tensors.items() if name not in spent}


def nibbles(words: Tensor) -> list[Tensor]:
    """Return the eight numbers of each word, lowest bits first."""
    return [(words.long() >> (4 * i)) & 15 for i in range(8)]


def _spread(scales_OG: Tensor, inputs: int) -> Tensor:
    return scales_OG.float().repeat_interleave(inputs // scales_OG.shape[1], dim=1)


def _compressed(tensors: Tensors, path: str) -> Tensor:
    outputs, inputs = tensors[f"{path}.weight_shape"].tolist()
    codes_OI = torch.stack(nibbles(tensors[f"{path}.weight_packed"]), dim=-1).view(outputs, -1)[:, :inputs]
    words_WG = tensors.get(f"{path}.weight_zero_point")
    if words_WG is None:
        zeros_OG = torch.full_like(tensors[f"{path}.weight_scale"], 8)
    else:
        zeros_OG = torch.stack(nibbles(words_WG), dim=1).flatten(0, 1)[:outputs]
    return (codes_OI - _spread(zeros_OG, inputs)) * _spread(tensors[f"{path}.weight_scale"], inputs)


def _autoawq(tensors: Tensors, path: str) -> Tensor:
    def outputs_first(words: Tensor) -> Tensor:
        found = torch.empty((*words.shape, 8), dtype=torch.int64)
        for nibble, number in zip(nibbles(words), AWQ_ORDER, strict=True):
            found[..., number] = nibble
        return found.flatten(1).T

    codes_OI, zeros_OG = outputs_first(tensors[f"{path}.qweight"]), outputs_first(tensors[f"{path}.qzeros"])
    inputs = codes_OI.shape[1]
    return (codes_OI - _spread(zeros_OG, inputs)) * _spread(tensors[f"{path}.scales"].T, inputs)


def _modelopt(tensors: Tensors, path: str) -> Tensor:
    bytes_HI = tensors[f"{path}.weight"].int()
    codes_OI = torch.stack((bytes_HI & 15, bytes_HI >> 4), dim=1).flatten(0, 1)
    numbers_OI = torch.where(codes_OI > 7, codes_OI - 16, codes_OI)
    weight_OI = numbers_OI * _spread(tensors[f"{path}.weight_scale"], codes_OI.shape[1])
    factor_I = tensors.get(f"{path}.pre_quant_scale")
    return weight_OI if factor_I is None else weight_OI * factor_I.float()


_DECODERS: dict[str, Callable[[Tensors, str], Tensor]] = {
    "compressed-tensors": _compressed,
    "autoawq": _autoawq,
    "modelopt": _modelopt,
}
