"""One continuation of a request, with everything the scheduler knows about it."""

from __future__ import annotations

from enum import Enum

from attrs import define, evolve, field

from paddock.request import Request, SamplingParams, TokenLogprobs
from paddock.scheduling.step import NOT_FINITE, Admission, SequenceUpdate


class Stage(Enum):
    """Where a sequence stands. It holds a slot and pages while it prefills or decodes."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


@define(eq=False)
class Sequence:
    """A sequence: its known tokens, how far it is computed, and the two counts at which the fast paths must look closer.

    `computed` counts the tokens whose K and V exist once all scheduled steps have run; a decode feeds the token at that
    position, whose value may still be in flight. `page_edge` is the position at which a decode needs a page or is at its
    end; `token_edge` the number of known tokens at which a further token means more than appending it.
    """

    request: Request
    request_id: str
    index: int
    params: SamplingParams
    rank: tuple[int, int, int]  # priority, arrival, index: lower runs earlier and is preempted later
    token_ids: list[int]
    prompt_len: int
    max_len: int  # tokens at which it ends for length, prompt included
    stop_ids: frozenset[int]
    watched_ids: frozenset[int]  # those, and the mark of unusable logits

    stage: Stage = Stage.WAITING
    slot: int = field(init=False)  # set by admission
    pages: list[int] = field(factory=list)
    computed: int = 0
    page_edge: int = 0
    token_edge: int = 0
    tokens_owed: int = 0  # in flight when it was preempted

    chain: list[bytes] = field(factory=list)  # names of its full blocks
    num_named: int = 0  # of its pages, those the pool knows by name or holds under the same name elsewhere

    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    first_scheduled: float | None = None
    announced: bool = False

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Return whether its prompt has to be computed whole, for the logprobs of its tokens."""
        return self.params.prompt_logprobs is not None and not self.announced

    @property
    def num_generated(self) -> int:
        """Return how many tokens it has generated, as far as known."""
        return len(self.token_ids) - self.prompt_len

    def admission(self) -> Admission:
        """Return what the runner has to know about it."""
        seed = None if self.params.seed is None else self.params.seed + self.index
        return Admission(
            slot=self.slot,
            sequence_id=f"{self.request_id}#{self.index}",
            params=self.params,
            token_ids=self.token_ids.copy(),
            prompt_len=self.prompt_len,
            stop_ids=self.stop_ids,
            bad_words_ids=self.request.bad_words_ids,
            seed=seed,
        )

    def keep_prompt_logprobs(self, start: int, logprobs: list[TokenLogprobs]) -> None:
        """Keep those of the prompt tokens after positions `start` and on; a recomputed chunk gives the same again."""
        if self.wants_prompt_logprobs:
            kept = self.prompt_logprobs = self.prompt_logprobs or [None] * self.prompt_len
            count = max(0, min(len(logprobs), self.prompt_len - start - 1))
            kept[start + 1 : start + 1 + count] = logprobs[:count]

    def update(self, token_ids: list[int]) -> SequenceUpdate:
        """Return an update with these tokens and, the first time, all that is said once."""
        update = SequenceUpdate(self.request_id, self.index, token_ids)
        if not self.announced:
            update.prompt_logprobs = self.prompt_logprobs
            update.num_cached_tokens = self.num_cached_tokens
            update.first_scheduled = self.first_scheduled
            self.announced = True
            self.prompt_logprobs = None
        return update

    def verdict(self) -> tuple[str, int | None] | None:
        """Return (finish reason, stop token id) if its last token ends it, else None."""
        last = self.token_ids[-1]
        if last in self.stop_ids and self.num_generated >= self.params.min_tokens:
            return "stop", last
        return ("length", None) if len(self.token_ids) >= self.max_len else None


def sequences_of(request: Request, arrival: int, max_model_len: int) -> list[Sequence]:
    """Return the n sequences of a request. Only the first computes prompt logprobs: its siblings' are the same."""
    params, prompt_len = request.params, len(request.prompt_token_ids)
    sibling_params = evolve(params, prompt_logprobs=None) if params.prompt_logprobs is not None else params
    max_new = max_model_len if params.max_tokens is None else params.max_tokens
    return [
        Sequence(
            request=request,
            request_id=request.request_id,
            index=index,
            params=sibling_params if index else params,
            rank=(request.priority, arrival, index),
            token_ids=list(request.prompt_token_ids),
            prompt_len=prompt_len,
            max_len=min(prompt_len + max_new, max_model_len),
            stop_ids=request.stop_ids,
            watched_ids=request.stop_ids | {NOT_FINITE},
        )
        for index in range(params.n)
    ]
