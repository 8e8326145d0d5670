from __future__ import annotations

import pytest
from core.tests.scheduling.driver import Driver, limits, request


def test_decodes_are_scheduled_before_the_tokens_they_feed_are_known() -> None:
    """With a step in flight, the next one already decodes at the following position."""
    driver = Driver(limits(), depth=1)
    driver.add(request("r", 5, max_tokens=4))
    steps = [driver.step() for _ in range(4)]
    assert [step.decode_positions for step in steps if step] == [[], [5], [6], [7]]
    assert driver.step() is None
    driver.check_outcomes()


def test_overlap_costs_at_most_one_surplus_token_a_sequence() -> None:
    """A sequence that stops was computed one token too far, not two."""
    computed = []
    for depth in (0, 1):
        driver = Driver(limits(), depth=depth)
        tokens = driver.model.generate(list(request("r", 5).prompt_token_ids), 12)
        driver.add(request("r", 5, max_tokens=12, stop_token_ids=(tokens[5],)))
        driver.run()
        driver.check_outcomes()
        computed.append(driver.runner.num_tokens)
    assert computed[1] == computed[0] + 1


def test_no_step_is_spent_beyond_the_count_even_with_tokens_in_flight() -> None:
    """Sequences that end for length compute the same tokens with and without overlap."""
    computed = []
    for depth in (0, 1):
        driver = Driver(limits(), depth=depth)
        driver.add(request("a", 5, max_tokens=1))
        driver.add(request("b", 5, max_tokens=7))
        driver.add(request("c", 5, max_tokens=None))
        driver.run()
        driver.check_outcomes()
        computed.append(driver.runner.num_tokens)
    assert computed[0] == computed[1]


def test_a_slot_freed_by_a_sequence_that_stopped_serves_the_next_though_its_surplus_is_in_flight() -> None:
    """The surplus token goes to nobody, not to the sequence that has the slot now."""
    driver = Driver(limits(seqs=1), depth=1)
    tokens = driver.model.generate(list(request("a", 5).prompt_token_ids), 12)
    driver.add(request("a", 5, max_tokens=12, stop_token_ids=(tokens[3],)))
    driver.add(request("b", 5, max_tokens=12))
    driver.run()
    driver.check_outcomes()


def test_a_third_step_is_not_scheduled_on_top_of_two() -> None:
    """The engine commits before it goes on; anything else is a bug of ours."""
    driver = Driver(limits())
    driver.add(request("r", 5))
    assert driver.scheduler.schedule()
    assert driver.scheduler.schedule()
    with pytest.raises(AssertionError, match="two steps"):
        driver.scheduler.schedule()
