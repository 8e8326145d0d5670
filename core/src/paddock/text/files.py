"""What a model folder says about text: its tokenizer, chat templates, end-of-text ids and recommended sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from paddock.errors import CheckpointError
from paddock.text.chat import ChatTemplates, read_templates
from paddock.text.tokenizer import Tokenizer, read_optional, read_tokenizer

NO_TOKENIZER = "none"  # as the `tokenizer` option: token ids in, token ids out

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@frozen(kw_only=True)
class TextFiles:
    """The text side of a model. Without a tokenizer only token ids go in and come out."""

    tokenizer: Tokenizer | None = None
    templates: ChatTemplates = field(factory=ChatTemplates)
    eos_ids: frozenset[int] = frozenset()
    sampling: Mapping[str, Any] = field(factory=dict)


def read_text_files(folder: Path, *, tokenizer: str | None = None, required: bool = True) -> TextFiles:
    """Return the text side of the model in `folder`.

    `tokenizer` names another folder to take tokenizer and templates from, or is "none". Unless `required` (weights are not
    read either) a folder without tokenizer.json means no tokenizer; otherwise it raises CheckpointError.
    """
    generation = read_optional(folder / "generation_config.json")
    eos_ids = _eos_ids(folder, generation.get("eos_token_id"))
    home = folder if tokenizer is None else Path(tokenizer)
    if tokenizer == NO_TOKENIZER or (tokenizer is None and not required and not (folder / "tokenizer.json").is_file()):
        return TextFiles(eos_ids=eos_ids, sampling=_sampling(generation))
    loaded = read_tokenizer(home)
    return TextFiles(
        tokenizer=loaded,
        templates=read_templates(home, read_optional(home / "tokenizer_config.json").get("chat_template")),
        eos_ids=eos_ids if loaded.eos_id is None else eos_ids | {loaded.eos_id},
        sampling=_sampling(generation),
    )


def _eos_ids(folder: Path, declared: Any) -> frozenset[int]:
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(
            f"{folder / 'generation_config.json'}: eos_token_id is {declared!r}", fix="make it a token id or a list of them"
        )
    return frozenset(ids)


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling a generation_config.json recommends, by SamplingParams' names."""
    found = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    if generation.get("max_new_tokens") is not None:
        found["max_tokens"] = generation["max_new_tokens"]
    return found
