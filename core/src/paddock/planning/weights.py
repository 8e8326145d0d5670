"""How many bytes a model's parameters take on one device, counted from the named axes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from attrs import field, frozen

from paddock.axes import Embedding, Linear, Module, Scheme, Shard, Tensor, Unquantized, Vector, WeightTable
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


def copies_tied_heads(device: str, dtype: str) -> bool:
    """Return whether a head tied to its embedding has a copy of the table, laid out for a CPU's matrix kernels."""
    return device == "cpu" and dtype in ("float32", "bfloat16")


def stored_tensors(table: WeightTable, scheme: Scheme) -> Tensors:
    """Return the tensors that hold each linear, by checkpoint path of its first part; tied heads hold none."""
    return {
        source + module.out[0].source: scheme.tensors(source + module.out[0].source, module)
        for _, source, module in table.modules()
        if isinstance(module, Linear) and not module.tied_to
    }


@frozen(kw_only=True)
class Weigher:
    """Counts the parameters of a weight table whose linears `tensors` hold, norms and biases in `dtype`.

    `copies_tied_heads`: a head tied to its embedding takes the table's bytes again. `row_scales`: linears that are not stored
    plainly keep a float32 scale an output beside what is stored; `fp8_copies`: and their weights once more, a byte each.
    """

    table: WeightTable
    tensors: Tensors
    dtype: str
    shard: Shard = field(factory=Shard)
    copies_tied_heads: bool = False
    row_scales: bool = False
    fp8_copies: bool = False

    def weigh(self, stage: Stage) -> WeightBytes:
        """Return the bytes one device of that stage holds."""
        totals = dict.fromkeys(("embeddings", "layers", "head", "norms", "copies"), 0)
        for module in self.table.outer:
            for kind, size in self._outer(module, stage):
                totals[kind] += size
        sources = [self.table.layer_source.format(i=i) for i in range(stage.first, stage.end)]
        for module in self.table.layer:
            if isinstance(module, Linear):
                totals["layers"] += self._linear(module, sources)
                totals["copies"] += self._copies(module, sources)
            elif isinstance(module, Vector):
                totals["norms"] += self._vector(module) * len(sources)
            else:
                totals["layers"] += self._embedding(module) * len(sources)
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
            shared = stage.is_first and not self.copies_tied_heads
            yield "head", 0 if shared else self._embedding(self._embedding_named(module.tied_to))
        else:
            yield "head", self._linear(module, [""])
            yield "copies", self._copies(module, [""])

    def _embedding(self, module: Embedding) -> int:
        return self.shard.part(module.rows).size * self.shard.part(module.width).size * dtype_bytes(self.dtype)

    def _vector(self, module: Vector) -> int:
        return self.shard.part(module.width).size * (2 if module.bias else 1) * dtype_bytes(self.dtype)

    def _linear(self, whole: Linear, sources: list[str]) -> int:
        """Return the bytes of a linear over the scopes with these checkpoint prefixes; most are stored alike."""
        mine = self.shard.linear(whole)
        alike = Counter(self.tensors[source + whole.out[0].source] for source in sources)
        stored = sum(times * (_linear_bytes(tensors, mine) + self._row_scales(tensors, mine)) for tensors, times in alike.items())
        return stored + (len(sources) * mine.out_size * dtype_bytes(self.dtype) if mine.bias else 0)

    def _row_scales(self, tensors: tuple[Tensor, ...], mine: Linear) -> int:
        return mine.out_size * dtype_bytes("float32") if self.row_scales and not self._is_plain(tensors, mine) else 0

    def _copies(self, whole: Linear, sources: list[str]) -> int:
        if not self.fp8_copies:
            return 0
        mine = self.shard.linear(whole)
        copied = sum(not self._is_plain(self.tensors[source + whole.out[0].source], mine) for source in sources)
        return copied * mine.out_size * mine.in_size * dtype_bytes("float8_e4m3fn")

    def _is_plain(self, tensors: tuple[Tensor, ...], mine: Linear) -> bool:
        return tensors == Unquantized(self.dtype).tensors("", mine)

    def _embedding_named(self, name: str) -> Embedding:
        found = [module for module in self.table.outer if isinstance(module, Embedding) and module.name == name]
        if not found:
            raise PluginError(f"a head is tied to {name!r}, which is no embedding of the model", fix="correct its weight table")
        return found[0]


def _linear_bytes(tensors: tuple[Tensor, ...], linear: Linear) -> int:
    """Return the bytes of all tensors that must be there."""
    outs, kept = [part.size for part in linear.out], [tensor for tensor in tensors if not tensor.optional]
    return sum(tensor.held(outs, linear.in_size) * dtype_bytes(tensor.dtype) for tensor in kept)


_TOGETHER = " (all belong together: one group, or groups whose inputs are reordered, as by desc_act)"


def straddling_groups(table: WeightTable, tensors: Tensors, shard: Shard) -> Iterator[str]:
    """Yield a sentence for each packed or grouped axis that the shard's cuts do not meet at a boundary."""
    asked: set[tuple[str, tuple[Tensor, ...]]] = set()
    for _, source, module in table.modules():
        if not isinstance(module, Linear) or module.tied_to:
            continue
        path = source + module.out[0].source
        if (module.name, tensors[path]) in asked:
            continue
        asked.add((module.name, tensors[path]))
        mine = shard.linear(module)
        sides = [("out", whole, cut) for whole, cut in zip(module.out, mine.out, strict=True)] + [("in", module.inp, mine.inp)]
        for side, whole, cut in sides:
            for piece in _pieces(tensors[path], side):
                if cut.size == whole.size or not cut.size % piece:
                    continue
                yield (
                    f"{path}: {whole.size} {side}puts over {shard.world} ranks are {cut.size} each, "
                    f"{cut.size / piece:g} groups of {piece}{_TOGETHER if piece == whole.size else ''}"
                )


def _pieces(tensors: tuple[Tensor, ...], side: str) -> list[int]:
    return sorted({axis.cut for tensor in tensors for axis in tensor.axes if axis.side == side}, reverse=True)
