"""Several continuations of one token each, of one context: all of them from one row of logits.

R rows that came at once, C continuations, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from paddock.execution.packing import to_device


class LastRows:
    """Keeps what a prompt's last but one position says of some tokens: their log-probabilities, on the device."""

    def __init__(self, wanted: Mapping[int, tuple[int, Sequence[int]]]) -> None:
        """Take, by the index of a prompt in its call, the position to look at and the tokens there [C]."""
        self._wanted = wanted
        self._found: dict[int, Tensor] = {}

    def watch(self, sequence_id: str, position: int, logits_RV: Tensor) -> None:
        """Look at rows of logits, the first at `position`: a PromptWatcher, which never waits for the device."""
        index = int(sequence_id.partition("#")[0].rpartition("-")[2])
        at, tokens = self._wanted.get(index, (-1, ()))
        if position <= at < position + len(logits_RV):
            row_V = logits_RV[at - position]
            tokens_C = to_device({"tokens": np.array(tokens, dtype=np.int64)}, logits_RV.device)["tokens"]
            self._found[index] = row_V.index_select(0, tokens_C) - row_V.logsumexp(0)

    def logprobs(self, index: int) -> list[float]:
        """Return those of a prompt that has come out of the engine, in nats."""
        found: list[float] = self._found.pop(index).tolist()
        return found
