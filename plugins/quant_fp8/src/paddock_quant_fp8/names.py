"""The lists of module names that this plugin's own formats have, each matched by the rule of its tool. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable


def in_fbgemm(entries: Iterable[str], path: str) -> bool:
    """Return whether an entry is this path, its last name, or a module around it (transformers' fbgemm_fp8)."""
    leaf = path.rpartition(".")[2]
    return any(entry in (path, leaf) or f"{entry}." in path for entry in entries)


def in_paths(entries: Iterable[str], path: str) -> bool:
    """Return whether an entry is this path or a module around it (AutoFP8), or the names it ends in (transformers)."""
    return any(path == entry or path.startswith(f"{entry}.") or path.endswith(f".{entry}") for entry in entries)
