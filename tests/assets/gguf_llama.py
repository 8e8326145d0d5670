"""A Llama-family GGUF file as a Hugging Face folder: dequantised, renamed, rotary rows put back in order.

Axes: H heads, D head size, I inputs; llama.cpp stores the rows of q and k with the two rotary halves interleaved, Hugging Face
one half after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.assets.sentencepiece import make_tokenizer

_PADDING = "tokenizer.ggml.padding_token_id"
_CONTROL = 3  # GGUF token type of a control token
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path, *, dtype: torch.dtype, progress: Callable[[int, int], None]) -> None:
    """Write config, weights in `dtype` and tokenizer of the GGUF file `source` into `folder`.

    `progress` takes how many tensors are done, and of how many. Raises ValueError when a tensor's name is unknown.
    """
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    _write_json(folder / "config.json", _config(fields, dtype, tied=tied))
    _write_json(folder / "generation_config.json", _special_ids(fields))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _tokenizer(fields).save(str(folder / "tokenizer.json"))
    weights: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        progress(done, len(reader.tensors))
        weights[_checkpoint_name(tensor.name)] = torch.from_numpy(_plain(tensor, fields)).to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    progress(len(reader.tensors), len(reader.tensors))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _checkpoint_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    if not block.isdigit() or rest not in _LAYER:
        raise ValueError(f"the GGUF tensor {name!r} has no place in a Llama model")
    return f"model.layers.{block}.{_LAYER[rest]}.{kind}"


def _plain(tensor: gguf.ReaderTensor, fields: dict[str, Any]) -> NDArray[np.float32]:
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if ".attn_q." in tensor.name:
        values = rotary_halves(values, fields["llama.attention.head_count"])
    elif ".attn_k." in tensor.name:
        values = rotary_halves(values, fields["llama.attention.head_count_kv"])
    return np.require(values, requirements=["C", "W"])


def rotary_halves(rows_HDI: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return the rows with each head's rotary pairs (2j, 2j + 1) moved to (j, j + D/2)."""
    rows, inputs = rows_HDI.shape
    return rows_HDI.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def _short(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _special_ids(fields: dict[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
    keys = {ours: f"tokenizer.ggml.{theirs}" for theirs, ours in names.items()}
    return {ours: fields[key] for ours, key in keys.items() if key in fields}


def _config(fields: dict[str, Any], dtype: torch.dtype, *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _short(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        **_special_ids(fields),
    }


def _control_tokens(fields: dict[str, Any]) -> dict[int, str]:
    pairs = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    return {i: token for i, (token, kind) in enumerate(pairs) if kind == _CONTROL}


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer the fields describe: SentencePiece's, or byte-level BPE with digits split one by one before it."""
    if fields["tokenizer.ggml.model"] == "llama":
        return make_tokenizer(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"])
    vocab = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _control_tokens(fields).values()]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(i): {"content": token, **plain} for i, token in _control_tokens(fields).items()},
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "model_max_length": fields["llama.context_length"],
        **({"pad_token": tokens[fields[_PADDING]]} if _PADDING in fields else {}),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
    }
