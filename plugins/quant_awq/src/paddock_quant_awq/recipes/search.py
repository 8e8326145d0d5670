"""AWQ's two searches (arXiv 2306.00978): a scale an input channel, and the range that a group's 16 numbers span.

A channel whose inputs are large gets a scale above 1: its weights are multiplied by it before rounding and its inputs divided, so
that rounding costs it less, at the others' expense. A narrower range than a group's own cuts off its largest weights and rounds
the others more finely; one a little wider may meet its weights better, and spares the largest what a zero point between two
numbers, or a scale of largest / 7.5, cuts off.

O outputs, I inputs, G groups of S inputs, R rows of a sample of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from paddock_quant_awq.recipes.rounding import LARGEST, Rounding, grouped

GRID = 20  # exponents, as AutoAWQ
# What a group's range may be divided into: 13 to 18 by halves, of which there are 15, and up to 27 where the largest are cut off.
STEPS = (*(13 + half / 2 for half in range(11)), 19, 20, 21.5, 23, 25, 27)
_EVEN = 0.3  # of the mean square of a group's inputs, added to each input's own
_FURTHEST = 2.0  # times as large as by its own range the squared error of a group's weights may become
_LEAST_SCALE = 1e-4
_CHUNK = 1 << 26  # weights whose ranges are searched at a time
_CPU_CHUNK = 1 << 18  # and on a CPU, whose cache holds so many: 0.6 of the time


def weight_means(weights: Iterable[Tensor], group: int) -> Tensor:
    """Return mean over rows of |W| / the group's largest |W| [I] in float32, over all rows of weights that share an input."""
    total_I, rows = None, 0
    for weight_OI in weights:
        magnitude_OGS = grouped(weight_OI.float().abs(), group)
        shares_OGS = magnitude_OGS / magnitude_OGS.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        sum_I = shares_OGS.sum(0).flatten()
        total_I, rows = sum_I if total_I is None else total_I + sum_I, rows + len(weight_OI)
    assert total_I is not None, "no weights"
    return total_I / rows


def candidates(x_mean_I: Tensor, w_mean_I: Tensor) -> Iterator[Tensor]:
    """Yield scales [I] to try: none, then mean|x|^a / (mean|w|^(1 - a) + 1e-4) for a = 0, 1/20, ... 19/20."""
    yield torch.ones_like(x_mean_I)
    for step in range(GRID):
        share = step / GRID
        scale_I = (x_mean_I**share / (w_mean_I ** (1 - share) + _LEAST_SCALE)).clamp(min=_LEAST_SCALE)
        scale_I = scale_I / (scale_I.max() * scale_I.min()).sqrt()
        yield torch.where(scale_I.isfinite() & (scale_I > 0), scale_I, torch.ones_like(scale_I))


def best_scale(tried: Iterable[Tensor], error: Callable[[Tensor], float]) -> Tensor:
    """Return the first of the scales with the least error."""
    least, best_I = math.inf, None
    for scale_I in tried:
        found = error(scale_I)
        if best_I is None or found < least:
            least, best_I = found, scale_I
    assert best_I is not None, "no scale was tried"
    return best_I


def output_error(difference_OI: Tensor, rows_RI: Tensor) -> float:
    """Return the mean squared error of the output that a difference of weights makes on a sample of inputs."""
    return float((rows_RI @ difference_OI.T).square().mean(dtype=torch.float64))


def best_parts(weight_OI: Tensor, rows_RI: Tensor, rounding: Rounding, *, cuts: bool = True) -> Tensor | None:
    """Return the part of its range [O, G] float32 that each group is best rounded by; None where the whole output gets no better.

    Each group's is the one with the least squared error of what the group adds to the output, of those that divide its range into
    STEPS; without `cuts` no more than there are numbers for, so that no weight is further than half a step from its own. A sample
    shows some inputs seldom: so each counts as if it came a little more often than it did, and weights stay near what they were.
    Groups are searched each for itself, and their errors may add up: the whole output decides.
    """
    x_RGS = grouped(rows_RI, rounding.group)
    moments_GSS = torch.einsum("rgs,rgt->gst", x_RGS, x_RGS)
    squares_GS = moments_GSS.diagonal(dim1=-2, dim2=-1)
    squares_GS += _EVEN * squares_GS.mean(-1, keepdim=True)
    parts = [rounding.steps / steps for steps in STEPS if steps != rounding.steps and (cuts or steps <= LARGEST)]
    step = max(1, (_CPU_CHUNK if weight_OI.is_cpu else _CHUNK) // weight_OI.shape[1])
    chunks = (weight_OI[start : start + step] for start in range(0, len(weight_OI), step))
    parts_OG = torch.cat([_best(chunk_OI, moments_GSS, rounding, parts) for chunk_OI in chunks])
    found = output_error(rounding.rounded(weight_OI, parts_OG).meaning() - weight_OI, rows_RI)
    plain = output_error(rounding.rounded(weight_OI).meaning() - weight_OI, rows_RI)
    return parts_OG if found < plain else None


def _best(weight_OI: Tensor, moments_GSS: Tensor, rounding: Rounding, parts: Iterable[float]) -> Tensor:
    def errors(parts_OG: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error [O, G] of what a group adds to the output, and of its weights."""
        difference_OGS = grouped(rounding.rounded(weight_OI, parts_OG).meaning() - weight_OI, rounding.group)
        output_OG = (torch.einsum("ogs,gst->ogt", difference_OGS, moments_GSS) * difference_OGS).sum(-1)
        return output_OG, difference_OGS.square().sum(-1)

    best_OG = torch.ones(len(weight_OI), len(moments_GSS), device=weight_OI.device)
    least_OG, plain_OG = errors(best_OG)
    for part in parts:
        parts_OG = torch.full_like(best_OG, part)
        output_OG, weights_OG = errors(parts_OG)
        better_OG = (output_OG < least_OG) & (weights_OG <= _FURTHEST * plain_OG)
        best_OG, least_OG = torch.where(better_OG, parts_OG, best_OG), torch.where(better_OG, output_OG, least_OG)
    return best_OG
