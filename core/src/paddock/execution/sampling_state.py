"""What each slot's sequence asks of the sampler: features on the host, parameters on the device. Written at admission only.

S slots, R rows, A admissions.
"""

from __future__ import annotations

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


@frozen(eq=False)
class RowParams:
    """Parameters of R rows, on the device."""

    numbers_R6: Tensor
    top_k_R: Tensor
    seed_R2: Tensor

    @property
    def temperature_R1(self) -> Tensor:
        """Return the temperatures as a column."""
        return self.numbers_R6[:, :1]

    @property
    def top_p_R(self) -> Tensor:
        """Return the top-p of each row."""
        return self.numbers_R6[:, 1]

    @property
    def min_p_R(self) -> Tensor:
        """Return the min-p of each row."""
        return self.numbers_R6[:, 2]

    @property
    def penalties_R3(self) -> Tensor:
        """Return the repetition, presence and frequency penalties of each row."""
        return self.numbers_R6[:, 3:]


class SamplingState:
    """Each slot's sampling parameters. The host keeps what decides how much work a batch is."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, seed: int) -> None:
        """Start with neutral parameters in every slot; `seed` is the engine's."""
        self._vocab_size, self._device, self._seed, self._drawn = vocab_size, device, seed, 0
        self.top_k_S = np.zeros(num_slots, dtype=np.int64)
        self.has_top_p_S = np.zeros(num_slots, dtype=np.bool_)
        self.logprobs_S = np.zeros(num_slots, dtype=np.int64)
        self._numbers_S6 = torch.ones((num_slots, 6), dtype=torch.float32, device=device)
        self._integers_S3 = torch.zeros((num_slots, 3), dtype=torch.int32, device=device)

    def admit(self, admissions: list[Admission]) -> None:
        """Take the parameters of new sequences, in one copy."""
        slots = np.array([admission.slot for admission in admissions], dtype=np.int64)
        numbers_A6 = np.array([_numbers(admission.params) for admission in admissions], dtype=np.float32)
        integers_A3 = np.array([self._integers(admission) for admission in admissions], dtype=np.int32)
        self.top_k_S[slots] = integers_A3[:, 0]
        self.has_top_p_S[slots] = numbers_A6[:, 1] < 1.0
        self.logprobs_S[slots] = [admission.params.logprobs or 0 for admission in admissions]
        sent = to_device({"slots": slots, "numbers": numbers_A6, "integers": integers_A3}, self._device)
        self._numbers_S6[sent["slots"]] = sent["numbers"]
        self._integers_S3[sent["slots"]] = sent["integers"]

    def _integers(self, admission: Admission) -> tuple[int, int, int]:
        seed = admission.seed
        if seed is None:
            seed, self._drawn = randomness.drawn_seed(self._seed, self._drawn), self._drawn + 1
        return (min(max(admission.params.top_k, 0), self._vocab_size), *randomness.seed_words(seed))

    def rows(self, slot_R: Tensor) -> RowParams:
        """Return the parameters of the slots [R]."""
        integers_R3 = self._integers_S3[slot_R]
        return RowParams(self._numbers_S6[slot_R], integers_R3[:, 0].to(torch.int64), integers_R3[:, 1:])


def _numbers(params: SamplingParams) -> tuple[float, ...]:
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return (params.temperature, params.top_p, params.min_p, *penalties)
