"""The sweep: one model under many quantizers, the data read once."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from hf_robustq.calibrate import (
    activation_grid,
    activation_probe,
    float_model,
    undisturbed,
    weight_probe,
    weight_sample,
)
from hf_robustq.grid import Grid, check_bits
from hf_robustq.plugin import RobustQ
from hf_robustq.scales import SCALE_RULES, Sample
from hf_robustq.sites import Site, is_sharded

Predict = Callable[[Any, Any], Any]
Metric = Callable[[list[Any]], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to quantize a model for evaluation: `fp`, `trained`, `w4`, `w4a8`, `w4@absmax` or `w4@mse/channel`.

    weights, activations   storage bits; None: float
    scale                  a name of `SCALE_RULES`
    per_channel            a step per output channel of the weights
    trained                the model's own quantizers, as it was trained
    Weights take the narrow grid of 2^b - 1 levels, activations the full one of 2^b.
    """

    weights: int | None = None
    activations: int | None = None
    scale: str = "mse"
    per_channel: bool = False
    trained: bool = False

    def __post_init__(self) -> None:
        if self.trained and (self.weights or self.activations):
            raise ValueError("a setting is either trained or has bits of its own")
        for what, bits in (("weight bits", self.weights), ("activation bits", self.activations)):
            if bits is not None:
                check_bits(bits, what)
        if self.scale not in SCALE_RULES:
            raise ValueError(f"unknown scale rule {self.scale!r}: known: {', '.join(SCALE_RULES)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        if text in ("fp", "trained"):
            return cls(trained=text == "trained")
        match = re.fullmatch(r"(?:w(\d+))?(?:a(\d+))?(?:@(\w+))?(/channel)?", text)
        if match is None or not (match[1] or match[2]):
            raise ValueError(f"cannot read setting {text!r}: write fp, trained, w4, w4a8, w4@absmax or w4@mse/channel")
        weights, activations = (int(bits) if bits else None for bits in match.groups()[:2])
        return cls(weights=weights, activations=activations, scale=match[3] or "mse", per_channel=bool(match[4]))

    @property
    def name(self) -> str:
        """The shortest text that `parse` reads back; `_` instead of `@` and `/` makes it a metric's name."""
        if self.trained:
            return "trained"
        bits = (f"w{self.weights}" if self.weights else "") + (f"a{self.activations}" if self.activations else "")
        scale = "" if self.scale == "mse" and not self.per_channel else f"@{self.scale}"
        return (bits + scale + ("/channel" if self.per_channel else "")) if bits else "fp"

    @property
    def key(self) -> str:
        return re.sub(r"[@/]", "_", self.name)


def parse_settings(settings: Sequence[Setting | str]) -> list[Setting]:
    """Settings, read where they are text. Raises `ValueError` for one that is listed twice."""
    parsed = [Setting.parse(setting) if isinstance(setting, str) else setting for setting in settings]
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"a setting is listed twice: {', '.join(setting.name for setting in parsed)}")
    return parsed


