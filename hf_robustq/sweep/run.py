"""The sweep itself: batches outside, settings inside, the data read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hf_robustq.calibrate import (
    activation_grid,
    float_model,
    input_probe,
    undisturbed,
    weight_probe,
    weight_sample,
)
from hf_robustq.grid import Grid
from hf_robustq.plugin import RobustQ
from hf_robustq.quantizers import LEARNED, InputProbe, Quantizer
from hf_robustq.scales import SCALE_RULES, Sample
from hf_robustq.sharded import is_sharded
from hf_robustq.sites import Site
from hf_robustq.sweep.settings import DEFAULT_SETTINGS, Setting, parse_settings

Predict = Callable[[Any, Any], Any]
Metric = Callable[[list[Any]], Mapping[str, float]]


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
        probe = input_probe(site)
        assert isinstance(probe, InputProbe)
        sample = probe.sample()
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
    if setting.scale == LEARNED:
        with _learned(plugin, setting):
            yield
        return
    with float_model(plugin.sites):
        for site in plugin.sites:
            if setting.weights is not None:
                weight_probe(site).quantize(*steps.weight(site, setting), keep=not is_sharded(site.parameter))
            if setting.activations is not None and isinstance(input_probe(site), InputProbe):
                input_probe(site).quantize(*steps.activation(site, setting))
        yield


@contextmanager
def _learned(plugin: RobustQ, setting: Setting) -> Iterator[None]:
    """The model's own quantizers at other bits, within the clip ranges they have."""
    plugin.check_initialized()
    quantizers = [(site, stage) for site in plugin.sites for stage in (*site.weight_stages, *site.activation_stages)]
    wanted = {"weight": setting.weights, "input": setting.activations}
    own = {id(stage): (site, stage) for site, stage in quantizers if isinstance(stage, Quantizer)}
    for role, bits in wanted.items():
        if bits is not None and not any(stage.role == role for _, stage in own.values()):
            raise ValueError(f"{setting.name}: the model has no {role} quantizers whose steps were learned")
    enabled = [(stage, stage.enabled) for _, stage in own.values()]
    try:
        for site, stage in own.values():
            bits = wanted[stage.role]
            stage.enabled = bits is not None
            if bits is not None:
                stage.set_bits(None if site.name in plugin.edges else bits)
        yield
    finally:
        for stage, was in enabled:
            stage.enabled = was
            stage.set_bits(None)


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
    plugin.warn_reshaped([setting.name for setting in wanted if not setting.trained and setting.scale != LEARNED])
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
