"""What the detection of every 4-bit format shares: finding its section, and lists and patterns in it. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen

from paddock.errors import ModelConfigError
from paddock.model_config import ConfigReader
from paddock.plugins import CheckpointFacts

Entry = Mapping[str, Any]
CONFIG_FILE = "config.json"
_CONFIG = "quantization_config"


@frozen(eq=False)
class Section:
    """The part of a model's files that describes its quantisation: as it is, and being read; `file` is where it stands."""

    entry: Entry
    reader: ConfigReader
    file: str = CONFIG_FILE

    def names(self, *keys: str) -> tuple[str, ...]:
        """Return the texts listed under any of `keys`; absent and null list none."""
        self.reader.accept(*keys)
        found: list[str] = []
        for key in keys:
            listed = self.entry.get(key) or []
            if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
                raise self.reader.wrong(key, listed, "a list of module names, or null")
            found += listed
        return tuple(found)

    def group_size(self, *keys: str, default: int | None = 128) -> int:
        """Return the group size: positive, or -1 for one group an output."""
        size = self.reader.integer(*keys, default=default, low=-1)
        if size == 0:
            raise self.reader.wrong(keys[0], size, "-1 (one group) or positive")
        return size

    def check_patterns(self, key: str, patterns: Iterable[str]) -> None:
        """Raise ModelConfigError for what is no regular expression."""
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise self.reader.wrong(key, pattern, f"a regular expression ({error})") from error

    def refuse_unless_empty(self, key: str, why: str) -> None:
        """Raise ModelConfigError where `key` holds anything; `why` says what that would mean."""
        self.reader.accept(key)
        if self.entry.get(key):
            raise ModelConfigError(
                f"{self.file}: {key} is {self.entry[key]!r:.120}: {why}, which is not supported",
                fix="use a checkpoint that was quantised without it",
            )


def section_of(facts: CheckpointFacts, entry: Entry, name: str = _CONFIG, *, file: str = CONFIG_FILE) -> Section:
    """Return the section `entry`, called `name` in errors, of a file."""
    reader = ConfigReader({name: entry}, ignored=facts.ignored_keys, file=file).section(name)
    assert reader is not None, name
    return Section(entry, reader, file)


def find(facts: CheckpointFacts, *methods: str, old_file: str = "", old_keys: frozenset[str] = frozenset()) -> Section | None:
    """Return the section of config.json of a quantisation called one of `methods`, else the `old_file` with one of `old_keys`.

    A file beside a config.json that says something is not asked.
    """
    entry = facts.config.get(_CONFIG)
    if isinstance(entry, Mapping) and entry:
        return section_of(facts, entry) if entry.get("quant_method") in methods else None
    old = facts.files.get(old_file)
    if old is None or "compression_config" in facts.config or not old_keys & old.keys():
        return None
    if (old.get("quant_method") or methods[0]) not in methods:
        return None
    return Section(old, ConfigReader(old, ignored=facts.ignored_keys, harmless=(), file=old_file), old_file)


def saved_dtype(facts: CheckpointFacts) -> str:
    """Return the dtype that config.json says the model was saved in."""
    return ConfigReader(facts.config).dtype()
