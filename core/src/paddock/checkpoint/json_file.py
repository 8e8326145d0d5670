"""Small JSON files from strangers: read whole, capped in size, with no key twice."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddock.checkpoint.problems import quoted
from paddock.errors import CheckpointError

MAX_BYTES = 16 << 20


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file; raise CheckpointError when it is no regular file, too large, or not one JSON object."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a regular file", fix="fetch the model again")
        if found.st_size > max_bytes:
            raise CheckpointError(
                f"{path} has {found.st_size:,} bytes; at most {max_bytes:,} are read", fix="check that it is what its name says"
            )
        return parse_object(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", fix="check the path and its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a valid JSON object: {error}", fix="fetch the file again") from error


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the object in UTF-8 JSON; raise ValueError when it is malformed, nested too deeply, or says a key twice."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found


def finite(value: Any) -> Any:
    """Return a value in which numbers that are infinite or NaN, for which JSON has no word, are null."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twice)} appears twice")
    return found
