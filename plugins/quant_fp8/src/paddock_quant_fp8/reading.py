"""The part of a checkpoint's JSON files that describes its quantisation, and readers of it. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paddock.model_config import ConfigReader
from paddock.plugins import CheckpointFacts

Entry = Mapping[str, Any]
_MAX_BLOCK = 1 << 16


def entry_of(
    facts: CheckpointFacts, wanted: Callable[[str], bool], *, key: str = "quantization_config", implied: str = ""
) -> tuple[ConfigReader, Entry] | None:
    """Return the section `key` of config.json, with a reader of it, when its `quant_method` is `wanted`; else None.

    A section without `quant_method` counts as written by `implied`.
    """
    entry = facts.config.get(key)
    if not isinstance(entry, Mapping) or not entry or not wanted(str(entry.get("quant_method") or implied)):
        return None
    reader = reader_of(facts, key, entry)
    reader.accept("quant_method")
    return reader, entry


def reader_of(facts: CheckpointFacts, name: str, entry: Entry, *, file: str = "config.json") -> ConfigReader:
    """Return a reader of the non-empty object `name` of a file."""
    reader = ConfigReader({name: entry}, ignored=facts.ignored_keys, file=file).section(name)
    assert reader is not None
    return reader


def names_in(reader: ConfigReader, entry: Entry, *keys: str) -> tuple[str, ...]:
    """Return the module names listed under any of `keys`; absent and null list none."""
    reader.accept(*keys)
    found: list[str] = []
    for key in keys:
        listed = entry.get(key) or []
        if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
            raise reader.wrong(key, listed, "a list of module names, or null")
        found += listed
    return tuple(found)


def block_size(reader: ConfigReader, key: str, value: object) -> tuple[int, int]:
    """Return (outs, ins) of a list of two sizes; raise ModelConfigError for anything else."""
    sizes = value if isinstance(value, (list, tuple)) else ()
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _MAX_BLOCK for size in sizes):
        raise reader.wrong(key, value, "two whole numbers above 0, such as [128, 128]")
    outs, ins = sizes
    return outs, ins
