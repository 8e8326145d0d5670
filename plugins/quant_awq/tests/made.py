"""Layers made of written checkpoints, as loading makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paddock import axes
from paddock.axes import EMBED, FFN, Linear, Part, Shard
from paddock.layers import LinearLayer
from paddock.plugins import CheckpointFacts, resolve
from paddock_quant_awq.method import linear_method
from paddock_quant_awq.plugin import paddock_quantizations
from paddock_quant_awq.scheme import Int4Scheme

CPU = torch.device("cpu")


def found(
    entry: Mapping[str, Any], *, files: Mapping[str, Mapping[str, Any]] | None = None, dtype: str = "float32", **config: Any
) -> Int4Scheme | None:
    """Return the scheme of a config.json with this quantisation entry; no two formats may recognise it."""
    said = {**config, "quantization_config": entry} if entry else config
    facts = CheckpointFacts(config=said, files=files or {}, dtype=dtype)
    schemes = [(spec.name, resolve(spec.detect)(facts)) for spec in paddock_quantizations()]
    matches = [(name, scheme) for name, scheme in schemes if scheme is not None]
    assert all(name == scheme.name for name, scheme in matches)
    assert len(matches) <= 1
    return matches[0][1] if matches else None


def scheme_of(entry: Mapping[str, Any], **facts: Any) -> Int4Scheme:
    """Return the scheme of an entry that some format recognises."""
    scheme = found(entry, **facts)
    assert scheme is not None
    return scheme


def linear(outs: int, ins: int, *parts: int) -> Linear:
    """Return a linear of one part `down`, or of parts `p0`, `p1` ... of these sizes; the inputs can be cut."""
    sizes = parts or (outs,)
    names = [f"p{i}" for i in range(len(sizes))] if parts else ["down"]
    out = tuple(Part(name, EMBED, size, source=name) for name, size in zip(names, sizes, strict=True))
    return Linear("made", out, Part("ffn", FFN, ins))


def empty(scheme: Int4Scheme, whole: Linear, shard: Shard = axes.WHOLE, dtype: torch.dtype = torch.float32) -> LinearLayer:
    """Return a layer that nothing has been loaded into."""
    return LinearLayer(whole, linear_method(scheme, whole.out[0].source, whole), dtype, CPU, shard=shard)


def load(layer: LinearLayer, stored: Mapping[str, Tensor]) -> None:
    """Fill a layer's parameters by checkpoint name; every tensor must be wanted, and every one that is needed be there."""
    wanted = {target.name: target for target in layer.targets()}
    assert stored.keys() <= wanted.keys(), stored.keys() - wanted.keys()
    for name, target in wanted.items():
        assert name in stored or target.optional, name
        if name in stored:
            assert stored[name].shape == torch.Size(target.shape), (name, stored[name].shape, target.shape)
            assert stored[name].dtype == target.view.dtype or stored[name].is_floating_point(), name
            target.view.copy_(stored[name][tuple(slice(*span) for span in target.region)])


def made(scheme: Int4Scheme, whole: Linear, stored: Mapping[str, Tensor], shard: Shard = axes.WHOLE) -> LinearLayer:
    """Return a layer loaded and finalised."""
    layer = empty(scheme, whole, shard)
    load(layer, stored)
    layer.finalise()
    return layer


def named(stored: Mapping[str, Tensor], part: str = "down") -> dict[str, Tensor]:
    """Return the tensors under the names a checkpoint gives them."""
    return {f"{part}.{name}": tensor for name, tensor in stored.items()}


def weight(outs: int, ins: int, seed: int = 0) -> Tensor:
    """Return a random weight [O, I]."""
    return torch.randn(outs, ins, generator=torch.Generator().manual_seed(seed)) * 0.1
