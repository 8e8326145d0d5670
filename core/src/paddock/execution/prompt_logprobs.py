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
from paddock.scheduling.step import Admission, PrefillChunk, Step

_LOGITS = 1 << 24  # logits computed at a time: bounds them to 64 MiB

PromptWatcher = Callable[[str, int, Tensor], None]
"""Called as `watcher(sequence_id, position, logits_RV)` with raw float32 logits, on the device, as a prompt is prefilled.

A sequence's id is `REQUEST_ID#CONTINUATION`. Row r predicts the prompt's token at `position + r + 1`. Rows may come twice, where
a step is taken back or a sequence is preempted; the tensor is the watcher's to keep.
"""


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
        self._prompts: dict[int, Admission] = {}
        self.watcher: PromptWatcher | None = None

    def admit(self, admission: Admission) -> None:
        """Take a slot's new sequence."""
        self._prompts.pop(admission.slot, None)
        if admission.params.prompt_logprobs is not None:
            self._prompts[admission.slot] = admission

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
                found[i] = self._chunk(self._prompts[chunk.slot], chunk, x_TE[first : first + len(chunk.token_ids)], logits)
            first += len(chunk.token_ids)
        return found

    def _chunk(
        self, admission: Admission, chunk: PrefillChunk, x_TE: Tensor, logits: Callable[[Tensor], Tensor]
    ) -> ChunkLogprobs:
        width = admission.params.prompt_logprobs
        assert width is not None, "only prompts whose logprobs were asked for are remembered"
        after = admission.token_ids[: admission.prompt_len][chunk.start + 1 : chunk.start + 1 + len(chunk.token_ids)]
        after_R = to_device({"after": np.array(after, dtype=np.int64)}, self._device)["after"]
        height = max(1, _LOGITS // self._vocab_size)
        pieces = []
        for first in range(0, len(after), height):
            span = slice(first, min(first + height, len(after)))
            logits_RV = logits(x_TE[span])
            if self.watcher is not None:
                self.watcher(admission.sequence_id, chunk.start + first, logits_RV)
            pieces.append(top_logprobs(logits_RV, after_R[span], width).to_host())
        return ChunkLogprobs(pieces, width)
