"""`robustq analyze`: why a saved model survives quantization, or does not.

    robustq analyze outputs/kure --data <cifar10 folder> --settings w4 w4a4 --out analysis.json
    robustq analyze outputs/lsq --data <cifar10 folder> --parts sharpness --rho 1e-3 5e-4 --out sharpness.json

Writes JSON: of each weight mean, deviation, skewness, kurtosis, symmetry and histogram; under each setting the signal
to quantization noise (dB) of each weight, the divergence (nats) of each layer's output from the float model's, and the
metrics with each layer quantized alone and with all others; of the model's own quantizers the bits, sizes and how far
weights lie from their levels, and the sharpness of the model as they have it.
Measured on samples of the evaluation split.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hf_robustq.analysis import layer_sensitivity, output_divergence, sharpness, weight_sqnr, weight_statistics
from hf_robustq.cli.tasks import add_task, check_calibration, load_task, prepare
from hf_robustq.files import locked, write_json
from hf_robustq.sweep import Calibration, Steps, parse_settings

SAID = (
    *("model", "data", "weights", "first_last", "eval_split", "samples", "calibration_split", "calibration_samples"),
    *("seed", "metric"),
)
PARTS = ("statistics", "quantizers", "sqnr", "divergence", "sensitivity", "sharpness")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, Hub id, or timm architecture (with --weights)")
    add("--out", required=True, type=Path, help="JSON file to write")
    add("--settings", nargs="+", default=["w4"], metavar="S", help="w4, w4a4, w3@lapq, ...; default: w4")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    add("--samples", type=int, default=1024, help="of the evaluation split")
    add("--rho", nargs="+", type=float, default=[1e-3, 5e-4], help="radii of the sharpness")
    add_task(parser)


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def run(args: argparse.Namespace) -> None:
    with locked(args.out, wait=0):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    from accelerate.utils import send_to_device

    from hf_robustq.trainer.batches import calibration_batches, forward, rows
    from hf_robustq.trainer.predictions import predicted, scores

    settings = parse_settings(args.settings)
    alone = [setting.name for setting in settings if setting.own or setting.reestimate]
    if alone and "sensitivity" in args.parts:
        raise ValueError(f"{', '.join(alone)}: sensitivity quantizes each layer by itself: leave it out of --parts")
    if args.out.exists():
        raise ValueError(f"{args.out} is there already: name another --out")
    check_calibration(args)
    task = load_task(args.model, args)
    plugin, trainer = prepare(task, args, args.out.parent)
    samples = args.samples if task.samples is None else len(task.evaluation)
    batches = list(calibration_batches(trainer, task.evaluation, samples, args.seed))
    known = list(calibration_batches(trainer, task.train, args.calibration_samples, args.seed))
    augmented = list(calibration_batches(trainer, task.train, args.calibration_samples, args.seed, augmented=True))
    call = forward(trainer)
    calibration = Calibration(known, lambda model, batch: call(model, batch)[0], augmented=augmented)
    if any(setting.activations for setting in settings):
        plugin.observe(known, call, activations=True)

    def predict(model: Any, batch: Any) -> Any:
        return predicted(trainer, model, batch, rows(batch), rows(batch))

    def score(outputs: list[Any]) -> dict[str, float]:
        return scores(trainer, outputs)

    def loss(model: Any, batch: Any) -> Tensor:
        return model(**send_to_device(dict(batch), trainer.args.device)).loss

    result: dict[str, Any] = {key: getattr(args, key) for key in SAID}

    def write(said: str) -> None:
        write_json(_plain(result), args.out)
        print(said, flush=True)

    if "statistics" in args.parts:
        result["statistics"] = weight_statistics(plugin)
        write("statistics of the weights")
    if "quantizers" in args.parts and plugin.config.weights:
        telemetry = plugin.telemetry()
        result["quantizers"], result["size"] = telemetry, plugin.size().to_dict()
        inner = [one["distance"] for n, one in telemetry.items() if n not in plugin.edges and "distance" in one]
        far = f", {np.mean(inner):.4f} steps from their levels in the mean over layers" if inner else ""
        write(f"{plugin.size().bits:.2f} bits, {plugin.size().megabytes:.4g} MB{far}")
    for setting in settings:
        own = result.setdefault("settings", {}).setdefault(setting.name, {})
        steps = Steps(plugin, calibration=calibration, forward=lambda: call(plugin.model, batches[0]))
        if "sqnr" in args.parts and (setting.weights or setting.trained):
            own["sqnr"] = weight_sqnr(plugin, setting, steps)
            write(f"{setting.name}: signal to noise")
        if "divergence" in args.parts:
            own["divergence"] = output_divergence(plugin, batches, call, setting, calibration)
            write(f"{setting.name}: divergence")
        if "sensitivity" in args.parts:
            own["sensitivity"] = layer_sensitivity(plugin, batches, predict, score, setting, calibration)
            write(f"{setting.name}: sensitivity")
    if "sharpness" in args.parts:
        where = ("stored", "quantized") if plugin.config.weights else ("stored",)
        for rho, kind, around in itertools.product(args.rho, ("ball", "box"), where):
            value = sharpness(plugin, batches, loss, rho, kind, around=around)
            result.setdefault("sharpness", {}).setdefault(f"{rho:g}", {})[f"{kind}, {around}"] = value
            write(f"sharpness, rho {rho:g}, {kind} around the {around} weights: {value:.4f}")
    print(f"all in {args.out}")
