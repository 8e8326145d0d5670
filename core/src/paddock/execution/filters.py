"""Top-k, top-p and min-p as one threshold: which tokens of a row stay in the draw.

R rows, V vocabulary, C candidates, X flat rows. The order is vLLM's: temperature, min-p, top-k, top-p, each on what the one
before left. Tokens of equal logit stay or go together, so the outcome depends neither on a sort's order of ties nor on other
rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_FIRST_TRY = 1024  # on a CPU core, of 49,152 logits: the 1,024 largest 0.45 ms a row, sorting all 1.3 ms, topk of all 3.7 ms


def threshold(scaled_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor) -> Tensor:
    """Return the least logit that stays in each row, [R, 1].

    `scaled_RV` is divided by the temperature and its rows' maximum is 0. `top_k_R` 0 means all, as do `top_p_R` 1 and `min_p_R`
    0. A CPU's values are looked at to do no more than they need; a GPU, which must not be waited for, sorts all.
    """
    floor_R1, top_k_R = min_p_R.log()[:, None], top_k_R.to(torch.int64)
    if scaled_RV.device.type == "cpu":
        return _quick_threshold(scaled_RV, floor_R1, top_k_R, top_p_R)
    values_RV = scaled_RV.sort(dim=-1, descending=True).values
    return _threshold(scaled_RV, values_RV, floor_R1, top_k_R, top_p_R, nucleus=True)[0]


def _quick_threshold(scaled_RV: Tensor, floor_R1: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Return the thresholds [R, 1] from as many of the largest logits as they take."""
    vocab_size, nucleus_R = scaled_RV.shape[-1], top_p_R < 1
    nucleus = bool(nucleus_R.any())
    unbounded = nucleus and bool((nucleus_R & (top_k_R == 0)).any())
    widest = vocab_size if unbounded else min(int(top_k_R.max()), vocab_size)
    if not widest:
        return floor_R1
    width = min(widest, _FIRST_TRY)
    values_RC = scaled_RV.topk(width, dim=-1).values
    least_R1, enough_R = _threshold(scaled_RV, values_RC, floor_R1, top_k_R, top_p_R, nucleus=nucleus)
    short_X = enough_R.logical_not().nonzero()[:, 0]
    if width < widest and len(short_X):  # only flat rows are sorted whole
        flat_XV = scaled_RV[short_X]
        rows = (floor_R1[short_X], top_k_R[short_X], top_p_R[short_X])
        least_R1[short_X] = _threshold(flat_XV, _descending(flat_XV), *rows, nucleus=nucleus)[0]
    return least_R1


def _descending(values_XV: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(-values_XV.numpy(), axis=-1)).neg_()


def _threshold(
    scaled_RV: Tensor, values_RC: Tensor, floor_R1: Tensor, top_k_R: Tensor, top_p_R: Tensor, *, nucleus: bool
) -> tuple[Tensor, Tensor]:
    """Return the thresholds [R, 1] as the C largest values give them, and whether C was enough [R]."""
    width = values_RC.shape[-1]
    has_k_R1 = (top_k_R > 0)[:, None]
    kth_R1 = values_RC.gather(-1, (top_k_R[:, None] - 1).clamp(0, width - 1))
    least_R1 = torch.where(has_k_R1, torch.maximum(floor_R1, kth_R1), floor_R1)
    enough_R = top_k_R <= width
    if not nucleus:
        return least_R1, enough_R
    has_p_R1 = (top_p_R < 1)[:, None]
    wanted_R1 = top_p_R[:, None].double() * _mass(scaled_RV, least_R1).sum(-1, keepdim=True, dtype=torch.float64)
    mass_RC = _mass(values_RC, least_R1)
    through_RC = mass_RC.cumsum(-1, dtype=torch.float64)
    last_R1 = (through_RC - mass_RC < wanted_R1).sum(-1, keepdim=True).sub_(1).clamp_(min=0)
    edge_R1 = torch.where(has_p_R1, values_RC.gather(-1, last_R1), least_R1)
    reached_R = (through_RC[:, -1:] >= wanted_R1)[:, 0] | (values_RC[:, -1:] < least_R1)[:, 0]
    return torch.maximum(least_R1, edge_R1), enough_R & (reached_R | ~has_p_R1[:, 0])


def _mass(values: Tensor, least_R1: Tensor) -> Tensor:
    return torch.where(values >= least_R1, values, -torch.inf).exp_()
