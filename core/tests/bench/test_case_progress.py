"""How far a run has come is said once: by a bar, by lines, or by the rows themselves."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from paddock.cli.bench.case_progress import case_progress


def shown(monkeypatch: pytest.MonkeyPatch, *, out: bool, err: bool, beside_lines: bool) -> Any:
    """Return the kind of progress where standard output and error are terminals or not, told of one case."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: out)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: err)
    with case_progress(2, beside_lines=beside_lines) as progress:
        progress.begin("gelu [1 x 2]")
        progress.end("gelu [1 x 2]", 0.5)
    return progress


def test_lines_where_nobody_watches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A number, seconds and a name, on standard error."""
    shown(monkeypatch, out=False, err=False, beside_lines=True)
    captured = capsys.readouterr()
    assert captured.err == "   1/2     0.50 s  gelu [1 x 2]\n"
    assert captured.out == ""


def test_a_bar_on_a_terminal_keeps_a_line_a_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Names are printed as they are, square brackets too."""
    shown(monkeypatch, out=True, err=True, beside_lines=False)
    assert "0.50 s  gelu [1 x 2]" in capsys.readouterr().err


def test_nothing_beside_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows come one by one already."""
    shown(monkeypatch, out=True, err=True, beside_lines=True)
    assert capsys.readouterr().err == ""
