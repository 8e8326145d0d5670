"""What is kept of a linear's inputs: means and maxima over all tokens, and a sample of rows in bounded memory.

T tokens, I input features, R rows of the sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paddock.errors import CheckpointError

SAMPLE_ROWS = 1024  # at least half as many are kept, evenly spread; AutoAWQ clips by 512


class SeenInputs:
    """The inputs of one linear."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._sum_I: Tensor | None = None
        self._largest_I: Tensor | None = None
        self._rows: list[Tensor] = []
        self._tokens, self._stride = 0, 1

    def see(self, x_TI: Tensor) -> None:
        """Take note of some inputs."""
        magnitude_TI = x_TI.abs()
        sum_I, largest_I = magnitude_TI.sum(0, dtype=torch.float32), magnitude_TI.amax(0).float()
        self._sum_I = sum_I if self._sum_I is None else self._sum_I + sum_I
        self._largest_I = largest_I if self._largest_I is None else torch.maximum(self._largest_I, largest_I)
        self._rows.append(x_TI[-self._tokens % self._stride :: self._stride].clone())
        self._tokens += len(x_TI)
        while sum(map(len, self._rows)) > SAMPLE_ROWS:  # rows 0, stride, 2 stride, ...: keep every second
            self._stride *= 2
            self._rows = [torch.cat(self._rows)[::2].clone()]

    def mean(self, what: str) -> Tensor:
        """Return mean |x| [I] in float32; raise CheckpointError where an input was not finite."""
        assert self._sum_I is not None, f"nothing was seen of {what}"
        require_finite(self._sum_I, what)
        return self._sum_I / self._tokens

    def largest(self) -> Tensor:
        """Return max |x| [I] in float32."""
        assert self._largest_I is not None, "nothing was seen"
        return self._largest_I

    def rows(self) -> Tensor:
        """Return the sample [R, I] in float32."""
        return torch.cat(self._rows).float()


def require_finite(values: Tensor, what: str) -> None:
    """Raise CheckpointError where a value is not a finite number."""
    if not bool(values.isfinite().all()):
        raise CheckpointError(
            f"{what} hold values that are not finite numbers, so no scale fits them",
            fix="check the source's weights, and that it was trained in the dtype its config names",
        )
