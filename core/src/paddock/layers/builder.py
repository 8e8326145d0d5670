"""The builder: what a model's `build` is given, to make its modules by the names its weight table declares.

It looks a declaration up by name in its scope, takes this rank's share, binds the kernels planning chose, and connects
producers with the linears they feed. A model neither names a checkpoint tensor nor asks how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, cast

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor, nn

from paddock import axes
from paddock.errors import PlanError
from paddock.layers.activation import ActivationKind, ActivationLayer
from paddock.layers.attention import AttentionBackend, AttentionParams
from paddock.layers.attention_layer import Attention, alibi_slopes
from paddock.layers.embedding import Embedding
from paddock.layers.formats import InputFormat
from paddock.layers.linear import LinearLayer, LinearMethod, TiedLinear
from paddock.layers.norm import LayerNorm, RMSNorm
from paddock.layers.ops import Ops
from paddock.layers.parallel import Communicator
from paddock.layers.rope import cos_sin_table
from paddock.layers.unquantized import PlainMethod
from paddock.model_config import RopeSpec

M = TypeVar("M", bound=axes.Module)
MethodFor = Callable[[str, axes.Linear], LinearMethod]


@define
class _Made:
    """What modules of one model share: tables already made, embeddings a head may be tied to, formats by producer."""

    rotary: dict[tuple[RopeSpec, int], Tensor] = field(factory=dict)
    embeddings: dict[str, Embedding] = field(factory=dict)
    formats: dict[tuple[int | None, str], InputFormat] = field(factory=dict)


class Absent(nn.Module):
    """Stands for a module outside the layers that another pipeline stage holds: nothing to load, never called."""


@frozen(eq=False, kw_only=True)
class Builder:
    """Makes the modules of one rank. `layers` is the range of layer indices it holds; None means all.

    Without `outer` it holds these layers and nothing outside them. `method_for(checkpoint path of the first part, declaration)`
    says how a linear is stored. `fp8_attention` has attention multiply in FP8. The first stage holds the embeddings, the last
    the norm and head; on the others these names give `Absent` modules.
    """

    table: axes.WeightTable = field(kw_only=False)
    method_for: MethodFor
    ops: Ops
    backend: AttentionBackend
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    shard: axes.Shard = axes.WHOLE
    communicator: Communicator | None = None
    outer: bool = True
    fp8_attention: bool = False
    _layers: range | None = None
    _index: int | None = None
    _made: _Made = field(factory=_Made)

    @property
    def layers(self) -> range:
        """Return the indices of the layers this rank holds."""
        return range(self.table.num_layers) if self._layers is None else self._layers

    def layer(self, index: int) -> Builder:
        """Return the builder of one layer: names are looked up among the layer's modules."""
        return evolve(self, index=index)

    def embedding(self, name: str) -> nn.Module:
        """Return the token embedding."""
        declared = self._declared(name, axes.Embedding)
        if self.layers.start != 0 or not self.outer:
            return Absent()
        reduce = self._group.all_reduce if self._is_cut(declared.rows) else None
        embedding = Embedding(
            declared,
            self.dtype,
            self.device,
            shard=self.shard,
            source=self._source,
            aliases=self._tied_names(declared),
            reduce=reduce,
            ops=self.ops,
        )
        self._made.embeddings[name] = embedding
        return embedding

    def norm(self, name: str, *, kind: Literal["rms", "layer"] = "rms", eps: float) -> RMSNorm | LayerNorm:
        """Return a norm of the residual stream: root-mean-square, or layer norm with or without bias."""
        declared = self._declared(name, axes.Vector)
        if self._elsewhere:
            return cast(RMSNorm, Absent())
        norm = RMSNorm if kind == "rms" else LayerNorm
        return norm(declared, self.dtype, self.device, eps=eps, ops=self.ops, emits=self._format(name), source=self._source)

    def linear(self, name: str) -> LinearLayer:
        """Return a linear layer; where its output is the vocabulary, every rank gets all columns."""
        whole = self._declared(name, axes.Linear)
        if self._elsewhere:
            return cast(LinearLayer, Absent())
        gather = self._group.all_gather if any(p.axis == axes.VOCAB and self._is_cut(p) for p in whole.out) else None
        if whole.tied_to:
            return cast(LinearLayer, self._tied(whole, gather))
        reduce = self._group.all_reduce if self._is_cut_evenly(whole.inp) else None
        method = self.method_for(self._source + whole.out[0].source, whole)
        layer = LinearLayer(
            whole,
            method,
            self.dtype,
            self.device,
            shard=self.shard,
            source=self._source,
            reduce=reduce,
            gather=gather,
            ops=self.ops,
        )
        self._format(whole.fed_by).feed(layer)
        return layer

    def activation(self, name: str, *, kind: ActivationKind, scaled: axes.Part | None = None) -> ActivationLayer:
        """Return an activation: `silu_mul` of gate and up side by side, or `gelu`.

        `scaled` is the part for which AWQ checkpoints of the family may store `.scales` that divide the output, with the
        prefix of that tensor as its source; None where they do not.
        """
        return ActivationLayer(
            kind, self.ops, self._format(name), self.device, scaled=scaled, shard=self.shard, source=self._source
        )

    def attention(
        self,
        name: str = "attention",
        *,
        head_dim: int,
        rope: RopeSpec | None = None,
        alibi: axes.Part | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        scales_source: str = "",
    ) -> Attention:
        """Return causal attention for the heads its inputs bring.

        `alibi` is the part that says how query heads (its elements) are cut; None for no bias. `scale` defaults to
        head_dim ** -0.5. `scales_source` is the block's checkpoint prefix in the layer (`self_attn`), for FP8 KV scales.
        """
        slopes_H = None
        if alibi is not None:
            start, stop = self.shard.span(alibi)
            slopes_H = alibi_slopes(alibi.size)[start:stop].to(self.device)
        params = AttentionParams(
            scale=head_dim**-0.5 if scale is None else scale,
            alibi_slopes_H=slopes_H,
            window=window,
            softcap=softcap,
            in_fp8=self.fp8_attention,
        )
        return Attention(
            params,
            head_dim=head_dim,
            backend=self.backend,
            ops=self.ops,
            emits=self._format(name),
            device=self.device,
            cos_sin_LD=None if rope is None else self._rotary(rope, head_dim),
            scales_source=scales_source and self._source + scales_source,
        )

    @property
    def _source(self) -> str:
        return "" if self._index is None else self.table.layer_source.format(i=self._index)

    @property
    def _elsewhere(self) -> bool:
        return self._index is None and (self.layers.stop != self.table.num_layers or not self.outer)

    @property
    def _group(self) -> Communicator:
        assert self.communicator is not None, "a shard of several ranks needs a communicator"
        return self.communicator

    def _declared(self, name: str, kind: type[M]) -> M:
        modules = self.table.outer if self._index is None else self.table.layer
        found = next((module for module in modules if module.name == name), None)
        assert isinstance(found, kind), f"the weight table declares no {kind.__name__} {name!r} here"
        return found

    def _is_cut(self, part: axes.Part) -> bool:
        return self.shard.part(part).units < part.units

    def _is_cut_evenly(self, part: axes.Part) -> bool:
        """Return whether an input part is cut; sums would count a share twice that several ranks hold."""
        share = self.shard.part(part)
        if share.units < part.units and share.units * self.shard.world != part.units:
            raise PlanError(
                f"input {part.name!r} has {part.units} {part.axis}: {self.shard.world} ranks cannot sum over it",
                fix=f"choose a tensor-parallel size that divides {part.units}",
            )
        return share.units < part.units

    def _format(self, producer: str) -> InputFormat:
        return self._made.formats.setdefault((self._index, producer), InputFormat(self.ops))

    def _tied(self, whole: axes.Linear, gather: Callable[[Tensor], Tensor] | None) -> nn.Module:
        """Return a head on the embedding's table, or on a copy of it where another stage holds the embedding."""
        embedding = self._made.embeddings.get(whole.tied_to)
        if embedding is not None:
            return TiedLinear(embedding.weight, self.ops, gather)
        declared = self._declared(whole.tied_to, axes.Embedding)
        copy = evolve(whole, out=(declared.rows,), tied_to="")
        method, names = PlainMethod.of(copy, self.dtype), self._tied_names(declared)
        return LinearLayer(copy, method, self.dtype, self.device, shard=self.shard, gather=gather, ops=self.ops, aliases=names)

    def _tied_names(self, embedding: axes.Embedding) -> tuple[str, ...]:
        """Return the checkpoint names of heads tied to an embedding: savers wrote the shared table under either name, or both."""
        heads = (m for m in self.table.outer if isinstance(m, axes.Linear) and m.tied_to == embedding.name)
        sources = dict.fromkeys(part.source for head in heads for part in head.out)
        return tuple(f"{source}.weight" for source in sources if source not in ("", embedding.rows.source))

    def _rotary(self, rope: RopeSpec, head_dim: int) -> Tensor:
        table_LD = self._made.rotary.get((rope, head_dim))
        if table_LD is None:
            table_LD = cos_sin_table(rope, head_dim=head_dim, max_model_len=self.max_model_len, device=self.device)
            self._made.rotary[rope, head_dim] = table_LD
        return table_LD
