"""Reports become Markdown: a table a kind, and where each report is from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from paddock.cli.bench import command
from paddock.errors import OptionError

SOURCE: dict[str, Any] = {
    "gpu": {"name": "NVIDIA H200", "driver": "570.1"},
    "date": "2030-01-02T03:04:05+00:00",
    "commit": "abc",
    "versions": {"paddock": "1.0", "cuda": None},
    "command": "paddock bench throughput models/cow --json",
    "definitions": {"output_tokens_per_second": "tokens/s: tokens out / wall", "microseconds": "us: of one call"},
}
SPEED: dict[str, Any] = {
    **SOURCE,
    "bench": "throughput",
    "model": "models/cow",
    "requests": 4,
    "isl": 16.0,
    "osl": 8.0,
    "output_tokens_per_second": 1234.56,
    "roof_tokens_per_second": 2469.12,
    "percent_of_roof": 50.0,
    "ttft_median_ms": 1.5,
    "itl_median_ms": 2.25,
    "e2e_median_ms": None,
    "ready_seconds": 6.2,
    "runs": [{}, {}, {}],
}
STARTUP: dict[str, Any] = {
    **SOURCE,
    "bench": "startup",
    "model": "cow",
    "weight_bytes": 16_060_000_000,
    "kernel_cache": "warm",
    **{
        f"{name}_seconds": 0.5 for name in ("accepted", "first_token", "python", "imports", "plan", "weights", "ready", "compute")
    },
}
ROW: dict[str, Any] = {
    "name": "triton gelu",
    "case": "a | b",
    "problem": None,
    "microseconds": 10.0,
    "rate": 3.5,
    "unit": "TB/s",
    "limit_microseconds": 8.0,
    "percent_of_roof": 80.0,
    "twin_microseconds": 20.0,
    "library_microseconds": None,
    "library": None,
}
KERNELS: dict[str, Any] = {
    **SOURCE,
    "gpu": None,
    "device": "a CPU",
    "bench": "kernels",
    "complete": False,
    "cases_not_measured": 7,
    "rows": [ROW, {**ROW, "case": "bad", "problem": "wrong: 0.3"}],
}
GAPS: dict[str, Any] = {
    **SOURCE,
    "bench": "decode_gaps",
    "rows": [
        {"batch": 256, "step": 10900.0, "idle": 171.0, "idle_percent": 1.6, "schedule": 1, "launch": 2, "commit": 3, "wait": 4}
    ],
}


def shown(folder: Path, *reports: object) -> str:
    """Return what `paddock bench table` prints of these reports."""
    paths = [folder / f"{number}.json" for number in range(len(reports))]
    for path, report in zip(paths, reports, strict=True):
        path.write_text(json.dumps(report))
    return CliRunner().invoke(command, ["table", *map(str, paths)], catch_exceptions=False).stdout


def test_a_report_is_a_row_of_its_kinds_table(tmp_path: Path) -> None:
    """Figures with the roof beside them; the row's number is that of its source at the end."""
    lines = shown(tmp_path, STARTUP, SPEED).splitlines()
    assert lines[0] == "## Throughput"
    assert "| 2 | cow | 4 | 16 | 8 | 1,234.6 | 2,469.1 | 50.0 | 1.50 | 2.25 | - | 6.2 |" in lines
    assert "| 1 | cow | 16.06 | warm |" + " 0.50 |" * 8 in lines
    assert "- output tokens/s: tokens out / wall" in lines
    assert lines[-1] == (
        "2. NVIDIA H200, driver 570.1; 2030-01-02; commit abc; paddock 1.0; median of 3; "
        "`paddock bench throughput models/cow --json`"
    )


def test_a_table_has_as_many_cells_in_every_line(tmp_path: Path) -> None:
    """Also where a name holds the character that parts cells."""
    for text in (shown(tmp_path, each) for each in (SPEED, STARTUP, KERNELS, GAPS)):
        counts = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(counts) == 1


def test_a_kernel_without_a_time_is_listed_with_its_problem(tmp_path: Path) -> None:
    """It has no row, and a run that was cut short says so."""
    text = shown(tmp_path, KERNELS)
    assert "| 1 | triton gelu | a \\| b | 10.00 | 3.500 | TB/s | 8.00 | 80.0 | 20.0 | - | - |" in text
    assert "- triton gelu bad: wrong: 0.3" in text
    assert "1. a CPU; 2030-01-02; commit abc; paddock 1.0; incomplete: 7 cases not measured; `" in text


def test_gaps_between_steps_are_a_table_too(tmp_path: Path) -> None:
    """A row a batch."""
    assert "| 1 | 256 | 10,900.0 | 171.0 | 1.6 | 1.0 | 2.0 | 3.0 | 4.0 |" in shown(tmp_path, GAPS)


def test_bytes_stand_as_predicted_and_as_measured(tmp_path: Path) -> None:
    """Where a report has them, each with what it is; a report of before that was said has a dash."""
    entries = {"graphs": {"predicted": 3 << 20, "measured": 1 << 20, "difference_percent": -66.67}}
    told = {**SPEED, "ledger": {"entries": entries, "definitions": {"graphs": "of all shapes"}}}
    text = shown(tmp_path, told, {**SPEED, "ledger": {"entries": entries}})
    assert "| 1 | graphs | 3.0 | 1.0 | -66.7 | of all shapes |" in text
    assert "| 2 | graphs | 3.0 | 1.0 | -66.7 | - |" in text


@pytest.mark.parametrize("text", ["{", "[]", '{"bench": "sheep"}', '{"bench": "startup"}'])
def test_a_file_without_such_a_report_is_named(tmp_path: Path, text: str) -> None:
    """And what to give instead."""
    path = tmp_path / "odd.json"
    path.write_text(text)
    result = CliRunner().invoke(command, ["table", str(path)])
    assert isinstance(result.exception, OptionError)
    assert "odd.json" in result.exception.message
