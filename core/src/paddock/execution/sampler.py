"""From logits to tokens, on the device and without waiting for it. A batch that needs nothing special is one argmax.

Logits are of any float dtype, and read as they are where a token is chosen; what works on all of a row makes them float32.

R rows, V vocabulary. In order: edits, penalties, temperature, min-p, top-k, top-p, draw.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from paddock.execution.batch import Pick, SampleRows
from paddock.execution.edits import Edits
from paddock.execution.logprobs import TopLogprobs, top_logprobs
from paddock.execution.penalties import TokenCounts
from paddock.execution.sampling_ops import REFERENCE_OPS, SamplingOps
from paddock.execution.sampling_state import DRAWN, EDITED, FILTERED, LOGPROBS, PENALISED, SamplingState, features_of
from paddock.scheduling.step import NOT_FINITE, Admission


@frozen(eq=False)
class Sampled:
    """Tokens [R] on the device, NOT_FINITE where a row was unusable, and the logprobs of the rows that asked for them."""

    token_R: Tensor
    logprobs: TopLogprobs | None = None


class Sampler:
    """Chooses tokens. Keeps, for each slot, its parameters and what penalties and bad words need of its history."""

    def __init__(
        self, *, num_slots: int, vocab_size: int, device: torch.device, seed: int, ops: SamplingOps = REFERENCE_OPS
    ) -> None:
        """Start greedy in every slot; `seed` is the engine's, for sequences that bring none."""
        self._ops = ops
        self._state = SamplingState(num_slots, vocab_size, device, seed)
        self._edits = Edits(num_slots, vocab_size, device)
        self._counts = TokenCounts(num_slots, vocab_size, device)

    def admit(self, admissions: list[Admission]) -> list[int]:
        """Take new sequences and return the features of each."""
        self._state.admit(admissions)
        features = [features_of(admission.params) for admission in admissions]
        for i, admission in enumerate(admissions):
            if self._edits.admit(admission):
                features[i] |= EDITED
            if features[i] & PENALISED:
                self._counts.admit(admission)
        return features

    def logprob_rows(self, rows: SampleRows) -> tuple[list[int], list[int]]:
        """Return the rows that asked for logprobs, and how many likely tokens each wants."""
        pick = rows.picks.get(LOGPROBS)
        return ([], []) if pick is None else (pick.rows.tolist(), self._state.logprobs_S[rows.slots[pick.rows]].tolist())

    def sample(self, logits_RV: Tensor, rows: SampleRows) -> Sampled:
        """Return a token for each row of logits, which are overwritten where edited."""
        wants_logprobs = rows.picks.get(LOGPROBS)
        raw_RV = None if wants_logprobs is None else self._raw(logits_RV, wants_logprobs, rows)
        logits_RV = self._edited(logits_RV, rows)
        top_R, token_R = self._ops.most_likely(logits_RV)
        for feature in (DRAWN, FILTERED):
            if feature in rows.picks:
                token_R = self._draw(logits_RV, top_R, token_R, rows, feature)
        usable_R = top_R.isfinite()
        token_R = torch.where(usable_R, token_R, 0)
        self._record(token_R, rows)
        logprobs = None
        if wants_logprobs is not None and raw_RV is not None:
            logprobs = top_logprobs(raw_RV, wants_logprobs.take(token_R), max(self.logprob_rows(rows)[1]))
        return Sampled(torch.where(usable_R, token_R, NOT_FINITE), logprobs)

    def plain(self, logits_RV: Tensor, slot_R: Tensor, output_index_R: Tensor, *, kind: int) -> Tensor:
        """Return a token for each row, NOT_FINITE where it is unusable, from device tables alone: a CUDA graph can hold it.

        `kind` is 0 where every row is greedy, `DRAWN` where some are drawn, `FILTERED` where some are drawn from what filters
        leave. Rows want no penalties, edits or logprobs. Padded rows are those of slot `num_slots`: greedy.
        """
        top_R, token_R = self._ops.most_likely(logits_RV)
        if kind:
            token_R = self._drawn(logits_RV, top_R, token_R, slot_R, output_index_R, kind)
        return torch.where(top_R.abs() < torch.inf, token_R, NOT_FINITE)

    def _raw(self, logits_RV: Tensor, pick: Pick, rows: SampleRows) -> Tensor:
        """Return the model's own logits of the picked rows in float32, safe from edits in place."""
        raw_RV = pick.take(logits_RV).float()
        edited = EDITED in rows.picks or PENALISED in rows.picks
        return raw_RV.clone() if raw_RV is logits_RV and edited else raw_RV

    def _edited(self, logits_RV: Tensor, rows: SampleRows) -> Tensor:
        edited, penalised = rows.picks.get(EDITED), rows.picks.get(PENALISED)
        if edited is not None or penalised is not None:
            logits_RV = logits_RV.float()
        if edited is not None:
            self._edits.apply(logits_RV, rows.output_index_R, edited.rows, rows.slots[edited.rows])
        if penalised is not None:
            slot_R = penalised.take(rows.slot_R)
            penalties_R3 = self._state.rows(slot_R).penalties_R3
            lower_RV = self._counts.apply(penalised.take(logits_RV), slot_R, penalties_R3)
            logits_RV = penalised.put(logits_RV, lower_RV)
        return logits_RV

    def _draw(self, logits_RV: Tensor, top_R: Tensor, token_R: Tensor, rows: SampleRows, feature: int) -> Tensor:
        """Return `token_R` with the rows of `feature` drawn."""
        pick = rows.picks[feature]
        chosen = (pick.take(logits_RV), pick.take(top_R), pick.take(token_R))
        return pick.put(token_R, self._drawn(*chosen, pick.take(rows.slot_R), pick.take(rows.output_index_R), feature))

    def _drawn(
        self, logits_RV: Tensor, top_R: Tensor, token_R: Tensor, slot_R: Tensor, output_index_R: Tensor, feature: int
    ) -> Tensor:
        """Return a token for each row: drawn, from what filters leave where `feature` says so, greedy at temperature 0."""
        params = self._state.rows(slot_R)
        logits_RV = logits_RV.float() if feature == FILTERED else logits_RV
        best, noise = (logits_RV, top_R, token_R, params.temperature_R), (params.seed_R2, output_index_R)
        if feature == FILTERED:
            return self._ops.draw_filtered(*best, params.top_k_R, params.top_p_R, params.min_p_R, *noise)
        return self._ops.draw(*best, *noise)

    def _record(self, token_R: Tensor, rows: SampleRows) -> None:
        for feature, keeper in ((PENALISED, self._counts), (EDITED, self._edits)):
            pick = rows.picks.get(feature)
            if pick is not None:
                keeper.record(pick.take(token_R), pick.take(rows.slot_R))
