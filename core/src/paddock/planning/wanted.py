"""What each tensor of a checkpoint must be, by its name: the same that the parameters of the built model are filled with."""

from __future__ import annotations

from collections.abc import Iterable

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
            found |= {name: Wanted(dtype, shape) for name in embedding_names(module, source, table)}
        elif isinstance(module, Vector):
            found |= {name: Wanted(dtype, (module.width.size,)) for name in vector_names(module, source)}
        elif not module.tied_to:
            found |= _of_linear(module, source, tensors, dtype)
    return found


def wanted_scales(names: Iterable[str], table: WeightTable, queries: Iterable[str] = ()) -> dict[str, Wanted]:
    """Return what those of `names` must be that are scales of keys or values, or of queries under the endings in `queries`."""
    endings = (*ENDINGS, *(f".{name}" for name in queries))
    return {name: _SCALE for name in names if name.endswith(endings) and not name.endswith(table.ignored)}


def embedding_names(module: Embedding, source: str, table: WeightTable) -> list[str]:
    """Return the names under which a checkpoint may hold an embedding: its own, and those of heads that share its table."""
    heads = [head for head in table.outer if isinstance(head, Linear) and head.tied_to == module.name]
    tied = [part.source for head in heads for part in head.out if part.source]
    return [f"{name}.weight" for name in (source + module.rows.source, *tied)]


def vector_names(module: Vector, source: str) -> list[str]:
    """Return the names of a norm's tensors."""
    return [f"{source}{module.source}.{name}" for name in (("weight", "bias") if module.bias else ("weight",))]


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
