"""What each tensor of a checkpoint must be, by its name: the same that the parameters of the built model are filled with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from paddock.axes import Embedding, Linear, Vector, WeightTable
from paddock.planning.kv_scales import ENDINGS
from paddock.planning.plan import Wanted
from paddock.planning.weights import Tensors

_SCALE = Wanted("float32", ())


def wanted_tensors(table: WeightTable, tensors: Tensors, dtype: str) -> dict[str, Wanted]:
    """Return what the tensors of linears, embeddings and norms must be.

    `tensors` are those that hold each linear, by checkpoint path of its first part; all others are filled in `dtype`.
    """
    found: dict[str, Wanted] = {}
    for _, source, module in table.modules():
        if isinstance(module, Embedding):
            shape = module.rows.size, module.width.size
            found |= {f"{name}.weight": Wanted(dtype, shape) for name in (source + module.rows.source, *_tied_to(module, table))}
        elif isinstance(module, Vector):
            names = ("weight", "bias") if module.bias else ("weight",)
            found |= {f"{source}{module.source}.{name}": Wanted(dtype, (module.width.size,)) for name in names}
        elif not module.tied_to:
            found |= _of_linear(module, source, tensors, dtype)
    return found


def wanted_scales(names: Iterable[str], table: WeightTable, queries: Iterable[str] = ()) -> dict[str, Wanted]:
    """Return what those of `names` must be that are scales of keys or values, or of queries under the endings in `queries`."""
    endings = (*ENDINGS, *(f".{name}" for name in queries))
    return {name: _SCALE for name in names if name.endswith(endings) and not name.endswith(table.ignored)}


def _of_linear(module: Linear, source: str, tensors: Tensors, dtype: str) -> dict[str, Wanted]:
    """Return what the tensors of every part of a linear must be, and its biases."""
    found = {}
    for part in module.out:
        prefix = source + part.source
        for tensor in tensors[source + module.out[0].source]:
            found[tensor.stored_name(prefix)] = Wanted(tensor.dtype, tensor.shape(part.size, module.in_size))
        if module.bias:
            found[f"{prefix}.bias"] = Wanted(dtype, (part.size,))
    return found


def _tied_to(embedding: Embedding, table: WeightTable) -> Iterator[str]:
    """Yield the sources of heads that share an embedding's table."""
    for head in table.outer:
        if isinstance(head, Linear) and head.tied_to == embedding.name:
            yield from (part.source for part in head.out if part.source)
