from __future__ import annotations

from typing import Any

import pytest
from core.tests.scheduling.driver import Driver, limits, request

from paddock.testing.fakes import FakeModel

PROMPT = tuple(range(100, 113))  # three pages of four, and one token


def cached(driver: Driver, request_id: str, index: int = 0) -> int:
    """Return how many prompt tokens the cache is said to have saved."""
    return driver.outcomes[request_id, index].updates[0].num_cached_tokens


def run(driver: Driver, request_id: str, prompt: tuple[int, ...], **options: Any) -> int:
    """Run one request to its end and return how many tokens were computed for it."""
    before = driver.runner.num_tokens
    driver.add(request(request_id, prompt, max_tokens=1, **options))
    driver.run()
    driver.check_outcomes()
    return driver.runner.num_tokens - before


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    """Only what lies behind the last full shared page is."""
    driver = Driver(limits())
    assert (run(driver, "a", PROMPT), run(driver, "b", PROMPT)) == (13, 1)
    assert (cached(driver, "a"), cached(driver, "b")) == (0, 12)


def test_the_last_token_is_always_computed() -> None:
    """Of a prompt that is cached to its end, the last page is computed again, for there is a token to sample."""
    driver = Driver(limits())
    run(driver, "a", PROMPT)
    assert run(driver, "b", PROMPT[:12]) == 4
    assert cached(driver, "b") == 8


def test_a_difference_hides_all_that_follows() -> None:
    """Prompts share pages up to the first that differs, though later ones look alike."""
    driver = Driver(limits())
    run(driver, "a", PROMPT)
    assert run(driver, "b", (*PROMPT[:5], 0, *PROMPT[6:])) == 9


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    """A conversation that goes on finds prompt and answer of its last turn."""
    driver = Driver(limits())
    driver.add(request("a", PROMPT, max_tokens=8))
    driver.run()
    run(driver, "b", (*PROMPT, *driver.outcomes["a", 0].token_ids, 7))
    assert cached(driver, "b") == 20


def test_what_a_running_sequence_has_generated_is_found_already() -> None:
    """A block is named when it is full, not when its sequence ends."""
    driver = Driver(limits())
    driver.add(request("a", PROMPT, max_tokens=18))
    for _ in range(9):
        driver.step()
    driver.add(request("b", (*PROMPT, *driver.outcomes["a", 0].token_ids), max_tokens=2))
    driver.run()
    assert cached(driver, "b") == 20
    driver.check_outcomes()


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_that_start_together_compute_their_common_start_once(depth: int) -> None:
    """Sharing works within a step already."""
    driver = Driver(limits(), depth=depth)
    for i in range(3):
        driver.add(request(f"r{i}", (*PROMPT[:12], i), max_tokens=4))
    step = driver.step()
    assert step is not None
    assert [len(chunk.token_ids) for chunk in step.prefills] == [13, 1, 1]
    driver.run()
    driver.check_outcomes()


def test_siblings_share_the_prompt_that_the_first_of_them_computes() -> None:
    """With a prompt in several chunks too, the others of n compute one token each."""
    driver = Driver(limits(tokens=8))
    driver.add(request("r", PROMPT, n=3, seed=1, max_tokens=4))
    driver.run()
    driver.check_outcomes()
    assert [[len(chunk.token_ids) for chunk in step.prefills] for step in driver.steps[:2]] == [[8], [5, 1, 1]]
    assert [cached(driver, "r", index) for index in range(3)] == [0, 12, 12]


def test_another_salt_shares_nothing() -> None:
    """Who gives a salt finds only what was computed under it."""
    driver = Driver(limits())
    run(driver, "a", PROMPT, salt="x")
    assert run(driver, "b", PROMPT, salt="y") == run(driver, "c", PROMPT) == 13
    assert run(driver, "d", PROMPT, salt="x") == 1


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    """Such a request uses no cached page, but leaves its own for others."""
    driver = Driver(limits())
    run(driver, "a", PROMPT)
    assert run(driver, "b", PROMPT, prompt_logprobs=0) == 13
    fresh = Driver(limits())
    run(fresh, "a", PROMPT, prompt_logprobs=0)
    assert run(fresh, "b", PROMPT) == 1


def test_caching_switched_off_shares_nothing() -> None:
    """Every request computes all of its prompt, and no page stays cached."""
    driver = Driver(limits(caching=False))
    assert (run(driver, "a", PROMPT), run(driver, "b", PROMPT)) == (13, 13)
    assert driver.scheduler.pool.num_cached == 0


def test_a_cache_full_of_old_prompts_makes_room_for_new_ones() -> None:
    """Cached pages are granted when free ones run out."""
    driver = Driver(limits(length=16, pages=4))
    for i in range(5):
        assert run(driver, f"r{i}", tuple(range(1000 * i, 1000 * i + 13))) == 13
    assert driver.scheduler.pool.num_cached + driver.scheduler.pool.num_free == 4


def test_what_a_failed_sequence_computed_is_not_shared() -> None:
    """Pages behind unusable logits may hold NaN, so nobody finds them."""
    seen = FakeModel().states(list(PROMPT))[-1]
    driver = Driver(limits(), model=FakeModel(not_finite_every=seen))
    run(driver, "a", PROMPT)
    assert driver.outcomes["a", 0].finish_reason == "error"
    assert driver.scheduler.pool.num_cached == 0
