"""Reports of `paddock bench` as bar charts: how fast, and what share of the roof that is. Needs matplotlib, an extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from paddock.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")
FULL_ROOF = 100.0
SPEED, KERNELS = ("throughput", "latency"), "kernels"
_SPEED_NEEDS = frozenset({"model", "requests", "at_once", "isl", "osl", "output_tokens_per_second", "percent_of_roof"})
NEEDS = {**dict.fromkeys(SPEED, _SPEED_NEEDS), KERNELS: frozenset({"rows", "dtype"})}  # of a report, by kind
_WHOLE = 1000.0  # figures from here on are shown without a fraction
_BAR_INCHES, _FRAME_INCHES, _WIDTH_INCHES = 0.32, 1.4, 12.0


@frozen(kw_only=True)
class Bar:
    """One bar of both halves: its label, what was measured, and percent of the roof, None where there is none."""

    label: str
    value: float
    percent: float | None
    device: str = ""


@frozen(kw_only=True)
class Chart:
    """Bars of one unit."""

    title: str
    unit: str
    bars: tuple[Bar, ...]


def charts_of(reports: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return a chart of models' output tokens a second, and one for each unit kernels are measured in, where there are any."""
    speeds = [report for report in reports if report["bench"] in SPEED]
    tables = [report for report in reports if report["bench"] == KERNELS]
    rows = [(report, row) for report in tables for row in report["rows"] if row["rate"] is not None]
    charts = []
    if speeds:
        bars = tuple(map(_speed_bar, speeds))
        charts.append(Chart(title="Output, prefill included", unit="tokens/s", bars=bars))
    for unit in sorted({row["unit"] for _, row in rows}):
        bars = tuple(_kernel_bar(report, row) for report, row in rows if row["unit"] == unit)
        charts.append(Chart(title="Kernels", unit=unit, bars=bars))
    return charts


def draw(charts: Sequence[Chart], out: Path) -> list[Path]:
    """Write the charts one below the other as `out` with each of FORMATS' endings; return the files.

    Raises OptionError where a file cannot be written.
    """
    figure_class = _figure_class()
    heights = [_FRAME_INCHES + _BAR_INCHES * len(chart.bars) for chart in charts]
    devices = {bar.device for chart in charts for bar in chart.bars}
    alone = devices.pop() if len(devices) == 1 else ""  # stands once, above, where all bars are of one device
    figure = figure_class(figsize=(_WIDTH_INCHES, sum(heights)), layout="constrained")
    halves = figure.subplots(len(charts), 2, squeeze=False, height_ratios=heights, sharey="row")
    if alone:
        figure.suptitle(alone)
    for (values, shares), chart in zip(halves, charts, strict=True):
        _draw_values(values, chart, with_device=not alone)
        _draw_shares(shares, chart)
    files = [out.with_name(f"{out.name}.{ending}") for ending in FORMATS]
    for file in files:
        try:
            figure.savefig(file, dpi=150)
        except OSError as error:
            raise OptionError(f"{file} cannot be written: {error.strerror}", fix="give --out a place that can") from error
    return files


def _draw_values(axes: Axes, chart: Chart, *, with_device: bool) -> None:
    places = range(len(chart.bars))
    bars = axes.barh(places, [bar.value for bar in chart.bars], color="tab:blue")
    axes.bar_label(bars, [f"{bar.value:,.0f}" if bar.value >= _WHOLE else f"{bar.value:.4g}" for bar in chart.bars], padding=3)
    names = (f"{bar.label}, {bar.device}" if with_device and bar.device else bar.label for bar in chart.bars)
    axes.set_yticks(places, list(names))
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.02)
    axes.set_title(chart.title)
    axes.set_xlabel(chart.unit)


def _draw_shares(axes: Axes, chart: Chart) -> None:
    bars = axes.barh(range(len(chart.bars)), [bar.percent or 0.0 for bar in chart.bars], color="tab:orange")
    axes.bar_label(bars, ["no roof" if bar.percent is None else f"{bar.percent:.1f}" for bar in chart.bars], padding=3)
    axes.axvline(FULL_ROOF, color="black", linestyle="--", linewidth=1, alpha=0.4)
    axes.set_xlim(0, max([FULL_ROOF, *(bar.percent or 0.0 for bar in chart.bars)]) * 1.3)
    axes.set_title("Share of the roof")
    axes.set_xlabel("%")


def _speed_bar(report: Mapping[str, Any]) -> Bar:
    name = Path(report["model"]).name or report["model"]
    how = f"{report['requests']} {'at once' if report['at_once'] else 'in turn'}"
    label = f"{name}, {how}, {report['isl']:g} in, {report['osl']:g} out"
    return Bar(label=label, value=report["output_tokens_per_second"], percent=report["percent_of_roof"], device=_device(report))


def _kernel_bar(report: Mapping[str, Any], row: Mapping[str, Any]) -> Bar:
    return Bar(
        label=f"{row['plugin']} {row['subject']} {row['case']}, {report['dtype']}",
        value=row["rate"],
        percent=row["percent_of_roof"],
        device=_device(report),
    )


def _device(report: Mapping[str, Any]) -> str:
    gpu = report.get("gpu")
    return str(gpu["name"]) if gpu else ""


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("a chart needs matplotlib, which is not installed", fix="pip install 'paddock[charts]'") from error
    return Figure
