"""Everything wrong with a checkpoint, gathered first and said at once."""

from __future__ import annotations

from paddock.errors import CheckpointError

MAX_LISTED = 20


class Problems:
    """A list of complaints that grows while files are examined and ends in one error, or none."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, complaint: str) -> None:
        """Remember one complaint."""
        self._found.append(complaint)

    def __len__(self) -> int:
        """Return how many complaints there are."""
        return len(self._found)

    def refuse(self, summary: str, *, fix: str) -> None:
        """Raise CheckpointError with every complaint, sorted, the first twenty in full; do nothing when there is none."""
        if not self._found:
            return
        listed = sorted(self._found)[:MAX_LISTED]
        rest = len(self._found) - len(listed)
        lines = [f"{summary}:", *listed, *([f"and {rest} more"] if rest else [])]
        raise CheckpointError("\n    ".join(lines), fix=fix)


def quoted(name: object) -> str:
    """Return a name out of an untrusted file, fit to print: escaped, in quotes, at most 120 characters."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:116]}...{text[-1]}"
