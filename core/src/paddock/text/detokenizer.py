"""Token ids to text, one at a time, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from paddock.text.tokenizer import Tokenizer, drop_opening

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of a growing sequence: what `push` and `finish` return, joined, equals one decode of all tokens.

    Bytes that may yet become a character are held back until they are one, or cannot be (then U+FFFD). A sequence that
    continues a prompt with visible text keeps its leading space; one that starts a text drops it where the tokenizer says so.
    Each token costs the same however long the sequence is.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, after: Iterable[int] = ()) -> None:
        self._pieces = tokenizer.pieces(skip_special_tokens=skip_special_tokens)
        self._bytes = _utf8("replace")
        self._opening = 0 if any(self._pieces[token] for token in after) else tokenizer.speller.opening

    def push(self, token_id: int) -> str:
        """Return the text that is certain now and was not before `token_id`."""
        return self._open(self._bytes.decode(self._pieces[token_id]))

    def finish(self) -> str:
        """Return what was held back: U+FFFD for the bytes of a character that will not be completed."""
        return self._open(self._bytes.decode(b"", final=True))

    def _open(self, text: str) -> str:
        if not self._opening or not text:
            return text
        rest = drop_opening(text, self._opening)
        self._opening = 0 if rest else self._opening - len(text)
        return rest
