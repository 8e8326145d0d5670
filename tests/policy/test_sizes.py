"""Files and functions stay small enough to read in one sitting."""

from __future__ import annotations

import statistics
from pathlib import Path

from tests.policy.source_tree import ROOT, functions, length, source_files, suite_files

MAX_FILE, MAX_FUNCTION = 400, 60
MEDIAN_FILE, MEDIAN_FUNCTION = 130, 12


def test_no_file_is_longer_than_the_limit() -> None:
    """A file over the limit wants to be two."""
    long = {str(path.relative_to(ROOT)): lines for path in source_files() + suite_files() if (lines := _lines(path)) > MAX_FILE}
    assert not long


def test_no_function_is_longer_than_the_limit() -> None:
    """A function over the limit wants a name for each of its parts."""
    long = [
        f"{path.relative_to(ROOT)}:{function.name} ({length(function)})"
        for path in source_files() + suite_files()
        for function in functions(path)
        if length(function) > MAX_FUNCTION
    ]
    assert not long


def test_the_median_file_and_function_stay_short() -> None:
    """The usual file fits two screens and the usual function half of one."""
    assert statistics.median(_lines(path) for path in source_files() if path.name != "__init__.py") <= MEDIAN_FILE
    assert statistics.median(length(function) for path in source_files() for function in functions(path)) <= MEDIAN_FUNCTION


def _lines(path: Path) -> int:
    return path.read_text().count("\n")
