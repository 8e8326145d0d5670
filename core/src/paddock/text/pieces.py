"""What a token spells: the bytes behind each token string, read off the decoder a tokenizer.json declares.

Working in bytes makes a text that grows token by token exact: a character whose bytes are split over tokens is whole once
its last byte is there. Supported decoders: byte-level BPE (GPT-2, Llama 3, Falcon), SentencePiece style with byte fallback
(Llama 2, Mistral, Gemma), Metaspace, and none at all (tokens joined by spaces).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from attrs import frozen

from paddock.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_NO_DECODER_FIX = 'use tokenizer="none" and give token ids, or convert the tokenizer to byte-level BPE or byte fallback'

Spell = Callable[[str], str | bytes]


@frozen
class Speller:
    """Turns token strings into bytes. `opening` leading spaces are dropped from the start of a text."""

    steps: tuple[Spell, ...]
    opening: int = 0

    def spell(self, token: str) -> bytes:
        """Return the UTF-8 bytes, possibly part of a character, that `token` stands for."""
        spelt: str | bytes = token
        for step in self.steps:
            if isinstance(spelt, bytes):
                return spelt
            spelt = step(spelt)
        return spelt if isinstance(spelt, bytes) else spelt.encode("utf-8", "replace")


def make_speller(decoder: Mapping[str, Any] | None) -> Speller:
    """Return the speller for the `decoder` section of a tokenizer.json; raise CheckpointError for one we cannot stream."""
    if decoder is None:
        return Speller((_after_space,), opening=1)
    steps: list[Spell] = []
    opening = 0
    fused = False
    for part in _flat(decoder):
        match part:
            case {"type": "ByteLevel"}:
                steps.append(_byte_level)
            case {"type": "ByteFallback"}:
                steps.append(_byte_fallback)
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                steps.append(_replacing(old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                steps.append(_replacing(mark, " "))
                opening += part.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                opening += start
            case _:
                raise CheckpointError(
                    f"tokenizer.json has the decoder {part!r}, which Paddock cannot stream", fix=_NO_DECODER_FIX
                )
    return Speller(tuple(steps), opening)


def _flat(decoder: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if decoder.get("type") == "Sequence":
        for part in decoder["decoders"]:
            yield from _flat(part)
    else:
        yield decoder


def _after_space(token: str) -> str:
    return f" {token}"


def _replacing(old: str, new: str) -> Spell:
    return lambda token: token.replace(old, new)


def _byte_fallback(token: str) -> str | bytes:
    found = _BYTE_TOKEN.match(token)
    return bytes.fromhex(found[1]) if found else token


def _byte_level(token: str) -> bytes:
    table = _byte_of_character()
    try:
        return bytes([table[character] for character in token])
    except KeyError:  # not spelt in byte-level characters: it stands for itself
        return token.encode("utf-8", "replace")


@cache
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's printable stand-ins: visible Latin-1 bytes are themselves, the others follow from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
