"""How far one engine's logits are from another's, row by row as they come.

T rows of a window, R rows that came at once, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from attrs import define
from torch import Tensor


@define(eq=False)
class Reference:
    """A's logits of the `count` rows of one window, on A's device; rows may come in any pieces, and twice."""

    count: int
    logits_TV: Tensor | None = None

    def watch(self, _: str, position: int, logits_RV: Tensor) -> None:
        """Keep rows of A's logits, the first at `position`: a PromptWatcher."""
        if self.logits_TV is None:
            self.logits_TV = logits_RV.new_empty((self.count, logits_RV.shape[1]))
        self.logits_TV[position : position + len(logits_RV)] = logits_RV


@define(eq=False)
class Against:
    """What B's logits, as they come, are beside A's: KL(A || B) and whether the first choice is the same, on the host."""

    logits_TV: Tensor
    kl_T: Tensor
    same_T: Tensor

    @classmethod
    def of(cls, reference: Reference) -> Against:
        """Return what compares with A's logits, nothing compared yet."""
        assert reference.logits_TV is not None, "A has run"
        poison_T = torch.full((reference.count,), math.nan, dtype=torch.float64)
        return cls(reference.logits_TV, poison_T, poison_T.clone())

    def watch(self, _: str, position: int, logits_RV: Tensor) -> None:
        """Compare rows of B's logits, the first at `position`: a PromptWatcher."""
        rows = slice(position, position + len(logits_RV))
        a_RV = self.logits_TV[rows].to(logits_RV.device)
        self.kl_T[rows] = _kl(a_RV, logits_RV).cpu()
        self.same_T[rows] = (a_RV.argmax(-1) == logits_RV.argmax(-1)).double().cpu()


def _kl(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    """Return KL(A || B) [R] in float64, from raw logits."""
    a_log_RV, b_log_RV = a_RV.double().log_softmax(-1), b_RV.double().log_softmax(-1)
    return (a_log_RV.exp() * (a_log_RV - b_log_RV)).sum(-1)
