"""Text that grows token by token."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from paddock.testing.text import SPECIAL, byte_fallback_tokenizer, byte_level_tokenizer
from paddock.text.detokenizer import Detokenizer
from paddock.text.tokenizer import Tokenizer

TOKENIZERS = {"byte_level": byte_level_tokenizer(), "byte_fallback": byte_fallback_tokenizer()}
FFFD = "\N{REPLACEMENT CHARACTER}"
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("the fox  🐎日\n", max_size=40)
LOSSY = (*SPECIAL.values(), "\N{LOWER ONE EIGHTH BLOCK}")  # special tokens decode to nothing, sentencepiece's mark to a space
texts = anything.filter(lambda text: not any(mark in text for mark in LOSSY))
kinds = st.sampled_from(sorted(TOKENIZERS))


def _stream(
    tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True, after: list[int] | None = None
) -> list[str]:
    decoder = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, after=after or [])
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@settings(max_examples=200, deadline=None)
@given(kind=kinds, text=texts)
def test_any_text_split_into_tokens_comes_back_whole(kind: str, text: str) -> None:
    """Encoding a text and streaming its tokens gives the text, as the tokenizer's own decoder does."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids) == tokenizer.core.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(kind=kinds, data=st.data(), skip=st.booleans())
def test_any_tokens_stream_to_what_they_decode_to(kind: str, data: st.DataObject, skip: bool) -> None:
    """Random tokens, half characters included, give the same text piece by piece as at once."""
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
    pieces = _stream(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(kind=kinds, text=texts)
def test_the_text_so_far_is_a_prefix_of_the_text_and_holds_no_half_character(kind: str, text: str) -> None:
    """What a stream has shown is never taken back, and no replacement character stands in for one still to come."""
    tokenizer = TOKENIZERS[kind]
    for so_far in accumulate(_stream(tokenizer, tokenizer.encode(text))):
        assert text.startswith(so_far)


def test_a_byte_level_decode_agrees_with_the_tokenizer_library_on_broken_bytes(byte_level: Tokenizer) -> None:
    """Bytes that are no character give as many replacement characters as the tokenizers library gives."""
    one = byte_level.encode("한")
    for ids in (one[:2], one[1:], one[:2] + byte_level.encode("x"), one[:1] * 3, one[2:] + one):
        assert byte_level.decode(ids) == byte_level.core.decode(ids)


def test_a_character_is_held_back_until_its_last_byte(byte_level: Tokenizer) -> None:
    """Three tokens of a byte each give nothing, nothing, a character."""
    assert _stream(byte_level, byte_level.encode("한")) == ["", "", "한", ""]


def test_an_unfinished_character_ends_as_a_replacement(byte_level: Tokenizer) -> None:
    """A text that ends within a character ends with U+FFFD, and not before."""
    assert _stream(byte_level, byte_level.encode("a한")[:3]) == ["a", "", "", FFFD]


def test_valid_characters_beside_broken_byte_tokens_survive(byte_fallback: Tokenizer) -> None:
    """One bad byte token in a run of them costs itself alone."""
    assert byte_fallback.decode([0, *byte_fallback.encode("日")[1:], 3 + 0xFF]) == f"日{FFFD}"


def test_a_continuation_keeps_its_leading_space(byte_fallback: Tokenizer) -> None:
    """Prompt and continuation joined read as one text; a text of its own drops the space its tokenizer puts first."""
    fox = byte_fallback.encode("fox")[-1]
    assert "".join(_stream(byte_fallback, [fox], after=byte_fallback.encode("the"))) == " fox"
    assert "".join(_stream(byte_fallback, [fox], after=[0])) == "fox"


def test_special_tokens_are_shown_on_request(byte_level: Tokenizer) -> None:
    """skip_special_tokens decides whether special tokens have text."""
    ids = [0, *byte_level.encode("fox"), 1]
    assert "".join(_stream(byte_level, ids)) == "fox"
    assert "".join(_stream(byte_level, ids, skip_special_tokens=False)) == "<s>fox</s>"
