"""What runs now: a Step, in host integers, and what came of it. Free of torch; values only.

A running sequence holds a *slot*, a row in every per-sequence buffer of the runner, from admission until it ends or is
preempted. The token a decode feeds in is the last one sampled for its slot: it stays on the device, the host need not know it.
"""

from __future__ import annotations

from attrs import define, field

from paddock.request import SamplingParams, TokenLogprobs

NOT_FINITE = -1  # stands for a token when a row of logits held NaN or +inf


@define
class Admission:
    """A sequence that takes a slot, new or resumed after preemption: all its known tokens and how it samples.

    `seed` is None for an unseeded request: the runner draws one from the engine's seed.
    """

    slot: int
    sequence_id: str
    params: SamplingParams
    token_ids: list[int]  # prompt, then the tokens already generated
    prompt_len: int
    stop_ids: frozenset[int]
    bad_words_ids: tuple[tuple[int, ...], ...]
    seed: int | None


@define
class PrefillChunk:
    """Tokens `start .. start + len(token_ids)` of a sequence; `samples` when they are its last known ones."""

    slot: int
    start: int
    token_ids: list[int]
    samples: bool


@define
class Step:
    """One batch. Admissions and page grants take effect first, then all sequences run at once: decodes, then prefills.

    Steps run in the order of their numbers, and every layer writes the step's K and V before it attends: a prefill may read
    pages that an earlier prefill of the same step fills. An admission to a slot replaces whatever sequence held it, and a
    page granted twice belongs to the later holder, without further notice.

    `decode_positions[i]` is the position of the token fed for `decode_slots[i]`. `pages` holds (slot, index of the
    first page granted, page ids). Results come back in the order: decodes, then the prefills that sample.
    """

    number: int
    decode_slots: list[int] = field(factory=list)
    decode_positions: list[int] = field(factory=list)
    prefills: list[PrefillChunk] = field(factory=list)
    admissions: list[Admission] = field(factory=list)
    pages: list[tuple[int, int, list[int]]] = field(factory=list)

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the step computes."""
        return len(self.decode_slots) + sum(len(chunk.token_ids) for chunk in self.prefills)

    @property
    def num_samples(self) -> int:
        """Return how many tokens the step samples."""
        return len(self.decode_slots) + sum(chunk.samples for chunk in self.prefills)


@define
class StepResult:
    """What a step sampled, in step order; NOT_FINITE marks a row whose logits were unusable.

    `logprobs` maps a sample's index to its logprobs; `prompt_logprobs` maps a prefill's index in the step to those of the
    tokens after each of its positions (the last known token of a prompt predicts nothing and has none).
    """

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(factory=dict)


@define
class SequenceUpdate:
    """What a step gave one sequence: at most one token, and how it ended if it did.

    `finish_reason` is `stop`, `length`, `abort` or `error`; `stop_reason` the stop token id; `error` what went wrong.
    The first update of a sequence alone carries `prompt_logprobs` (None for the first token; given to index 0 only),
    `num_cached_tokens` (found in the prefix cache) and `first_scheduled` (seconds on the scheduler's clock).
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    first_scheduled: float | None = None
    error: str | None = None
