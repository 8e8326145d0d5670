"""Who runs in the next step, and what came of the last.

`schedule()` may run ahead: one earlier step may still be uncommitted, so it decides by counts and never by the values of
tokens in flight. What it decided wrongly for want of a value costs little: a sequence that turns out to have ended drops its
one surplus token, and one preempted with a token in flight keeps that token when it arrives.

Slots and pages are free for the next `schedule()` the moment a sequence ends or is preempted, though a step in flight may
still read and write them. That is safe because steps run on the device in the order in which they were scheduled: whoever
gets the page next writes it in a later step, and nobody reads a row that his own steps, or those of the sequence he shares
a full block with, have not written before. A surplus token writes behind the last token kept, so never into a named block.
For the same reason a block can be shared as soon as its computation is scheduled. Every scheduled step must be launched, or
taken back before anything else happens.

Nobody starves. A prompt is admitted only with pages for all of it, so a prefill never waits for pages; a decode that needs
one takes it from the running sequence with the highest rank, at last from itself. So the running sequence of lowest rank
advances with every step, and as waiting sequences are admitted strictly by rank and keep theirs when preempted, each
becomes the lowest in turn. One alone always fits, because the pool holds a sequence of max_model_len.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable

from attrs import define, field

from paddock.errors import RequestError
from paddock.request import Request
from paddock.scheduling.allowance import StepAllowance
from paddock.scheduling.blocks import BlockPool, extend_chain
from paddock.scheduling.limits import SchedulerLimits
from paddock.scheduling.sequence import Sequence, Stage, sequences_of
from paddock.scheduling.step import NOT_FINITE, PrefillChunk, SequenceUpdate, Step, StepResult
from paddock.scheduling.waiting import WaitingQueue

_RUNNING = (Stage.PREFILLING, Stage.DECODING)


def _rank(seq: Sequence) -> tuple[int, int, int]:
    return seq.rank


@define
class _Scheduled:
    """A step on its way, with the sequences behind its slots: a slot may have a new holder before the step is committed."""

    step: Step
    sampled: list[Sequence] = field(factory=list)  # in the order of the results
    prefilled: list[Sequence] = field(factory=list)  # in the order of step.prefills
    started: list[Sequence] = field(factory=list)  # that never had a slot before
    named_pages: list[int] = field(factory=list)  # which others may share, though only this step fills them


class Scheduler:
    """Chooses the sequences of each step under the limits, and ends them when their time has come."""

    def __init__(self, limits: SchedulerLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_pages)
        self._allowance = StepAllowance(limits.max_num_batched_tokens)
        self._clock = clock
        self._waiting = WaitingQueue(limits.max_queue)
        self._prefilling: list[Sequence] = []  # these two by rank
        self._decoding: list[Sequence] = []
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._requests: dict[str, list[Sequence]] = {}  # what has not ended
        self._in_flight: deque[_Scheduled] = deque()
        self._any_ended = False  # since the running ones were last swept
        self._num_arrived = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        """Return whether a request has not ended or a step is not committed."""
        return bool(self._requests or self._in_flight)

    @property
    def num_waiting(self) -> int:
        """Return how many sequences wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Return how many sequences hold a slot."""
        return len(self._prefilling) + len(self._decoding)

    def add(self, request: Request) -> None:
        """Queue a request's n sequences; raise RequestError, with nothing changed, if it can never run or not now."""
        rid, prompt_len, limit = request.request_id, len(request.prompt_token_ids), self.limits.max_model_len
        if rid in self._requests:
            raise RequestError(f"request {rid!r} is already here", fix="give every request an id of its own")
        if not prompt_len:
            raise RequestError(f"request {rid!r} has an empty prompt", fix="give at least one token")
        if prompt_len >= limit:
            raise RequestError(
                f"request {rid!r} has a prompt of {prompt_len} tokens: max_model_len {limit} leaves no room for a new one",
                fix=f"shorten the prompt to at most {limit - 1} tokens, or raise max_model_len",
            )
        self._waiting.check_room(rid, request.params.n)
        self._requests[rid] = sequences_of(request, self._num_arrived, limit)
        self._num_arrived += 1
        for seq in self._requests[rid]:
            self._waiting.push(seq)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceUpdate]:
        """End a request's sequences, or the one at `index`, and return their updates: none if unknown or ended already."""
        ended = [seq for seq in self._requests.get(request_id, ()) if index is None or seq.index == index]
        for seq in ended:
            self._end(seq)
        self._sweep()
        return [_ended(seq, [], "abort") for seq in ended]

    def fail(self) -> None:
        """End everything without a word, after a step that could not run; named blocks may never have been computed."""
        for seq in [seq for unfinished in self._requests.values() for seq in unfinished]:
            self._end(seq)
        self._in_flight.clear()
        self._sweep()
        self.pool.forget()

    def schedule(self) -> Step | None:
        """Return the next step, or None if nothing can run before the step in flight is committed; launch what it returns."""
        assert len(self._in_flight) <= 1, "two steps are uncommitted already"
        scheduled = _Scheduled(Step(self._num_steps))
        self._decode(scheduled)
        budget = self._allowance.tokens - len(scheduled.sampled)
        assert budget >= 0, "more sequences decode than a step has tokens"
        if self._prefilling:
            budget = self._continue_prefills(scheduled, budget)
        if self._waiting:
            self._admit(scheduled, budget)
        if not scheduled.sampled and not scheduled.prefilled:
            return None
        self._num_steps += 1
        self._in_flight.append(scheduled)
        return scheduled.step

    def commit(self, step: Step, result: StepResult) -> list[SequenceUpdate]:
        """Take the results of the oldest uncommitted step and return what they mean for its sequences."""
        scheduled = self._in_flight.popleft()
        assert scheduled.step.number == step.number, "steps are committed in the order they were scheduled"
        for i, prompt_logprobs in result.prompt_logprobs.items():
            scheduled.prefilled[i].keep_prompt_logprobs(scheduled.step.prefills[i].start, prompt_logprobs)
        updates: list[SequenceUpdate] = []
        logprobs = result.logprobs
        for i, (seq, token) in enumerate(zip(scheduled.sampled, result.token_ids, strict=True)):
            if token in seq.watched_ids or len(seq.token_ids) >= seq.token_edge:
                update = self._settle(seq, token)
                if update is None:
                    continue
            else:
                seq.token_ids.append(token)
                update = SequenceUpdate(seq.request_id, seq.index, [token])
            if logprobs:
                update.logprobs = logprobs.get(i)
            updates.append(update)
        self._sweep()
        self._allowance.count_committed()
        return updates

    def take_back(self, step: Step) -> list[SequenceUpdate]:
        """Undo the step scheduled last, for which the device lacked memory: none of it has run, and the next ones are smaller.

        Every running sequence is preempted, for nobody knows how far the launch changed its slot; a token of an earlier step
        still arrives. A step of one token that does not fit ends its sequence, and the update that says so is returned.
        """
        scheduled = self._in_flight.pop()
        assert scheduled.step.number == step.number, "the step scheduled last is taken back, and right away"
        self._num_steps -= 1
        for seq in scheduled.started:
            seq.first_scheduled, seq.num_cached_tokens = None, 0
        for seq in scheduled.sampled:
            seq.computed -= 1  # of the tokens that were to come, the last one will not
        for running in (self._prefilling, self._decoding):
            while running:
                self._preempt(running[-1])
        self.pool.free_unfilled(scheduled.named_pages)
        if self._allowance.shrink_below(step):
            return []
        (seq,) = scheduled.sampled or scheduled.prefilled
        if seq.tokens_owed:
            return []  # the token in flight may be its last; and memory may suffice once that step has left the device
        self._end(seq)
        return [_ended(seq, [], "error", error=_too_large(seq))]

    # -- what runs ------------------------------------------------------------------------------------------------------

    def _decode(self, scheduled: _Scheduled) -> None:
        """Take the next token of every decoding sequence, lowest rank first; who is preempted here has a higher rank."""
        slots, positions, sampled = scheduled.step.decode_slots, scheduled.step.decode_positions, scheduled.sampled
        for seq in self._decoding:
            position = seq.computed
            if position >= seq.page_edge and not self._extend(seq, scheduled.step):
                continue
            seq.computed = position + 1
            slots.append(seq.slot)
            positions.append(position)
            sampled.append(seq)

    def _extend(self, seq: Sequence, step: Step) -> bool:
        """Give a decoding sequence one more page and return True, or False if it is at its end or was preempted itself."""
        if seq.computed >= seq.max_len - 1:
            return False  # the token at its last position is in flight, and nothing follows it
        while not self.pool.num_available:
            victim = max((running[-1] for running in (self._prefilling, self._decoding) if running), key=_rank)
            self._preempt(victim)
            if victim is seq:
                return False
        page = self.pool.grant(1)
        step.pages.append((seq.slot, len(seq.pages), page))
        seq.pages += page
        self._set_page_edge(seq)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take slot and pages from the last of the running sequences and queue it; its tokens are computed anew later."""
        running = self._prefilling if seq.stage is Stage.PREFILLING else self._decoding
        assert running.pop() is seq
        if seq.stage is Stage.DECODING:
            seq.tokens_owed = seq.computed + 1 - len(seq.token_ids)
        self._give_up(seq)
        seq.stage = Stage.WAITING
        self._waiting.push(seq)

    def _continue_prefills(self, scheduled: _Scheduled, budget: int) -> int:
        """Take further chunks of started prompts, lowest rank first, and return what is left of the budget."""
        for seq in self._prefilling:
            if budget:
                budget -= self._prefill(seq, scheduled, budget)
        self._prefilling = [seq for seq in self._prefilling if seq.stage is Stage.PREFILLING]
        return budget

    def _prefill(self, seq: Sequence, scheduled: _Scheduled, budget: int) -> int:
        """Take a chunk of at most `budget` tokens and return its size; with the last chunk the sequence decodes."""
        start, known = seq.computed, len(seq.token_ids)
        seq.computed = end = min(start + budget, known)
        scheduled.step.prefills.append(PrefillChunk(seq.slot, start, seq.token_ids[start:end], end == known))
        scheduled.prefilled.append(seq)
        scheduled.named_pages += self._name_blocks(seq, end)
        if end == known:
            scheduled.sampled.append(seq)
            seq.stage = Stage.DECODING
            insort(self._decoding, seq, key=_rank)
        return end - start

    def _admit(self, scheduled: _Scheduled, budget: int) -> None:
        """Start waiting sequences strictly by rank, as long as budget, slots and pages last.

        One page stays available for each running sequence, or a newcomer would often be preempted a few steps on. Siblings
        of a prompt in several chunks come after its last chunk, for a chunk that is not the last leaves no budget; they find
        all its full blocks named.
        """
        while budget and self._free_slots and self.pool.num_available > self.num_running:
            seq = self._waiting.first()
            if seq is None or not self._place(seq, scheduled):
                return
            budget -= self._prefill(seq, scheduled, budget)
            if seq.stage is Stage.PREFILLING:
                insort(self._prefilling, seq, key=_rank)

    def _place(self, seq: Sequence, scheduled: _Scheduled) -> bool:
        """Give the first of the queue a slot and pages for all its tokens, shared where cached; False if they do not fit."""
        if seq.tokens_owed:
            return False  # preempted a step ago; what it is computed from is still in flight
        shared = self._cached_pages(seq)
        missing = -(-len(seq.token_ids) // self.limits.page_size) - len(shared)
        if missing + self.num_running > self.pool.num_available - self.pool.num_idle(shared):
            return False
        self.pool.share(shared)
        seq.pages = shared + self.pool.grant(missing)
        seq.slot = self._free_slots.pop()
        seq.stage = Stage.PREFILLING
        seq.num_named = len(shared)
        seq.computed = len(shared) * self.limits.page_size
        self._set_page_edge(seq)
        if seq.first_scheduled is None:
            seq.first_scheduled = self._clock()
            seq.num_cached_tokens = seq.computed
            scheduled.started.append(seq)
        scheduled.step.admissions.append(seq.admission())
        scheduled.step.pages.append((seq.slot, 0, seq.pages.copy()))
        return self._waiting.pop() is seq

    def _cached_pages(self, seq: Sequence) -> list[int]:
        """Return the pages that hold its first blocks already; its last known token is computed in any case."""
        if not self.limits.enable_prefix_caching:
            return []
        extend_chain(seq.chain, seq.token_ids, self.limits.page_size, seq.request.cache_salt)
        if seq.wants_prompt_logprobs:
            return []
        return self.pool.match(seq.chain[: (len(seq.token_ids) - 1) // self.limits.page_size])

    def _set_page_edge(self, seq: Sequence) -> None:
        seq.page_edge = min(len(seq.pages) * self.limits.page_size, seq.max_len - 1)

    # -- what came of it ------------------------------------------------------------------------------------------------

    def _settle(self, seq: Sequence, token: int) -> SequenceUpdate | None:
        """Return the update for a token that may end its sequence, fill a block, be the first, be owed or be surplus."""
        if seq.stage is Stage.ENDED:
            return None
        if seq.stage is Stage.WAITING:
            seq.tokens_owed -= 1
        if token == NOT_FINITE:
            self._end(seq, forget=True)
            return _ended(seq, [], "error", error=f"the model's logits were NaN or infinite after {len(seq.token_ids)} tokens")
        if seq.stage is Stage.DECODING:
            self._name_blocks(seq, len(seq.token_ids))
        seq.token_ids.append(token)
        verdict = seq.verdict()
        if verdict:
            self._end(seq)
            return _ended(seq, [token], verdict[0], stop_reason=verdict[1])
        if seq.stage is Stage.DECODING:
            self._set_token_edge(seq)
        return seq.update([token])

    def _name_blocks(self, seq: Sequence, computed: int) -> list[int]:
        """Let the full blocks among its first `computed` tokens, all known, be found by others; return their pages."""
        first, end = seq.num_named, computed // self.limits.page_size
        if not self.limits.enable_prefix_caching or end <= first:
            return []
        extend_chain(seq.chain, seq.token_ids, self.limits.page_size, seq.request.cache_salt)
        while seq.num_named < end:
            self.pool.name(seq.pages[seq.num_named], seq.chain[seq.num_named])
            seq.num_named += 1
        return seq.pages[first:end]

    def _set_token_edge(self, seq: Sequence) -> None:
        block_end = (seq.num_named + 1) * self.limits.page_size
        seq.token_edge = min(seq.max_len - 1, block_end) if self.limits.enable_prefix_caching else seq.max_len - 1

    def _end(self, seq: Sequence, *, forget: bool = False) -> None:
        """Take everything from a sequence that ended; with `forget` others find none of the blocks it alone holds."""
        was, seq.stage = seq.stage, Stage.ENDED
        self._any_ended = True
        if was in _RUNNING:
            self._give_up(seq, forget=forget)
        elif was is Stage.WAITING:
            self._waiting.discard(seq)
        unfinished = self._requests[seq.request_id]
        unfinished.remove(seq)
        if not unfinished:
            del self._requests[seq.request_id]

    def _give_up(self, seq: Sequence, *, forget: bool = False) -> None:
        """Return slot and pages; tokens still in flight have to be looked at closely."""
        self._free_slots.append(seq.slot)
        self.pool.release(seq.pages, forget=forget)
        seq.pages = []
        seq.computed = seq.num_named = seq.token_edge = 0

    def _sweep(self) -> None:
        """Drop ended sequences from the running ones."""
        if not self._any_ended:
            return
        self._any_ended = False
        self._prefilling = [seq for seq in self._prefilling if seq.stage is not Stage.ENDED]
        self._decoding = [seq for seq in self._decoding if seq.stage is not Stage.ENDED]

    def check(self) -> None:
        """Assert that slots, pages, queue and running sequences agree; for tests, it looks at everything."""
        running = self._prefilling + self._decoding
        self.pool.check(page for seq in running for page in seq.pages)
        self._waiting.check()
        assert sorted(self._free_slots + [seq.slot for seq in running]) == list(range(self.limits.max_num_seqs)), "a slot is lost"
        assert sum(map(len, self._requests.values())) == len(running) + len(self._waiting), "a sequence is lost"
        for stage, seqs in zip(_RUNNING, (self._prefilling, self._decoding), strict=True):
            assert all(seq.stage is stage for seq in seqs), f"a sequence that is not {stage.value} is listed as such"
            assert seqs == sorted(seqs, key=_rank), "running sequences are out of order"
        for seq in running:
            assert seq.computed <= len(seq.pages) * self.limits.page_size, "a token has no page"
            assert max(seq.computed, len(seq.token_ids)) < seq.max_len, "a sequence is past its end"


def _ended(
    seq: Sequence, token_ids: list[int], finish_reason: str, *, stop_reason: int | None = None, error: str | None = None
) -> SequenceUpdate:
    update = seq.update(token_ids)
    update.finish_reason, update.stop_reason, update.error = finish_reason, stop_reason, error
    return update


def _too_large(seq: Sequence) -> str:
    return (
        f"the device has too little memory for a step of one token, after {len(seq.token_ids)} tokens: free it of other "
        "programs, or lower gpu_memory_utilization or max_num_seqs"
    )
