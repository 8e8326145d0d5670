"""Checkpoint tensors against the parameters that want them: each used once, each filled once, or one error with every misfit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import frozen

from paddock.checkpoint.dtypes import STORED_NAMES, fills
from paddock.checkpoint.header import StoredTensor
from paddock.checkpoint.problems import Problems, quoted
from paddock.checkpoint.targets import Target

_FP8 = "float8_e4m3fn"
_OTHER_FP8 = frozenset({"F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@frozen(eq=False)
class Match:
    """A stored tensor and where it goes."""

    stored: StoredTensor
    target: Target


def match(
    stored: Mapping[str, StoredTensor], targets: Iterable[Target], *, ignored_suffixes: Iterable[str], source: object
) -> list[Match]:
    """Return what fills each target; `source` names the checkpoint in errors.

    Of a target's name and aliases the first that is stored fills it; further ones are copies and need only have its shape.
    An alias may serve several targets, as one KV scale serves keys and values.
    Tensors whose name ends in one of `ignored_suffixes` may be left over. Raises CheckpointError with every missing,
    unexpected, mis-shaped and wrongly typed tensor.
    """
    problems, matches, taken = Problems(), list[Match](), set[str]()
    for target in targets:
        _check(target)
        present = [name for name in (target.name, *target.aliases) if name in stored]
        if not present and not target.optional:
            problems.add(f"{quoted(target.name)}: missing; the model wants {_describe(target)}")
        for name in present:
            if name in taken and name == target.name:
                problems.add(f"{quoted(name)}: two parameters want it")
            _compare(stored[name], target, problems)
        taken.update(present)
        matches += [Match(stored[name], target) for name in present[:1]]
    endings = tuple(ignored_suffixes)
    for name in stored.keys() - taken:
        if not name.endswith(endings):
            problems.add(f"{quoted(name)}: unexpected; no parameter of the model takes it")
    alien = sorted({each.stored.dtype for each in matches if each.stored.dtype in _OTHER_FP8 and _dtype(each.target) == _FP8})
    problems.refuse(
        f"the checkpoint in {source} does not fit the model ({len(problems)} of its tensors)",
        fix=f"use one whose FP8 weights are {STORED_NAMES[_FP8]}: {', '.join(alien)} stores other numbers in the same bytes"
        if alien
        else "check that config.json belongs to these weights and says how they are quantised",
    )
    return matches


def _check(target: Target) -> None:
    sizes = tuple(stop - start for start, stop in target.region)
    assert tuple(target.view.shape) == sizes, f"{target.name}: a region of {sizes} cannot fill {tuple(target.view.shape)}"
    assert all(0 <= start <= stop <= n for (start, stop), n in zip(target.region, target.shape, strict=True)), target.name


def _compare(stored: StoredTensor, target: Target, problems: Problems) -> None:
    """Complain where a stored tensor cannot fill a target. Axes of one element may come and go: the bytes are the same."""
    if _without_ones(stored.shape) != _without_ones(target.shape):
        problems.add(f"{quoted(stored.name)}: has shape {list(stored.shape)}; the model wants {_describe(target)}")
    elif not fills(stored.dtype, _dtype(target)):
        problems.add(
            f"{quoted(stored.name)}: is {stored.dtype}, of shape {list(stored.shape)}; the model wants {_describe(target)}"
        )


def _describe(target: Target) -> str:
    return f"{STORED_NAMES.get(_dtype(target), _dtype(target))} {list(target.shape)}"


def _dtype(target: Target) -> str:
    return target.rows.dtype if target.rows is not None else str(target.view.dtype).removeprefix("torch.")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
