"""Log-probabilities of a prompt's own tokens, computed as its chunks are prefilled.

T tokens, R rows, E model size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from paddock.execution.logprobs import TopLogprobs, top_logprobs
from paddock.execution.packing import to_device
from paddock.request import TokenLogprobs
from paddock.scheduling.step import Admission, Step

_LOGITS = 1 << 24  # logits computed at a time: bounds them to 64 MiB


@frozen(eq=False)
class ChunkLogprobs:
    """The logprobs of one chunk, in pieces on their way to the host, and how many likely tokens a position lists."""

    pieces: list[TopLogprobs]
    width: int

    def rows(self) -> list[TokenLogprobs]:
        """Return those of the token after each position, once they have arrived."""
        return [row for piece in self.pieces for row in piece.rows([self.width] * len(piece.chosen_R))]


class PromptLogprobs:
    """Remembers the prompts whose logprobs were asked for."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        """Start with no prompt."""
        self._vocab_size, self._device = vocab_size, device
        self._prompts: dict[int, tuple[list[int], int]] = {}

    def admit(self, admission: Admission) -> None:
        """Take a slot's new sequence."""
        self._prompts.pop(admission.slot, None)
        width = admission.params.prompt_logprobs
        if width is not None:
            self._prompts[admission.slot] = (admission.token_ids[: admission.prompt_len], width)

    def wants(self, step: Step) -> bool:
        """Return whether a chunk of the step has logprobs to give."""
        return bool(self._prompts) and any(chunk.slot in self._prompts for chunk in step.prefills)

    def launch(self, step: Step, x_TE: Tensor, logits: Callable[[Tensor], Tensor]) -> dict[int, ChunkLogprobs]:
        """Return the logprobs of the chunks that want them, by index in the step, given the step's residual stream."""
        if not self._prompts:
            return {}
        found, first = {}, len(step.decode_slots)
        for i, chunk in enumerate(step.prefills):
            if chunk.slot in self._prompts:
                prompt, width = self._prompts[chunk.slot]
                after = prompt[chunk.start + 1 : chunk.start + 1 + len(chunk.token_ids)]
                found[i] = self._chunk(x_TE[first : first + len(after)], after, width, logits)
            first += len(chunk.token_ids)
        return found

    def _chunk(self, x_RE: Tensor, after: list[int], width: int, logits: Callable[[Tensor], Tensor]) -> ChunkLogprobs:
        after_R = to_device({"after": np.array(after, dtype=np.int64)}, self._device)["after"]
        height = max(1, _LOGITS // self._vocab_size)
        spans = [slice(first, first + height) for first in range(0, len(after), height)]
        return ChunkLogprobs([top_logprobs(logits(x_RE[span]), after_R[span], width).to_host() for span in spans], width)
