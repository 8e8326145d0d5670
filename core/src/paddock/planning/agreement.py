"""Whether the tensors of a checkpoint are those its config.json describes, by their names, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from paddock.axes import Linear, Scheme, WeightTable
from paddock.config import DUMMY, EngineConfig
from paddock.planning.kv_scales import NAMES, UNREAD
from paddock.planning.notes import Notes
from paddock.planning.weights import Tensors

_LISTED = 10
_NOT_OF_LINEARS = {"bias", *(ending.rpartition(".")[2] for endings in NAMES.values() for ending in endings)}


def say_disagreement(
    config: EngineConfig, scheme: Scheme, tensors: Tensors, table: WeightTable, names: frozenset[str] | None, notes: Notes
) -> None:
    """Note one error with every linear whose tensors are not those of the format; `tensors` is what the checkpoint must hold."""
    if names is None or config.load_format == DUMMY:
        return
    found = list(_differences(tensors, table, names))
    if not found:
        return
    rest = [f"and {len(found) - _LISTED} more"] if len(found) > _LISTED else []
    format_ = "plain" if scheme.name == "none" else f"quantised as {scheme.name!r}"
    notes.find(
        "error",
        "checkpoint_disagrees",
        "\n    ".join(
            [f"by config.json the model is {format_}, but its weights say otherwise:", *sorted(found)[:_LISTED], *rest]
        ),
        "take config.json and weights from the same export; a module that is plain there must be in the config's ignore list",
    )


def _differences(tensors: Tensors, table: WeightTable, names: Iterable[str]) -> Iterator[str]:
    held = _by_module(name for name in names if not name.endswith((*table.ignored, *UNREAD)))
    for _, source, module in table.modules():
        if not isinstance(module, Linear) or module.tied_to:
            continue
        declared = tensors[source + module.out[0].source]
        for part in module.out:
            has = held.get(source + part.source, set())
            may = {tensor.name for tensor in declared}
            must = {tensor.name for tensor in declared if not tensor.optional}
            if not must <= has <= may:
                yield (
                    f"{source}{part.source}: config.json means {', '.join(sorted(must))}; "
                    f"the checkpoint holds {', '.join(sorted(has)) or 'nothing'}"
                )


def _by_module(names: Iterable[str]) -> dict[str, set[str]]:
    held: dict[str, set[str]] = {}
    for name in names:
        module, _, tensor = name.rpartition(".")
        if tensor not in _NOT_OF_LINEARS:
            held.setdefault(module, set()).add(tensor)
    return held
