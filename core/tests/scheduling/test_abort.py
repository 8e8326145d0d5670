from __future__ import annotations

import pytest
from core.tests.scheduling.driver import Driver, limits, request


@pytest.fixture(params=[0, 1], ids=["synchronous", "overlapped"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """Return a driver with one running request beside the one to abort."""
    driver = Driver(limits(seqs=3), depth=request.param)
    driver.add(globals()["request"]("other", 5, max_tokens=12))
    driver.step()
    return driver


def test_an_unknown_id_is_nobody() -> None:
    """Aborting it changes nothing and reports nothing."""
    driver = Driver(limits())
    assert driver.scheduler.abort("nobody") == []


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("n", [1, 4])
def test_an_aborted_request_ends_at_once_and_harms_nobody(driver: Driver, steps: int, n: int) -> None:
    """Waiting, in prefill, decoding or in flight: every continuation ends with one update, and all pages come back."""
    driver.add(request("r", 9, max_tokens=12, n=n))
    for _ in range(steps):
        driver.step()
    driver.abort("r")
    assert all(driver.outcomes["r", index].finish_reason == "abort" for index in range(n))
    driver.run()
    driver.check_outcomes()
    assert driver.outcomes["other", 0].finish_reason == "length"


def test_a_second_abort_reports_nothing(driver: Driver) -> None:
    """What has ended cannot end again."""
    driver.abort("other")
    assert driver.scheduler.abort("other") == []


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("index", [0, 1])
def test_one_continuation_can_be_aborted_alone(driver: Driver, steps: int, index: int) -> None:
    """Its siblings go on."""
    driver.add(request("r", 9, max_tokens=12, n=3))
    for _ in range(steps):
        driver.step()
    driver.abort("r", index)
    driver.run()
    driver.check_outcomes()
    reasons = [driver.outcomes["r", i].finish_reason for i in range(3)]
    assert reasons == ["abort" if i == index else "length" for i in range(3)]


def test_an_id_can_be_used_again_while_its_last_token_is_in_flight() -> None:
    """The old sequence's token is not taken for the new one's."""
    driver = Driver(limits(), depth=1)
    driver.add(request("r", 5, max_tokens=12))
    for _ in range(3):
        driver.step()
    driver.abort("r")
    driver.add(request("r", (1, 2, 3), max_tokens=12))
    driver.run()
    driver.check_outcomes()


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_after_a_step_that_could_not_run_nothing_is_left_and_nothing_is_trusted(steps: int) -> None:
    """Everything has ended, every page is free, and the prompts that were under way are computed anew."""
    driver = Driver(limits(length=32, page_size=4, pages=10, tokens=8), depth=1)
    driver.add(request("a", 6, max_tokens=24))
    driver.add(request("b", 11, max_tokens=12, n=2))
    for _ in range(steps):
        driver.step()
    driver.scheduler.schedule()
    driver.scheduler.fail()
    driver.scheduler.check()
    assert not driver.scheduler.has_work
    assert driver.scheduler.pool.num_free == 10
    fresh = Driver(driver.scheduler.limits)
    fresh.scheduler = driver.scheduler
    fresh.runner.num_launched = driver.scheduler._num_steps
    fresh.add(request("a", 6, max_tokens=24))
    fresh.run()
    fresh.check_outcomes()
