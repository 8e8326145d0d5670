"""Texts cut into windows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import pytest

from paddock.errors import RequestError
from paddock.evaluation import Comparison, Perplexity
from paddock.evaluation.texts import check_window, token_ids, windows
from paddock.llm import LLM


def test_windows_do_not_overlap_and_leave_out_nothing_that_can_be_scored() -> None:
    """Together they are the text, but for a last single token, which nothing predicts."""
    ids = list(range(13))
    assert windows(ids, 5) == [ids[:5], ids[5:10], ids[10:]]
    assert windows(ids, 4) == [ids[:4], ids[4:8], ids[8:12]]
    assert windows(ids, 100) == [ids]
    assert windows(ids, 5, limit=2) == [ids[:5], ids[5:10]]


@pytest.mark.parametrize(
    ("window", "limit", "message"),
    [
        (1, None, "window is 1"),
        (True, None, "window is True"),
        (8.5, None, r"window is 8\.5"),
        (64, None, "window is 64, which leaves no room in max_model_len 64"),
        (8, 0, "limit is 0"),
        (8, True, "limit is True"),
    ],
)
def test_a_window_that_cannot_be_is_named(window: int, limit: int | None, message: str) -> None:
    """The error has the value and the way out."""
    with pytest.raises(RequestError, match=message) as caught:
        check_window(window, 64, limit=limit)
    assert caught.value.fix


def test_a_model_too_short_for_any_window_is_what_is_named() -> None:
    """The window was not asked for: it is what max_model_len leaves."""
    for longest in (1, 2):
        with pytest.raises(RequestError, match=f"max_model_len is {longest}") as caught:
            check_window(longest - 1, longest, limit=None)
        assert "3 or more" in caught.value.fix
    check_window(2, 3, limit=None)


def test_bytes_are_no_ids() -> None:
    """They are numbers to Python, and would be taken for tokens."""
    with pytest.raises(RequestError, match="the text is bytes") as caught:
        token_ids(cast(LLM, None), b"a text")
    assert "decode" in caught.value.fix


def test_a_perplexity_beyond_all_floats_is_infinite() -> None:
    """A model that is worse than any number says so, and does not break what compares it."""
    assert Perplexity(tokens=1, nats=800.0, windows=1).perplexity == math.inf
    found = Comparison(tokens=1, windows=1, kl=0.0, kl_max=0.0, top1=1.0, nats_a=800.0, nats_b=1.0)
    assert (found.perplexity_a, found.perplexity_b) == (math.inf, math.e)


def test_no_more_of_a_text_is_encoded_than_is_scored() -> None:
    """With a limit the rest of a long text costs nothing; ids that are given are cut too."""
    seen: list[int] = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return [len(word) for word in text.split()]

    llm = cast(LLM, SimpleNamespace(tokenizer=SimpleNamespace(encode=encode)))
    assert token_ids(llm, "a bc def " * 1000, most=4) == [1, 2, 3, 1]
    assert max(seen) <= 64
    assert token_ids(llm, [5, 6, 7], most=2) == [5, 6]
    assert len(token_ids(llm, "a bc def " * 1000)) == 3000
