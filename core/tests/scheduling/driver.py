"""Runs a scheduler against the strict fake runner, as the engine would, and knows what every request has to end with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import define, field

from paddock.request import Request, SamplingParams, TokenLogprobs
from paddock.scheduling.limits import SchedulerLimits
from paddock.scheduling.scheduler import Scheduler
from paddock.scheduling.step import NOT_FINITE, SequenceUpdate, Step
from paddock.testing.fakes import FakeInFlight, FakeModel, FakeRunner

Key = tuple[str, int]  # request id and index


def limits(
    *,
    seqs: int = 4,
    tokens: int = 64,
    length: int = 32,
    pages: int = 64,
    page_size: int = 4,
    queue: int = 100,
    caching: bool = True,
) -> SchedulerLimits:
    """Return small limits."""
    return SchedulerLimits(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=length,
        num_pages=pages,
        page_size=page_size,
        max_queue=queue,
        enable_prefix_caching=caching,
    )


def request(request_id: str, prompt: int | tuple[int, ...], *, priority: int = 0, salt: str = "", **options: Any) -> Request:
    """Return a request; a whole number is the length of a prompt that no other request id shares."""
    if isinstance(prompt, int):
        prompt = own_prompt(request_id, prompt)
    params = SamplingParams(**options)
    return Request(request_id=request_id, prompt_token_ids=prompt, params=params, priority=priority, cache_salt=salt)


def own_prompt(request_id: str, length: int) -> tuple[int, ...]:
    """Return `length` tokens that spell the request's name, so that the prompts of two requests share no block."""
    name = request_id.encode()
    return tuple(name[i % len(name)] + 1000 * i for i in range(length))


def expected(model: FakeModel, request: Request, index: int, max_model_len: int) -> tuple[list[int], str, int | None]:
    """Return the tokens, finish reason and stop reason the fake model and the request's own words define."""
    params = request.params
    seed = None if params.seed is None else params.seed + index
    room = max_model_len - len(request.prompt_token_ids)
    room = room if params.max_tokens is None else min(room, params.max_tokens)
    tokens = model.generate(list(request.prompt_token_ids), room, seed)
    for count, token in enumerate(tokens, start=1):
        if token in request.stop_ids and count >= params.min_tokens:
            return tokens[:count], "stop", token
        if token == NOT_FINITE:
            return tokens[: count - 1], "error", None
    return tokens, "length", None


@define
class Outcome:
    """What the updates of one sequence add up to."""

    token_ids: list[int] = field(factory=list)
    updates: list[SequenceUpdate] = field(factory=list)
    logprobs: list[TokenLogprobs | None] = field(factory=list)

    @property
    def finish_reason(self) -> str | None:
        """Return why it ended, None while it runs."""
        return self.updates[-1].finish_reason if self.updates else None


class Driver:
    """A scheduler, a runner and the loop between them, with `depth` steps (0 or 1) in flight while the next is scheduled.

    A step that does not fit (`fits`) the device's memory is taken back.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        depth: int = 0,
        model: FakeModel | None = None,
        fits: Callable[[Step], bool] = lambda step: True,
    ) -> None:
        self.scheduler = Scheduler(limits, clock=lambda: float(self.runner.num_launched))
        self.model = model or FakeModel()
        self.runner = FakeRunner(
            model=self.model,
            num_slots=limits.max_num_seqs,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            overlaps=bool(depth),
        )
        self.depth, self.fits = depth, fits
        self.in_flight: FakeInFlight | None = None
        self.outcomes: dict[Key, Outcome] = {}
        self.requests: dict[str, Request] = {}
        self.steps: list[Step] = []
        self.taken_back: list[Step] = []
        self._fresh: dict[str, tuple[int, int]] = {}  # requests nothing of which has run: priority, arrival

    def add(self, request: Request) -> None:
        """Add a request to the scheduler."""
        self.scheduler.add(request)
        self._fresh[request.request_id] = request.priority, len(self.requests)
        self.requests[request.request_id] = request
        self.outcomes |= {(request.request_id, index): Outcome() for index in range(request.params.n)}

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Abort a request, or one of its sequences."""
        if index in (None, 0):
            self._fresh.pop(request_id, None)
        self._take(self.scheduler.abort(request_id, index))
        self.scheduler.check()

    def step(self) -> Step | None:
        """Schedule, launch and commit as the engine does, and hold the scheduler to its invariants."""
        step = self.scheduler.schedule()
        assert step or self.in_flight or not self.scheduler.has_work, "there is work, but nothing runs"
        launched = self._launch(step) if step else None
        arrived, self.in_flight = (self.in_flight, launched) if self.depth else (launched, None)
        self.scheduler.check()
        if arrived:
            self._take(self.scheduler.commit(arrived.step, arrived.result()))
        self.scheduler.check()
        return step

    def _launch(self, step: Step) -> FakeInFlight | None:
        if not self.fits(step):
            self.taken_back.append(step)
            self._take(self.scheduler.take_back(step))
            return None
        self._check_admissions(step)
        self.steps.append(step)
        return self.runner.launch(step)

    def run(self, max_steps: int = 10_000) -> None:
        """Step until nothing is left to do; fail after `max_steps`."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"not done after {max_steps} steps"
        assert self.scheduler.pool.num_used == 0, "pages have leaked"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    def check_outcome(self, request_id: str, index: int = 0) -> None:
        """Assert that a sequence ended with exactly what the fake model defines, or before that by abort."""
        outcome, wanted = self.outcomes[request_id, index], self.requests[request_id]
        tokens, reason, stop_reason = expected(self.model, wanted, index, self.scheduler.limits.max_model_len)
        if outcome.finish_reason == "abort":
            assert outcome.token_ids == tokens[: len(outcome.token_ids)]
        else:
            assert (outcome.token_ids, outcome.finish_reason) == (tokens, reason)
            assert outcome.updates[-1].stop_reason == stop_reason
        history = list(wanted.prompt_token_ids) + tokens
        states = self.model.states(history)
        start = len(wanted.prompt_token_ids)
        if wanted.params.logprobs is not None:
            count = len(outcome.token_ids)
            assert outcome.logprobs == [self.model.logprobs(states[i - 1], history[i]) for i in range(start, start + count)]
        if wanted.params.prompt_logprobs is not None and outcome.token_ids and index == 0:
            whole = [None, *(self.model.logprobs(states[i - 1], history[i]) for i in range(1, start))]
            assert outcome.updates[0].prompt_logprobs == whole
        assert all(update.prompt_logprobs is None for update in outcome.updates[1:])

    def check_outcomes(self) -> None:
        """Assert this of every sequence."""
        for request_id, index in self.outcomes:
            self.check_outcome(request_id, index)

    def _take(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            outcome = self.outcomes[update.request_id, update.index]
            assert outcome.finish_reason is None, "an ended sequence gets an update"
            outcome.updates.append(update)
            outcome.token_ids += update.token_ids
            outcome.logprobs += [update.logprobs] * len(update.token_ids)

    def _check_admissions(self, step: Step) -> None:
        for admission in step.admissions:
            rid = admission.sequence_id.rpartition("#")[0]
            rank = self._fresh.pop(rid, None)
            if rank is not None:
                assert all(rank < other for other in self._fresh.values()), f"{rid} passes a request of lower rank"
