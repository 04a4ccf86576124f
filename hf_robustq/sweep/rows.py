"""Rows: what a sweep measured, kept as JSON, and the robustness score."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from hf_robustq.files import VERSION, read_json, write_json
from hf_robustq.shapes import check
from hf_robustq.sweep.settings import Setting

FACTS = {field.name for field in dataclasses.fields(Setting)} | {
    *("model", "setting", "method", "samples", "subset", "calibration", "data", "split", "seed", "seconds", "staged"),
}
"""What a row of `robustq sweep` has besides its metrics."""

NUMBER = (float, None)
SWEEPS = [{
    "rows": [{
        "setting": str, "weights": NUMBER, "activations": NUMBER, "metrics": {str: float}, "samples": int,
        "dataset?": str, "subset?": str, "staged?": NUMBER,
    }, ...],
    "epoch?": NUMBER, "step?": (int, None), "context?": dict, "layers?": {str: {str: NUMBER}},
}]  # fmt: skip
ROW = {
    "model": str, "setting": str, "weights": NUMBER, "activations": NUMBER, "samples": int, "subset": str,
    "split": (str, None), "staged?": NUMBER, "data?": (str, None), "calibration?": (str, None),
    "method?": (str, None), "seed?": int, "seconds?": float,
}  # fmt: skip
ROWS = {"sweep": dict, "models": {str: str}, "rows": [ROW]}
"""What the files here hold: see `hf_robustq.shapes`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a sweep: a setting, its bits, and what was measured under it, on `samples` samples of `dataset`.

    Of `trained`, bits are their mean over the layers where these differ. `staged`: the share of the elements of all
    weights in products that these bits are of, where calibration has seen it.
    """

    setting: str
    weights: float | None
    activations: float | None
    metrics: dict[str, float]
    samples: int
    dataset: str = "eval"
    subset: str = "all"
    staged: float | None = None

    def value(self, metric: str) -> float:
        """NaN where it was not measured."""
        return self.metrics.get(metric, math.nan)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The rows of one model at one moment, with what is needed to read them.

    layers   by weight, what the telemetry of that moment says of it: its kurtosis, its bits, its quantization error
    """

    rows: list[Row]
    epoch: float | None = None
    step: int | None = None
    context: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def value(self, setting: str, metric: str = "accuracy") -> float:
        return next(row for row in self.rows if row.setting == setting).metrics[metric]

    @property
    def origin(self) -> str:
        """What its figures are of, in a sentence."""
        sets = {f"{row.samples} samples of {row.dataset} ({row.subset})" for row in self.rows}
        calibration = self.context.get("calibration_samples") if any(row.activations for row in self.rows) else None
        steps = f" Activation steps come from {calibration} training samples." if calibration else ""
        said = self.context.get("products", "")
        return f"Measured on {', '.join(sorted(sets))}.{steps}{said and ' '}{said}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "rows": [Row(**row) for row in values["rows"]]})


def save_sweeps(sweeps: Sequence[Sweep], path: str | Path) -> None:
    """Write sweeps as JSON; the old file stays whole until the new one is."""
    write_json({"version": VERSION, "sweeps": [sweep.to_dict() for sweep in sweeps]}, path)


def load_sweeps(path: str | Path) -> list[Sweep]:
    """What `save_sweeps` wrote, also before its files had a version. Raises `ValueError` for anything else."""
    values = read_json(path)
    try:
        values = values["sweeps"] if isinstance(values, dict) and "sweeps" in values else values
        check(values, SWEEPS)
        for row in (row for one in values for row in one["rows"]):
            Setting.parse(row["setting"])
        return [Sweep.from_dict(one) for one in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no sweeps as this version writes them ({error}): measure again") from None


def load_measured(path: str | Path) -> dict[str, Sweep]:
    """The `rows.json` of `robustq sweep`, by model. Raises `ValueError` for anything else."""
    values = read_json(path)
    try:
        check_rows(values)
    except ValueError as error:
        raise ValueError(f"{path} holds no rows as this version writes them ({error}): measure again") from None
    return measured_sweeps(values["rows"], values["sweep"])


def check_rows(values: Any) -> None:
    """Raise `ValueError` for what is no `rows.json` of `robustq sweep`."""
    check(values, ROWS)
    for index, row in enumerate(values["rows"]):
        metrics = {key: value for key, value in row.items() if key not in FACTS}
        check(metrics, {str: NUMBER}, f"/rows/{index}")
        setting = asdict(Setting.parse(row["setting"]))
        facts = {key: value for key, value in setting.items() if key not in ROW}
        differ = [key for key, value in facts.items() if repr(row.get(key, value)) != repr(value)]
        if differ:
            raise ValueError(f"/rows/{index}: {differ[0]} is not that of {row['setting'][:80]!r}")


def measured_sweeps(rows: Iterable[Mapping[str, Any]], context: Mapping[str, Any]) -> dict[str, Sweep]:
    """The flat rows of `robustq sweep`, by model."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        metrics = {key: value for key, value in row.items() if key not in FACTS and value is not None}
        known = {key: row[key] for key in ("setting", "weights", "activations", "samples", "subset")}
        known["staged"] = row.get("staged")
        found.setdefault(row["model"], []).append(Row(**known, metrics=metrics, dataset=row["split"] or "eval"))
    return {model: Sweep(rows=rows, context=dict(context)) for model, rows in found.items()}


def curves(rows: Iterable[Row], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Metric against weight bits, by what the settings say besides ("": nothing; "a4@learned"); two points or more.

    Inputs of as many bits as the weights are one curve too ("a=w"). A model `trained` at some bits is on none of them.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.weights is not None and row.setting.startswith("w"):
            how = row.setting.removeprefix(f"w{row.weights}")
            found.setdefault(how, []).append((row.weights, row.value(metric)))
            if row.activations == row.weights:
                how = f"a=w{how.removeprefix(f'a{row.activations}')}"
                found.setdefault(how, []).append((row.weights, row.value(metric)))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def robustness(rows: Iterable[Row], metric: str) -> float | None:
    """Area under metric against weight bits, by trapezoids, over (b_max - b_min): in units of the metric.

    Over the curve of weights only, per tensor, by the default rule; None for fewer than two points. Not divided by the
    float value, which would reward a bad float model.
    """
    points = curves(rows, metric).get("")
    if points is None:
        return None
    area = sum((b1 - b0) * (v0 + v1) / 2 for (b0, v0), (b1, v1) in itertools.pairwise(points))
    return area / (points[-1][0] - points[0][0])
