"""Text to token ids and back, over the `tokenizers` library and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from paddock.checkpoint.json_file import read_object
from paddock.errors import CheckpointError, RequestError
from paddock.text.pieces import Speller, make_speller

if TYPE_CHECKING:
    import tokenizers

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Pieces(dict[int, bytes]):
    """The bytes of each token id, spelt on first use; an id no token has spells nothing."""

    def __init__(self, core: tokenizers.Tokenizer, speller: Speller, added: Mapping[int, str], skipped: Iterable[int]) -> None:
        super().__init__(dict.fromkeys(skipped, b""))
        self._core, self._speller, self._added = core, speller, added

    def __missing__(self, token_id: int) -> bytes:
        if token_id in self._added:
            piece = self._added[token_id].encode("utf-8", "replace")
        else:
            token = self._core.id_to_token(token_id)
            piece = b"" if token is None else self._speller.spell(token)
        self[token_id] = piece
        return piece


@frozen(eq=False, kw_only=True)
class Tokenizer:
    """A model's tokenizer. `special` holds the text of bos_token, eos_token, pad_token and unk_token where they exist."""

    core: tokenizers.Tokenizer
    special: Mapping[str, str]
    speller: Speller
    shown: Pieces = field(repr=False)
    hidden: Pieces = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Return how many tokens there are, added ones included."""
        return self.core.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Return the id of the token that begins a text, or None."""
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Return the id of the token that ends a text, or None."""
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Return the id of the padding token, or None."""
        return self._named_id("pad_token")

    def _named_id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.core.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; the tokenizer's post-processor adds bos and eos unless told not to.

        Raises RequestError when `text` holds a lone surrogate, which no encoding can carry.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds a lone surrogate, {text[error.start]!r}, at character {error.start}",
                fix="decode the input as UTF-8 with errors='replace'",
            ) from None
        return self.core.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`, U+FFFD standing for bytes that are no character."""
        pieces = self.pieces(skip_special_tokens=skip_special_tokens)
        text = b"".join([pieces[token_id] for token_id in token_ids]).decode("utf-8", "replace")
        return drop_opening(text, self.speller.opening)

    def pieces(self, *, skip_special_tokens: bool) -> Pieces:
        """Return the bytes of each token id; with `skip_special_tokens` special tokens spell nothing."""
        return self.hidden if skip_special_tokens else self.shown

    def token_text(self, token_id: int) -> str:
        """Return one token's text, as logprobs show it."""
        return self.shown[token_id].decode("utf-8", "replace")


def drop_opening(text: str, spaces: int) -> str:
    """Return `text` without up to `spaces` leading spaces, which some tokenizers put before every text."""
    while spaces and text.startswith(" "):
        text, spaces = text[1:], spaces - 1
    return text


def make_tokenizer(core: tokenizers.Tokenizer, special: Mapping[str, str] | None = None) -> Tokenizer:
    """Return the tokenizer around a `tokenizers.Tokenizer`, its truncation and padding switched off."""
    import json

    core.no_truncation()
    core.no_padding()
    speller = make_speller(json.loads(core.to_str()).get("decoder"))
    added = {token_id: token.content for token_id, token in core.get_added_tokens_decoder().items()}
    hidden = [token_id for token_id, token in core.get_added_tokens_decoder().items() if token.special]
    return Tokenizer(
        core=core,
        special=dict(special or {}),
        speller=speller,
        shown=Pieces(core, speller, added, ()),
        hidden=Pieces(core, speller, added, hidden),
    )


def read_optional(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty when there is no such file."""
    return read_object(path) if path.exists() else {}


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder, from tokenizer.json and the small JSON files beside it.

    Raises CheckpointError when tokenizer.json is missing or unreadable, or the files contradict one another.
    """
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json", fix=_way_out(folder))
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read: {error}", fix="fetch the file again, or update `tokenizers`") from error
    config = read_optional(folder / "tokenizer_config.json")
    _add_tokens(core, config.get("added_tokens_decoder") or {}, folder)
    return make_tokenizer(core, _special_tokens(core, config, read_optional(folder / "special_tokens_map.json")))


def _way_out(folder: Path) -> str:
    convert = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    if (folder / "tokenizer.model").is_file():
        return f"a SentencePiece tokenizer.model alone is not supported: write tokenizer.json with transformers' {convert}"
    return f'write one with transformers\' {convert}, name another folder as `tokenizer`, or use tokenizer="none" with token ids'


def _content(token: Any) -> str | None:
    """Return the text of a token written as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _add_tokens(core: tokenizers.Tokenizer, declared: Mapping[str, Any], folder: Path) -> None:
    """Add the tokens tokenizer_config.json declares and tokenizer.json lacks, each under its declared id."""
    from tokenizers import AddedToken

    known = core.get_added_tokens_decoder()
    for key, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        text, special = _content(entry), bool(entry.get("special"))
        if text is None or (int(key) in known and known[int(key)].content == text and known[int(key)].special == special):
            continue
        flags = {name: bool(entry[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in entry}
        token = AddedToken(text, special=special, **flags)
        if special:
            core.add_special_tokens([token])
        else:
            core.add_tokens([token])
        if core.token_to_id(text) != int(key):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'} gives token {text!r} the id {key}, tokenizer.json {core.token_to_id(text)}",
                fix="fetch both files from the same revision",
            )


def _special_tokens(core: tokenizers.Tokenizer, config: Mapping[str, Any], listed: Mapping[str, Any]) -> dict[str, str]:
    """Return bos, eos, pad and unk by name, tokenizer_config.json first; the extra ones are marked special on the way."""
    extra = [_content(token) for token in (listed.get("additional_special_tokens") or [])]
    named = {name: _content(config.get(name) or listed.get(name)) for name in _NAMED}
    special = {name: text for name, text in named.items() if text is not None and core.token_to_id(text) is not None}
    known = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    texts = {text for text in (*special.values(), *extra) if text is not None and core.token_to_id(text) is not None}
    core.add_special_tokens(sorted(texts - known))
    return special
