"""Which charts a set of runs gives: each function takes runs and returns the charts their data suffice for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_robustq.report.chart import Bars, Cells, Chart, Line, Lines, is_share, less_is_better, written
from hf_robustq.report.runs import Run
from hf_robustq.sweep import Row, Setting, Sweep, curves

SCALARS = ("loss", "learning_rate", "grad_norm")
"""Logged by every Trainer; what else its training logs hold is ours."""


def title(setting: str) -> str:
    """`w4a8` as W4/A8, `a8` as A8, `fp` as FP: what a column is headed with."""
    head, slash, rest = setting.partition("/")
    if head in ("fp", "trained"):
        return (head.upper() if head == "fp" else head) + slash + rest
    bits, _, how = setting.partition("@")
    return bits.upper().replace("A", "/A").lstrip("/") + (f" {how}" if how else "")


def kind(how: str) -> str:
    """What the settings of a curve have in common: `a8@learned` as "A8 learned", `a=w` as "A=W"."""
    return title(how).strip("/ ")


def by_bits(sweeps: Mapping[str, Sweep], metric: str) -> Lines | None:
    """Metric against weight bits: of each named sweep a line for each kind of setting; float dashed, trained a star."""
    lines: list[Line] = []
    ticks: set[float] = set()
    for color, (label, sweep) in enumerate(sweeps.items()):
        rows = [row for row in sweep.rows if not _moved(row)]
        for dash, (how, points) in enumerate(curves(rows, metric).items()):
            x, y = zip(*points, strict=True)
            lines.append(Line(name=f"{label}, {kind(how)}" if how else label, x=x, y=y, color=color, dash=dash))
            ticks.update(x)
        for row in rows:
            if row.setting == "trained" and row.weights is not None:
                x, y = [row.weights], [row.value(metric)]
                lines.append(Line(name=f"{label}, trained", x=x, y=y, color=color, mark="star"))
                ticks.add(row.weights)
    if not lines:
        return None
    ends = [min(ticks), max(ticks)]
    for color, (label, sweep) in enumerate(sweeps.items()):
        for row in sweep.rows:
            if row.setting == "fp":
                level = [row.value(metric)] * 2
                lines.append(Line(name=f"{label}, float", x=ends, y=level, color=color, dash=-1, mark="none"))
    head = f"{metric.capitalize()} against weight bits"
    return Lines(title=head, x="weight bits", y=metric, lines=lines, ticks=sorted(ticks), percent=is_share(metric))


def _moved(row: Row) -> bool:
    """Whether its steps are perturbed."""
    setting = Setting.parse(row.setting)
    return setting.ratio != 1 or setting.power_of_two != "no"


def step_ratios(sweeps: Mapping[str, Sweep], metric: str) -> Lines | None:
    """Metric against the ratio of steps to those of the method, a line for each setting; three ratios or more."""
    lines = []
    for color, (label, sweep) in enumerate(sweeps.items()):
        found: dict[str, list[tuple[float, float]]] = {}
        for row in sweep.rows:
            setting = Setting.parse(row.setting)
            found.setdefault(replace(setting, ratio=1.0).name, []).append((setting.ratio, row.value(metric)))
        found = {name: sorted(points) for name, points in found.items() if len(points) > 2}
        for dash, (name, points) in enumerate(found.items()):
            x, y = zip(*points, strict=True)
            lines.append(Line(name=f"{label}, {title(name)}", x=x, y=y, color=color, dash=dash))
    if not lines:
        return None
    head = f"{metric.capitalize()} with other steps"
    return Lines(title=head, x="step / step of the method", y=metric, lines=lines, percent=is_share(metric))


def transfer(sweeps: Mapping[str, Sweep], metric: str) -> Cells | None:
    """Settings down, models across: what was trained one way, measured another."""
    names = list(dict.fromkeys(row.setting for one in sweeps.values() for row in one.rows if not _moved(row)))
    if len(sweeps) < 2 or len(names) < 2:
        return None
    values = [[_value(one, name, metric) for one in sweeps.values()] for name in names]
    head = f"{metric.capitalize()} of each model under each setting"
    rows = [title(name) for name in names]
    return Cells(title=head, rows=rows, columns=list(sweeps), values=values, percent=is_share(metric))


def _value(sweep: Sweep, setting: str, metric: str) -> float:
    return next((row.value(metric) for row in sweep.rows if row.setting == setting), math.nan)


def over_training(run: Run) -> list[Chart]:
    """Each setting's metric at each evaluation, of each dataset evaluated twice or more."""
    charts: list[Chart] = []
    for dataset in dict.fromkeys(one.rows[0].dataset for one in run.sweeps):
        history = [one for one in run.sweeps if one.rows[0].dataset == dataset and one.epoch is not None]
        names = list(dict.fromkeys(row.setting for one in history for row in one.rows))
        x = [one.epoch or 0.0 for one in history]
        if len(set(x)) < 2:
            continue
        lines = [
            Line(name=title(name), x=x, y=[_value(one, name, run.metric) for one in history], color=i, dash=i // 8)
            for i, name in enumerate(names)
        ]
        head = f"{run.metric.capitalize()} on {dataset} while training: {run.name}"
        ticks = sorted(set(x)) if len(set(x)) <= 12 else ()
        charts.append(
            Lines(title=head, x="epoch", y=run.metric, lines=lines, ticks=ticks, percent=is_share(run.metric))
        )
    return charts


def layers_over_training(run: Run, key: str, head: str) -> Cells | None:
    """One figure of the telemetry, layers down and evaluations across."""
    history = {one.step: one for one in run.sweeps if any(key in values for values in one.layers.values())}
    if not history:
        return None
    names = list(dict.fromkeys(name for one in history.values() for name in one.layers))
    values = [[one.layers.get(name, {}).get(key, math.nan) for one in history.values()] for name in names]
    columns = [f"{one.epoch:g}" if one.epoch is not None else str(one.step) for one in history.values()]
    return Cells(title=f"{head}: {run.name}", rows=short(names), columns=columns, values=values, x="epoch")


def bits(runs: Sequence[Run]) -> list[Chart]:
    """Weight bits by layer, as the model's own quantizers have them at the end."""
    charts: list[Chart] = []
    for run in runs:
        size = run.facts.get("size") or run.analysis.get("size") or {"layers": []}
        layers = [one for one in size["layers"] if one["grid"]]
        if len({one["bits"] for one in layers}) > 1:
            head = f"Weight bits: {run.name}"
            x = f"bits, {size['bits']:.2f} in the mean over elements"
            names = short([one["name"] for one in layers])
            charts.append(Bars(title=head, x=x, names=names, series={"bits": [one["bits"] for one in layers]}))
    return charts


def kurtosis(sweep: Sweep) -> Bars | None:
    """Of each layer at one moment."""
    layers = {name: one["kurtosis"] for name, one in sweep.layers.items() if "kurtosis" in one}
    if not layers:
        return None
    return Bars(title="Kurtosis of each layer", x="kurtosis", names=short(layers), series={"": list(layers.values())})


def sensitivity(runs: Sequence[Run]) -> list[Chart]:
    """What each layer costs when it alone is quantized, for each setting analysed."""
    charts: list[Chart] = []
    for run in runs:
        for setting, found in run.analysis.get("settings", {}).items():
            whole = found.get("sensitivity", {}).get("")
            layers = {name: one for name, one in found.get("sensitivity", {}).items() if name}
            if not layers or whole is None:
                continue
            metric = next((name for name in whole["only"] if name != "loss"), "loss")
            percent = is_share(metric)
            head = f"Sensitivity to {title(setting)}: {run.name}"
            note = (
                f"{metric}: {written(whole['only'].get(metric, math.nan), percent)} in float, "
                f"{written(whole['without'].get(metric, math.nan), percent)} with every layer at {title(setting)}"
            )
            sign = -1 if less_is_better(metric) else 1

            def lost(one: dict[str, Any], other: dict[str, Any], metric: str = metric, sign: int = sign) -> float:
                return sign * (one.get(metric, math.nan) - other.get(metric, math.nan))

            series = {
                "lost by this layer alone": [lost(whole["only"], one["only"]) for one in layers.values()],
                "won by leaving it in float": [lost(one["without"], whole["without"]) for one in layers.values()],
            }
            names = short(list(layers))
            charts.append(
                Bars(title=head, note=note, x=f"{metric}, difference", names=names, series=series, percent=percent)
            )
    return charts


def histograms(run: Run) -> list[Chart]:
    """Of each weight its distribution before and after the training, or as it was analysed."""
    moments = {"before": run.weights.get("before", {}), "after": run.weights.get("after", {})}
    moments = {when: found for when, found in moments.items() if found}
    if not moments and run.analysis.get("statistics"):
        moments = {"": run.analysis["statistics"]}
    names = list(dict.fromkeys(name for found in moments.values() for name in found))
    charts: list[Chart] = []
    for label, name in zip(short(names), names, strict=True):
        lines = []
        for color, (when, found) in enumerate(moments.items()):
            if name in found:
                one = found[name]
                text = ", ".join(filter(None, [when, f"kurtosis {one['kurtosis']:.2f}"]))
                x, y = _density(one)
                lines.append(Line(name=text, x=x, y=y, color=color, mark="none"))
        charts.append(Lines(title=label, x="weight", y="density", lines=lines, fill=True))
    return charts


def _density(one: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(middle of each bin, share of the elements over its width); a histogram from -largest to largest."""
    counts = one["counts"]
    largest = one["edges"][-1] if "edges" in one else one["largest"]
    width = 2 * largest / len(counts) or 1.0
    total = sum(counts) or 1.0
    middle = [-largest + width * (i + 0.5) for i in range(len(counts))]
    return middle, [count / total / width for count in counts]


def telemetry(runs: Sequence[Run]) -> list[Chart]:
    """Each scalar of the training logs, a line for each run."""
    logs = {run.name: [one for one in run.log if "loss" in one and "epoch" in one] for run in runs}
    found = dict.fromkeys(key for log in logs.values() for one in log for key in one)
    keys = [*SCALARS, *(key for key in found if key not in (*SCALARS, "epoch", "step"))]
    charts: list[Chart] = []
    for key in keys:
        lines = []
        for color, (name, log) in enumerate(logs.items()):
            points = [(one["epoch"], one[key]) for one in log if isinstance(one.get(key), (int, float))]
            if len(points) > 1:
                x, y = zip(*points, strict=True)
                lines.append(Line(name=name, x=x, y=y, color=color, mark="none"))
        if lines:
            charts.append(Lines(title=key.replace("_", " "), x="epoch", y="", lines=lines))
    return charts


def short(names: Iterable[str]) -> list[str]:
    """Names of weights without the parts that all of them begin or end with."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return [".".join(part) for part in parts]

    def alike(columns: Iterable[tuple[str, ...]]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    most = min(map(len, parts)) - 1
    front = min(alike(zip(*parts, strict=False)), most)
    back = min(alike(zip(*(part[::-1] for part in parts), strict=False)), most - front)
    return [".".join(part[front : len(part) - back]) for part in parts]
