"""Rows: what a sweep measured, kept as JSON, and the robustness score."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a sweep: a setting, its bits, and what was measured under it, on `samples` samples of `dataset`.

    Of `trained`, bits are their mean over the layers where these differ.
    """

    setting: str
    weights: float | None
    activations: float | None
    metrics: dict[str, float]
    samples: int
    dataset: str = "eval"
    subset: str = "all"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The rows of one model at one moment, with what is needed to read them."""

    rows: list[Row]
    epoch: float | None = None
    step: int | None = None
    context: dict[str, Any] = field(default_factory=dict)

    def value(self, setting: str, metric: str = "accuracy") -> float:
        return next(row for row in self.rows if row.setting == setting).metrics[metric]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "rows": [Row(**row) for row in values["rows"]]})


def save_sweeps(sweeps: Sequence[Sweep], path: str | Path) -> None:
    """Write sweeps as JSON; the old file stays whole until the new one is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps([sweep.to_dict() for sweep in sweeps], indent=1), encoding="utf-8")
    draft.replace(path)


def load_sweeps(path: str | Path) -> list[Sweep]:
    return [Sweep.from_dict(values) for values in json.loads(Path(path).read_text(encoding="utf-8"))]


def curves(rows: Iterable[Row], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Metric against weight bits, by what the settings say besides ("": nothing; "a4@learned"); two points or more.

    A model `trained` at some bits is on none of them.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.weights is not None and row.setting.startswith("w"):
            found.setdefault(row.setting.removeprefix(f"w{row.weights}"), []).append((row.weights, row.metrics[metric]))
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
