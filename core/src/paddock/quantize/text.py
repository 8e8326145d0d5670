"""The calibration text: read, cut into sequences, and its last fifth kept apart for the gate.

N sequences, L tokens a sequence.
"""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from paddock.errors import OptionError
from paddock.quantize.options import DEFAULT_LENGTH, DEFAULT_SAMPLES, DEFAULT_TEXT, QuantizeOptions
from paddock.text.beginning import first_ids
from paddock.text.tokenizer import Tokenizer
from paddock.text.utf8 import decode_utf8, read_bounded

_KEPT_APART = 5  # one part in this many


@frozen(kw_only=True)
class Text:
    """A text, the file it came from, and the size and SHA-256 of that. `part` says which part of the file it is."""

    name: str
    words: str
    sha256: str
    nbytes: int
    part: str = "all"

    @property
    def for_calibration(self) -> Text:
        """Return all but the last fifth."""
        return evolve(self, words=self.words[: self._cut], part="all but the last fifth")

    @property
    def kept_apart(self) -> Text:
        """Return the last fifth, which calibration never reads."""
        return evolve(self, words=self.words[self._cut :], part="the last fifth")

    def said(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return {"text": Path(self.name).name, "part": self.part, "sha256": self.sha256, "bytes": self.nbytes}

    @property
    def _cut(self) -> int:
        """Return where the last fifth begins: after the last space before it, so that no word is cut."""
        end = len(self.words) - len(self.words) // _KEPT_APART
        return self.words.rfind(" ", 0, end) + 1 or end


def read_text(name: str) -> Text:
    """Return the text of a UTF-8 file, or the one that comes with Paddock for `default`; raise OptionError with what is wrong."""
    if name == DEFAULT_TEXT:
        data = files("paddock.quantize").joinpath("default_text/prose.txt").read_bytes()
    else:
        data = read_bounded(Path(name))
    words = decode_utf8(data, name)
    return Text(name=name, words=words, sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))


def sequences(text: Text, tokenizer: Tokenizer, options: QuantizeOptions, *, longest: int = DEFAULT_LENGTH) -> Tensor:
    """Return token ids [N, L] int64 of a text for calibration: consecutive pieces, each behind the token that begins a text.

    Where no length was asked for, L is 512, or `longest` if the model takes no more.
    Raises OptionError where the text is too short for what was asked.
    """
    length = options.sequence_length or max(2, min(DEFAULT_LENGTH, longest))
    opening = _opening(tokenizer)
    piece = length - len(opening)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    ids = first_ids(encode, text.words, (options.samples or DEFAULT_SAMPLES) * piece)
    available = len(ids) // piece
    wanted = options.samples or min(max(available, 1), DEFAULT_SAMPLES)
    if available < wanted:
        raise OptionError(
            f"the calibration text {text.name!r} gives {len(ids):,} tokens ({text.part}): {available} sequences of {length}, "
            f"and {wanted} are wanted",
            fix="give a longer text, or lower samples or sequence_length",
        )
    rows = [opening + ids[i * piece : (i + 1) * piece] for i in range(wanted)]
    return torch.tensor(rows, dtype=torch.int64)


def _opening(tokenizer: Tokenizer) -> list[int]:
    """Return the token that the tokenizer puts before a text, if any."""
    with_special, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    begins = tokenizer.bos_id is not None and with_special[:1] == [tokenizer.bos_id] != bare[:1]
    return with_special[:1] if begins else []
