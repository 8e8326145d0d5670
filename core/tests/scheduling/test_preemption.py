from __future__ import annotations

from typing import Any

import pytest
from core.tests.scheduling.driver import Driver, limits, request

# One sequence of 32 tokens takes 8 pages of 4; this pool holds one and two pages more.
TIGHT: Any = {"length": 32, "page_size": 4, "pages": 10}


def preempted(driver: Driver) -> list[str]:
    """Return the sequences that were admitted again, in order."""
    seen, again = set[str](), []
    for step in driver.steps:
        for admission in step.admissions:
            if admission.sequence_id in seen:
                again.append(admission.sequence_id)
            seen.add(admission.sequence_id)
    return again


def first_pause(driver: Driver, sequence_id: str) -> int:
    """Return the number of the first step that a sequence did not run in after its first."""
    slots: dict[int, str] = {}
    started = False
    for step in driver.steps:
        slots |= {admission.slot: admission.sequence_id for admission in step.admissions}
        running = {slots[slot] for slot in [*step.decode_slots, *(chunk.slot for chunk in step.prefills)]}
        if started and sequence_id not in running:
            return step.number
        started |= sequence_id in running
    return len(driver.steps)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_sequence_resumes_with_the_tokens_it_had(depth: int, caching: bool) -> None:
    """Two sequences that outgrow the pool both get all their tokens, the younger one in two parts."""
    driver = Driver(limits(**TIGHT, caching=caching), depth=depth)
    driver.add(request("old", 6, max_tokens=24))
    driver.add(request("young", 6, max_tokens=24))
    driver.run()
    driver.check_outcomes()
    assert set(preempted(driver)) == {"young#0"}


def test_the_victim_has_the_lowest_priority_and_of_those_the_latest_arrival() -> None:
    """Whoever arrived first is not spared if others matter more."""
    driver = Driver(limits(length=32, page_size=4, pages=12))
    for name, priority in (("a", 1), ("b", 1), ("c", 0)):
        driver.add(request(name, 4, priority=priority, max_tokens=24))
    driver.run()
    driver.check_outcomes()
    assert set(preempted(driver)) == {"a#0", "b#0"}
    assert first_pause(driver, "b#0") < first_pause(driver, "a#0") < first_pause(driver, "c#0")


def test_a_prefill_under_way_may_be_the_victim() -> None:
    """A long prompt in the middle of its chunks gives way to a decode of lower rank."""
    driver = Driver(limits(length=32, page_size=4, pages=9, seqs=2, tokens=2))
    driver.add(request("decode", 3, max_tokens=20))
    driver.step()
    driver.step()
    driver.add(request("prefill", 27, max_tokens=2))
    driver.run()
    driver.check_outcomes()
    assert preempted(driver) == ["prefill#0"]
    update = driver.outcomes["prefill", 0].updates[0]
    assert (update.first_scheduled, update.num_cached_tokens) == (2.0, 0), "its first admission counts"


def test_a_token_in_flight_at_preemption_is_kept() -> None:
    """It arrives a step later, is reported then, and is among the known tokens at the next admission."""
    driver = Driver(limits(**TIGHT), depth=1)
    driver.add(request("old", 6, max_tokens=24))
    driver.add(request("young", 6, max_tokens=24))
    while len({step.number for step in driver.steps if len(step.decode_slots) == 1}) == 0:
        driver.step()
    young = driver.outcomes["young", 0]
    kept = len(young.token_ids)
    assert driver.runner._slots[1].history[6:] == young.token_ids, "nothing was in flight"
    driver.run()
    again = [admission for step in driver.steps for admission in step.admissions if admission.sequence_id == "young#0"][1]
    assert len(again.token_ids) == again.prompt_len + kept
    driver.check_outcomes()


def test_a_preempted_sequence_keeps_its_place_before_those_who_came_later() -> None:
    """It is admitted again before anyone of higher rank."""
    driver = Driver(limits(**TIGHT))
    for name in ("old", "young", "late"):
        driver.add(request(name, 6, max_tokens=24))
        driver.step()
    driver.run()
    driver.check_outcomes()
    ends = [step.number for step in driver.steps for admission in step.admissions if admission.sequence_id == "young#0"]
    lates = [step.number for step in driver.steps for admission in step.admissions if admission.sequence_id == "late#0"]
    assert ends[-1] <= lates[-1]


def test_a_preempted_sequence_waits_for_its_token_whatever_room_there_is() -> None:
    """Until the step in flight is committed nobody knows what it would be computed from, so it is not admitted."""
    driver = Driver(limits(length=32, page_size=4, pages=10), depth=1)
    driver.add(request("ends", 14, max_tokens=4))
    driver.add(request("gives way", 17, max_tokens=12))
    for _ in range(4):
        driver.step()
    assert driver.scheduler.schedule() is None, "both ran"
    assert (driver.scheduler.num_running, driver.scheduler.num_waiting) == (1, 1)
    driver.abort("ends")
    assert driver.scheduler.schedule() is None
    driver.run()
    driver.check_outcomes()
    assert preempted(driver) == ["gives way#0"]


def test_a_newcomer_leaves_a_page_for_each_running_sequence() -> None:
    """A prompt that fits exactly, but would give way to the next page of a neighbour, is not started."""
    driver = Driver(limits(length=32, page_size=4, pages=10))
    driver.add(request("old", 6, max_tokens=12))
    driver.step()
    driver.add(request("new", 29, max_tokens=3))
    driver.run()
    driver.check_outcomes()
    assert not preempted(driver)


def test_one_sequence_alone_uses_the_smallest_pool_to_its_end() -> None:
    """A pool of one sequence runs one sequence of max_model_len without ever preempting it."""
    driver = Driver(limits(length=32, page_size=4, pages=8), depth=1)
    driver.add(request("r", 1, max_tokens=None))
    driver.run(max_steps=33)
    driver.check_outcomes()
    assert not preempted(driver)


def test_prompt_logprobs_survive_preemption() -> None:
    """A prompt preempted between its chunks still delivers them whole, and only once."""
    driver = Driver(limits(length=32, page_size=4, pages=9, seqs=2, tokens=2), depth=1)
    driver.add(request("decode", 3, max_tokens=20))
    driver.step()
    driver.step()
    driver.add(request("prefill", 27, max_tokens=4, prompt_logprobs=0))
    driver.run()
    driver.check_outcomes()
    assert preempted(driver) == ["prefill#0"]
