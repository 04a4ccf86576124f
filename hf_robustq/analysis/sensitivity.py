"""Which layers a network's accuracy hangs on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from hf_robustq.calibrate import float_model, undisturbed, weight_probe
from hf_robustq.plugin import RobustQ
from hf_robustq.sweep import Calibration, Setting, Steps, chunked
from hf_robustq.sweep.run import Metric, Predict


def layer_sensitivity(
    plugin: RobustQ,
    batches: Iterable[Any],
    predict: Predict,
    metric: Metric,
    setting: Setting | str,
    calibration: Calibration | None = None,
    limit: int = 1 << 30,
) -> dict[str, dict[str, dict[str, float]]]:
    """By weight: {"only": metrics with that layer quantized alone, "without": metrics with all others quantized}.

    Besides, under "": {"only": nothing quantized, "without": everything quantized}. The data is read once, in chunks of
    `limit` bytes, for 2n + 2 evaluations. Arguments as of `sweep`; a setting with activations quantizes a layer's input
    along with its weight; layers that share a weight are one. Raises `ValueError` for the model's own quantizers and
    for batch norms re-estimated.
    """
    setting = Setting.parse(setting) if isinstance(setting, str) else setting
    if setting.own or setting.reestimate:
        raise ValueError(f"{setting.name}: sensitivity takes settings that quantize each layer by itself")
    shared: dict[int, set[str]] = {}
    for site in plugin.sites:
        shared.setdefault(id(weight_probe(site)), set()).add(site.name)
    names = {site.name for site in plugin.sites}
    chosen: dict[tuple[str, str], set[str]] = {("", "only"): set(), ("", "without"): names}
    for site in plugin.sites:
        layer = shared[id(weight_probe(site))]
        chosen[site.name, "only"], chosen[site.name, "without"] = layer, names - layer
    outputs: dict[tuple[str, str], list[Any]] = {key: [] for key in chosen}
    steps = Steps(plugin, calibration=calibration)
    with undisturbed(plugin.model):
        for chunk in chunked(batches, limit):
            steps.forward = partial(predict, plugin.model, chunk[0])
            for key, some in chosen.items():
                with float_model(plugin.sites):
                    steps.apply(setting, some)
                    outputs[key] += [predict(plugin.model, batch) for batch in chunk]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, which), predicted in outputs.items():
        found.setdefault(name, {})[which] = dict(metric(predicted))
    return found
