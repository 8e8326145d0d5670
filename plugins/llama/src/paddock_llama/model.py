"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783): a pre-norm transformer with rotary positions and a gated feed-forward.

T tokens, R rows whose logits are wanted, E model size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from paddock.layers import AttentionInputs, Builder, LayerKV
from paddock_llama.config import LlamaConfig


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); each sum is taken by the norm that follows it."""

    def __init__(self, config: LlamaConfig, builder: Builder) -> None:
        """Make the layer's modules."""
        super().__init__()
        self.attention_norm = builder.norm("attention_norm", eps=config.norm_eps)
        self.qkv = builder.linear("qkv")
        self.attention = builder.attention(head_dim=config.head_dim, rope=config.rope, scales_source="self_attn")
        self.o = builder.linear("o")
        self.mlp_norm = builder.norm("mlp_norm", eps=config.norm_eps)
        self.gate_up = builder.linear("gate_up")
        self.silu = builder.activation("silu", kind="silu_mul")
        self.down = builder.linear("down")

    def forward(
        self, x_TE: Tensor, delta_TE: Tensor | None, inputs: AttentionInputs, kv: LayerKV, *, last: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream and what the feed-forward adds to it; the last layer's, of the tokens that are wanted."""
        x_TE, h_TE = self.attention_norm(x_TE, delta_TE)
        q_TI, k_TI, v_TI = self.qkv.split(self.qkv(h_TE))
        a_TI = self.attention(q_TI, k_TI, v_TI, inputs, kv)
        if last:
            x_TE, a_TI = inputs.wanted(x_TE), inputs.wanted(a_TI)
        x_TE, h_TE = self.mlp_norm(x_TE, self.o(a_TI))
        return x_TE, self.down(self.silu.after(self.gate_up, h_TE))


class Llama(nn.Module):
    """Token embedding, layers, final norm and head."""

    def __init__(self, config: LlamaConfig, builder: Builder) -> None:
        """Make the modules this rank holds."""
        super().__init__()
        self.embedding = builder.embedding("embed")
        self.layers = nn.ModuleList(LlamaLayer(config, builder.layer(i)) for i in builder.layers)
        self.norm = builder.norm("norm", eps=config.norm_eps)
        self.lm_head = builder.linear("lm_head")

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Return the residual stream [T, E]."""
        x_TE: Tensor = self.embedding(token_ids_T)
        return x_TE

    def forward(self, x_TE: Tensor, inputs: AttentionInputs, kv: list[LayerKV]) -> Tensor:
        """Return the residual stream after the layers."""
        delta_TE = None
        for i, (layer, layer_kv) in enumerate(zip(self.layers, kv, strict=True), 1):
            x_TE, delta_TE = layer(x_TE, delta_TE, inputs, layer_kv, last=i == len(self.layers))
        return x_TE if delta_TE is None else x_TE + delta_TE

    def logits(self, x_RE: Tensor) -> Tensor:
        """Return logits [R, V]."""
        _, h_RE = self.norm(x_RE)
        logits_RV: Tensor = self.lm_head(h_RE)
        return logits_RV


def build(config: LlamaConfig, builder: Builder) -> Llama:
    """Return the model as this rank holds it, its parameters not yet filled."""
    return Llama(config, builder)
