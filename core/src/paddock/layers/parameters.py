"""Parameters from declarations: allocating a linear's tensors, and where each checkpoint tensor goes in them.

A stored tensor keeps its axes; fused parts follow one another along `out`. A tensor without an `out` axis is kept once for each
part, along a leading axis of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from attrs import evolve
from torch import Tensor, nn

from paddock import axes
from paddock.checkpoint.targets import RowQuantiser, Target
from paddock.errors import PlanError

Region = tuple[tuple[int, int], ...]


@runtime_checkable
class Loadable(Protocol):
    """A module with parameters of its own that a checkpoint fills."""

    def targets(self) -> Iterator[Target]:
        """Yield where the checkpoint's tensors go."""

    def finalise(self) -> None:
        """Bring loaded parameters into their final layout."""

    def randomise(self, generator: torch.Generator) -> None:
        """Fill the parameters with random values of a trained model's magnitude."""


class Settles(Protocol):
    """An output format that the linears behind it decide, once they are loaded."""

    def settle(self) -> None:
        """Choose the format."""


@runtime_checkable
class Producer(Protocol):
    """A module whose output feeds linears."""

    emits: Settles


def allocate(linear: axes.Linear, tensors: tuple[axes.Tensor, ...], device: torch.device) -> dict[str, Tensor]:
    """Return uninitialised tensors for a (share of a) linear by name, parts fused along `out`."""
    return {t.name: torch.empty(_fused_shape(linear, t), dtype=torch_dtype(t.dtype), device=device) for t in tensors}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype a declaration names."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype), name
    return found


def part_spans(linear: axes.Linear, tensor: axes.Tensor) -> list[Region]:
    """Return the region of the fused tensor that holds each part, in the order of the parts."""
    if tensor.is_per_part:
        return [((i, i + 1), *((0, n) for n in tensor.share(part, linear.inp))) for i, part in enumerate(linear.out)]
    regions, start = [], 0
    for part in linear.out:
        whole = tensor.share(part, linear.inp)
        step = next(n for axis, n in zip(tensor.axes, whole, strict=True) if axis.side == "out")
        regions.append(
            tuple((start, start + n) if axis.side == "out" else (0, n) for axis, n in zip(tensor.axes, whole, strict=True))
        )
        start += step
    return regions


def linear_targets(
    whole: axes.Linear,
    shard: axes.Shard,
    source: str,
    tensors: tuple[axes.Tensor, ...],
    parameters: Mapping[str, Tensor],
) -> Iterator[Target]:
    """Yield the targets of every part of every tensor of a linear, and of its bias."""
    share = shard.linear(whole)
    for tensor in tensors:
        for part, region in zip(whole.out, part_spans(share, tensor), strict=True):
            fused = parameters[tensor.name]
            view = fused[region[0][0]] if tensor.is_per_part else fused[tuple(slice(*span) for span in region)]
            yield Target(
                name=tensor.stored_name(f"{source}{part.source}"),
                view=view,
                shape=tensor.shape(part.size, whole.in_size),
                region=tuple(
                    _stored_span(axis, shard, part if axis.side == "out" else whole.inp, tensor) for axis in tensor.axes
                ),
                optional=tensor.optional,
            )
    if whole.bias:
        offsets = part_spans(share, _BIAS)
        for part, ((start, stop),) in zip(whole.out, offsets, strict=True):
            yield Target(
                name=f"{source}{part.source}.bias",
                view=parameters["bias"][start:stop],
                shape=(part.size,),
                region=(shard.span(part),),
            )


def quantised_targets(
    whole: axes.Linear,
    shard: axes.Shard,
    source: str,
    dtype: torch.dtype,
    parameters: Mapping[str, Tensor],
    convert: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Iterator[Target]:
    """Yield the targets of a linear that is stored plainly and kept in other values, with a scale a row: `convert` makes both."""
    name = str(dtype).removeprefix("torch.")
    plain = axes.Unquantized(name).tensors("", whole)
    rows = iter(part_spans(shard.linear(whole), plain[0]))
    for target in linear_targets(whole, shard, source, plain, parameters):
        if target.name.endswith(".bias"):
            yield target
            continue
        scales = parameters["weight_scale"][slice(*next(rows)[0])]
        yield evolve(target, rows=RowQuantiser(convert=convert, scales=scales, dtype=name))


def targets(model: nn.Module) -> list[Target]:
    """Return where every checkpoint tensor of `model`, as built for this rank, goes."""
    return [target for module in model.modules() if isinstance(module, Loadable) for target in module.targets()]


@torch.no_grad()
def finalise(model: nn.Module) -> None:
    """Bring every loaded parameter into its final layout; call once, after loading and before the first forward."""
    for module in model.modules():
        if isinstance(module, Loadable):
            module.finalise()
    for module in model.modules():
        if isinstance(module, Producer):
            module.emits.settle()


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter with random values of a trained model's magnitude (load format `dummy`)."""
    for module in model.modules():
        if isinstance(module, Loadable):
            module.randomise(generator)


_BIAS = axes.Tensor("bias", "float32", (axes.TensorAxis("out"),))


def _fused_shape(linear: axes.Linear, tensor: axes.Tensor) -> tuple[int, ...]:
    spans = part_spans(linear, tensor)
    return tuple(max(span[axis][1] for span in spans) for axis in range(len(spans[0])))


def _stored_span(axis: axes.TensorAxis, shard: axes.Shard, part: axes.Part, tensor: axes.Tensor) -> tuple[int, int]:
    """Return the stored entries that a rank's share of `part` takes on `axis`."""
    start, stop = shard.span(part)
    if start % axis.cut or (stop % axis.cut and stop != part.size):
        raise PlanError(
            f"part {part.name!r}: a rank's elements {start}..{stop} do not fall on the groups of {axis.cut} of {tensor.name!r}",
            fix="choose a smaller tensor-parallel size",
        )
    return axis.span(start, stop)
