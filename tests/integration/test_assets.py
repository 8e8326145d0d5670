"""Models from other formats: converted without a change of what they compute."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from paddock import LLM
from paddock.errors import PaddockError
from paddock.evaluation import perplexity
from tests.assets import stories15m
from tests.assets.archives import checked
from tests.assets.folders import filled, origin
from tests.assets.sentencepiece import BYTES, SPACE, SPECIAL, make_tokenizer

WORDS = ("a", "b", "c", "ab", "bc", "abc", f"{SPACE}a", f"{SPACE}ab", f"{SPACE}", "ca", "cab", "aa", "é")
SCORES = (-12.0, -13.0, -14.0, -3.0, -2.0, -9.0, -1.0, -8.0, -11.0, -4.0, -7.0, -5.0, -6.0)
PIECES = [*SPECIAL, *BYTES, *WORDS]
TEXTS = ["abc", "ab abc", "cabcab aa", "a  b", "é b", "漢 a", " abc\n", "aabbccaabbcc" * 3]
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside. One day, she saw a big, red ball."


def _greedy(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """Return what SentencePiece gives: characters, or their bytes, then the best join of neighbours until there is none."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    ids: list[int] = []
    for character in SPACE + text.replace(" ", SPACE):
        ids += [vocab[character]] if character in vocab else [3 + byte for byte in character.encode()]
    while True:
        joins = [
            (scores[found], -at, found)
            for at, (left, right) in enumerate(pairwise(ids))
            if (found := vocab.get(pieces[left] + pieces[right])) is not None
        ]
        if not joins:
            return [1, *ids]
        _, back, found = max(joins)
        ids[-back : -back + 2] = [found]


@pytest.mark.parametrize("text", TEXTS)
def test_merges_by_score_are_what_sentencepiece_joins(text: str) -> None:
    """Whatever is joined first, and for characters no piece has, and back again to the text."""
    scores = [0.0] * 259 + list(SCORES)
    tokenizer = make_tokenizer(PIECES, scores)
    ids = tokenizer.encode(text).ids
    assert ids == _greedy(text, PIECES, scores)
    assert tokenizer.decode(ids) == text


def _interleaved(rows_OI: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return q's or k's rows as llama2.c has them: a head's row 2j is Hugging Face's row j, its row 2j + 1 the row j + D/2."""
    size = len(rows_OI) // heads
    order = [head * size + j + half * size // 2 for head in range(heads) for j in range(size // 2) for half in (0, 1)]
    return rows_OI[order]


def _llama2c(model: Any, config: LlamaConfig) -> bytes:
    """Return a checkpoint as llama2.c's exporter writes it, tied."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads, kv_heads, config.vocab_size)
    parts = [state["model.embed_tokens.weight"]]
    for kind in ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]:
        for layer in range(config.num_hidden_layers):
            rows = state[f"model.layers.{layer}.{kind}.weight"]
            count = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(kind)
            parts.append(rows if count is None else _interleaved(rows, count))
    for kind in ["post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]:
        parts += [state[f"model.layers.{layer}.{kind}.weight"] for layer in range(config.num_hidden_layers)]
    rotary = np.zeros(config.max_position_embeddings * config.hidden_size // heads, dtype=np.float32)
    parts += [state["model.norm.weight"], rotary]
    return struct.pack("<7i", *sizes, config.max_position_embeddings) + b"".join(part.tobytes() for part in parts)


def test_a_checkpoint_of_llama2c_comes_back_tensor_by_tensor() -> None:
    """Each name and value is that of the Hugging Face model it was written from, grouped KV heads included."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=50,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    header, weights = stories15m.read_checkpoint(_llama2c(model, config))
    assert (header.layers, header.kv_heads, header.context) == (3, 2, 16)
    expected = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], value.numpy()) for name, value in expected.items())
    with pytest.raises(RuntimeError, match="its header says"):
        stories15m.read_checkpoint(_llama2c(model, config)[:-4])


def test_pieces_of_llama2c_come_back_as_sentencepiece_wrote_them() -> None:
    """Bytes, spaces and the special tokens get their names again; a byte too many is found."""
    written = ["<unk>", "\n<s>\n", "\n</s>\n", *map(chr, range(256)), *(word.replace(SPACE, " ") for word in WORDS)]
    scores = [0.0] * 259 + list(SCORES)
    data = struct.pack("<i", 27)
    for piece, score in zip(written, scores, strict=True):
        data += struct.pack("<fi", score, len(piece.encode())) + piece.encode()
    assert stories15m.read_pieces(data, len(PIECES)) == (PIECES, scores)
    with pytest.raises(RuntimeError, match="pieces take"):
        stories15m.read_pieces(data + b"x", len(PIECES))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where filling it fails the old one stays; where it does not, it says where it came from."""
    folder = tmp_path / "model"

    def fail(scratch: Path, fresh: Path) -> None:
        (fresh / "config.json").write_text("{}")
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        filled(folder, "here", fail)
    assert not list(tmp_path.iterdir())
    filled(folder, "here", lambda scratch, fresh: (fresh / "a").touch())
    assert (origin(folder, ["a"]), origin(folder, ["b"])) == ("here", None)
    assert list(tmp_path.iterdir()) == [folder]


def test_an_archive_that_was_not_pinned_is_refused(tmp_path: Path) -> None:
    """The error has both checksums."""
    (tmp_path / "x.tgz").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"has SHA-256 2d7116.*expected 00"):
        checked(tmp_path / "x.tgz", "00" * 32)


@pytest.mark.model
@pytest.mark.skipif(
    not (stories15m.FOLDER / "model.safetensors").is_file(), reason="`python -m tests.assets.stories15m` fetches it"
)
def test_stories15m_knows_its_stories() -> None:
    """A story like those it was trained on has a perplexity below 4, transformers' own, and its tokens decode to the story."""
    model: Any = LlamaForCausalLM.from_pretrained(stories15m.FOLDER, dtype=torch.float32)
    with LLM(stories15m.FOLDER, device="cpu", dtype="float32") as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(STORY)
        assert llm.tokenizer.decode(ids) == STORY
        with torch.inference_mode():
            logprobs_TV = model.eval()(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        nats = -logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
        found = perplexity(llm, STORY, window=255)
        assert found.nats == pytest.approx(nats, abs=1e-4)
        assert found.perplexity < 4.0
        with pytest.raises(PaddockError, match="max_model_len 256"):
            perplexity(llm, STORY)
