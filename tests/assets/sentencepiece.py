"""Llama 2's tokenizer for the `tokenizers` library, from the pieces and scores of a SentencePiece BPE model.

SentencePiece joins, again and again, the two neighbours whose joined piece has the best score; so a merge's rank is its result's
score, and every way to split a piece in two pieces is a merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def make_tokenizer(pieces: Sequence[str], scores: Sequence[float]) -> Tokenizer:
    """Return the tokenizer: `pieces` by id, spaces written as SPACE, the special tokens first and the 256 bytes after them."""
    assert tuple(pieces[:259]) == (*SPECIAL, *BYTES), "a Llama 2 vocabulary begins with the special tokens and the bytes"
    vocab = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocab) == len(pieces), "a piece stands twice"
    tokenizer = Tokenizer(models.BPE(vocab, _merges(vocab, scores), unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _merges(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, i in vocab.items():
        if i < len(SPECIAL) + len(BYTES):
            continue
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocab and right in vocab:
                ranked.append((-scores[i], vocab[left], vocab[right], (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def tokenizer_config(*, context: int, **more: Any) -> dict[str, Any]:
    """Return what tokenizer_config.json says beside such a tokenizer.json."""
    return {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        **more,
    }
