"""What a layer asks of the other ranks of its group. The parallel plugin implements it; one rank alone needs none."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """A group of ranks that hold shares of the same layers. Every rank calls the same methods in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors; `x` may be overwritten."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the ranks' tensors joined along the last axis, in the order of ranks."""
