"""Whatever arrives, in whatever order and however little room there is, everyone gets the tokens the model defines."""

from __future__ import annotations

from itertools import count
from typing import Any

from core.tests.scheduling.driver import Driver, limits
from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.errors import RequestError
from paddock.request import Request, SamplingParams
from paddock.scheduling.limits import SchedulerLimits
from paddock.testing.fakes import FakeModel


@st.composite
def small_limits(draw: st.DrawFn) -> SchedulerLimits:
    """Draw limits that are often just enough for one sequence."""
    page_size, length = draw(st.integers(1, 4)), draw(st.sampled_from((2, 7, 16, 20, 24)))
    seqs = draw(st.sampled_from((4, 2, 6, 1)))
    needed = -(-length // page_size)
    return limits(
        seqs=seqs,
        tokens=seqs + draw(st.sampled_from((0, 1, 3, 16, 64))),
        length=length,
        pages=needed + draw(st.sampled_from((0, 1, 2, 3, 5, 40))),
        page_size=page_size,
        queue=draw(st.sampled_from((4, 100, 100))),
        caching=draw(st.booleans()),
    )


# Few different tokens and prompts that repeat themselves: prefixes are shared often, and differ late.
prompts = st.tuples(st.sampled_from(((0,), (1,), (0, 1))), st.integers(1, 6), st.sampled_from(((), (2,), (0, 0)))).map(
    lambda parts: parts[0] * parts[1] + parts[2]
)
options: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"max_tokens": st.sampled_from((None, 4, 6, 12, 20))},
    optional={
        "min_tokens": st.sampled_from((0, 4)),
        "n": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "logprobs": st.integers(0, 1),
        "prompt_logprobs": st.integers(0, 1),
        "stop_token_ids": st.sets(st.integers(0, 10), max_size=1),
        "ignore_eos": st.booleans(),
    },
)
arrivals = st.fixed_dictionaries(
    {
        "prompt_token_ids": prompts,
        "params": options.map(lambda chosen: SamplingParams(**chosen)),
        "priority": st.integers(-1, 1),
        "cache_salt": st.sampled_from(("", "", "tenant")),
        "eos_ids": st.sampled_from((frozenset[int](), frozenset({3}))),
    }
)
events = st.lists(
    st.one_of(
        arrivals,
        arrivals,
        st.integers(1, 6),  # steps
        st.tuples(st.integers(0, 12), st.sampled_from((None, None, 0, 1))),  # abort: request, index
    ),
    min_size=6,
    max_size=24,
)


def play(driver: Driver, story: list[Any], *, patience: int = 1) -> None:
    """Let arrivals, steps and aborts happen in order, then run until nothing is left to do, `patience` times as long."""
    for event in story:
        if isinstance(event, dict):
            try:
                driver.add(Request(request_id=f"r{len(driver.requests)}", **event))
            except RequestError:
                driver.scheduler.check()
        elif isinstance(event, tuple):
            driver.abort(f"r{event[0]}", event[1])
        else:
            for _ in range(event):
                driver.step()
    driver.run(max_steps=patience * (len(driver.outcomes) + 1) ** 2 * driver.scheduler.limits.max_model_len)


@settings(max_examples=200, deadline=None)
@given(limits=small_limits(), depth=st.integers(0, 1), story=events, not_finite_every=st.sampled_from((0, 0, 0, 13)))
def test_every_request_ends_with_the_tokens_the_model_defines(
    limits: SchedulerLimits, depth: int, story: list[Any], not_finite_every: int
) -> None:
    """Every sequence gets its tokens exactly, in a bounded number of steps, and every page comes back."""
    driver = Driver(limits, depth=depth, model=FakeModel(not_finite_every=not_finite_every))
    play(driver, story)
    driver.check_outcomes()


@settings(max_examples=100, deadline=None)
@given(limits=small_limits(), depth=st.integers(0, 1), crowd=st.lists(arrivals, min_size=3, max_size=8))
def test_a_crowd_in_a_tiny_pool_does_not_livelock(limits: SchedulerLimits, depth: int, crowd: list[dict[str, Any]]) -> None:
    """Requests that arrive together and cannot run together end all the same, none with an abort or an error."""
    driver = Driver(limits, depth=depth)
    play(driver, crowd)
    driver.check_outcomes()
    assert {outcome.finish_reason for outcome in driver.outcomes.values()} <= {"stop", "length"}


@settings(max_examples=200, deadline=None)
@given(
    limits=small_limits(),
    depth=st.integers(0, 1),
    story=events,
    times=st.sets(st.integers(0, 40), max_size=12),
    not_finite_every=st.sampled_from((0, 0, 0, 13)),
)
def test_whenever_memory_runs_out_nobody_loses_a_token(
    limits: SchedulerLimits, depth: int, story: list[Any], times: set[int], not_finite_every: int
) -> None:
    """Steps that find too little memory, at whatever times, change no token, and every page comes back."""
    asked = count()
    model = FakeModel(not_finite_every=not_finite_every)
    driver = Driver(limits, depth=depth, model=model, fits=lambda step: next(asked) not in times or step.num_tokens == 1)
    play(driver, story, patience=1 + len(times))
    driver.check_outcomes()


@settings(max_examples=200, deadline=None)
@given(limits=small_limits(), depth=st.integers(0, 1), story=events, most=st.integers(1, 12), weight=st.integers(0, 3))
def test_a_device_with_room_for_small_steps_serves_everyone(
    limits: SchedulerLimits, depth: int, story: list[Any], most: int, weight: int
) -> None:
    """However few tokens fit, with whatever a sampled row costs beside its token, everyone gets his own in the end."""
    driver = Driver(limits, depth=depth, fits=lambda step: step.num_tokens + weight * step.num_samples <= max(most, 1 + weight))
    play(driver, story, patience=10)
    driver.check_outcomes()
    assert {outcome.finish_reason for outcome in driver.outcomes.values()} <= {"stop", "length", "abort"}