DEFAULT_SETTINGS = tuple(Setting.parse(s) for s in ["fp", "w8", "w6", "w5", "w4", "w3", "w2", "w8a8", "w6a6", "w4a4"])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a sweep: a setting and what was measured under it, on `samples` samples of `dataset`."""

    setting: str
    weights: int | None
    activations: int | None
    metrics: dict[str, float]
    samples: int
    dataset: str = "eval"
    subset: str = "all"

    @property
    def on_curve(self) -> bool:
        """Whether the row is a point of the curve over weight bits: weights only, per tensor, by the default rule."""
        return self.weights is not None and self.activations is None and "@" not in self.setting


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


def robustness(rows: Iterable[Row], metric: str) -> float | None:
    """Area under metric against weight bits, by trapezoids, over (b_max - b_min): in units of the metric.

    Over the rows on the curve (`Row.on_curve`), None for fewer than two of them; not divided by the float value,
    which would reward a bad float model.
    """
    points = sorted((row.weights or 0, row.metrics[metric]) for row in rows if row.on_curve)
    if len({bits for bits, _ in points}) < 2:
        return None
    area = sum((b1 - b0) * (v0 + v1) / 2 for (b0, v0), (b1, v1) in itertools.pairwise(points))
    return area / (points[-1][0] - points[0][0])


class Steps:
    """The steps of each setting, searched once per sweep: of the stored weights, and of the inputs calibration saw."""

    def __init__(self, plugin: RobustQ) -> None:
        self.plugin = plugin
        self._samples: dict[tuple[str, int | None], Sample] = {}
        self._steps: dict[tuple[str, Grid, str], torch.Tensor] = {}

    def weight(self, site: Site, setting: Setting) -> tuple[Grid, torch.Tensor]:
        assert setting.weights is not None
        axis = site.axis if setting.per_channel else None
        grid = Grid(bits=8 if site.name in self.plugin.edges else setting.weights, narrow=True, axis=axis)
        return grid, self._step(site.name, grid, setting.scale, lambda: weight_sample(site, axis))

    def activation(self, site: Site, setting: Setting) -> tuple[Grid, torch.Tensor]:
        assert setting.activations is not None
        sample = activation_probe(site).sample()
        grid = activation_grid(8 if site.name in self.plugin.edges else setting.activations, sample)
        return grid, self._step(f"the input of {site.name}", grid, setting.scale, lambda: sample)

    def _step(self, name: str, grid: Grid, rule: str, observe: Callable[[], Sample]) -> torch.Tensor:
        key = (name, grid, rule)
        if key not in self._steps:
            sample = self._samples.get((name, grid.axis)) or observe()
            if sample.width:  # a histogram is small enough to keep
                self._samples[name, grid.axis] = sample
            self._steps[key] = SCALE_RULES[rule](sample, grid)
        return self._steps[key]


@contextmanager
def quantized(plugin: RobustQ, setting: Setting, steps: Steps) -> Iterator[None]:
    """The model as `setting` says, each weight quantized at its first read; afterwards as before, to the bit."""
    if setting.trained:
        plugin.check_initialized()
        yield
        return
    with float_model(plugin.sites):
        for site in plugin.sites:
            if setting.weights is not None:
                weight_probe(site).quantize(*steps.weight(site, setting), keep=not is_sharded(site.parameter))
            probe = activation_probe(site)
            if setting.activations is not None and probe.histogram:
                probe.quantize(*steps.activation(site, setting))
        yield


def chunked(batches: Iterable[Any], limit: int) -> Iterator[list[Any]]:
    """Lists of consecutive batches of at most `limit` bytes of tensors together (at least one batch each)."""
    chunk: list[Any] = []
    size = 0
    for batch in batches:
        bytes_ = _bytes(batch)
        if chunk and size + bytes_ > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(batch)
        size += bytes_
    if chunk:
        yield chunk


def _bytes(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    if isinstance(batch, Mapping):
        return sum(map(_bytes, batch.values()))
    return sum(map(_bytes, batch)) if isinstance(batch, (list, tuple)) else 0


def sweep(
    plugin: RobustQ,
    batches: Iterable[Any],
    predict: Predict,
    metric: Metric,
    settings: Sequence[Setting | str] = DEFAULT_SETTINGS,
    model: Any = None,
    limit: int = 1 << 30,
) -> dict[str, dict[str, float]]:
    """Measure a model under every setting while reading the data once; returns metrics by the setting's name.

    predict   `predict(model, batch) -> anything`, run without gradients in evaluation mode
    metric    `metric([what predict returned, batch by batch]) -> {name: value}`
    model     what to call, where it is not `plugin.model` (a DDP or FSDP wrapping of it)
    limit     bytes of batches kept at a time: batches outside, settings inside, a weight quantized once for
              each setting and chunk

    What `predict` returns is kept for every setting until the end: return no more than `metric` needs. The
    model and the global RNGs are left as they were, to the bit. Settings with activations need
    `plugin.observe(...)` on training data first.
    """
    model = plugin.model if model is None else model
    wanted = parse_settings(settings)
    outputs: dict[str, list[Any]] = {setting.name: [] for setting in wanted}
    steps = Steps(plugin)
    with undisturbed(model):
        for chunk in chunked(batches, limit):
            for setting in wanted:
                with quantized(plugin, setting, steps):
                    outputs[setting.name] += [predict(model, batch) for batch in chunk]
    if not any(outputs.values()):
        raise ValueError("the evaluation set is empty: give at least one batch")
    return {name: dict(metric(predicted)) for name, predicted in outputs.items()}
