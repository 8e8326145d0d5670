"""The first ids of a text."""

from __future__ import annotations

import pytest

from paddock.testing.text import byte_fallback_tokenizer, byte_level_tokenizer
from paddock.text.beginning import first_ids

TEXTS = {
    "words": "the quick brown fox jumps over the lazy dog " * 200,
    "long words": (" " * 40 + "the") * 300,
    "no space": "thefox" * 900,
    "unknown letters": "Früh übt sich 木 " * 300,
    "empty": "",
}


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("most", [1, 7, 100, 1_000_000])
def test_they_are_those_of_the_whole_text(make: object, text: str, most: int) -> None:
    """Wherever the text is cut, and whether or not it is."""
    assert callable(make)
    encode = make().encode
    assert first_ids(encode, text, most) == encode(text)[:most]


def test_a_long_text_is_not_encoded_whole() -> None:
    """Once, and as much as so many tokens may have; where that was not enough, all of it."""
    seen: list[int] = []

    def letters(text: str) -> list[int]:
        seen.append(len(text))
        return [ord(letter) for letter in text if letter != " "]

    assert len(first_ids(letters, "ab " * 10_000, 20)) == 20
    assert seen == [318]
    assert len(first_ids(letters, "a" + " " * 1000 + "ab " * 100, 20)) == 20
    assert seen[1:] == [320, 1301]
