"""Scales as a checkpoint brings them, checked once after loading; rows of a weight in pieces that fit in float32; random weights.

O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paddock import axes
from paddock.errors import CheckpointError
from paddock.layers import LinearLayer, part_spans
from paddock.layers.reference import FP8_MAX

MAX_SCALE = 1e4  # no weight or activation of a working model reaches 448 times that
MIN_SCALE = 1e-16  # tools floor that of what they never saw above 0 at 1e-12 / 448 or more; single rows of weights may die out
_RANDOM_DEVIATION = 100.0  # of stored values: most of the range is used, next to nothing saturates
CHUNK_BYTES = 64 << 20  # of weights held in float32 at a time


def checked(layer: LinearLayer, tensors: tuple[axes.Tensor, ...], name: str) -> Tensor:
    """Return the scales called `name`; raise CheckpointError, naming tensor and value, where one is not in (0, MAX_SCALE].

    Those of inputs, and the largest of a part's weights, are above MIN_SCALE: below it all would be next to nothing.
    """
    low = MIN_SCALE if name == "input_scale" else 0.0
    (declared,) = (tensor for tensor in tensors if tensor.name == name)
    scale = layer.get_parameter(name).detach()
    for part, region in zip(layer.linear.out, part_spans(layer.linear, declared), strict=True):
        values = scale[tuple(slice(*span) for span in region)].flatten()
        wrong = values[~((values > low) & (values <= MAX_SCALE))]
        if wrong.numel():
            raise CheckpointError(
                f"{name} of {layer.source}{part.source} holds {wrong[0].item()}, one of {wrong.numel()} unusable scales",
                fix=f"scales are above {low:g} and at most {MAX_SCALE:g}: make or download the checkpoint again",
            )
        if not values.max() > MIN_SCALE:
            raise CheckpointError(
                f"{name} of {layer.source}{part.source} holds nothing above {values.max().item():g}: its weights are next to 0",
                fix=f"some are above {MIN_SCALE:g} in a working model: make or download the checkpoint again",
            )
    return scale


def chunks(weight_OI: Tensor) -> list[slice]:
    """Return slices of rows small enough to hold in float32."""
    rows, inputs = weight_OI.shape
    step = max(1, CHUNK_BYTES // (4 * inputs))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def draw(layer: LinearLayer, scale_name: str, generator: torch.Generator) -> None:
    """Fill a layer's weight and the scales of that name so that outputs keep their inputs' magnitude."""
    weight_OI = layer.get_parameter("weight")
    for rows in chunks(weight_OI):
        values_OI = torch.empty(weight_OI[rows].shape, device=weight_OI.device)
        values_OI.normal_(std=_RANDOM_DEVIATION, generator=generator).clamp_(-FP8_MAX, FP8_MAX)
        weight_OI[rows] = values_OI.to(weight_OI.dtype)
    layer.get_parameter(scale_name).fill_(layer.whole.in_size**-0.5 / _RANDOM_DEVIATION)
