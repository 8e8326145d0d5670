"""The arithmetic of tables of quality, on made-up numbers."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest

from paddock.evaluation import Comparison
from tests.bench.quality_rows import Growth, Row, difference, differences, growth, printed

PLAIN = (2.5, 3.5, 3.0, 2.0)  # nats a token, window by window
OURS = (0.03, 0.01, -0.02, 0.04)  # more
THEIRS = (0.02, 0.02, -0.03, 0.02)


def row(library: str, more: tuple[float, ...], *, recipe: str, kv: str = "fp8", tokens: tuple[int, ...] = (9, 9, 9, 9)) -> Row:
    """Return a row with so many nats more than the plain model; Paddock's plain model is a little worse than theirs."""
    plain = [nats + (0.001 if library == "paddock" else 0) for nats in PLAIN]
    found = [
        Comparison(tokens=each, windows=1, kl=0.1 * at, kl_max=0.2 * at, top1=1 - 0.1 * at, nats_a=nats, nats_b=nats + extra)
        for at, (each, nats, extra) in enumerate(zip(tokens, plain, more, strict=True))
    ]
    return Row.of(found, model="llama", library=library, recipe=recipe, kv=kv)


def test_the_error_of_equal_windows_is_that_of_their_mean() -> None:
    """The textbook's: the standard deviation of the windows by the root of how many there are, on the scale of e^x."""
    found = growth((9, 9, 9, 9), OURS)
    assert found.share == pytest.approx(math.exp(fmean(OURS)) - 1)
    assert found.error == pytest.approx(math.exp(fmean(OURS)) * stdev(OURS) / math.sqrt(len(OURS)))


def test_a_short_window_weighs_less() -> None:
    """By its tokens: a mean over 3 and 1 tokens, and its deviations 3 x 0.01 and 1 x 0.03, worked out by hand."""
    found = growth((3, 1), (0.02, 0.06))
    assert found.share == pytest.approx(math.expm1(0.03))
    assert found.error == pytest.approx(math.exp(0.03) * math.sqrt((0.03**2 + 0.03**2) * 2 / 1) / 4)


def test_one_window_has_no_error() -> None:
    """None, which JSON can say, and no ± in the table."""
    found = growth((9,), (0.01,))
    assert found.error is None
    assert str(found) == "+1.005%"
    assert str(Growth(share=0.01, error=0.002)) == "+1.000% ± 0.200%"


def test_a_row_is_the_mean_over_all_tokens() -> None:
    """Not over windows; the largest KL is the largest of any."""
    found = row("paddock", OURS, recipe="fp8-static", tokens=(8, 8, 8, 4))
    nats = [(each + 0.001 + extra) * tokens for each, extra, tokens in zip(PLAIN, OURS, (8, 8, 8, 4), strict=True)]
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / 28))
    assert found.growth.share == pytest.approx(math.expm1((8 * 0.03 + 8 * 0.01 - 8 * 0.02 + 4 * 0.04) / 28))
    assert (found.kl, found.kl_max) == pytest.approx(((8 * 0.1 + 8 * 0.2 + 4 * 0.3) / 28, 0.6))
    assert found.top1 == pytest.approx(1 - found.kl)


def test_a_difference_is_of_pairs_each_from_its_own_plain_model() -> None:
    """So the libraries' plain models drop out, and so does what a window costs both."""
    found = difference(row("paddock", OURS, recipe="fp8-static"), row("modelopt", THEIRS, recipe="FP8_DEFAULT_CFG"))
    each = [ours - theirs for ours, theirs in zip(OURS, THEIRS, strict=True)]
    assert found.growth.share == pytest.approx(math.expm1(fmean(each)))
    assert found.growth.error == pytest.approx(math.exp(fmean(each)) * stdev(each) / 2)
    assert (found.reference, found.windows) == ("modelopt FP8_DEFAULT_CFG", 4)


def test_rows_of_other_windows_are_no_pairs() -> None:
    """They are told by how many tokens each has."""
    with pytest.raises(AssertionError, match="same windows"):
        difference(
            row("paddock", OURS, recipe="fp8-static"), row("modelopt", THEIRS, recipe="FP8_DEFAULT_CFG", tokens=(9, 9, 9, 8))
        )


def test_each_quantised_row_is_held_to_the_reference_with_the_same_keys_and_values() -> None:
    """Not the plain one; where the reference has no such row there is nothing to say, and without a reference never."""
    rows = [
        row("paddock", (0, 0, 0, 0), recipe="plain", kv="float32"),
        row("paddock", OURS, recipe="fp8-static", kv="float32"),
        row("paddock", OURS, recipe="fp8-static"),
        row("paddock", OURS, recipe="fp8-dynamic"),
        row("transformers", (0, 0, 0, 0), recipe="plain", kv="float32"),
        row("modelopt", THEIRS, recipe="FP8_DEFAULT_CFG"),
    ]
    found = differences(rows, "modelopt")
    assert [(each.recipe, each.kv) for each in found] == [("fp8-static", "fp8"), ("fp8-dynamic", "fp8")]
    assert differences(rows, None) == []
    text = printed(rows, found).splitlines()
    assert [line.count("|") for line in text[:8]] == [10] * 8
    assert text[8] == ""
    assert text[9].startswith("llama, keys and values in fp8: growth of fp8-static is +0.753% ±")
