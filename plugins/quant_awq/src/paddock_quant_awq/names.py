"""Which modules a checkpoint leaves plain: each tool has its own way to name them. Free of torch."""

from __future__ import annotations

import re

from attrs import frozen

from paddock.module_lists import in_compressed, in_modelopt

_PATTERN_SIGNS = frozenset("*+?^$|()[]{}\\")  # what tells a pattern from a path


@frozen
class Containing:
    """Plain are paths that hold one of `entries` (AutoAWQ)."""

    entries: tuple[str, ...] = ()

    def __call__(self, path: str, *, head: bool = False) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain."""
        return any(entry in path for entry in self.entries)


@frozen
class Wildcards:
    """Plain are paths that one of `patterns` names as ModelOpt does."""

    patterns: tuple[str, ...] = ()

    def __call__(self, path: str, *, head: bool = False) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain."""
        return in_modelopt(self.patterns, path)


@frozen
class Untargeted:
    """Plain are modules of no target, and those ignored, by the rule of compressed-tensors."""

    targets: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def __call__(self, path: str, *, head: bool = False) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain; `head`: it projects to the vocabulary."""
        return not in_compressed(self.targets, path, head=head) or in_compressed(self.ignored, path, head=head)


@frozen
class Outside:
    """Plain are paths that a pattern of `excluded` matches from the start, and those that end in none of `inside`, if any.

    (GPTQ)
    """

    excluded: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    def __call__(self, path: str, *, head: bool = False) -> bool:
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

    def __call__(self, path: str, *, head: bool = False) -> bool:
        """Return whether the module at checkpoint prefix `path` is plain."""
        if path in self.quantised:
            return False
        if any(path == entry or (_PATTERN_SIGNS & set(entry) and re.search(entry, path)) for entry in self.excluded):
            return True
        return bool(self.blocks) and not any(path.startswith(f"{block}.") for block in self.blocks)
