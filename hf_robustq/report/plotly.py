"""A chart as Plotly's data and layout: plain dicts, all text escaped."""

from __future__ import annotations

import html
from typing import Any

from hf_robustq.report.chart import COLORS, Bars, Cells, Chart, Lines, written

FONT = {"family": "system-ui, sans-serif", "size": 12, "color": "#222"}
MARKS = {"circle": "lines+markers", "star": "markers", "none": "lines"}


def options(chart: Chart) -> dict[str, Any]:
    """{"data", "layout"} for `Plotly.newPlot`, and for `plotly.graph_objects.Figure`. The title is the page's."""
    data, layout = {Lines: _lines, Bars: _bars, Cells: _cells}[type(chart)](chart)
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top", "font": {"size": 11}}
    base = {"font": FONT, "margin": {"l": 10, "r": 10, "t": 10, "b": 10}, "legend": legend, "hovermode": "closest"}
    return {"data": data, "layout": {**base, "paper_bgcolor": "white", "plot_bgcolor": "white", **layout}}


def _axis(text: str, **more: Any) -> dict[str, Any]:
    title = {"text": html.escape(text), "standoff": 8}
    return {"title": title, "automargin": True, "gridcolor": "#ddd", "linecolor": "#888", "zeroline": False, **more}


def _lines(chart: Lines) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    shape = ":.2%" if chart.percent else ":.5g"
    data = []
    for line in chart.lines:
        trace = {
            "type": "scatter",
            "mode": "lines" if line.dash < 0 else MARKS[line.mark],
            "name": html.escape(line.name),
            "x": list(line.x),
            "y": list(line.y),
            "line": {"color": line.hue, "dash": line.stroke[0], "width": 1.2 if line.dash < 0 else 2},
            "marker": {"color": line.hue, "size": 14 if line.mark == "star" else 6, "symbol": line.mark},
            "hovertemplate": f"%{{fullData.name}}<br>%{{x}}: %{{y{shape}}}<extra></extra>",
        }
        if line.mark == "none":
            del trace["marker"]
        data.append({**trace, **({"fill": "tozeroy"} if chart.fill else {})})
    ticks = {"tickmode": "array", "tickvals": list(chart.ticks)} if chart.ticks else {}
    yaxis = _axis(chart.y, **({"tickformat": ".0%"} if chart.percent else {}))
    layout = {"xaxis": _axis(chart.x, **ticks), "yaxis": yaxis}
    return data, {**layout, "height": 360 + 20 * len(chart.lines), "showlegend": len(chart.lines) > 1 or chart.fill}


def _bars(chart: Bars) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    shape = ":.2%" if chart.percent else ":.5g"
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": html.escape(name),
            "x": list(values),
            "y": list(map(html.escape, chart.names)),
            "marker": {"color": COLORS[index % len(COLORS)]},
            "hovertemplate": f"%{{y}}: %{{x{shape}}}<extra></extra>",
        }
        for index, (name, values) in enumerate(chart.series.items())
    ]
    xaxis = _axis(chart.x, **({"tickformat": ".1%"} if chart.percent else {}))
    yaxis = _axis("", autorange="reversed", tickfont={"size": 10}, type="category", tickmode="linear")
    height = 140 + 16 * len(chart.names) * max(1, len(data))
    return data, {"xaxis": xaxis, "yaxis": yaxis, "height": height, "bargap": 0.25, "showlegend": len(data) > 1}


def _cells(chart: Cells) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    small = len(chart.rows) * len(chart.columns) <= 400
    text = [[written(value, chart.percent) if value == value else "" for value in row] for row in chart.values]
    data = {
        "type": "heatmap",
        "x": list(map(html.escape, chart.columns)),
        "y": list(map(html.escape, chart.rows)),
        "z": [list(row) for row in chart.values],
        "text": text,
        "texttemplate": "%{text}" if small else "",
        "colorscale": "Viridis",
        "colorbar": {"tickformat": ".0%" if chart.percent else "", "thickness": 12},
        "hovertemplate": "%{y}<br>%{x}: %{text}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    xaxis = _axis(chart.x, type="category", tickmode="linear", autotickangles=[0, 30, 60, 90])
    yaxis = _axis("", type="category", autorange="reversed", tickfont={"size": 10}, tickmode="linear")
    return [data], {"xaxis": xaxis, "yaxis": yaxis, "height": 170 + 22 * len(chart.rows), "showlegend": False}
