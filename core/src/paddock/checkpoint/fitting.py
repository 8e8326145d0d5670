"""Whether stored tensors fit what wants them, in the words that planning and loading refuse them with. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paddock.checkpoint.dtypes import STORED_NAMES, fills
from paddock.checkpoint.header import StoredTensor
from paddock.checkpoint.problems import Problems, quoted
from paddock.planning.plan import Wanted

_FP8 = "float8_e4m3fn"
_OTHER_FP8 = frozenset({"F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


def check(stored: Mapping[str, StoredTensor], wanted: Mapping[str, Wanted], *, source: object) -> None:
    """Raise CheckpointError with every tensor of a name in `wanted` that cannot fill it; `source` names the checkpoint."""
    problems, pairs = Problems(), [(stored[name], each) for name, each in wanted.items() if name in stored]
    for tensor, each in pairs:
        compare(tensor, each, problems)
    refuse(problems, pairs, source=source)


def compare(stored: StoredTensor, wanted: Wanted, problems: Problems) -> None:
    """Complain where a stored tensor cannot fill what wants it. Axes of one element may come and go: the bytes are the same."""
    if _without_ones(stored.shape) != _without_ones(wanted.shape):
        problems.add(f"{quoted(stored.name)}: has shape {list(stored.shape)}; the model wants {described(wanted)}")
    elif not fills(stored.dtype, wanted.dtype):
        problems.add(
            f"{quoted(stored.name)}: is {stored.dtype}, of shape {list(stored.shape)}; the model wants {described(wanted)}"
        )


def described(wanted: Wanted) -> str:
    """Return the dtype, as files call it, and the shape."""
    return f"{STORED_NAMES.get(wanted.dtype, wanted.dtype)} {list(wanted.shape)}"


def refuse(problems: Problems, pairs: Iterable[tuple[StoredTensor, Wanted]], *, source: object) -> None:
    """Raise CheckpointError with all complaints, if any; the way out depends on what was to fill what."""
    alien = sorted({stored.dtype for stored, wanted in pairs if stored.dtype in _OTHER_FP8 and wanted.dtype == _FP8})
    problems.refuse(
        f"the checkpoint in {source} does not fit the model ({len(problems)} of its tensors)",
        fix=f"use one whose FP8 weights are {STORED_NAMES[_FP8]}: {', '.join(alien)} stores other numbers in the same bytes"
        if alien
        else "check that config.json belongs to these weights and says how they are quantised",
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
