"""Stop strings across token borders."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.text.stop import StopStrings

letters = st.text("ab\n", max_size=12)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


def _cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


def _ended(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Return text and stop string by definition: the first end of any stop string, the longest one there."""
    for end in range(1, len(text) + 1):
        there = [stop for stop in stops if text[:end].endswith(stop)]
        if there:
            stop = max(there, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(text=letters, stops=stops, sizes=st.lists(st.integers(0, 3), max_size=8), include=st.booleans())
def test_the_result_is_the_same_wherever_the_borders_fall(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    """Any split of a text into pieces ends at the same stop string with the same text, never showing what it takes back."""
    watch = StopStrings(stops, include=include)
    shown = "".join(watch.push(piece) for piece in _cut(text, sizes))
    expected, stop = _ended(text, stops, include)
    assert expected.startswith(shown)
    if watch.found is None:
        shown += watch.finish()
    assert (shown, watch.found) == (expected, stop)


@settings(max_examples=200, deadline=None)
@given(text=letters, stops=stops)
def test_no_more_is_held_back_than_could_start_a_stop_string(text: str, stops: list[str]) -> None:
    """The text held back is the longest end of it that begins a stop string."""
    watch = StopStrings(stops)
    shown = watch.push(text)
    if watch.found is None:
        starts = {stop[:size] for stop in stops for size in range(1, len(stop))}
        assert len(text) - len(shown) == max((len(start) for start in starts if text.endswith(start)), default=0)


def test_a_stop_string_completed_too_early_does_not_count() -> None:
    """Before min_tokens tokens a stop string is plain text; one begun before and completed after counts."""
    watch = StopStrings(["STOP"])
    assert watch.push("aSTOPbST", armed=False) == "aSTOPb"
    assert watch.push("OPc") == ""
    assert watch.found == "STOP"


def test_after_its_stop_string_a_text_is_over() -> None:
    """Nothing that comes after the stop string is shown."""
    watch = StopStrings(["."])
    assert watch.push("a.b") == "a"
    assert watch.push("c") == ""
