"""Charts show what reports hold, models and kernels apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from paddock.bench.charts import NEEDS, charts_of, draw
from paddock.bench.reports import read_reports
from paddock.cli.bench import command
from paddock.errors import OptionError

SPEED: dict[str, Any] = {
    "bench": "throughput",
    "model": "models/cow",
    "requests": 4,
    "at_once": True,
    "isl": 16.0,
    "osl": 8.0,
    "output_tokens_per_second": 120.0,
    "percent_of_roof": 60.0,
    "gpu": {"name": "NVIDIA H200"},
}
ROW = {"plugin": "triton", "subject": "gelu", "case": "1 x 2", "rate": 3.5, "unit": "TB/s", "percent_of_roof": 81.4}
KERNELS: dict[str, Any] = {
    "bench": "kernels",
    "dtype": "bfloat16",
    "gpu": None,
    "rows": [ROW, {**ROW, "rate": None}, {**ROW, "unit": "TFLOP/s", "rate": 500.0}],
}


def written(folder: Path, *reports: object) -> list[Path]:
    """Return files that hold these reports."""
    paths = [folder / f"{number}.json" for number in range(len(reports))]
    for path, report in zip(paths, reports, strict=True):
        path.write_text(json.dumps(report))
    return paths


def test_a_chart_has_one_unit_and_a_bar_each_figure() -> None:
    """Models' tokens stand in one chart, kernels in one for each unit; what has no time has no bar."""
    charts = charts_of([SPEED, KERNELS, {**SPEED, "percent_of_roof": None}])
    assert [(chart.unit, len(chart.bars)) for chart in charts] == [("tokens/s", 2), ("TB/s", 1), ("TFLOP/s", 1)]
    assert charts[0].bars[0].label == "cow, 4 at once, 16 in, 8 out"
    assert charts[0].bars[0].device == "NVIDIA H200"
    assert (charts[0].bars[0].value, charts[0].bars[0].percent) == (120.0, 60.0)
    assert charts[0].bars[1].percent is None


def test_a_chart_is_written_in_both_formats(tmp_path: Path) -> None:
    """NAME.png and NAME.svg, also where NAME has a dot."""
    pytest.importorskip("matplotlib")
    files = map(str, written(tmp_path, SPEED, KERNELS))
    result = CliRunner().invoke(command, ["chart", *files, "--out", str(tmp_path / "v0.1")], catch_exceptions=False)
    assert result.stdout.split() == [str(tmp_path / "v0.1.png"), str(tmp_path / "v0.1.svg")]
    assert (tmp_path / "v0.1.png").read_bytes().startswith(b"\x89PNG")
    assert "TFLOP/s" in (tmp_path / "v0.1.svg").read_text() or "<svg" in (tmp_path / "v0.1.svg").read_text()


def test_a_chart_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    files = map(str, written(tmp_path, SPEED))
    result = CliRunner().invoke(command, ["chart", *files, "--out", str(tmp_path / "x")])
    assert isinstance(result.exception, OptionError)
    assert "paddock[charts]" in result.exception.fix


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A folder that is not there is the user's to make."""
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionError, match=r"absent.x\.png"):
        draw(charts_of([SPEED]), tmp_path / "absent" / "x")


@pytest.mark.parametrize("text", ["{", "[]", '{"bench": "startup"}', '{"bench": "kernels"}', '{"bench": "latency", "isl": 1}'])
def test_a_file_without_a_report_is_named(tmp_path: Path, text: str) -> None:
    """So is one of a kind that has nothing to draw."""
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"odd\.json"):
        read_reports([path], NEEDS)
