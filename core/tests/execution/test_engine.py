"""The engine over a real scheduler: the same tokens at either depth, errors that harm nobody else, observers."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import deque
from typing import Any

import attrs
import pytest
import torch

from paddock.errors import RequestError
from paddock.execution.engine import Engine
from paddock.request import Request, SamplingParams
from paddock.scheduling.limits import SchedulerLimits
from paddock.scheduling.scheduler import Scheduler


@attrs.define
class Overlapping:
    """A runner that overlaps: it runs a step when the next is launched, or when its result is asked for."""

    inner: Any
    vocab_size: int
    overlaps: bool = True
    queue: deque[Late] = attrs.field(factory=deque)
    closed: int = 0

    def launch(self, step: Any) -> Any:
        """Queue the step, after running those before it."""
        self.drain()
        self.queue.append(Late(self, step))
        return self.queue[-1]

    def drain(self) -> None:
        """Run what is queued."""
        while self.queue:
            late = self.queue.popleft()
            late.done = self.inner.launch(late.step)

    def recover(self) -> None:
        """Wait for what is queued."""
        self.drain()

    def close(self) -> None:
        """Count."""
        self.closed += 1


@attrs.define
class Late:
    """A step that has not run yet."""

    runner: Overlapping
    step: object
    done: Any = None

    def result(self) -> Any:
        """Return what it sampled."""
        self.runner.drain()
        return self.done.result()


@attrs.define
class Cramped:
    """A runner on a device that has room for steps of so many tokens."""

    inner: Any
    most: int
    failed: list[int] = attrs.field(factory=list)  # tokens of each step there was no room for
    kept: list[weakref.ref[Any]] = attrs.field(factory=list)  # what those launches had allocated
    recovered: list[bool] = attrs.field(factory=list)  # whether that was gone by then

    @property
    def overlaps(self) -> Any:
        """Return the inner one's."""
        return self.inner.overlaps

    @property
    def vocab_size(self) -> Any:
        """Return the inner one's."""
        return self.inner.vocab_size

    def launch(self, step: Any) -> Any:
        """Launch a step that fits, and fail in the middle of one that does not."""
        if step.num_tokens > self.most:
            activations = torch.zeros(3)
            self.kept.append(weakref.ref(activations))
            self.failed.append(step.num_tokens)
            raise torch.OutOfMemoryError(f"out of memory beside {len(activations)} floats")
        return self.inner.launch(step)

    def recover(self) -> None:
        """Note whether the launch still holds anything."""
        self.recovered.append(self.kept[-1]() is None)

    def close(self) -> None:
        """Close the inner one."""
        self.inner.close()


def engine_on(
    rig: Any, *, overlaps: bool = False, observers: Any = (), num_pages: Any = 20, wrap: Any = None, **limits: Any
) -> Any:
    """Return an engine, its scheduler and the model of a rig; `wrap` puts a launcher around the runner."""
    made = rig(num_pages=num_pages)
    chosen = {"max_num_seqs": 4, "max_num_batched_tokens": 11, "max_model_len": 48, "num_pages": num_pages, "page_size": 4}
    scheduler = Scheduler(SchedulerLimits(**(chosen | limits)))
    runner: Any = Overlapping(made.runner, made.runner.vocab_size) if overlaps else made.runner
    runner, ticks = wrap(runner) if wrap else runner, itertools.count()
    return Engine(scheduler, runner, observers, clock=lambda: float(next(ticks))), scheduler, made.model


def request(name: str, prompt: Any, count: int, **more: Any) -> Any:
    """Return a greedy request."""
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **more)
    return Request(request_id=name, prompt_token_ids=tuple(prompt), params=params)


def run(engine: Any, limit: int = 500) -> Any:
    """Return each request's tokens and how it ended, once all have."""
    tokens: dict[str, list[int]] = {}
    reasons: dict[str, Any] = {}
    for _ in range(limit):
        if not engine.has_work:
            return tokens, reasons
        for update in engine.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
            if update.finish_reason is not None:
                reasons[update.request_id] = update.finish_reason
    raise AssertionError("the engine does not come to an end")


PROMPTS = {f"r{i}": [(i * 7 + j * 3) % 32 for j in range(1 + (i * 5) % 19)] for i in range(9)}


