"""Checkpoint tensors against the parameters that want them: each used once, each filled once, or one error with every misfit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import frozen

from paddock.checkpoint.fitting import compare, described, refuse
from paddock.checkpoint.header import StoredTensor
from paddock.checkpoint.problems import Problems, quoted
from paddock.checkpoint.targets import Target
from paddock.planning.plan import Wanted


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
    Planning compares the numbers of KV scales.
    An alias may serve several targets, as one KV scale serves keys and values.
    Tensors whose name ends in one of `ignored_suffixes` may be left over. Raises CheckpointError with every missing,
    unexpected, mis-shaped and wrongly typed tensor.
    """
    problems, matches, taken = Problems(), list[Match](), set[str]()
    for target in targets:
        _check(target)
        wanted = _wanted(target)
        present = [name for name in (target.name, *target.aliases) if name in stored]
        if not present and not target.optional:
            problems.add(f"{quoted(target.name)}: missing; the model wants {described(wanted)}")
        for name in present:
            if name in taken and name == target.name:
                problems.add(f"{quoted(name)}: two parameters want it")
            compare(stored[name], wanted, problems)
        taken.update(present)
        matches += [Match(stored[name], target) for name in present[:1]]
    endings = tuple(ignored_suffixes)
    for name in stored.keys() - taken:
        if not name.endswith(endings):
            problems.add(f"{quoted(name)}: unexpected; no parameter of the model takes it")
    refuse(problems, ((each.stored, _wanted(each.target)) for each in matches), source=source)
    return matches


def _check(target: Target) -> None:
    sizes = tuple(stop - start for start, stop in target.region)
    assert tuple(target.view.shape) == sizes, f"{target.name}: a region of {sizes} cannot fill {tuple(target.view.shape)}"
    assert all(0 <= start <= stop <= n for (start, stop), n in zip(target.region, target.shape, strict=True)), target.name


def _wanted(target: Target) -> Wanted:
    dtype = target.rows.dtype if target.rows is not None else str(target.view.dtype).removeprefix("torch.")
    return Wanted(dtype, target.shape)
