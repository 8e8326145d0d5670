"""Repetition, presence and frequency penalties from token counts kept on the device.

R rows, V vocabulary, S slots, C rows of counts (one for each slot that ever had penalties).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from paddock.execution.packing import to_device
from paddock.scheduling.step import Admission


def penalise(logits_RV: Tensor, outputs_RV: Tensor, prompt_RV: Tensor, penalties_R3: Tensor) -> Tensor:
    """Return the penalised logits. `outputs_RV` counts each token in the output, `prompt_RV` says which are in the prompt.

    The columns of `penalties_R3` are repetition, presence and frequency. Repetition divides a positive logit of a token
    seen in prompt or output, and multiplies a negative one (CTRL, arXiv 1909.05858); presence is subtracted once for a token
    in the output, frequency each time.
    """
    repetition_R1, presence_R1, frequency_R1 = penalties_R3[:, :1], penalties_R3[:, 1:2], penalties_R3[:, 2:]
    out_RV = outputs_RV > 0
    factor_RV = torch.where(logits_RV > 0, repetition_R1.reciprocal(), repetition_R1)
    repeated_RV = torch.where(out_RV | prompt_RV, logits_RV * factor_RV, logits_RV)
    return repeated_RV - presence_R1 * out_RV - frequency_R1 * outputs_RV


class TokenCounts:
    """Which tokens each penalised sequence has seen. Rows are made when a slot first needs one and reused after it."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        """Start without rows, so without their memory."""
        self._vocab_size, self._device = vocab_size, device
        self._rows: dict[int, int] = {}
        self._row_S = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._outputs_CV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._prompt_CV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)

    def admit(self, admission: Admission) -> None:
        """Count the known tokens of a slot's new sequence."""
        row = self._row(admission.slot)
        known = to_device({"known": np.array(admission.token_ids, dtype=np.int64)}, self._device)["known"]
        prompt, output = known[: admission.prompt_len], known[admission.prompt_len :]
        self._prompt_CV[row].zero_().index_fill_(0, prompt, value=True)
        self._outputs_CV[row].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _row(self, slot: int) -> int:
        if slot not in self._rows:
            self._rows[slot] = len(self._rows)
            self._row_S[slot].fill_(self._rows[slot])  # assigning a number would wait for the device
        row = self._rows[slot]
        if row >= len(self._outputs_CV):
            more = max(8, row)
            grown = (torch.cat((old, old.new_zeros((more, self._vocab_size)))) for old in (self._outputs_CV, self._prompt_CV))
            self._outputs_CV, self._prompt_CV = grown  # both or, where memory is short, neither
        return row

    def apply(self, logits_RV: Tensor, slot_R: Tensor, penalties_R3: Tensor) -> Tensor:
        """Return logits [R, V] penalised by what the sequences in slots [R] have seen."""
        row_R = self._row_S[slot_R]
        return penalise(logits_RV, self._outputs_CV[row_R], self._prompt_CV[row_R], penalties_R3)

    def record(self, token_R: Tensor, slot_R: Tensor) -> None:
        """Count the tokens [R] sampled for slots [R], each slot once."""
        self._outputs_CV[self._row_S[slot_R], token_R] += 1
