"""The named ops that choose tokens, bound once when the sampler is built: which implementation runs is decided by planning.

R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from attrs import fields_dict, frozen
from torch import Tensor

from paddock.execution import sampling_reference


class Draw(Protocol):
    """Draw a token of each row."""

    def __call__(
        self, logits_RV: Tensor, top_R: Tensor, token_R: Tensor, temperature_R: Tensor, seed_R2: Tensor, position_R: Tensor
    ) -> Tensor:
        """Return tokens [R], int64; rows of temperature 0 keep `token_R`."""


class DrawFiltered(Protocol):
    """Draw a token of what min-p, top-k and top-p leave of each row."""

    def __call__(
        self,
        logits_RV: Tensor,
        top_R: Tensor,
        token_R: Tensor,
        temperature_R: Tensor,
        top_k_R: Tensor,
        top_p_R: Tensor,
        min_p_R: Tensor,
        seed_R2: Tensor,
        position_R: Tensor,
    ) -> Tensor:
        """Return tokens [R], int64; rows of temperature 0 keep `token_R`."""


@frozen(eq=False, kw_only=True)
class SamplingOps:
    """One implementation of every sampling op. `execution.sampling_reference` defines each of them."""

    most_likely: Callable[[Tensor], tuple[Tensor, Tensor]] = sampling_reference.most_likely
    draw: Draw = sampling_reference.draw
    draw_filtered: DrawFiltered = sampling_reference.draw_filtered

    @classmethod
    def bind(cls, implementations: Mapping[str, Any]) -> SamplingOps:
        """Return the ops with these implementations by name; an op not named runs its reference."""
        assert implementations.keys() <= SAMPLING_OP_NAMES, implementations.keys() - SAMPLING_OP_NAMES
        return cls(**implementations)


SAMPLING_OP_NAMES = frozenset(fields_dict(SamplingOps))
REFERENCE_OPS = SamplingOps()
