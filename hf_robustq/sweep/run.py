"""The sweep itself: batches outside, settings inside, the data read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from hf_robustq.calibrate import float_model, switches_kept, undisturbed
from hf_robustq.plugin import RobustQ
from hf_robustq.plugin.stages import quantizers
from hf_robustq.quantizers import Role
from hf_robustq.sweep.batch_norm import with_statistics
from hf_robustq.sweep.settings import DEFAULT_SETTINGS, Setting, parse_settings
from hf_robustq.sweep.steps import Calibration, Steps, perturbed

Predict = Callable[[Any, Any], Any]
Metric = Callable[[list[Any]], Mapping[str, float]]


@contextmanager
def quantized(plugin: RobustQ, setting: Setting, steps: Steps) -> Iterator[None]:
    """The model as `setting` says, each weight quantized at its first read; afterwards as before, to the bit."""
    with ExitStack() as stack:
        if setting.own:
            stack.enter_context(_own(plugin, setting))
        else:
            stack.enter_context(float_model(plugin.sites))
            steps.apply(setting)
        if setting.reestimate:
            stack.enter_context(with_statistics(plugin.model, steps.statistics(setting)))
        yield


@contextmanager
def _own(plugin: RobustQ, setting: Setting) -> Iterator[None]:
    """The model's own quantizers: as they are, or at other bits within their clip ranges; with the steps perturbed."""
    plugin.check_initialized()
    own = list(quantizers(plugin.sites))
    wanted: dict[Role, int | None] = {"weight": setting.weights, "input": setting.activations}
    if not own:
        raise ValueError(f"{setting.name}: the model has no quantizers of its own")
    for role, bits in wanted.items():
        if bits is not None and not any(stage.role == role for stage in own):
            raise ValueError(f"{setting.name}: the model has no {role} quantizers whose steps were learned")
    moved = setting.ratio != 1 or setting.power_of_two != "no"
    if moved and plugin.reshaped:
        raise ValueError(f"{setting.name}: the model's quantizers do more than round by a step: none to perturb")
    try:
        with switches_kept(own):
            for stage in own:
                if not setting.trained:
                    bits = wanted[stage.role]
                    stage.enabled = bits is not None
                    stage.set_bits(None if bits is None or stage.site in plugin.edges else bits)
                if moved and (stage.role == "weight" or setting.perturb_inputs):
                    stage.change_steps(partial(perturbed, setting=setting))
            yield
    finally:
        for stage in own:
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
    calibration: Calibration | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Measure a model under every setting while reading the data once; returns metrics by the setting's name.

    predict   `predict(model, batch) -> anything`, run without gradients in evaluation mode
    metric    `metric([what predict returned, batch by batch]) -> {name: value}`
    model     what to call, where it is not `plugin.model` (a DDP or FSDP wrapping of it)
    limit     bytes of batches kept at a time: batches outside, settings inside, a weight quantized once for
              each setting and chunk
    calibration   training samples for "lapq" and "/bn", never those of `batches`
    seed      of stochastic rounding

    What `predict` returns is kept for every setting until the end: return no more than `metric` needs. The
    model and the global RNGs are left as they were, to the bit. Settings with activations need
    `plugin.observe(...)` on training data first.
    """
    model = plugin.model if model is None else model
    wanted = parse_settings(settings)
    plugin.check_in_place()
    plugin.warn_reshaped([setting.name for setting in wanted if not setting.own])
    outputs: dict[str, list[Any]] = {setting.name: [] for setting in wanted}
    steps = Steps(plugin, model, calibration, seed)
    for setting in wanted:
        steps.check(setting)
    with undisturbed(model):
        for chunk in chunked(batches, limit):
            steps.forward = partial(predict, model, chunk[0])
            for setting in wanted:
                with quantized(plugin, setting, steps):
                    outputs[setting.name] += [predict(model, batch) for batch in chunk]
    if not any(outputs.values()):
        raise ValueError("the evaluation set is empty: give at least one batch")
    return {name: dict(metric(predicted)) for name, predicted in outputs.items()}
