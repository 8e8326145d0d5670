"""Which checkpoint tensor fills which module of a Llama. Free of torch."""

from __future__ import annotations

from paddock.axes import EMBED, FFN, HEADS, KV_HEADS, VOCAB, Embedding, Linear, Part, Vector, WeightTable
from paddock_llama.config import LlamaConfig

_UNREAD = (".rotary_emb.inv_freq",)


def weight_table(config: LlamaConfig) -> WeightTable:
    """Return every parameter of the model. A tied model has one table, under either name or both."""
    embed = Part("embed", EMBED, config.hidden_size)
    heads = Part("heads", HEADS, config.num_heads, config.head_dim)
    ffn = Part("ffn", FFN, config.ffn_size)
    q = Part("q", HEADS, config.num_heads, config.head_dim, "self_attn.q_proj")
    k = Part("k", KV_HEADS, config.num_kv_heads, config.head_dim, "self_attn.k_proj")
    v = Part("v", KV_HEADS, config.num_kv_heads, config.head_dim, "self_attn.v_proj")
    o = Part("o", EMBED, config.hidden_size, source="self_attn.o_proj")
    gate = Part("gate", FFN, config.ffn_size, source="mlp.gate_proj")
    up = Part("up", FFN, config.ffn_size, source="mlp.up_proj")
    down = Part("down", EMBED, config.hidden_size, source="mlp.down_proj")
    tokens = Part("tokens", VOCAB, config.vocab_size, source="model.embed_tokens")
    head = Part("tokens", VOCAB, config.vocab_size, source="lm_head")
    return WeightTable(
        outer=(
            Embedding("embed", tokens, embed),
            Vector("norm", embed, source="model.norm"),
            Linear("lm_head", (head,), embed, fed_by="norm", tied_to="embed" if config.tied else ""),
        ),
        layer=(
            Vector("attention_norm", embed, source="input_layernorm"),
            Linear("qkv", (q, k, v), embed, config.attention_bias, fed_by="attention_norm"),
            Linear("o", (o,), heads, config.attention_bias, fed_by="attention", follows="v"),
            Vector("mlp_norm", embed, source="post_attention_layernorm"),
            Linear("gate_up", (gate, up), embed, config.mlp_bias, fed_by="mlp_norm"),
            Linear("down", (down,), ffn, config.mlp_bias, fed_by="silu", follows="up"),
        ),
        num_layers=config.num_layers,
        ignored=(*_UNREAD, "lm_head.weight") if config.tied else _UNREAD,
    )
