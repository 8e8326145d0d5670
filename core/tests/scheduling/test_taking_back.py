"""Steps for which the device lacks memory are undone, smaller ones follow, and what cannot shrink ends alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core.tests.scheduling.driver import Driver, limits, request
from structlog.testing import capture_logs

from paddock.scheduling.allowance import PATIENCE, StepAllowance
from paddock.scheduling.step import PrefillChunk, Step


def at_most(tokens: int) -> Callable[[Step], bool]:
    """Return whether a step fits: those of at most so many tokens do."""
    return lambda step: step.num_tokens <= tokens


def step_of(tokens: int) -> Step:
    """Return a step of one chunk."""
    return Step(0, prefills=[PrefillChunk(0, 0, [7] * tokens, True)])


@pytest.mark.parametrize("depth", [0, 1])
def test_after_a_shortage_steps_are_half_as_large(depth: int) -> None:
    """Sixty tokens do not fit, nor do thirty; fifteen do, and everybody gets his tokens in steps that stay below."""
    driver = Driver(limits(tokens=64, length=64, pages=99), depth=depth, fits=at_most(16))
    for name in "abc":
        driver.add(request(name, 20, max_tokens=6))
    driver.run()
    driver.check_outcomes()
    assert [step.num_tokens for step in driver.taken_back] == [60, 30]
    assert max(step.num_tokens for step in driver.steps) == 15


@pytest.mark.parametrize("depth", [0, 1])
def test_a_crowd_of_decodes_thins_out(depth: int) -> None:
    """Where eight rows are more than can be sampled at once, fewer sequences run at a time."""
    driver = Driver(limits(seqs=8, length=16), depth=depth, fits=lambda step: step.num_samples <= 3)
    for i in range(8):
        driver.add(request(f"r{i}", 4, max_tokens=8))
    driver.run()
    driver.check_outcomes()
    assert max(step.num_samples for step in driver.steps) <= 3


@pytest.mark.parametrize("depth", [0, 1])
def test_blocks_of_a_step_that_did_not_run_are_not_shared(depth: int) -> None:
    """Two sequences share blocks that neither computes in the end: the one that is left computes them, and says so."""
    fits = iter([False])
    driver = Driver(limits(), depth=depth, fits=lambda step: next(fits, True))
    prompt = tuple(range(100, 112))
    driver.add(request("first", prompt, max_tokens=4))
    driver.add(request("second", prompt, max_tokens=4))
    driver.step()
    assert driver.scheduler.pool.num_cached == driver.scheduler.pool.num_used == 0
    driver.abort("first")
    driver.run()
    driver.check_outcome("second")
    assert driver.outcomes["second", 0].updates[0].num_cached_tokens == 0


def test_what_earlier_steps_computed_is_found_again() -> None:
    """A sequence whose third chunk did not fit keeps the blocks of the first two."""
    driver = Driver(limits(tokens=8), fits=lambda step: len(driver.steps) != 2 or step.num_tokens < 8)
    driver.add(request("r", 24, max_tokens=2))
    driver.run()
    driver.check_outcomes()
    assert driver.runner.num_tokens == 25


def test_a_token_in_flight_arrives_although_the_next_step_is_taken_back() -> None:
    """Its sequence is preempted meanwhile, takes the token when it comes, and goes on after it."""
    driver = Driver(limits(), depth=1, fits=lambda step: len(driver.steps) != 3 or len(driver.taken_back) == 1)
    for name in "ab":
        driver.add(request(name, 5, max_tokens=6))
    driver.run()
    driver.check_outcomes()
    assert [step.decode_positions for step in driver.taken_back] == [[7, 7]]
    assert [len(admission.token_ids) for admission in driver.steps[3].admissions] == [5 + 3]
    assert driver.steps[3].num_tokens == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_of_one_token_that_does_not_fit_ends_its_sequence(depth: int) -> None:
    """One request meets a device that takes nothing after its third token: it ends with an error, the next one runs."""
    full: list[str] = []
    driver = Driver(limits(), depth=depth, fits=lambda step: not full)
    driver.add(request("unlucky", 5, max_tokens=9))
    while len(driver.outcomes["unlucky", 0].token_ids) < 3:
        driver.step()
    full.append("now")
    driver.run()
    outcome = driver.outcomes["unlucky", 0]
    assert outcome.finish_reason == "error"
    assert outcome.token_ids == driver.model.generate(list(driver.requests["unlucky"].prompt_token_ids), 9)[: 3 + depth]
    error = outcome.updates[-1].error or ""
    assert f"after {8 + depth} tokens" in error
    assert "lower gpu_memory_utilization" in error
    full.clear()
    driver.add(request("lucky", 5, max_tokens=9))
    driver.run()
    driver.check_outcome("lucky")


def test_a_sequence_that_has_stopped_is_not_blamed_for_its_surplus_step() -> None:
    """The stop token is in flight when the step after it does not fit: the request ends as it would have."""
    driver = Driver(limits(), depth=1, fits=lambda step: len(driver.steps) < 3)
    tokens = driver.model.generate(list(request("r", 5).prompt_token_ids), 3)
    driver.add(request("r", 5, max_tokens=9, stop_token_ids=(tokens[-1],)))
    driver.run()
    driver.check_outcomes()
    assert len(driver.taken_back) == 1


def test_the_allowance_grows_back_and_takes_longer_after_each_vain_attempt() -> None:
    """It doubles after so many steps; after a doubling that came too early, only after twice as many."""
    allowance = StepAllowance(64)
    with capture_logs() as events:
        assert allowance.shrink_below(step_of(16))
        assert allowance.shrink_below(step_of(8))
    assert allowance.tokens == 4
    assert [(event["event"], event["tokens"], event["tokens_allowed"]) for event in events] == [
        ("step_out_of_memory", 16, 8),
        ("step_out_of_memory", 8, 4),
    ]
    for waits in (PATIENCE, 2 * PATIENCE, 4 * PATIENCE):
        for _ in range(waits - 1):
            allowance.count_committed()
        assert allowance.tokens == 4
        allowance.count_committed()
        assert allowance.tokens == 8
        assert allowance.shrink_below(step_of(8))
    for _ in range(4 * 8 * PATIENCE):
        allowance.count_committed()
    assert allowance.is_whole
    assert not allowance.shrink_below(step_of(1))
    assert allowance.is_whole
