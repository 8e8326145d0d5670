"""Reports that `paddock bench ... --json` wrote, read back."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from paddock.errors import OptionError


def read_reports(paths: Sequence[Path], needs: Mapping[str, Collection[str]]) -> list[dict[str, Any]]:
    """Return the reports; `needs` says of each kind that is of use what it must hold.

    Raises OptionError for a file that holds no report, one of another kind, or one that lacks something.
    """
    return [_read(path, needs) for path in paths]


def _read(path: Path, needs: Mapping[str, Collection[str]]) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} holds no report: {error}", fix="give files that `paddock bench ... --json` wrote") from error
    kind = report.get("bench") if isinstance(report, dict) else None
    if not isinstance(kind, str) or kind not in needs:
        *others, last = needs
        raise OptionError(
            f"{path} holds a report of {kind!r}", fix=f"give reports of paddock bench {', '.join(others)} or {last}"
        )
    missing = sorted(set(needs[kind]) - report.keys())
    if missing:
        raise OptionError(f"{path} lacks {', '.join(missing)}", fix="give files that `paddock bench ... --json` wrote")
    found: dict[str, Any] = report
    return found
