"""The lists of module names in FP8 checkpoints, each matched by the rule of the tool that writes it. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

REGEX = "re:"
# The classes, parents included, that linears of the model families have in transformers. A head is never a FalconLinear.
LINEAR_CLASSES = frozenset({"Linear", "LinearBase", "FalconLinear", "Module"})
HEAD_CLASSES = LINEAR_CLASSES - {"FalconLinear"}


def in_fbgemm(entries: Iterable[str], path: str) -> bool:
    """Return whether an entry is this path, its last name, or a module around it (transformers' fbgemm_fp8)."""
    leaf = path.rpartition(".")[2]
    return any(entry in (path, leaf) or f"{entry}." in path for entry in entries)


def in_paths(entries: Iterable[str], path: str) -> bool:
    """Return whether an entry is this path or a module around it (AutoFP8), or the names it ends in (transformers)."""
    return any(path == entry or path.startswith(f"{entry}.") or path.endswith(f".{entry}") for entry in entries)


def in_wildcards(entries: Iterable[str], path: str) -> bool:
    """Return whether an entry is a shell pattern of this path, or part of it as older files mean it (ModelOpt).

    A part does not end inside a number: `layers.1` is none of `layers.10`.
    """
    return any(fnmatchcase(path, entry) or _is_part(entry, path) for entry in entries)


def in_targets(entries: Iterable[str], path: str, *, head: bool) -> bool:
    """Return whether an entry is this path, a pattern `re:...` of its beginning, or its class (compressed-tensors)."""
    return any(target_rank(entry, path, head=head) is not None for entry in entries)


def target_rank(entry: str, path: str, *, head: bool) -> int | None:
    """Return how closely an entry of compressed-tensors names a linear: 0 its path, 1 a pattern, 2 its class; None not at all."""
    if entry.startswith(REGEX):
        return 1 if re.match(entry.removeprefix(REGEX), path) else None
    if entry == path:
        return 0
    return 2 if entry in (HEAD_CLASSES if head else LINEAR_CLASSES) else None


def _is_part(entry: str, path: str) -> bool:
    return re.search(re.escape(entry) + (r"(?!\d)" if entry[-1:].isdigit() else ""), path) is not None
