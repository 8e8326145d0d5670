"""Falcon (arXiv 2311.16867): decoder blocks whose attention and MLP run side by side, or, in RW, one after the other.

T tokens, R rows to predict from, E model size, X width of the fused query_key_value, K KV heads, G = Q + 2 heads of a group: Q
of queries, one of keys, one of values; D head size.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from paddock.axes import FFN, KV_HEADS, Part
from paddock.layers import Activation, AttentionInputs, Builder, LayerKV
from paddock_falcon.config import FalconConfig

Deltas = tuple[Tensor, ...]  # one or two [T, E] that the next norm adds to the residual stream, two of them to each other first


class Attention(nn.Module):
    """Grouped-query attention; one group is multi-query, a group a head is multi-head."""

    def __init__(self, config: FalconConfig, make: Builder) -> None:
        """Rotate positions, or bias scores by ALiBi when the config has no `rope`."""
        super().__init__()
        self.group_size, self.head_dim = config.heads_per_group + 2, config.head_dim
        self.qkv, self.dense = make.linear("qkv"), make.linear("dense")
        heads = Part("heads", KV_HEADS, config.num_kv_heads, config.heads_per_group)
        self.attend = make.attention(
            head_dim=config.head_dim,
            rope=config.rope,
            alibi=heads if config.rope is None else None,
            scales_source="self_attention",
        )

    def forward(self, h_TE: Activation, inputs: AttentionInputs, kv: LayerKV, *, last: bool) -> Tensor:
        """Return what the block's tokens gather, the last block's that are wanted, projected back [T, E]."""
        q_TKQD, k_TKD, v_TKD = self._split(self.qkv(h_TE))
        a_TI = self.attend(q_TKQD, k_TKD, v_TKD, inputs, kv)
        out_TE: Tensor = self.dense(inputs.wanted(a_TI) if last else a_TI)
        return out_TE

    def _split(self, qkv_TX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [T, K, Q, D], keys and values [T, K, D] as views of groups of Q queries, one key and one value."""
        groups_TKGD = qkv_TX.view(len(qkv_TX), -1, self.group_size, self.head_dim)
        return groups_TKGD[:, :, :-2], groups_TKGD[:, :, -2], groups_TKGD[:, :, -1]


class MLP(nn.Module):
    """Two linears around a GELU, whose output AWQ checkpoints may divide by stored scales."""

    def __init__(self, config: FalconConfig, make: Builder) -> None:
        """Make the linears."""
        super().__init__()
        self.up, self.down = make.linear("up"), make.linear("down")
        self.gelu = make.activation("gelu", kind="gelu", scaled=Part("ffn", FFN, config.ffn_size, source="mlp.act"))

    def forward(self, h_TE: Activation) -> Tensor:
        """Return [T, E]."""
        out_TE: Tensor = self.down(self.gelu(self.up(h_TE)))
        return out_TE


