"""What each slot's sequence asks of the sampler: features on the host, parameters on the device. Written at admission only.

S slots, R rows, A admissions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from paddock.execution import randomness
from paddock.execution.packing import to_device
from paddock.request import SamplingParams
from paddock.scheduling.step import Admission

# What a row needs beyond being the most likely token: bits, so that a batch without any is recognised at once.
DRAWN = 1  # from all tokens
FILTERED = 2  # drawn from what top-k, top-p or min-p leave
PENALISED = 4
EDITED = 8
LOGPROBS = 16
FEATURES = (DRAWN, FILTERED, PENALISED, EDITED, LOGPROBS)


def features_of(params: SamplingParams) -> int:
    """Return the features sampling parameters ask for, `EDITED` excepted: that takes the whole admission to know."""
    filtered = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    features = 0 if params.greedy else FILTERED if filtered else DRAWN
    if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
        features |= PENALISED
    return features if params.logprobs is None else features | LOGPROBS


def plain_kind(features: Iterable[int]) -> int | None:
    """Return the variant of `Sampler.plain` for rows with these features: 0, DRAWN or FILTERED; None where it serves none."""
    kind = 0
    for feature in features:
        if feature not in (DRAWN, FILTERED):
            return None
        kind = max(kind, feature)
    return kind


@frozen(eq=False)
class RowParams:
    """Parameters of R rows, on the device: one gather of floats, one of integers. Rows of temperature 0 are greedy."""

    numbers_6R: Tensor
    integers_3R: Tensor

    @property
    def temperature_R(self) -> Tensor:
        """Return the temperature of each row."""
        return self.numbers_6R[0]

    @property
    def top_p_R(self) -> Tensor:
        """Return the top-p of each row."""
        return self.numbers_6R[1]

    @property
    def min_p_R(self) -> Tensor:
        """Return the min-p of each row."""
        return self.numbers_6R[2]

    @property
    def penalties_R3(self) -> Tensor:
        """Return the repetition, presence and frequency penalties of each row."""
        return self.numbers_6R[3:].T

    @property
    def top_k_R(self) -> Tensor:
        """Return the top-k of each row, at most V."""
        return self.integers_3R[0]

    @property
    def seed_R2(self) -> Tensor:
        """Return the seed words of each row."""
        return self.integers_3R[1:].T


class SamplingState:
    """Each slot's sampling parameters, and those of a scratch slot after the last, which stays greedy: padding's."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, seed: int) -> None:
        """Start greedy in every slot; `seed` is the engine's."""
        self._vocab_size, self._device, self._seed, self._drawn = vocab_size, device, seed, 0
        self.logprobs_S = np.zeros(num_slots, dtype=np.int64)
        neutral_6 = torch.tensor(_numbers(SamplingParams(temperature=0.0)), dtype=torch.float32, device=device)
        self._numbers_6S = neutral_6[:, None].repeat(1, num_slots + 1)
        self._integers_3S = torch.zeros((3, num_slots + 1), dtype=torch.int32, device=device)

    def admit(self, admissions: list[Admission]) -> None:
        """Take the parameters of new sequences, in one copy."""
        slots = np.array([admission.slot for admission in admissions], dtype=np.int64)
        numbers_A6 = np.array([_numbers(admission.params) for admission in admissions], dtype=np.float32)
        integers_A3 = np.array([self._integers(admission) for admission in admissions], dtype=np.int32)
        self.logprobs_S[slots] = [admission.params.logprobs or 0 for admission in admissions]
        sent = to_device({"slots": slots, "numbers": numbers_A6, "integers": integers_A3}, self._device)
        self._numbers_6S[:, sent["slots"]] = sent["numbers"].T
        self._integers_3S[:, sent["slots"]] = sent["integers"].T

    def _integers(self, admission: Admission) -> tuple[int, int, int]:
        seed = admission.seed
        if seed is None:
            seed, self._drawn = randomness.drawn_seed(self._seed, self._drawn), self._drawn + 1
        return (min(max(admission.params.top_k, 0), self._vocab_size), *randomness.seed_words(seed))

    def rows(self, slot_R: Tensor) -> RowParams:
        """Return the parameters of the slots [R]."""
        return RowParams(self._numbers_6S.index_select(1, slot_R), self._integers_3S.index_select(1, slot_R))


def _numbers(params: SamplingParams) -> tuple[float, ...]:
    """Return a slot's floats; what is near enough to temperature 0 to be greedy is 0."""
    temperature = 0.0 if params.greedy else params.temperature
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return (temperature, params.top_p, params.min_p, *penalties)
