"""The calibration text: how it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddock.errors import OptionError
from paddock.quantize.options import QuantizeOptions
from paddock.quantize.text import Text, read_text, sequences
from paddock.testing.text import byte_fallback_tokenizer, byte_level_tokenizer
from paddock.text.tokenizer import Tokenizer


def cut(text: str, **options: int) -> list[list[int]]:
    """Return the sequences of a text by a tokenizer that begins each text with token 0."""
    asked = QuantizeOptions(recipe="any", out=Path("out"), **options)  # type: ignore[arg-type]
    whole = Text(name="text", words=text, sha256="", nbytes=len(text))
    found: list[list[int]] = sequences(whole, byte_fallback_tokenizer(), asked).tolist()
    return found


def test_each_sequence_begins_as_a_text_does_and_goes_on_where_the_last_ended() -> None:
    """Where the tokenizer puts a token before every text, each sequence has it; no token of the text is used twice."""
    rows = cut("the fox " * 50, sequence_length=9, samples=5)
    assert [row[0] for row in rows] == [0] * 5
    ids = byte_fallback_tokenizer().encode("the fox " * 50, add_special_tokens=False)
    assert [token for row in rows for token in row[1:]] == ids[:40]


def test_without_a_number_all_the_text_gives_is_taken_up_to_128() -> None:
    """A sequence that would not be full is left out."""
    tokens = len(byte_fallback_tokenizer().encode("the fox " * 50, add_special_tokens=False))
    assert len(cut("the fox " * 50, sequence_length=9)) == tokens // 8
    assert len(cut("the fox " * 3000, sequence_length=9)) == 128


def test_a_model_of_few_positions_gets_sequences_as_long_as_it_takes() -> None:
    """Unless a length was asked for."""
    asked, text = QuantizeOptions(recipe="any", out=Path("out")), Text(name="text", words="the fox " * 3000, sha256="", nbytes=1)
    for longest, length in ((64, 64), (4096, 512), (1, 2)):
        assert sequences(text, byte_fallback_tokenizer(), asked, longest=longest).shape[1] == length
    assert len(cut("the fox " * 50, sequence_length=9)[0]) == 9


def test_a_text_too_short_for_one_sequence_is_refused() -> None:
    """With how many tokens it has."""
    with pytest.raises(OptionError, match="0 sequences of 512, and 1 are wanted"):
        cut("the fox")


def test_the_last_fifth_is_kept_apart_and_no_word_is_cut() -> None:
    """Both parts together are the text."""
    text = Text(name="text", words="one two three four five six seven", sha256="", nbytes=33)
    parts = text.for_calibration.words, text.kept_apart.words
    assert "".join(parts) == text.words
    assert parts == ("one two three four five ", "six seven")
    unbroken = Text(name="text", words="x" * 50, sha256="", nbytes=50)
    assert len(unbroken.kept_apart.words) == 10


def test_the_text_that_comes_with_paddock_is_prose_enough() -> None:
    """It gives 128 sequences of 512 tokens, by a tokenizer of few merges, and is the file whose digest is known."""
    text = read_text("default")
    assert text.nbytes == 256_759
    assert len(byte_level_tokenizer().encode(text.for_calibration.words)) > 65_536
    assert text.said()["sha256"] == "1105dd8bcb975f1ca0fa0fc57fd05084901d814e3d180e3c0c738f88f93bc49c"


def test_no_more_of_a_text_is_encoded_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the sequences are the same."""
    lengths, encode = list[int](), Tokenizer.encode

    def counted(self: Tokenizer, text: str, **options: bool) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, **options)

    text = "the fox jumps over the lazy dog " * 10_000
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", counted)
        rows = cut(text, sequence_length=9, samples=5)
    assert max(lengths) < 1000
    assert [token for row in rows for token in row[1:]] == byte_fallback_tokenizer().encode(text, add_special_tokens=False)[:40]
