"""Which checkpoint tensor fills which module of a Falcon model. Free of torch."""

from __future__ import annotations

from paddock.axes import EMBED, FFN, KV_HEADS, VOCAB, Embedding, Linear, Module, Part, Vector, WeightTable
from paddock_falcon.config import FalconConfig

_UNREAD = (".maybe_rotary.inv_freq", ".rotary_emb.inv_freq")


def weight_table(config: FalconConfig) -> WeightTable:
    """Return every parameter of the model.

    A tied model has one table: files that store `lm_head.weight` beside the word embeddings hold the same numbers twice.
    """
    embed = Part("embed", EMBED, config.hidden_size)
    rows = Part("tokens", VOCAB, config.vocab_size, source="transformer.word_embeddings")
    head = Part("tokens", VOCAB, config.vocab_size, source="lm_head")
    return WeightTable(
        outer=(
            Embedding("embed", rows, embed),
            Vector("norm", embed, bias=True, source="transformer.ln_f"),
            Linear("lm_head", (head,), embed, fed_by="norm", tied_to="embed" if config.tied else ""),
        ),
        layer=(*_norms(config, embed), *_linears(config, embed)),
        num_layers=config.num_layers,
        layer_source="transformer.h.{i}.",
        ignored=(*_UNREAD, "lm_head.weight") if config.tied else _UNREAD,
    )


def _norms(config: FalconConfig, embed: Part) -> tuple[Vector, ...]:
    """Return the layer norms: one that feeds both branches, or one for each."""
    if config.block_norms == 1:
        return (Vector("norm", embed, bias=True, source="input_layernorm"),)
    attention, mlp = ("ln_attn", "ln_mlp") if config.parallel else ("input_layernorm", "post_attention_layernorm")
    return (Vector("attention_norm", embed, bias=True, source=attention), Vector("mlp_norm", embed, bias=True, source=mlp))


def _linears(config: FalconConfig, embed: Part) -> tuple[Module, ...]:
    """Return the four linears.

    The rows of `query_key_value` come in KV groups, each its query heads, one key head, one value head. Both it and the columns
    of `dense` are cut by whole groups.
    """
    groups, heads, size = config.num_kv_heads, config.heads_per_group, config.head_dim
    qkv = Part("qkv", KV_HEADS, groups, (heads + 2) * size, "self_attention.query_key_value")
    attended = Part("attended", KV_HEADS, groups, heads * size)
    dense = Part("dense", EMBED, config.hidden_size, source="self_attention.dense")
    up = Part("up", FFN, config.ffn_size, source="mlp.dense_h_to_4h")
    down = Part("down", EMBED, config.hidden_size, source="mlp.dense_4h_to_h")
    feeds_attention, feeds_mlp = ("norm", "norm") if config.block_norms == 1 else ("attention_norm", "mlp_norm")
    return (
        Linear("qkv", (qkv,), embed, config.bias, fed_by=feeds_attention),
        Linear("dense", (dense,), attended, config.bias, fed_by="attention"),
        Linear("up", (up,), embed, config.bias, fed_by=feeds_mlp),
        Linear("down", (down,), Part("ffn", FFN, config.ffn_size), config.bias, fed_by="gelu"),
    )
