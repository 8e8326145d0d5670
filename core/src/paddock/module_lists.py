"""Lists of modules in the description of a checkpoint, each read by the rule of the tool that writes it. Free of torch.

ModelOpt lists what is left plain (`exclude_modules`, `ignore`); compressed-tensors lists what is quantised how (`targets`) and
what is left plain (`ignore`). Rules that a single format has are its plugin's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from paddock.model_config import ConfigReader

PATTERN = "re:"
# The classes, parents included, that linears of the model families have in transformers. A head is never a FalconLinear.
LINEAR_CLASSES = frozenset({"Linear", "LinearBase", "FalconLinear", "Module"})
HEAD_CLASSES = LINEAR_CLASSES - {"FalconLinear"}


def in_modelopt(entries: Iterable[str], path: str) -> bool:
    """Return whether an entry is a shell pattern of checkpoint prefix `path`, or part of it as older files mean it (ModelOpt).

    A part does not end inside a number: `layers.1` is none of `layers.10`. Source: vLLM, modelopt.py.
    """
    return any(fnmatchcase(path, entry) or _is_part(entry, path) for entry in entries)


def in_compressed(entries: Iterable[str], path: str, *, head: bool) -> bool:
    """Return whether an entry names the linear at `path` (compressed-tensors); `head`: it projects to the vocabulary."""
    return any(compressed_rank(entry, path, head=head) is not None for entry in entries)


def compressed_rank(entry: str, path: str, *, head: bool) -> int | None:
    """Return how closely an entry of compressed-tensors names a linear: 0 its path, 1 a pattern, 2 its class; None not at all.

    A pattern, `re:...`, matches from the beginning of the path.
    """
    if entry.startswith(PATTERN):
        return 1 if re.match(entry.removeprefix(PATTERN), path) else None
    if entry == path:
        return 0
    return 2 if entry in (HEAD_CLASSES if head else LINEAR_CLASSES) else None


def compressed_targets(reader: ConfigReader, key: str, listed: object) -> tuple[str, ...]:
    """Return the targets of a group of compressed-tensors; raise ModelConfigError for anything but names and patterns."""
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) and name for name in listed):
        raise reader.wrong(key, listed, "a list of module names, classes or patterns re:...")
    check_compressed(reader, key, listed)
    return tuple(listed)


def check_compressed(reader: ConfigReader, key: str, entries: Iterable[str]) -> None:
    """Raise ModelConfigError for an entry of compressed-tensors that is a pattern and no regular expression."""
    for entry in entries:
        try:
            re.compile(entry.removeprefix(PATTERN) if entry.startswith(PATTERN) else "")
        except re.error as error:
            raise reader.wrong(key, entry, f"a regular expression after {PATTERN} ({error})") from error


def _is_part(entry: str, path: str) -> bool:
    return re.search(re.escape(entry) + (r"(?!\d)" if entry[-1:].isdigit() else ""), path) is not None
