"""Charts as data, which a picture (matplotlib) and a page (Plotly) draw alike: lines, bars, cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_robustq.files import written as written_whole

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#56b4e9", "#e69f00", "#444444")
"""Okabe and Ito's, which the colour-blind can tell apart, in an order of contrast to white."""

DASHES = (
    ("solid", "-"),
    ("dot", ":"),
    ("dashdot", "-."),
    ("longdash", (0, (8, 3))),
    ("longdashdot", (0, (8, 2, 2, 2))),
)
"""By Plotly's name and by matplotlib's."""

FLOAT = ("dash", "--")

LARGEST = 1e30
"""In a picture."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points in order of x.

    color, dash   numbers into `COLORS` and `DASHES`; `dash=-1`: dashed and thin, a value to compare with
    mark          a point each; "star": a single point
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    dash: int = 0
    mark: str = "circle"

    @property
    def hue(self) -> str:
        return COLORS[self.color % len(COLORS)]

    @property
    def stroke(self) -> tuple[str, Any]:
        return FLOAT if self.dash < 0 else DASHES[self.dash % len(DASHES)]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """title  said above it; note: below it; `percent`: values are shares of one."""

    title: str
    note: str = ""
    percent: bool = False


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """Lines over a number; `ticks`: where it has values, if few."""

    x: str
    y: str
    lines: Sequence[Line]
    ticks: Sequence[float] = ()
    fill: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars(Chart):
    """A horizontal bar for each name, of each series."""

    x: str
    names: Sequence[str]
    series: Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Cells(Chart):
    """values[i][j] of row i and column j, coloured and written; NaN: none."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    x: str = ""


def save_png(charts: Chart | Sequence[Chart], path: str | Path) -> None:
    """One chart as PNG, or several as a grid of small ones. `ImportError` without matplotlib (extra `report`)."""
    with written_whole(path) as draft:
        figure(charts).savefig(draft, dpi=150, format="png")


def figure(charts: Chart | Sequence[Chart]) -> Any:
    """The matplotlib figure of `save_png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = [charts] if isinstance(charts, Chart) else list(charts)
    across = min(4, len(charts))
    down = math.ceil(len(charts) / across)
    width, height = _inches(charts[0]) if len(charts) == 1 else (3.6, max(_inches(one)[1] for one in charts) * 0.7)
    found = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(found)
    for index, chart in enumerate(charts):
        axes = found.add_subplot(down, across, index + 1)
        axes.set_title(chart.title, fontsize="medium" if len(charts) == 1 else "small", parse_math=False)
        {Lines: _lines, Bars: _bars, Cells: _cells}[type(chart)](axes, chart)
    return found


def _inches(chart: Chart) -> tuple[float, float]:
    if isinstance(chart, Bars):
        return 6.4, 1.4 + 0.2 * len(chart.names) * max(1, len(chart.series) * 0.6)
    if isinstance(chart, Cells):
        return max(6.4, 2.0 + 0.45 * len(chart.columns)), 1.6 + 0.24 * len(chart.rows)
    return 6.4, 4.0 + (0.16 * max(0, len(chart.lines) - 6) if isinstance(chart, Lines) else 0)


def _plain(text: str) -> str:
    """Not read as a formula."""
    return text.replace("$", r"\$")


def _drawn(values: Sequence[float]) -> list[float]:
    """NaN, which is left out, where a value is beyond what a picture has room for."""
    return [value if abs(value) < LARGEST else math.nan for value in values]


def _lines(axes: Any, chart: Lines) -> None:
    for line in chart.lines:
        mark = {"star": "*", "circle": "o", "none": ""}[line.mark] if line.dash >= 0 else ""
        look = {
            "marker": mark,
            "markersize": 14 if line.mark == "star" else 4,
            "linewidth": 1 if line.dash < 0 else 1.5,
        }
        x, y = _drawn(line.x), _drawn(line.y)
        axes.plot(x, y, linestyle=line.stroke[1], color=line.hue, label=_plain(line.name), **look)
        if chart.fill:
            axes.fill_between(x, y, color=line.hue, alpha=0.25)
    axes.set_xlabel(_plain(chart.x))
    axes.set_ylabel(_plain(chart.y))
    if chart.ticks:
        axes.set_xticks(sorted(tick for tick in chart.ticks if abs(tick) < LARGEST))
    if chart.percent:
        axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    if any(line.name for line in chart.lines):
        axes.legend(fontsize="small")


def _bars(axes: Any, chart: Bars) -> None:
    each = 0.8 / len(chart.series)
    for index, (name, values) in enumerate(chart.series.items()):
        places = [i + (index - (len(chart.series) - 1) / 2) * each for i in range(len(chart.names))]
        label = _plain(name) if len(chart.series) > 1 else None
        drawn = axes.barh(places, _drawn(values), each, color=COLORS[index % len(COLORS)], label=label)
        axes.bar_label(drawn, fmt="{:.1%}" if chart.percent else "{:.4g}", fontsize=7, padding=2)
    axes.set_yticks(range(len(chart.names)), map(_plain, chart.names), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(_plain(chart.x))
    axes.margins(x=0.12)
    if chart.percent:
        axes.xaxis.set_major_formatter("{x:.0%}")
    if len(chart.series) > 1:
        axes.legend(fontsize="small")


def _cells(axes: Any, chart: Cells) -> None:
    values = [_drawn(row) for row in chart.values]
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(chart.columns)), map(_plain, chart.columns), rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(chart.rows)), map(_plain, chart.rows), fontsize=8)
    axes.set_xlabel(_plain(chart.x))
    small = len(chart.rows) * len(chart.columns) <= 400
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if small and math.isfinite(value):
                dark = image.norm(value) < 0.6
                color = "white" if dark else "black"
                axes.text(j, i, written(value, chart.percent), ha="center", va="center", fontsize=7, color=color)
    axes.figure.colorbar(image, ax=axes, format="{x:.0%}" if chart.percent else "{x:.3g}")


def is_share(metric: str) -> bool:
    """Whether a metric is a share of one, shown in percent; a loss and a perplexity are not."""
    return not metric.endswith(("loss", "perplexity"))


def less_is_better(metric: str) -> bool:
    """Whether a metric is a loss, a perplexity, or a rate of errors in words or characters."""
    return not is_share(metric) or metric.split("_")[-1] in ("wer", "cer")


def written(value: float, percent: bool) -> str:
    """As the cells have it: 91.73 for a share in percent, four digits of anything else."""
    return f"{value * 100:.2f}" if percent else f"{value:.4g}"