class SharedNormBlock(nn.Module):
    """7B and 11B: x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self, config: FalconConfig, make: Builder) -> None:
        """Make one norm and the two branches."""
        super().__init__()
        self.norm = make.norm("norm", kind="layer", eps=config.norm_eps)
        self.attention, self.mlp = Attention(config, make), MLP(config, make)

    def forward(
        self, x_TE: Tensor, deltas_TE: Deltas, inputs: AttentionInputs, kv: LayerKV, *, last: bool = False
    ) -> tuple[Tensor, Deltas]:
        """Return the residual stream with the deltas added, and the two that this block is to add."""
        x_TE, h_TE = self.norm(x_TE, *deltas_TE)
        attended_TE = self.attention(h_TE, inputs, kv, last=last)
        if last:
            x_TE, h_TE = inputs.wanted(x_TE), inputs.wanted(h_TE)
        return x_TE, (attended_TE, self.mlp(h_TE))


class TwoNormBlock(nn.Module):
    """40B and 180B: x + attention(norm(x)) + mlp(other_norm(x))."""

    def __init__(self, config: FalconConfig, make: Builder) -> None:
        """Make a norm for each of the two branches."""
        super().__init__()
        self.attention_norm = make.norm("attention_norm", kind="layer", eps=config.norm_eps)
        self.mlp_norm = make.norm("mlp_norm", kind="layer", eps=config.norm_eps)
        self.attention, self.mlp = Attention(config, make), MLP(config, make)

    def forward(
        self, x_TE: Tensor, deltas_TE: Deltas, inputs: AttentionInputs, kv: LayerKV, *, last: bool = False
    ) -> tuple[Tensor, Deltas]:
        """Return the residual stream with the deltas added, and the two that this block is to add."""
        x_TE, h_TE = self.attention_norm(x_TE, *deltas_TE)
        _, g_TE = self.mlp_norm(x_TE)
        attended_TE = self.attention(h_TE, inputs, kv, last=last)
        if last:
            x_TE, g_TE = inputs.wanted(x_TE), inputs.wanted(g_TE)
        return x_TE, (attended_TE, self.mlp(g_TE))


class SerialBlock(nn.Module):
    """RW: y = x + attention(norm(x)), then y + mlp(other_norm(y))."""

    def __init__(self, config: FalconConfig, make: Builder) -> None:
        """Make a norm before each of the two steps."""
        super().__init__()
        self.attention_norm = make.norm("attention_norm", kind="layer", eps=config.norm_eps)
        self.mlp_norm = make.norm("mlp_norm", kind="layer", eps=config.norm_eps)
        self.attention, self.mlp = Attention(config, make), MLP(config, make)

    def forward(
        self, x_TE: Tensor, deltas_TE: Deltas, inputs: AttentionInputs, kv: LayerKV, *, last: bool = False
    ) -> tuple[Tensor, Deltas]:
        """Return the residual stream with the deltas and the attention added, and what the MLP is to add."""
        x_TE, h_TE = self.attention_norm(x_TE, *deltas_TE)
        attended_TE = self.attention(h_TE, inputs, kv, last=last)
        y_TE, g_TE = self.mlp_norm(inputs.wanted(x_TE) if last else x_TE, attended_TE)
        return y_TE, (self.mlp(g_TE),)


class Falcon(nn.Module):
    """The model: embedding, blocks, norm, head."""

    def __init__(self, config: FalconConfig, make: Builder) -> None:
        """Make the modules `make` holds on this rank."""
        super().__init__()
        self.embedding = make.embedding("embed")
        self.blocks = nn.ModuleList(_block(config, make.layer(i)) for i in make.layers)
        self.norm = make.norm("norm", kind="layer", eps=config.norm_eps)
        self.lm_head = make.linear("lm_head")

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Return the residual stream [T, E] for token ids."""
        x_TE: Tensor = self.embedding(token_ids_T)
        return x_TE

    def forward(self, x_TE: Tensor, inputs: AttentionInputs, kv: list[LayerKV]) -> Tensor:
        """Return the residual stream after this rank's blocks."""
        deltas_TE: Deltas = ()
        for i, (block, layer_kv) in enumerate(zip(self.blocks, kv, strict=True), 1):
            x_TE, deltas_TE = block(x_TE, deltas_TE, inputs, layer_kv, last=i == len(self.blocks))
        return x_TE + reduce(torch.add, deltas_TE) if deltas_TE else x_TE

    def logits(self, x_RE: Tensor) -> Tensor:
        """Return logits [R, V]."""
        _, h_RE = self.norm(x_RE)
        logits_RV: Tensor = self.lm_head(h_RE)
        return logits_RV


def build(config: FalconConfig, builder: Builder) -> Falcon:
    """Return the model of one rank, its parameters empty."""
    return Falcon(config, builder)


def _block(config: FalconConfig, make: Builder) -> nn.Module:
    if not config.parallel:
        return SerialBlock(config, make)
    return SharedNormBlock(config, make) if config.block_norms == 1 else TwoNormBlock(config, make)
