"""Reading a tokenizer, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddock.errors import CheckpointError, RequestError
from paddock.text.files import read_text_files
from paddock.text.pieces import make_speller
from paddock.text.tokenizer import Tokenizer, make_tokenizer, read_tokenizer


def _folder(tmp_path: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    tokenizer.core.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_bos_comes_from_the_post_processor(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    """A tokenizer adds the special tokens its post-processor names, and none when told so."""
    assert byte_fallback.encode("the")[0] == byte_fallback.bos_id == 0
    assert byte_fallback.encode("the", add_special_tokens=False)[0] != 0
    assert 0 not in byte_level.encode("the")


def test_a_folder_gives_back_the_tokenizer_it_was_saved_from(tmp_path: Path, byte_level: Tokenizer) -> None:
    """tokenizer.json holds vocabulary and decoder, tokenizer_config.json the roles of special tokens."""
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    read = read_tokenizer(_folder(tmp_path, byte_level, tokenizer_config=config, special_tokens_map={"pad_token": "<pad>"}))
    assert (read.bos_id, read.eos_id, read.pad_id) == (0, 1, 2)
    assert read.encode("the 🐎") == byte_level.encode("the 🐎")


def test_tokens_that_only_the_config_declares_are_added(tmp_path: Path, byte_level: Tokenizer) -> None:
    """added_tokens_decoder of tokenizer_config.json adds tokens under the ids it gives, special ones hidden from text."""
    size = byte_level.vocab_size
    added = {str(size): {"content": "<call>", "special": True}, str(size + 1): {"content": "é!", "special": False}}
    read = read_tokenizer(_folder(tmp_path, byte_level, tokenizer_config={"added_tokens_decoder": added}))
    assert read.encode("<call>é!") == [size, size + 1]
    assert read.decode([size, size + 1]) == "é!"
    assert read.token_text(size) == "<call>"


def test_added_tokens_at_another_id_are_refused(tmp_path: Path, byte_level: Tokenizer) -> None:
    """Two files that disagree about an id are an error that names the token and both ids."""
    folder = _folder(tmp_path, byte_level, tokenizer_config={"added_tokens_decoder": {"900": {"content": "<call>"}}})
    with pytest.raises(CheckpointError, match=r"'<call>' the id 900, tokenizer\.json 300"):
        read_tokenizer(folder)


def test_a_folder_without_tokenizer_says_the_way_out(tmp_path: Path) -> None:
    """No tokenizer.json is an error that says how to make one, also beside a SentencePiece file."""
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json\n.*save_pretrained"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"SentencePiece tokenizer\.model alone is not supported"):
        read_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    """A tokenizer.json that does not parse is an error with its path."""
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_text_files(tmp_path)


def test_a_lone_surrogate_is_refused(byte_level: Tokenizer) -> None:
    """Text that no encoding can carry is an error that says where it is."""
    with pytest.raises(RequestError, match="at character 2"):
        byte_level.encode("ab\ud800")


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path, byte_level: Tokenizer) -> None:
    """A tokenizer.json saved with a truncation length does not shorten prompts."""
    core = type(byte_level.core).from_str(byte_level.core.to_str())
    core.enable_truncation(1)
    core.enable_padding(length=20)
    tokenizer = make_tokenizer(core)
    assert tokenizer.encode("a fox") == byte_level.encode("a fox")


def test_an_unsupported_decoder_is_named() -> None:
    """A decoder that cannot be streamed is refused by name."""
    with pytest.raises(CheckpointError, match="CTC"):
        make_speller({"type": "CTC", "pad_token": "<pad>"})


@pytest.mark.parametrize(
    ("decoder", "tokens", "text"),
    [
        (None, ["a", "b"], " a b"),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, ["▁a", "▁b"], " a b"),
        ({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}, ["<0x61>", "b"], "ab"),
        ({"type": "ByteLevel"}, ["Ġa", "日"], " a日"),
    ],
)
def test_each_decoder_spells_its_tokens(decoder: dict[str, Any] | None, tokens: list[str], text: str) -> None:
    """The bytes of the tokens, joined, are the text before its opening space is dropped."""
    speller = make_speller(decoder)
    assert b"".join(speller.spell(token) for token in tokens).decode() == text


def test_eos_ids_and_sampling_come_from_the_generation_config(tmp_path: Path, byte_level: Tokenizer) -> None:
    """generation_config.json adds end-of-text ids and recommends sampling; what it leaves out or nulls is not there."""
    generation = {"eos_token_id": [1, 5], "temperature": 0.6, "top_p": 0.9, "top_k": None, "max_new_tokens": 7, "bos_token_id": 0}
    folder = _folder(tmp_path, byte_level, generation_config=generation, tokenizer_config={"eos_token": "</s>"})
    files = read_text_files(folder)
    assert files.eos_ids == {1, 5}
    assert files.sampling == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 7}
    (folder / "generation_config.json").write_text('{"do_sample": false, "eos_token_id": "two"}')
    with pytest.raises(CheckpointError, match="eos_token_id is 'two'"):
        read_text_files(folder)


def test_no_tokenizer_is_a_choice_or_allowed_where_weights_are_not_read_either(tmp_path: Path) -> None:
    """`tokenizer="none"`, or a bare config.json with nothing required, gives token ids in and out."""
    assert read_text_files(tmp_path, tokenizer="none").tokenizer is None
    assert read_text_files(tmp_path, required=False).tokenizer is None
    with pytest.raises(CheckpointError):
        read_text_files(tmp_path)
