"""From logits to tokens, on the device and without waiting for it. A batch that needs nothing special is one argmax.

R rows, V vocabulary. In order: edits, penalties, temperature, min-p, top-k, top-p, draw.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from paddock.execution import randomness
from paddock.execution.batch import Indices, Pick, SampleRows
from paddock.execution.edits import Edits
from paddock.execution.filters import threshold
from paddock.execution.logprobs import TopLogprobs, top_logprobs
from paddock.execution.penalties import TokenCounts
from paddock.execution.sampling_state import DRAWN, EDITED, FILTERED, LOGPROBS, PENALISED, RowParams, SamplingState, features_of
from paddock.scheduling.step import NOT_FINITE, Admission

_DRAW_ELEMENTS = 1 << 24  # logits drawn from at a time: bounds each temporary to 64 MiB


_BLOCK = 256  # divides every published model's vocabulary


def most_likely(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit, NaN if it holds one, and the first token that has it.

    torch's argmax is not vectorised on a CPU: 16 x 49,152 take 0.65 ms on a core, by blocks 0.08 ms.
    """
    rows, vocab_size = logits_RV.shape
    if logits_RV.device.type != "cpu" or vocab_size % _BLOCK or not rows:
        top_R, token_R = logits_RV.max(dim=-1)
        return top_R, token_R
    blocks_RBX = logits_RV.unflatten(-1, (-1, _BLOCK))  # type: ignore[no-untyped-call]
    top_R, block_R = blocks_RBX.amax(dim=-1).max(dim=-1)
    within_R = blocks_RBX[torch.arange(rows), block_R].argmax(dim=-1)
    return top_R, block_R * _BLOCK + within_R


@frozen(eq=False)
class Sampled:
    """Tokens [R] on the device, NOT_FINITE where a row was unusable, and the logprobs of the rows that asked for them."""

    token_R: Tensor
    logprobs: TopLogprobs | None = None


class Sampler:
    """Chooses tokens. Keeps, for each slot, its parameters and what penalties and bad words need of its history."""

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device, seed: int) -> None:
        """Start with neutral parameters in every slot; `seed` is the engine's, for sequences that bring none."""
        self._state = SamplingState(num_slots, vocab_size, device, seed)
        self._edits = Edits(num_slots, vocab_size, device)
        self._counts = TokenCounts(num_slots, vocab_size, device)
        self._terms_V = randomness.token_terms(vocab_size, device)

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
        """Return a token for each row of logits (float32, overwritten where edited)."""
        wants_logprobs = rows.picks.get(LOGPROBS)
        raw_RV = None if wants_logprobs is None else self._raw(logits_RV, wants_logprobs, rows)
        logits_RV = self._edited(logits_RV, rows)
        top_R, token_R = most_likely(logits_RV)
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

    def _raw(self, logits_RV: Tensor, pick: Pick, rows: SampleRows) -> Tensor:
        """Return the model's own logits of the picked rows, safe from edits in place."""
        raw_RV = pick.take(logits_RV)
        edited = EDITED in rows.picks or PENALISED in rows.picks
        return raw_RV.clone() if raw_RV is logits_RV and edited else raw_RV

    def _edited(self, logits_RV: Tensor, rows: SampleRows) -> Tensor:
        edited, penalised = rows.picks.get(EDITED), rows.picks.get(PENALISED)
        if edited is not None:
            self._edits.apply(logits_RV, rows.output_index_R, edited.rows, rows.slots[edited.rows])
        if penalised is not None:
            slot_R = penalised.take(rows.slot_R)
            penalties_R3 = self._state.rows(slot_R).penalties_R3
            lower_RV = self._counts.apply(penalised.take(logits_RV), slot_R, penalties_R3)
            logits_RV = penalised.put(logits_RV, lower_RV)
        return logits_RV

    def _draw(self, logits_RV: Tensor, top_R: Tensor, token_R: Tensor, rows: SampleRows, feature: int) -> Tensor:
        """Return `token_R` with the rows of `feature` drawn, some rows at a time."""
        pick = rows.picks[feature]
        slot_R, index_R, slots = pick.take(rows.slot_R), pick.take(rows.output_index_R), rows.slots[pick.rows]
        logits_RV, top_R = pick.take(logits_RV), pick.take(top_R)
        height, winners = max(1, _DRAW_ELEMENTS // logits_RV.shape[-1]), []
        for first in range(0, len(slots), height):
            span = slice(first, first + height)
            params = self._state.rows(slot_R[span])
            scaled_RV = (logits_RV[span] - top_R[span, None]).div_(params.temperature_R1)
            if feature == FILTERED:
                scaled_RV = self._filtered(scaled_RV, params, slots[span])
            noise_RV = randomness.gumbel(randomness.noise_bits(params.seed_R2, index_R[span], self._terms_V))
            winners.append(most_likely(noise_RV.add_(scaled_RV))[1])  # samples the softmax of scaled (Gumbel-max)
        return pick.put(token_R, winners[0] if len(winners) == 1 else torch.cat(winners))

    def _filtered(self, scaled_RV: Tensor, params: RowParams, slots: Indices) -> Tensor:
        """Return the scaled logits with -inf where a filter takes a token out."""
        top_k, has_top_p = self._state.top_k_S[slots], self._state.has_top_p_S[slots]
        widest = scaled_RV.shape[-1] if (has_top_p & (top_k == 0)).any() else int(top_k.max())
        least_R1 = threshold(
            scaled_RV, params.top_k_R, params.top_p_R, params.min_p_R, widest=widest, nucleus=bool(has_top_p.any())
        )
        return torch.where(scaled_RV >= least_R1, scaled_RV, -torch.inf)

    def _record(self, token_R: Tensor, rows: SampleRows) -> None:
        for feature, keeper in ((PENALISED, self._counts), (EDITED, self._edits)):
            pick = rows.picks.get(feature)
            if pick is not None:
                keeper.record(pick.take(token_R), pick.take(rows.slot_R))
