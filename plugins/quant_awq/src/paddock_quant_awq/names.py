"""Which modules a checkpoint leaves plain: each tool has its own way to name them. Free of torch."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from attrs import frozen

_PATTERN_SIGNS = frozenset("*+?^$|()[]{}\\")  # what tells a pattern from a path
_LINEAR_CLASSES = ("Linear", "FalconLinear")  # what the tools' models call the linears of ours


@frozen
class Containing:
    """Plain are paths that hold one of `entries` (AutoAWQ)."""

    entries: tuple[str, ...] = ()

    def __call__(self, path: str) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain."""
        return any(entry in path for entry in self.entries)


@frozen
class Wildcards:
    """Plain are paths that a shell pattern matches, and whatever lies in a module that one names (ModelOpt)."""

    patterns: tuple[str, ...] = ()

    def __call__(self, path: str) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain."""
        return any(fnmatchcase(path, entry) or path.startswith(f"{entry}.") for entry in self.patterns)


@frozen
class Untargeted:
    """Plain are modules of no target, and those ignored: exact paths, `re:` patterns from the start, or class names.

    (compressed-tensors)
    """

    targets: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def __call__(self, path: str) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain."""
        return not _meant(self.targets, path) or _meant(self.ignored, path)


@frozen
class Outside:
    """Plain are paths that a pattern of `excluded` matches from the start, and those that end in none of `inside`, if any.

    (GPTQ)
    """

    excluded: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    def __call__(self, path: str) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain."""
        if any(re.match(pattern, path) for pattern in self.excluded):
            return True
        return bool(self.inside) and not any(path.endswith(name) for name in self.inside)


@frozen
class OutsideBlocks:
    """Plain are paths outside the `blocks`, if any are named, and those that one of `excluded` names or matches (AutoRound)."""

    blocks: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    quantised: tuple[str, ...] = ()

    def __call__(self, path: str) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain."""
        if path in self.quantised:
            return False
        if any(path == entry or (_PATTERN_SIGNS & set(entry) and re.search(entry, path)) for entry in self.excluded):
            return True
        return bool(self.blocks) and not any(path.startswith(f"{block}.") for block in self.blocks)


def _meant(entries: tuple[str, ...], path: str) -> bool:
    return any(
        re.match(entry.removeprefix("re:"), path) if entry.startswith("re:") else entry == path or entry in _LINEAR_CLASSES
        for entry in entries
    )
