"""The page: sections of charts, drawn by Plotly from data that the page carries, and the same as PNG."""

from __future__ import annotations

import html
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_robustq.files import write_text
from hf_robustq.report import charts as draw
from hf_robustq.report.chart import Chart, save_png
from hf_robustq.report.plotly import options
from hf_robustq.report.runs import Run
from hf_robustq.sweep import Sweep

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page.html"
MOST_SMALL = 80
"""Charts in one picture."""


@dataclass(kw_only=True)
class Section:
    """Charts under one heading; `choose`: one at a time, which a menu chooses."""

    title: str
    charts: Sequence[Chart] = ()
    choose: bool = False


def sections(runs: Sequence[Run]) -> list[Section]:
    """Everything the data of the runs suffice for."""
    found: list[Section] = []
    for dataset, metric in dict.fromkeys((one.rows[0].dataset, run.metric) for run in runs for one in run.final):
        final = {
            run.name: one for run in runs for one in run.final if (one.rows[0].dataset, run.metric) == (dataset, metric)
        }
        drawn = [draw.by_bits(final, metric), draw.step_ratios(final, metric), draw.transfer(final, metric)]
        found.append(Section(title=f"Robustness on {dataset}", charts=[one for one in drawn if one]))
    found.append(Section(title="While training", charts=[one for run in runs for one in draw.over_training(run)]))
    watched = (("kurtosis", "Kurtosis of each layer"), ("bits", "Bits of each layer"), ("error", "Quantization error"))
    layers = [draw.layers_over_training(run, key, head) for key, head in watched for run in runs]
    found.append(Section(title="Layers while training", charts=[one for one in layers if one]))
    for run in runs:
        found.append(Section(title=f"Histograms of weights: {run.name}", charts=draw.histograms(run), choose=True))
    found.append(Section(title="Sensitivity of layers", charts=draw.sensitivity(runs)))
    found.append(Section(title="Bits of layers", charts=draw.bits(runs)))
    found.append(Section(title="Telemetry", charts=draw.telemetry(runs)))
    return [section for section in found if section.charts]


def write_report(runs: Sequence[Run], folder: str | Path, pictures: bool = True) -> list[Path]:
    """Write `index.html`, which needs no network, and a PNG of each section's charts; returns what was written.

    Without `pictures` the page alone. Without matplotlib there are no PNGs, which a warning says. Raises `ImportError`
    without Plotly (extra `report`).
    """
    from plotly.offline import get_plotlyjs

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = sections(runs)
    parts = {
        "title": html.escape(", ".join(run.name for run in runs)),
        "contents": "".join(f'<a href="#s{i}">{html.escape(one.title)}</a> ' for i, one in enumerate(found)),
        "runs": facts_table(runs),
        "figures": figures_tables(runs),
        "sections": "".join(_section(i, one) for i, one in enumerate(found)),
        "charts": _embedded([[options(chart) for chart in one.charts] for one in found]),
        "plotly": get_plotlyjs(),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8"))
    written = [folder / "index.html"]
    write_text(page, written[0])
    if not pictures:
        return written
    try:
        for index, section in enumerate(found):
            name = re.sub(r"\W+", "_", section.title.lower()).strip("_")[:60]
            for number, chart in enumerate([section.charts[:MOST_SMALL]] if section.choose else section.charts):
                path = folder / f"{index:02d}_{name}_{number}.png"
                save_png(chart, path)
                written.append(path)
    except ImportError:
        logger.warning("No PNGs, for want of matplotlib: pip install 'hf_robustq[report]'")
    return written


def _embedded(values: Any) -> str:
    """JSON that no text in it can end early; NaN as null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(values), allow_nan=False).replace("<", r"\u003c").replace(">", r"\u003e")


def _section(index: int, section: Section) -> str:
    shown = section.charts[:1] if section.choose else section.charts
    menu = ""
    if section.choose and len(section.charts) > 1:
        names = "".join(f"<option value={i}>{html.escape(one.title)}</option>" for i, one in enumerate(section.charts))
        menu = f'<select aria-label="weight" data-section="{index}">{names}</select>'
    figures = "".join(_figure(index, number, chart) for number, chart in enumerate(shown))
    return (
        f'<section id="s{index}"><h2>{html.escape(section.title)}</h2>{menu}<div class="grid">{figures}</div></section>'
    )


def _figure(index: int, number: int, chart: Chart) -> str:
    note = f"<p>{html.escape(chart.note)}</p>" if chart.note else ""
    return (
        f"<figure><figcaption>{html.escape(chart.title)}</figcaption>{note}"
        f'<div class="chart" data-section="{index}" data-chart="{number}"></div></figure>'
    )


def facts_table(runs: Sequence[Run]) -> str:
    """How each run was made, a column each."""
    facts = [{"folder": run.source, **flat(run.facts)} for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(str(one.get(name, '')))}</td>" for one in facts)
        + "</tr>"
        for name in names
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def flat(facts: dict[str, Any]) -> dict[str, Any]:
    """What is worth a line each of a run's facts; the config as JSON."""
    kept = {key: value for key, value in facts.items() if key not in ("settings", "versions", "size", "version")}
    kept |= {**facts.get("settings", {}), **facts.get("versions", {})}
    if "config" in kept:
        kept["config"] = json.dumps(kept["config"])
    return {key: value for key, value in kept.items() if value not in (None, [])}


def figures_tables(runs: Sequence[Run]) -> str:
    """The figures of the last sweeps, one table a dataset: a row for each setting, a column for each run and metric."""
    datasets = dict.fromkeys(one.rows[0].dataset for run in runs for one in run.final)
    return "".join(_figures(dataset, runs) for dataset in datasets)


def _figures(dataset: str, runs: Sequence[Run]) -> str:
    final: dict[str, Sweep] = {run.name: one for run in runs for one in run.final if one.rows[0].dataset == dataset}
    metrics = list(dict.fromkeys(metric for one in final.values() for row in one.rows for metric in row.metrics))
    settings = list(dict.fromkeys(row.setting for one in final.values() for row in one.rows))
    rows = {(name, row.setting): row for name, one in final.items() for row in one.rows}
    heads = [(name, metric) for name in final for metric in metrics]
    head = "".join(f"<th>{html.escape(name)}<br>{html.escape(metric)}</th>" for name, metric in heads)
    lines = []
    for setting in settings:
        cells = []
        for name, metric in heads:
            value = rows[name, setting].metrics.get(metric) if (name, setting) in rows else None
            cells.append("<td></td>" if value is None else f'<td data-value="{value!r}">{value:.4f}</td>')
        lines.append(f"<tr><th>{html.escape(draw.title(setting))}</th>{''.join(cells)}</tr>")
    said = " ".join(f"{html.escape(name)}: {html.escape(one.origin)}" for name, one in final.items())
    return (
        f"<details open><summary>Figures on {html.escape(dataset)}</summary><p>{said}</p>"
        f'<div class="wide"><table class="figures"><tr><th></th>{head}</tr>{"".join(lines)}</table></div></details>'
    )
