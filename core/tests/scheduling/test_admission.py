from __future__ import annotations

import pytest
from core.tests.scheduling.driver import Driver, limits, request

from paddock.errors import PlanError, QueueFullError, RequestError


def test_a_pool_too_small_for_one_sequence_is_refused_with_its_numbers() -> None:
    """The error names what is there, what is needed and how far to go down."""
    with pytest.raises(PlanError, match=r"7 pages of 4 tokens.*max_model_len 32 needs 8\n.*lower max_model_len to 28"):
        limits(length=32, page_size=4, pages=7)
    assert limits(length=32, page_size=4, pages=8).pages_per_sequence == 8


def test_a_token_budget_below_the_number_of_sequences_is_refused() -> None:
    """Every running sequence gets a token in every step, so the budget must allow for it."""
    with pytest.raises(PlanError, match=r"max_num_batched_tokens 3 is below max_num_seqs 4.*\n.*lower max_num_seqs to 3"):
        limits(seqs=4, tokens=3)


@pytest.mark.parametrize(
    ("length", "words"),
    [(0, "empty prompt"), (32, "32 tokens: max_model_len 32.*\n.*at most 31"), (40, "40 tokens: max_model_len 32")],
)
def test_a_request_that_can_never_run_is_refused_and_nothing_changes(length: int, words: str) -> None:
    """Empty and overlong prompts say so, and the scheduler has no more work than before."""
    driver = Driver(limits(length=32))
    with pytest.raises(RequestError, match=words):
        driver.scheduler.add(request("r", length))
    assert not driver.scheduler.has_work
    driver.add(request("r", 31))
    driver.run()
    driver.check_outcomes()


def test_an_id_in_use_is_refused_and_may_be_used_again_later() -> None:
    """Ids tell requests apart only while they run."""
    driver = Driver(limits())
    driver.add(request("r", 3, max_tokens=2))
    with pytest.raises(RequestError, match=r"request 'r' is already here"):
        driver.scheduler.add(request("r", 4))
    driver.run()
    driver.add(request("r", 4, max_tokens=2))
    driver.run()
    driver.check_outcomes()


def test_a_full_queue_refuses_the_newcomer_alone() -> None:
    """Those who wait already are served, and room made is room found."""
    driver = Driver(limits(queue=2))
    driver.add(request("a", 3, n=2))
    with pytest.raises(QueueFullError):
        driver.scheduler.add(request("b", 3))
    driver.step()
    driver.step()
    driver.add(request("b", 3))
    driver.run()
    driver.check_outcomes()


def test_requests_start_by_priority_then_arrival() -> None:
    """With one slot, sequences run one after the other in order of rank."""
    driver = Driver(limits(seqs=1))
    for name, priority in (("a", 1), ("b", 0), ("c", -1), ("d", 0)):
        driver.add(request(name, 3, priority=priority, max_tokens=2))
    driver.run()
    started = [admission.sequence_id for step in driver.steps for admission in step.admissions]
    assert started == ["c#0", "b#0", "d#0", "a#0"]


def test_a_step_takes_all_decodes_and_fills_up_with_prefill_chunks() -> None:
    """A long prompt is cut to the budget, and running sequences go on beside it."""
    driver = Driver(limits(tokens=8, length=64))
    driver.add(request("short", 4, max_tokens=20))
    driver.step()
    driver.add(request("long", 20, max_tokens=2))
    sizes = []
    while (step := driver.step()) and step.prefills:
        assert len(step.decode_slots) == 1
        sizes.append([(chunk.start, len(chunk.token_ids), chunk.samples) for chunk in step.prefills])
    assert sizes == [[(0, 7, False)], [(7, 7, False)], [(14, 6, True)]]
    driver.run()
    driver.check_outcomes()


def test_short_prompts_share_a_step() -> None:
    """Several whole prompts and a piece of another fill one budget."""
    driver = Driver(limits(tokens=16))
    for name in "abcd":
        driver.add(request(name, 5, max_tokens=2))
    step = driver.step()
    assert step is not None
    assert [len(chunk.token_ids) for chunk in step.prefills] == [5, 5, 5, 1]
    assert (step.num_tokens, step.num_samples) == (16, 3)


def test_nothing_of_lower_rank_passes_a_prompt_that_has_to_wait_for_pages() -> None:
    """A large prompt at the head of the queue is not starved by small ones behind it."""
    driver = Driver(limits(pages=8, page_size=4, length=32))
    driver.add(request("first", 12, max_tokens=8))
    driver.step()
    driver.add(request("large", 24, max_tokens=2))
    driver.add(request("small", 2, max_tokens=2))
    driver.run()
    started = [admission.sequence_id for step in driver.steps for admission in step.admissions]
    assert started == ["first#0", "large#0", "small#0"]


def test_n_makes_sequences_with_seeds_of_their_own() -> None:
    """Each continuation has its index, its seed counted up, and its own tokens."""
    driver = Driver(limits())
    driver.add(request("r", 6, n=3, seed=40, max_tokens=6))
    driver.run()
    driver.check_outcomes()
    admissions = [admission for step in driver.steps for admission in step.admissions]
    assert [(admission.sequence_id, admission.seed) for admission in admissions] == [("r#0", 40), ("r#1", 41), ("r#2", 42)]
    assert len({tuple(outcome.token_ids) for outcome in driver.outcomes.values()}) == 3


def test_the_first_update_says_when_the_sequence_was_first_scheduled() -> None:
    """The time is that of admission, on the scheduler's clock, and is told once."""
    driver = Driver(limits(seqs=1))
    driver.add(request("a", 3, max_tokens=3))
    driver.add(request("b", 3, max_tokens=2))
    driver.run()
    times = {key[0]: [update.first_scheduled for update in outcome.updates] for key, outcome in driver.outcomes.items()}
    assert times == {"a": [0.0, None, None], "b": [3.0, None]}
