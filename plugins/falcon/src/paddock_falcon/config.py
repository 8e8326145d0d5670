"""What a Falcon config.json says: 7B, 40B, 180B, 11B and RW, in the current and the RefinedWeb spelling. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen

from paddock.model_config import MAX_LAYERS, MAX_POSITIONS, ConfigReader, RopeSpec, parse_rope
from paddock.plugins import AttentionNeeds

_MODEL_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")
_HARMLESS = ("hidden_dropout", "attention_dropout", "apply_residual_connection_post_layernorm")
_END_OF_TEXT = 11


@frozen(kw_only=True)
class FalconConfig:
    """A Falcon model. `rope` None means ALiBi. A `parallel` block adds attention and MLP to the same residual.

    `block_norms` is 2 when a parallel block has a norm for each branch, and when a serial block has one before each.
    Heads share `hidden_size` evenly, in an even size each; `num_kv_heads` divides `num_heads`.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    max_model_len: int
    norm_eps: float
    parallel: bool
    block_norms: int
    bias: bool
    rope: RopeSpec | None
    tied: bool
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def head_dim(self) -> int:
        """Return the size of one head."""
        return self.hidden_size // self.num_heads

    @property
    def heads_per_group(self) -> int:
        """Return how many query heads share one key and value head."""
        return self.num_heads // self.num_kv_heads


def parse_config(raw: Mapping[str, Any], ignored: Iterable[str] = ()) -> FalconConfig:
    """Return the config that config.json describes; raise ModelConfigError for a key or value that is not supported."""
    reader = ConfigReader(raw, ignored=ignored)
    model_type = reader.choice("model_type", allowed=_MODEL_TYPES, default="falcon")
    grouped = reader.flag("new_decoder_architecture", default=model_type == "RefinedWeb")
    parallel = _parallel(reader, grouped=grouped)
    hidden, heads = _width(reader)
    context = reader.integer("max_position_embeddings", default=2048, high=MAX_POSITIONS)
    rope = parse_rope(reader, max_position_embeddings=context)
    alibi = _alibi(reader, rope)
    reader.only("activation", value="gelu")
    reader.accept(*_HARMLESS)
    config = FalconConfig(
        num_layers=reader.integer("num_hidden_layers", "n_layer", default=32, high=MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_kv_heads(reader, heads, grouped=grouped),
        ffn_size=_ffn_size(reader, hidden),
        vocab_size=reader.integer("vocab_size", default=65024),
        max_model_len=context if alibi else rope.context(context),
        norm_eps=reader.number("layer_norm_epsilon", default=1e-5, low=1e-12, high=1.0),
        parallel=parallel,
        block_norms=_block_norms(reader, grouped=grouped, parallel=parallel),
        bias=reader.flag("bias", default=False),
        rope=None if alibi else rope,
        tied=reader.flag("tie_word_embeddings", default=True),
        eos_token_ids=reader.token_ids("eos_token_id", default=(_END_OF_TEXT,)),
        dtype=reader.dtype(),
    )
    reader.finish()
    return config


def attention_needs(config: FalconConfig) -> AttentionNeeds:
    """Return what the model asks of an attention backend."""
    return AttentionNeeds(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        features=frozenset({"alibi"}) if config.rope is None else frozenset(),
    )


def _width(reader: ConfigReader) -> tuple[int, int]:
    """Return the hidden size and the heads that share it."""
    hidden = reader.integer("hidden_size", "n_embed", default=4544)
    heads = reader.integer("num_attention_heads", "n_head", default=71)
    if hidden % (2 * heads):
        raise reader.wrong("hidden_size", hidden, f"an even head size for each of {heads} heads: a multiple of {2 * heads}")
    return hidden, heads


def _alibi(reader: ConfigReader, rope: RopeSpec) -> bool:
    """Return whether positions are ALiBi's: savers write a plain rotary embedding beside it, but a scaled one contradicts it."""
    alibi = reader.flag("alibi", default=False)
    if alibi and rope.kind != "default":
        raise reader.wrong(
            "alibi", alibi, f"false with rotary scaling {rope.kind!r}; or remove the scaling, which ALiBi does not use"
        )
    return alibi


def _parallel(reader: ConfigReader, *, grouped: bool) -> bool:
    """Return whether attention and MLP run side by side: the only way the new decoder has."""
    parallel = reader.flag("parallel_attn", default=True)
    if grouped and not parallel:
        raise reader.wrong("parallel_attn", parallel, "true with new_decoder_architecture, whose blocks are parallel")
    return parallel


def _kv_heads(reader: ConfigReader, heads: int, *, grouped: bool) -> int:
    """Return the KV heads: the new decoder names them and ignores `multi_query`; the old one has one, or one a head.

    With `multi_query` the old decoder ignores `num_kv_heads`, into which savers write the number of heads.
    """
    multi_query = reader.flag("multi_query", default=True)
    named = reader.integer("num_kv_heads", "n_head_kv", default=heads)
    if grouped:
        if heads % named:
            raise reader.wrong("num_kv_heads", named, f"a divisor of num_attention_heads, {heads}")
        return named
    if multi_query:
        return 1
    if named != heads:
        raise reader.wrong("num_kv_heads", named, f"{heads}; for fewer, set multi_query or new_decoder_architecture to true")
    return heads


def _ffn_size(reader: ConfigReader, hidden: int) -> int:
    factor = reader.integer("ff_factor", default=4)
    size = reader.integer("ffn_hidden_size", default=factor * hidden)
    if reader.has("ff_factor") and size != factor * hidden:
        raise reader.wrong("ffn_hidden_size", size, f"ff_factor * hidden_size = {factor * hidden}")
    return size


def _block_norms(reader: ConfigReader, *, grouped: bool, parallel: bool) -> int:
    """Return the norms of a block; `num_ln_in_parallel_attn` chooses them in the new decoder alone."""
    named = reader.integer("num_ln_in_parallel_attn", default=2 if grouped or not parallel else 1, low=1, high=2)
    if grouped:
        return named
    if parallel and named != 1:
        raise reader.wrong("num_ln_in_parallel_attn", named, "1, or new_decoder_architecture must be true")
    return 1 if parallel else 2
