"""What a Llama's config.json says, checked. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen

from paddock.model_config import MAX_LAYERS, MAX_POSITIONS, ConfigReader, RopeSpec, parse_rope
from paddock.plugins import AttentionNeeds


@frozen(kw_only=True)
class LlamaConfig:
    """A Llama: sizes, and what differs between its releases."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    max_model_len: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    dtype: str


def parse_config(raw: Mapping[str, Any], ignored: Iterable[str] = ()) -> LlamaConfig:
    """Return the config; raise ModelConfigError naming every key that is missing, unknown or not supported."""
    reader = ConfigReader(raw, ignored=ignored)
    hidden_size, num_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    max_positions = reader.integer("max_position_embeddings", default=2048, high=MAX_POSITIONS)
    rope = parse_rope(reader, max_position_embeddings=max_positions)
    reader.choice("hidden_act", allowed=("silu",), default="silu")
    reader.only("rope_interleaved", value=False)
    reader.accept("pretraining_tp", "attention_dropout", "is_llama_config")
    config = LlamaConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=reader.integer("intermediate_size"),
        num_layers=reader.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=_kv_heads(reader, num_heads),
        head_dim=_head_dim(reader, hidden_size, num_heads),
        norm_eps=reader.number("rms_norm_eps", default=1e-6),
        rope=rope,
        max_model_len=rope.context(max_positions),
        tied=reader.flag("tie_word_embeddings", default=False),
        attention_bias=reader.flag("attention_bias", default=False),
        mlp_bias=reader.flag("mlp_bias", default=False),
        eos_token_ids=reader.token_ids("eos_token_id", default=(2,)),
        dtype=reader.dtype(),
    )
    reader.finish()
    return config


def attention_needs(config: LlamaConfig) -> AttentionNeeds:
    """Return what the model asks of an attention backend."""
    return AttentionNeeds(num_heads=config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)


def _kv_heads(reader: ConfigReader, num_heads: int) -> int:
    kv_heads = reader.integer("num_key_value_heads", default=num_heads)
    if num_heads % kv_heads:
        raise reader.wrong("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {num_heads}")
    return kv_heads


def _head_dim(reader: ConfigReader, hidden_size: int, num_heads: int) -> int:
    if not reader.has("head_dim") and hidden_size % num_heads:
        raise reader.wrong(
            "hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}, or head_dim must be given"
        )
    head_dim = reader.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise reader.wrong("head_dim", head_dim, "even, for rotary position embedding")
    return head_dim