@pytest.mark.parametrize("overlaps", [False, True])
def test_crowded_requests_get_the_models_tokens(rig: Any, overlaps: bool) -> None:
    """Nine requests on four slots and too few pages, chunked, preempted and resumed, each get their greedy continuation."""
    engine, scheduler, model = engine_on(rig, overlaps=overlaps)
    for name, prompt in PROMPTS.items():
        engine.add(request(name, prompt, 20))
    tokens, reasons = run(engine)
    assert tokens == {name: model.greedy(prompt, 20) for name, prompt in PROMPTS.items()}
    assert set(reasons.values()) == {"length"}
    scheduler.check()
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_stopped_sequence_drops_its_surplus_token(rig: Any, overlaps: bool) -> None:
    """A stop id ends a request with that token, though the next step was launched already where steps overlap."""
    engine, _, model = engine_on(rig, overlaps=overlaps)
    whole = model.greedy([5, 6], 12)
    engine.add(request("r", [5, 6], 12, stop_token_ids=[whole[4]]))
    tokens, reasons = run(engine)
    assert tokens["r"] == whole[: whole.index(whole[4]) + 1]
    assert reasons == {"r": "stop"}


@pytest.mark.parametrize("overlaps", [False, True])
def test_an_aborted_request_leaves_the_others_alone(rig: Any, overlaps: bool) -> None:
    """Abort in the middle of a run ends one request at once; the other gets all its tokens."""
    engine, scheduler, model = engine_on(rig, overlaps=overlaps)
    engine.add(request("gone", [1, 2, 3], 30))
    engine.add(request("stays", [4, 5], 12))
    early = [update for _ in range(4) for update in engine.step()]
    (last,) = engine.abort("gone")
    assert last.finish_reason == "abort"
    assert engine.abort("gone") == []
    tokens, _ = run(engine)
    assert "gone" not in tokens
    stays = [token for update in early if update.request_id == "stays" for token in update.token_ids]
    assert stays + tokens["stays"] == model.greedy([4, 5], 12)
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_step_that_raises_ends_every_request_and_poisons_nothing(
    rig: Any, monkeypatch: pytest.MonkeyPatch, overlaps: bool
) -> None:
    """The error comes through; then pages and slots are free, no half-computed block is shared, and new requests run."""
    engine, scheduler, model = engine_on(rig, overlaps=overlaps)
    engine.add(request("before", [9] * 9, 3))
    forward, calls = model.forward, itertools.count()

    def breaks(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return forward(*arguments)

    monkeypatch.setattr(model, "forward", breaks)
    engine.step()
    engine.add(request("shares", [8] * 9, 3))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine)
    scheduler.check()
    assert not engine.has_work
    assert scheduler.pool.num_used == 0
    for prompt in ([9] * 9, [8] * 9):
        engine.add(request(f"after {prompt[0]}", prompt, 3))
    assert run(engine)[0] == {"after 9": model.greedy([9] * 9, 3), "after 8": model.greedy([8] * 9, 3)}


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_step_without_memory_is_taken_back_and_smaller_ones_follow(rig: Any, overlaps: bool) -> None:
    """Where eleven tokens do not fit but five do, everyone gets the model's tokens; the failed launch holds nothing by then."""
    cramped: list[Cramped] = []
    heard: list[Any] = []

    def wrap(runner: Any) -> Any:
        cramped.append(Cramped(runner, most=5))
        return cramped[0]

    engine, scheduler, model = engine_on(rig, overlaps=overlaps, wrap=wrap, observers=(heard.append,))
    for name, prompt in PROMPTS.items():
        engine.add(request(name, prompt, 20))
    tokens, reasons = run(engine, limit=2000)
    assert tokens == {name: model.greedy(prompt, 20) for name, prompt in PROMPTS.items()}
    assert set(reasons.values()) == {"length"}
    assert cramped[0].failed[0] == 11
    assert len(cramped[0].recovered) == len(cramped[0].failed)
    assert all(cramped[0].recovered)
    assert [stats.number for stats in heard] == list(range(len(heard)))
    scheduler.check()
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_request_for_which_no_step_is_small_enough_ends_alone(rig: Any, overlaps: bool) -> None:
    """On a device with no room at all a request ends with an error that says what to lower; with room again the next one runs."""
    cramped: list[Cramped] = []

    def wrap(runner: Any) -> Any:
        cramped.append(Cramped(runner, most=0))
        return cramped[0]

    engine, scheduler, model = engine_on(rig, overlaps=overlaps, wrap=wrap)
    engine.add(request("lost", [1, 2, 3], 4))
    updates = [update for _ in range(9) if engine.has_work for update in engine.step()]
    assert [update.finish_reason for update in updates] == ["error"]
    assert "one token, after 3 tokens" in updates[0].error
    assert scheduler.pool.num_used == 0
    cramped[0].most = 11
    engine.add(request("next", [1, 2, 3], 4))
    assert run(engine)[0] == {"next": model.greedy([1, 2, 3], 4)}


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_token_ids": (1, 32)},
        {"prompt_token_ids": (-1,)},
        {"params": SamplingParams(logit_bias={99: 1.0})},
        {"bad_words_ids": ((1, 40),)},
    ],
)
def test_token_ids_out_of_range_are_refused_alone(rig: Any, bad: Any) -> None:
    """A request that names a token the model does not have is an error with both numbers; the others never notice."""
    engine, _, model = engine_on(rig)
    engine.add(request("good", [1, 2], 3))
    with pytest.raises(RequestError, match=r"token id -?\d+ .* the vocabulary has 32"):
        engine.add(attrs.evolve(request("bad", [1], 3), **bad))
    assert run(engine)[0] == {"good": model.greedy([1, 2], 3)}


