"""One call of a kernel at one size: how to make its arguments, and the least it must move and compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from paddock.planning.roofs import Ceilings

ATTENTION = "attention"  # what is measured where it is no op; and the kind of operations its ceiling is of
Make = Callable[[int], tuple[Any, ...]]  # seed to arguments, the same for the same seed


@frozen(eq=False, kw_only=True)
class Case:
    """`name` says the size; `nbytes` what must be read and written once; `flops` operations, of the `kind` ceilings know."""

    name: str
    make: Make
    nbytes: int
    flops: float = 0.0
    kind: str

    def limit(self, ceilings: Ceilings | None) -> Limit | None:
        """Return the least seconds on a device with these ceilings, and what bounds them; None where they are not known."""
        if ceilings is None:
            return None
        flops = ceilings.attention_flops if self.kind == ATTENTION else ceilings.matmul_flops(self.kind)
        moving, computing = self.nbytes / ceilings.bytes_per_second, self.flops / flops if flops else 0.0
        return Limit(seconds=max(moving, computing), computes=computing > moving)


@frozen(kw_only=True)
class Limit:
    """The least seconds of a call; `computes` says that operations bound it, else bytes do."""

    seconds: float
    computes: bool


@frozen(eq=False, kw_only=True)
class Draw:
    """Random tensors on a device, the same for the same seed."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, seed: int, *shape: int) -> Tensor:
        """Return standard normal values; never zeros, with which a GPU runs faster than with data."""
        return torch.randn(shape, device=self.device, generator=self._generator(seed)).to(self.dtype)

    def whole(self, seed: int, least: int, beyond: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return uniform integers from `least` to below `beyond`."""
        return torch.randint(least, beyond, shape, device=self.device, generator=self._generator(seed), dtype=dtype)

    def order(self, seed: int, count: int) -> Tensor:
        """Return 0 to count - 1, shuffled."""
        return torch.randperm(count, device=self.device, generator=self._generator(seed))

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)
