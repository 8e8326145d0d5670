"""Whether the tensors of a checkpoint are those its config.json describes, by headers alone, before anything is allocated."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

from paddock.axes import Embedding, Linear, Scheme, Vector, WeightTable
from paddock.config import DUMMY, FP8_ATTENTION, EngineConfig
from paddock.errors import PaddockError
from paddock.planning.formats import Format
from paddock.planning.kv_scales import ENDINGS, QUERIES, UNREAD
from paddock.planning.notes import Notes, listed
from paddock.planning.plan import ModelFiles
from paddock.planning.wanted import embedding_names, vector_names, wanted_scales, wanted_tensors
from paddock.planning.weights import Tensors
from paddock.plugins.known import TENSORS_READ_BY_NOBODY

_FIX = "take config.json and weights from the same export; a module that is plain there must be in the config's ignore list"
_FIX_TIED = "set tie_word_embeddings to false in config.json, so that the quantised head is read as the linear it is"
_NOT_OF_LINEARS = {"bias", *(ending.rpartition(".")[2] for ending in ENDINGS)}


def say_disagreement(
    config: EngineConfig, fmt: Format, tensors: Tensors, table: WeightTable, files: ModelFiles, notes: Notes
) -> None:
    """Note one error with all that a checkpoint does not hold as it must: `tensors` are those of linears.

    With every linear whose tensors have not the names of the format; where all have, what loading would say: of every tensor that
    is missing beside, and of every one of another shape or a dtype that does not fill the parameter, or of every file that is
    not sound.
    """
    if config.load_format == DUMMY:
        return
    names = files.tensor_names
    if names is not None and _say_names(fmt.scheme, tensors, table, names, notes):
        return
    queries = QUERIES if config.attention_compute == FP8_ATTENTION else ()
    wanted = wanted_scales(names or (), table, queries) | wanted_tensors(table, tensors, fmt.dtype)
    if names is not None:
        _say_missing(table, names, wanted, notes)
    try:
        files.check_weights(wanted)
    except PaddockError as error:
        notes.find("error", "weights_do_not_fit", error.message, error.fix)


def _say_names(scheme: Scheme, tensors: Tensors, table: WeightTable, names: frozenset[str], notes: Notes) -> bool:
    """Note one error with every linear whose tensors are not those of the format; return whether there is one."""
    held = _by_module(name for name in names if not name.endswith((*table.ignored, *UNREAD)))
    tied = list(_quantised_though_tied(table, held))
    found = [*_differences(tensors, table, held), *tied]
    if not found:
        return False
    format_ = "plain" if scheme.name == "none" else f"quantised as {scheme.name!r}"
    notes.find(
        "error",
        "checkpoint_disagrees",
        listed(f"by config.json the model is {format_}, but its weights say otherwise:", sorted(found)),
        _of_nobody(held) or (_FIX_TIED if len(tied) == len(found) else f"{_FIX}; {_FIX_TIED}" if tied else _FIX),
    )
    return True


def _of_nobody(held: Mapping[str, set[str]]) -> str:
    """Return what to do about tensors of a format that nothing here reads, an empty text where there are none."""
    found = {TENSORS_READ_BY_NOBODY[name]: name for has in held.values() for name in has if name in TENSORS_READ_BY_NOBODY}
    if not found:
        return ""
    said = (f"tensors called {name} are {format_}'s, which nothing here reads" for format_, name in sorted(found.items()))
    return "; ".join((*said, "use a checkpoint in another format (`paddock list quantizations`), or the plain model"))


def _differences(tensors: Tensors, table: WeightTable, held: Mapping[str, set[str]]) -> Iterator[str]:
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


def _say_missing(table: WeightTable, names: frozenset[str], wanted: Container[str], notes: Notes) -> None:
    """Note one error with every embedding, norm and bias that the checkpoint does not hold, and what it holds in their place."""
    missing = [each for each in _others(table) if names.isdisjoint(each)]
    if not missing:
        return
    unread = (*table.ignored, *UNREAD)
    alien = sorted(name for name in names if name not in wanted and not name.endswith(unread))
    cases = [f"{' or '.join(each)}: missing" for each in missing]
    notes.find(
        "error",
        "weights_are_missing",
        listed(
            f"the checkpoint does not hold {len(missing)} of the model's tensors:",
            [*cases, *(f"{name}: unexpected, nothing of the model takes it" for name in alien)],
        ),
        "take config.json and weights from the same export, or fetch the weights again",
    )


def _others(table: WeightTable) -> Iterator[list[str]]:
    """Yield the names of each tensor that no format decides on: of embeddings, norms and biases."""
    for _, source, module in table.modules():
        if isinstance(module, Embedding):
            yield embedding_names(module, source, table)
        elif isinstance(module, Vector):
            yield from ([name] for name in vector_names(module, source))
        elif module.bias and not module.tied_to:
            yield from ([f"{source}{part.source}.bias"] for part in module.out)


def _quantised_though_tied(table: WeightTable, held: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield a sentence for each head that config.json ties to its embedding and the checkpoint holds in more than a weight."""
    for _, source, module in table.modules():
        if not isinstance(module, Linear) or not module.tied_to:
            continue
        for part in module.out:
            has = held.get(source + part.source, set())
            if not has <= {"weight"}:
                yield (
                    f"{source}{part.source}: config.json ties it to the embedding; "
                    f"the checkpoint holds it quantised, as {', '.join(sorted(has))}"
                )


def _by_module(names: Iterable[str]) -> dict[str, set[str]]:
    held: dict[str, set[str]] = {}
    for name in names:
        module, _, tensor = name.rpartition(".")
        if tensor not in _NOT_OF_LINEARS:
            held.setdefault(module, set()).add(tensor)
    return held
