"""How many bytes a model's parameters take on one device, counted from the named axes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from attrs import field, frozen

from paddock.axes import Embedding, Linear, Module, Part, Scheme, Shard, Tensor, Vector, WeightTable
from paddock.errors import PluginError, did_you_mean
from paddock.planning.plan import WeightBytes

DTYPE_BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "float8_e4m3fn": 1,
    "fp8": 1,  # the KV cache's word for float8_e4m3fn
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def dtype_bytes(dtype: str) -> int:
    """Return the size of one element; raise PluginError for a dtype nobody knows."""
    size = DTYPE_BYTES.get(dtype)
    if size is None:
        raise PluginError(f"a tensor is declared with unknown dtype {dtype!r}", fix=did_you_mean(dtype, DTYPE_BYTES))
    return size


@frozen(kw_only=True)
class Stage:
    """What one pipeline stage holds: layers `first` to `end`, with the embedding in the first and the head in the last stage."""

    index: int = 0
    count: int = 1
    first: int
    end: int

    @property
    def is_first(self) -> bool:
        """Return whether it embeds tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Return whether it makes logits."""
        return self.index == self.count - 1


Tensors = Mapping[str, tuple[Tensor, ...]]


def stored_tensors(table: WeightTable, scheme: Scheme) -> Tensors:
    """Return the tensors that hold each linear, by checkpoint path of its first part; tied heads hold none."""
    return {
        source + module.out[0].source: scheme.tensors(source + module.out[0].source, module)
        for _, source, module in table.modules()
        if isinstance(module, Linear) and not module.tied_to
    }


@frozen(kw_only=True)
class Weigher:
    """Counts the parameters of a weight table whose linears `tensors` hold, norms and biases in `dtype`."""

    table: WeightTable
    tensors: Tensors
    dtype: str
    shard: Shard = field(factory=Shard)

    def weigh(self, stage: Stage) -> WeightBytes:
        """Return the bytes one device of that stage holds."""
        totals = dict.fromkeys(("embeddings", "layers", "head", "norms"), 0)
        for module in self.table.outer:
            for kind, size in self._outer(module, stage):
                totals[kind] += size
        for i in range(stage.first, stage.end):
            source = self.table.layer_source.format(i=i)
            for module in self.table.layer:
                totals["norms" if isinstance(module, Vector) else "layers"] += self._module(module, source)
        return WeightBytes(**totals)

    def _outer(self, module: Module, stage: Stage) -> Iterator[tuple[str, int]]:
        if isinstance(module, Embedding):
            if stage.is_first:
                yield "embeddings", self._embedding(module)
        elif not stage.is_last:
            return
        elif isinstance(module, Vector):
            yield "norms", self._vector(module)
        elif module.tied_to:
            # A tied head needs the table where the head runs; on another device than the embedding that is a second copy.
            yield "head", 0 if stage.is_first else self._embedding(self._embedding_named(module.tied_to))
        else:
            yield "head", self._linear(module, "")

    def _module(self, module: Module, source: str) -> int:
        if isinstance(module, Linear):
            return self._linear(module, source)
        return self._vector(module) if isinstance(module, Vector) else self._embedding(module)

    def _embedding(self, module: Embedding) -> int:
        return self.shard.part(module.rows).size * self.shard.part(module.width).size * dtype_bytes(self.dtype)

    def _vector(self, module: Vector) -> int:
        return self.shard.part(module.width).size * (2 if module.bias else 1) * dtype_bytes(self.dtype)

    def _linear(self, whole: Linear, source: str) -> int:
        mine = self.shard.linear(whole)
        tensors = self.tensors[source + whole.out[0].source]
        bias = mine.out_size * dtype_bytes(self.dtype) if mine.bias else 0
        return bias + sum(_tensor_bytes(tensor, part, mine.in_size) for tensor in tensors for part in mine.out)

    def _embedding_named(self, name: str) -> Embedding:
        found = [module for module in self.table.outer if isinstance(module, Embedding) and module.name == name]
        if not found:
            raise PluginError(f"a head is tied to {name!r}, which is no embedding of the model", fix="correct its weight table")
        return found[0]


def _tensor_bytes(tensor: Tensor, part: Part, in_size: int) -> int:
    return math.prod(tensor.shape(part.size, in_size)) * dtype_bytes(tensor.dtype)


def straddling_groups(table: WeightTable, tensors: Tensors, shard: Shard) -> Iterator[str]:
    """Yield a sentence for each packed or grouped axis that the shard's cuts do not meet at a boundary."""
    said: set[tuple[str, str]] = set()
    for _, source, module in table.modules():
        if not isinstance(module, Linear) or module.tied_to:
            continue
        mine, path = shard.linear(module), source + module.out[0].source
        sides = [("out", whole, cut) for whole, cut in zip(module.out, mine.out, strict=True)] + [("in", module.inp, mine.inp)]
        for side, whole, cut in sides:
            if cut.size == whole.size or (module.name, side) in said:
                continue
            for piece in _pieces(tensors[path], side):
                if cut.size % piece:
                    said.add((module.name, side))
                    yield (
                        f"{path}: {whole.size} {side}puts over {shard.world} ranks are {cut.size} each, "
                        f"{cut.size / piece:g} groups of {piece}"
                    )


def _pieces(tensors: tuple[Tensor, ...], side: str) -> list[int]:
    axes = (axis for tensor in tensors for axis in tensor.axes if axis.side == side and axis.group != -1)
    return sorted({axis.pack * axis.group for axis in axes}, reverse=True)
