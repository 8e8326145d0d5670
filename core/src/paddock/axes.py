"""Named axes: what a model's parameters are made of, declared once and read by everyone.

A model declares its modules and the *parts* of each linear; a quantisation declares the *tensors* that hold a linear,
axis by axis; a parallel strategy names the axes it cuts. The memory ledger, loading, sharding and alignment checks all read
these values, so a model, a format and a strategy meet here and nowhere else. Free of torch: planning reads it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from attrs import field, frozen, validators

from paddock.errors import PlanError

EMBED = "embed"  # width of the residual stream: never cut
HEADS = "heads"  # query heads
KV_HEADS = "kv_heads"  # key/value heads
FFN = "ffn"  # feed-forward width
VOCAB = "vocab"  # vocabulary rows

PLAIN = "plain"  # an activation in the model's dtype
FP8_STATIC = "fp8_static"  # FP8 e4m3, one scale known before the run
FP8_TOKEN = "fp8_token"  # FP8 e4m3, one scale a token, found at run time
FP8_GROUP = "fp8_group"  # FP8 e4m3, one scale a token and group of inputs, found at run time
INPUT_FORMATS = (PLAIN, FP8_STATIC, FP8_TOKEN, FP8_GROUP)

_positive = validators.ge(1)


@frozen
class Part:
    """A run of rows (or columns) with one meaning: `units` pieces of `unit` elements on the named `axis`.

    `source` is the checkpoint prefix that fills it, relative to its module's scope (`self_attn.q_proj`). `start` is where
    a rank's share begins in the whole part.
    """

    name: str
    axis: str
    units: int = field(validator=_positive)
    unit: int = field(default=1, validator=_positive)
    source: str = ""
    start: int = field(default=0, eq=False)

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return self.units * self.unit


@frozen
class Linear:
    """A linear layer y = x W^T + b: output parts fused in order, one input part, and the module that feeds it.

    `fed_by` names the producer (a norm, an activation, `attention`) in the same scope, so that the builder can let it emit
    the input format the linear's method takes. `follows` names the output part of another linear of the scope to which the inputs
    are proportional: dividing row i of that part by a number divides input i by it. A part with fewer units than the input feeds
    each to as many units in a row: 4 heads of values and 32 query heads, the first head of values to the first 8.
    """

    name: str
    out: tuple[Part, ...]
    inp: Part
    bias: bool = False
    fed_by: str = ""
    tied_to: str = ""  # name of the embedding whose table serves as weight; nothing is stored or loaded
    follows: str = ""

    @property
    def out_size(self) -> int:
        """Return the number of output features over all parts."""
        return sum(part.size for part in self.out)

    @property
    def in_size(self) -> int:
        """Return the number of input features."""
        return self.inp.size


@frozen
class Embedding:
    """A table of `rows` by `width`, gathered by token id."""

    name: str
    rows: Part
    width: Part


@frozen
class Vector:
    """A norm's parameters: a weight, and a bias where `bias`, both of `width` and always in the model's dtype."""

    name: str
    width: Part
    bias: bool = False
    source: str = ""


Module = Linear | Embedding | Vector


@frozen
class WeightTable:
    """Every parameter of a model: modules outside the layers, and those of one layer, repeated `num_layers` times.

    `layer_scope` and `layer_source` are the module and checkpoint prefixes of layer i, with `{i}` in them.
    `ignored` lists checkpoint name suffixes that older savers wrote and nobody reads.
    """

    outer: tuple[Module, ...]
    layer: tuple[Module, ...]
    num_layers: int
    layer_scope: str = "layers.{i}."
    layer_source: str = "model.layers.{i}."
    ignored: tuple[str, ...] = ()

    def modules(self) -> Iterator[tuple[str, str, Module]]:
        """Yield (scope, source prefix, module) for every module, outer ones first."""
        for module in self.outer:
            yield "", "", module
        for i in range(self.num_layers):
            scope, source = self.layer_scope.format(i=i), self.layer_source.format(i=i)
            for module in self.layer:
                yield scope, source, module


@frozen
class TensorAxis:
    """One axis of a stored tensor: the `out` or `in` side of a linear, `pack` elements a word, one entry a `group`.

    `group` -1 is one entry for the whole axis. `cut` is the number of elements at whose multiples a rank may begin and end: whole
    words and groups unless the format's method can slice a group; a rank then takes every group that it touches. What a rank
    keeps is filled up to a multiple of `fill` elements. An axis of the side `fixed` belongs to neither side and has `entries`
    entries.
    """

    side: str = field(validator=validators.in_(("out", "in", "fixed")))
    pack: int = field(default=1, validator=_positive)
    group: int = 1
    cut: int = field(kw_only=True, validator=_positive)
    entries: int = field(default=0, kw_only=True)
    fill: int = field(default=1, kw_only=True, validator=_positive)

    @cut.default
    def _whole_entries(self) -> int:
        return max(1, self.step)

    @property
    def step(self) -> int:
        """Return how many elements an entry is for, negative where that is the whole axis."""
        return self.pack * self.group

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the stored entries (first, end) that elements `start` to `stop` take."""
        if self.side == "fixed":
            return 0, self.entries
        return (0, 1) if self.group == -1 else (start // self.step, math.ceil(stop / self.step))

    def extent(self, size: int, start: int = 0) -> int:
        """Return how many stored entries `size` elements take on this axis, the first of them being element `start`."""
        first, end = self.span(start, start + size)
        return end - first

    def piece(self, size: int) -> int:
        """Return how many elements an entry is for on a rank with `size` of them: groups that its ends slice lie in pieces."""
        if self.group == -1:
            return size
        return math.gcd(self.step, size) if self.cut < self.step else self.step

    def held(self, size: int) -> int:
        """Return how many entries a rank with `size` elements keeps."""
        if self.side == "fixed":
            return self.extent(size)
        return math.ceil(math.ceil(size / self.fill) * self.fill / self.piece(size))


@frozen
class Tensor:
    """A stored tensor of a linear: checkpoint suffix, dtype and axes. Without an `out` axis it is kept once for each part.

    An `optional` one may be absent: the parameter then holds what `create` put there. `stored_as` is its name in the checkpoint
    where that is not the part's prefix and `name`; `{part}` in it stands for the prefix.
    """

    name: str
    dtype: str
    axes: tuple[TensorAxis, ...] = ()
    optional: bool = False
    stored_as: str = ""

    @property
    def is_per_part(self) -> bool:
        """Return whether each fused part has its own, along a leading axis."""
        return all(axis.side != "out" for axis in self.axes)

    def stored_name(self, prefix: str) -> str:
        """Return its name in the checkpoint for the part at that prefix."""
        return (self.stored_as or f"{{part}}.{self.name}").replace("{part}", prefix)

    def shape(self, out_size: int, in_size: int) -> tuple[int, ...]:
        """Return the stored shape for a linear (or a part of it) of that size."""
        return tuple(axis.extent(out_size if axis.side == "out" else in_size) for axis in self.axes)

    def share(self, part: Part, inp: Part) -> tuple[int, ...]:
        """Return the shape of what a rank's shares of a part and of the input take of the stored tensor."""
        sides = {"out": part, "in": inp, "fixed": inp}
        return tuple(axis.extent(sides[axis.side].size, sides[axis.side].start) for axis in self.axes)

    def held(self, out_sizes: Sequence[int], in_size: int) -> int:
        """Return how many elements a rank keeps for parts of these sizes: each has its own last word, group or scalar.

        Where outputs are filled up, all parts lie together and are filled up once.
        """
        sizes = [sum(out_sizes)] if any(axis.side == "out" and axis.fill > 1 for axis in self.axes) else out_sizes
        return sum(math.prod(axis.held(out if axis.side == "out" else in_size) for axis in self.axes) for out in sizes)


class Scheme(Protocol):
    """How a checkpoint stores its linears: what a quantisation's `detect` returns. Free of torch."""

    @property
    def name(self) -> str:
        """Return the format's name."""

    @property
    def kv_cache_dtype(self) -> str | None:
        """Return the dtype the checkpoint has KV scales for, None for none."""

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return the tensors (bias excluded) that hold `linear`, whose first part is found at checkpoint prefix `path`."""


@runtime_checkable
class RoundsInputs(Protocol):
    """A `Scheme` of 4-bit weights, whose products take inputs as they are or round each token to FP8; planning chooses."""

    @property
    def fp8_inputs_from(self) -> int | None:
        """Return from how many tokens a step on inputs are rounded, None for never; as detected, what it was made for."""

    def with_fp8_from(self, inputs: int | None, weights: int | None, *, keep: bool = False) -> Scheme:
        """Return the same scheme with inputs rounded from so many tokens a step on, and weights to FP8 rows from so many on.

        With `keep` those rows are made once and stay beside the 4-bit weights; else each such step makes them.
        """


@runtime_checkable
class KeepsScales(Protocol):
    """A `Scheme` whose scales may be stored in any float dtype; planning has it keep one that loses nothing of them."""

    @property
    def scale_name(self) -> str:
        """Return the name of the tensors that hold them, as `Tensor.name`."""

    @property
    def scale_dtype(self) -> str:
        """Return the dtype they are kept in; as detected, the one that is usual for the format."""

    def with_scale_dtype(self, dtype: str) -> Scheme:
        """Return the same scheme with its scales kept in another dtype."""


def left_plain(path: str, linear: Linear, skipped: Callable[[str], bool]) -> bool:
    """Return whether a format skips `linear`, whose first part is found at checkpoint prefix `path`.

    Raises PlanError when it skips some of the parts that run as one product and stores the others.
    """
    scope = path.removesuffix(linear.out[0].source)
    answers = {scope + part.source: skipped(scope + part.source) for part in linear.out}
    if len(set(answers.values())) == 1:
        return answers[path]
    plain = ", ".join(name for name, answer in answers.items() if answer)
    stored = ", ".join(name for name, answer in answers.items() if not answer)
    raise PlanError(
        f"the checkpoint leaves {plain} plain but quantises {stored}, which run as one product",
        fix="quantise or skip all of them when making the checkpoint",
    )


@frozen
class Unquantized:
    """The plain scheme: one weight [out, in] in the model's dtype."""

    dtype: str
    name: str = "none"
    kv_cache_dtype: str | None = None

    def tensors(self, path: str, linear: Linear) -> tuple[Tensor, ...]:
        """Return the single weight."""
        return (Tensor("weight", self.dtype, (TensorAxis("out"), TensorAxis("in"))),)


@frozen
class Shard:
    """A rank's share of the cut axes: `rank` of `world`."""

    rank: int = 0
    world: int = 1
    cuts: frozenset[str] = frozenset()

    def part(self, part: Part) -> Part:
        """Return this rank's share of `part`: whole when its axis is not cut, one unit when there are fewer units than ranks."""
        if part.axis not in self.cuts or self.world == 1:
            return part
        units, world = part.units, self.world
        if units % world == 0:
            share = units // world
        elif units < world and world % units == 0:
            share = 1
        else:
            raise PlanError(
                f"part {part.name!r} has {units} {part.axis} of {part.unit}: {world} ranks cannot share them evenly",
                fix=f"choose a tensor-parallel size that divides {units}",
            )
        start = self.rank * units // world * part.unit
        return Part(part.name, part.axis, share, part.unit, part.source, start)

    def span(self, part: Part) -> tuple[int, int]:
        """Return the elements (start, stop) of `part` this rank holds; ranks that share one unit hold the same ones."""
        share = self.part(part)
        return share.start, share.start + share.size

    def linear(self, linear: Linear) -> Linear:
        """Return this rank's share of a linear, part by part."""
        return Linear(
            linear.name,
            tuple(self.part(part) for part in linear.out),
            self.part(linear.inp),
            linear.bias,
            linear.fed_by,
            linear.tied_to,
            linear.follows,
        )


WHOLE = Shard()
