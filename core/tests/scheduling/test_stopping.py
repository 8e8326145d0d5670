from __future__ import annotations

from typing import Any

import pytest
from core.tests.scheduling.driver import Driver, limits, request

from paddock.testing.fakes import FakeModel

PROMPT = (5, 6, 7)
TOKENS = FakeModel().generate(list(PROMPT), 29)  # what the fake model says after PROMPT, up to 32 tokens in all


@pytest.fixture(params=[0, 1], ids=["synchronous", "overlapped"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """Return a driver, once without and once with a step in flight."""
    return Driver(limits(length=32), depth=request.param)


def finish(driver: Driver, **options: Any) -> tuple[list[int], str | None, int | None]:
    """Return tokens, finish reason and stop reason of one request for PROMPT."""
    driver.add(request("r", PROMPT, **options))
    driver.run()
    driver.check_outcomes()
    outcome = driver.outcomes["r", 0]
    return outcome.token_ids, outcome.finish_reason, outcome.updates[-1].stop_reason


def test_max_tokens_ends_a_sequence_for_length(driver: Driver) -> None:
    """Exactly so many tokens come, and no step is spent on one more."""
    assert finish(driver, max_tokens=5) == (TOKENS[:5], "length", None)
    assert driver.runner.num_tokens == len(PROMPT) + 4


def test_max_model_len_ends_a_sequence_for_length(driver: Driver) -> None:
    """Without max_tokens, prompt and continuation together reach max_model_len, and no step goes beyond."""
    assert finish(driver, max_tokens=None) == (TOKENS, "length", None)
    assert driver.runner.num_tokens == 31


def test_a_stop_token_ends_a_sequence_and_is_its_last(driver: Driver) -> None:
    """The first stop token counts, and what was computed beyond it is dropped."""
    stop = TOKENS[4]
    count = TOKENS.index(stop) + 1
    assert finish(driver, max_tokens=20, stop_token_ids=(stop,)) == (TOKENS[:count], "stop", stop)


def test_no_stop_token_counts_before_min_tokens(driver: Driver) -> None:
    """With every token a stop token, the sequence ends at min_tokens."""
    tokens, reason, stop = finish(driver, max_tokens=20, min_tokens=7, stop_token_ids=tuple(range(11)))
    assert (tokens, reason, stop) == (TOKENS[:7], "stop", TOKENS[6])


def test_a_stop_token_in_last_place_is_a_stop(driver: Driver) -> None:
    """Where both end it, the model's own end is the reason."""
    assert finish(driver, max_tokens=3, stop_token_ids=(TOKENS[2],), min_tokens=3) == (TOKENS[:3], "stop", TOKENS[2])


@pytest.mark.parametrize("depth", [0, 1])
def test_unusable_logits_end_one_sequence_with_an_error_and_leave_the_others(depth: int) -> None:
    """The error says what was wrong; the neighbours get all their tokens; the pages of the failed one serve nobody."""
    model = FakeModel(not_finite_every=17)
    driver = Driver(limits(seqs=8), depth=depth, model=model)
    for i in range(8):
        driver.add(request(f"r{i}", 4, max_tokens=16))
    driver.run()
    driver.check_outcomes()
    ends = [outcome.updates[-1] for outcome in driver.outcomes.values()]
    assert {update.finish_reason for update in ends} == {"length", "error"}
    assert all(("NaN" in (update.error or "")) == (update.finish_reason == "error") for update in ends)


def test_prompt_logprobs_come_whole_with_the_first_token_of_the_first_continuation(driver: Driver) -> None:
    """They are gathered over chunks; the first token has none; siblings do not repeat them."""
    driver = Driver(limits(tokens=4), depth=driver.depth)
    driver.add(request("r", 11, prompt_logprobs=0, logprobs=0, max_tokens=3, n=2))
    driver.run()
    driver.check_outcomes()
    first = driver.outcomes["r", 0].updates[0].prompt_logprobs
    assert first is not None
    assert (len(first), first[0]) == (11, None)
    assert driver.outcomes["r", 1].updates[0].prompt_logprobs is None


def test_logprobs_stay_with_their_tokens_when_a_neighbour_drops_its_surplus() -> None:
    """With one sequence ending by a stop token, the other's logprobs still belong to its own tokens."""
    driver = Driver(limits(), depth=1)
    driver.add(request("stops", PROMPT, max_tokens=20, stop_token_ids=(TOKENS[3],), logprobs=0))
    driver.add(request("goes on", 3, max_tokens=20, logprobs=0))
    driver.run()
    driver.check_outcomes()