@pytest.mark.parametrize("overlaps", [False, True])
def test_observers_hear_of_every_committed_step_once(rig: Any, overlaps: bool) -> None:
    """Each observer gets the steps' numbers in order, their sizes, and seconds that add up to the turn's."""
    heard: list[Any] = []
    engine, _, _ = engine_on(rig, overlaps=overlaps, observers=(heard.append,))
    engine.add(request("a", [1, 2, 3], 4))
    engine.add(request("b", [4], 4))
    run(engine)
    assert [stats.number for stats in heard] == list(range(len(heard)))
    assert (heard[0].num_tokens, heard[0].num_prefills, heard[0].num_decodes) == (4, 2, 0)
    assert (heard[1].num_tokens, heard[1].num_prefills, heard[1].num_decodes) == (2, 0, 2)
    assert (heard[-1].num_running, heard[-1].num_waiting) == (0, 0)
    assert all(s.schedule_seconds == s.launch_seconds == s.wait_seconds == s.commit_seconds == 1.0 for s in heard)


def test_an_observer_that_raises_leaves_no_request_behind(rig: Any) -> None:
    """Its error comes through, with the updates of that step lost: so every request ends, and new ones run."""
    faults = [ValueError("full disk")]

    def observe(stats: Any) -> None:
        if faults:
            raise faults.pop()

    engine, scheduler, model = engine_on(rig, observers=(observe,))
    engine.add(request("lost", [1, 2, 3], 4))
    with pytest.raises(ValueError, match="full disk"):
        engine.step()
    assert not engine.has_work
    assert scheduler.pool.num_used == 0
    engine.add(request("next", [1, 2, 3], 4))
    assert run(engine)[0] == {"next": model.greedy([1, 2, 3], 4)}


def test_close_ends_everything(rig: Any) -> None:
    """A closed engine has no work and holds no page, whatever was in flight."""
    engine, scheduler, _ = engine_on(rig, overlaps=True)
    engine.add(request("r", [1, 2, 3], 9))
    engine.step()
    engine.close()
    assert not engine.has_work
    assert scheduler.pool.num_used == 0


def test_a_step_fits_on_a_screen() -> None:
    """`Engine.step` stays under fifteen lines."""
    assert len(inspect.getsource(Engine.step).splitlines()) < 15


def test_prompt_logprobs_and_logprobs_reach_the_updates(rig: Any) -> None:
    """A request with both gets a row for every prompt token but the first, in chunks, and one for every new token."""
    engine, _, model = engine_on(rig)
    prompt = list(range(17))
    engine.add(request("r", prompt, 3, prompt_logprobs=1, logprobs=2))
    updates = []
    while engine.has_work:
        updates += engine.step()
    assert [next(iter(update.logprobs)) for update in updates] == model.greedy(prompt, 3)
    rows = updates[0].prompt_logprobs
    assert rows[0] is None
    assert [next(iter(row)) for row in rows[1:]] == prompt[1:]
