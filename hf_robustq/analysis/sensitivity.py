"""Which layers a network's accuracy hangs on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_robustq.calibrate import float_model, undisturbed
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
    along with its weight. Raises `ValueError` for the model's own quantizers and for batch norms re-estimated.
    """
    setting = Setting.parse(setting) if isinstance(setting, str) else setting
    if setting.own or setting.reestimate:
        raise ValueError(f"{setting.name}: sensitivity takes settings that quantize each layer by itself")
    names = [site.name for site in plugin.sites]
    chosen: dict[tuple[str, str], set[str]] = {("", "only"): set(), ("", "without"): set(names)}
    for name in names:
        chosen[name, "only"], chosen[name, "without"] = {name}, set(names) - {name}
    outputs: dict[tuple[str, str], list[Any]] = {key: [] for key in chosen}
    steps = Steps(plugin, calibration=calibration)
    with undisturbed(plugin.model):
        for chunk in chunked(batches, limit):
            if setting.fold and not steps.norms:
                steps.find_norms(lambda first=chunk[0]: predict(plugin.model, first))
            for key, some in chosen.items():
                with float_model(plugin.sites):
                    steps.apply(setting, some)
                    outputs[key] += [predict(plugin.model, batch) for batch in chunk]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, which), predicted in outputs.items():
        found.setdefault(name, {})[which] = dict(metric(predicted))
    return found
