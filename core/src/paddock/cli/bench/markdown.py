"""Reports of `paddock bench` as Markdown: a table a kind, what its figures mean, and where each report is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from paddock.cli.bench.figures import number

MIB = 1 << 20


@frozen(kw_only=True)
class Column:
    """A column: its head, the figure in it, its decimals (None for a word), and what the figure is divided by."""

    head: str
    name: str
    digits: int | None = 2
    unit: float = 1.0

    def cell(self, figures: Mapping[str, Any]) -> str:
        """Return the figure as text, a dash for one that is not known."""
        value = figures[self.name]
        if self.digits is None:
            return "-" if value is None else str(value).replace("|", "\\|")
        return number(None if value is None else value / self.unit, self.digits)


_SPEED = (
    Column(head="model", name="model", digits=None),
    Column(head="requests", name="requests", digits=0),
    Column(head="in", name="isl", digits=0),
    Column(head="out", name="osl", digits=0),
    Column(head="output tokens/s", name="output_tokens_per_second", digits=1),
    Column(head="roof tokens/s", name="roof_tokens_per_second", digits=1),
    Column(head="% of roof", name="percent_of_roof", digits=1),
    Column(head="first token ms", name="ttft_median_ms"),
    Column(head="inter-token ms", name="itl_median_ms"),
    Column(head="end to end ms", name="e2e_median_ms", digits=1),
    Column(head="ready s", name="ready_seconds", digits=1),
)
_STARTUP = (
    Column(head="model", name="model", digits=None),
    Column(head="weights GB", name="weight_bytes", unit=1e9),
    Column(head="kernel cache", name="kernel_cache", digits=None),
    Column(head="accepted s", name="accepted_seconds"),
    Column(head="first token s", name="first_token_seconds"),
    *(Column(head=f"{name} s", name=f"{name}_seconds") for name in ("python", "imports", "plan", "weights", "ready", "compute")),
)
_KERNELS = (
    Column(head="kernel", name="name", digits=None),
    Column(head="case", name="case", digits=None),
    Column(head="us", name="microseconds"),
    Column(head="rate", name="rate", digits=3),
    Column(head="unit", name="unit", digits=None),
    Column(head="roof us", name="limit_microseconds"),
    Column(head="% of roof", name="percent_of_roof", digits=1),
    Column(head="twin us", name="twin_microseconds", digits=1),
    Column(head="torch us", name="library_microseconds", digits=1),
    Column(head="torch's call", name="library", digits=None),
)
_STEPS = (
    Column(head="batch", name="batch", digits=0),
    *(Column(head=f"{name} us", name=name, digits=1) for name in ("step", "idle")),
    Column(head="idle %", name="idle_percent", digits=1),
    *(Column(head=f"{name} us", name=name, digits=1) for name in ("schedule", "launch", "commit", "wait")),
)
_LEDGER = (
    Column(head="bytes of", name="name", digits=None),
    Column(head="predicted MiB", name="predicted", digits=1, unit=MIB),
    Column(head="measured MiB", name="measured", digits=1, unit=MIB),
    Column(head="difference %", name="difference_percent", digits=1),
    Column(head="what it is", name="meaning", digits=None),
)
_COLUMNS = {"throughput": _SPEED, "latency": _SPEED, "startup": _STARTUP, "kernels": _KERNELS, "decode_gaps": _STEPS}
_TITLES = {"decode_gaps": "Between decode steps", "startup": "Start-up"}  # of others their kind, as a word
_LISTS = ("kernels", "decode_gaps")  # reports of many rows; of the others each is one
_SOURCE = ("gpu", "date", "commit", "versions", "command")
NEEDS = {  # of a report, by kind
    kind: frozenset({*_SOURCE, "definitions", *(["rows"] if kind in _LISTS else [column.name for column in columns])})
    for kind, columns in _COLUMNS.items()
}


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables, a kind after the other; the first column of each numbers the reports as the list at the end does."""
    numbered = list(enumerate(reports, start=1))
    parts = []
    for kind, columns in _COLUMNS.items():
        rows = [(str(n), row) for n, report in numbered if report["bench"] == kind for row in _rows(report)]
        if rows:
            problems = [f"- {row['name']} {row['case']}: {row['problem']}" for _, row in rows if row.get("problem")]
            timed = [(n, row) for n, row in rows if not row.get("problem")]
            parts += [f"## {_TITLES.get(kind, kind.capitalize())}", _table(columns, timed), *_list("Without a time:", problems)]
            parts += _list("", _meanings(columns, next(report for _, report in numbered if report["bench"] == kind)))
    held = [(str(n), entry) for n, report in numbered for entry in _entries(report.get("ledger"))]
    parts += ["## Bytes", _table(_LEDGER, held)] if held else []
    parts += _list("## Measured by", [f"{n}. {_source(report)}" for n, report in numbered])
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[Column], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    heads = ("#", *(column.head for column in columns))
    rule = ("---:", *("---" if column.digits is None else "---:" for column in columns))
    cells = [(n, *(column.cell(row) for column in columns)) for n, row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *cells))


def _rows(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if report["bench"] in _LISTS:
        return list(report["rows"])
    return [{**report, "model": Path(report["model"]).name or report["model"]}]


def _entries(ledger: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if ledger is None:
        return []
    meanings = ledger.get("definitions", {})
    return [{"name": name, "meaning": meanings.get(name), **entry} for name, entry in ledger["entries"].items()]


def _meanings(columns: Sequence[Column], report: Mapping[str, Any]) -> list[str]:
    """Return what the report says of each figure in the table: its unit and its meaning."""
    said = report["definitions"]
    return [f"- {column.head}: {said[column.name].partition(': ')[2]}" for column in columns if column.name in said]


def _source(report: Mapping[str, Any]) -> str:
    gpu = report["gpu"]
    device = f"{gpu['name']}, driver {gpu['driver']}" if gpu else report.get("device") or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    median = f"; median of {len(report['runs'])}" if "runs" in report else ""
    part = f"; incomplete: {report['cases_not_measured']} cases not measured" if report.get("complete") is False else ""
    return f"{device}; {report['date'][:10]}; commit {report['commit']}; {versions}{median}{part}; `{report['command']}`"


def _list(head: str, lines: Sequence[str]) -> list[str]:
    """Return a list under its head as parts of a page, none where there is nothing to list."""
    return [part for part in (head, "\n".join(lines)) if part] if lines else []
