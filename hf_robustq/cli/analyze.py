"""`robustq analyze`: why a saved model survives quantization, or does not.

    robustq analyze outputs/kure --data <cifar10 folder> --settings w4 w4a4 --out analysis.json
    robustq analyze outputs/lsq --data <cifar10 folder> --parts sharpness --rho 1e-3 5e-4 --out sharpness.json

Writes JSON: of each weight mean, deviation, skewness, kurtosis, symmetry and histogram; under each setting the signal
to quantization noise (dB) of each weight, the divergence (nats) of each layer's output from the float model's, and the
metrics with each layer quantized alone and with all others; the sharpness of the model as its own quantizers have it.
Measured on samples of the evaluation split.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hf_robustq.analysis import layer_sensitivity, output_divergence, sharpness, weight_sqnr, weight_statistics
from hf_robustq.cli.tasks import add_task, load_task, prepare
from hf_robustq.sweep import parse_settings

PARTS = ("weights", "sqnr", "divergence", "sensitivity", "sharpness")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    head, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    text = "sensitivity, distributions and sharpness of a saved model"
    parser = commands.add_parser("analyze", help=text, description=head, epilog=rest, formatter_class=plain)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, Hub id, or timm architecture (with --weights)")
    add("--out", required=True, type=Path, help="JSON file to write")
    add("--settings", nargs="+", default=["w4"], metavar="S", help="w4, w4a4, w3@lapq, ...; default: w4")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    add("--samples", type=int, default=1024, help="of the evaluation split")
    add("--rho", nargs="+", type=float, default=[1e-3, 5e-4], help="radii of the sharpness")
    add_task(parser)
    return parser


def _metrics(outputs: list[tuple[Any, ...]]) -> dict[str, float]:
    """The mean loss, and the accuracy where predictions are classes of whole samples."""
    losses, logits, labels = zip(*outputs, strict=True)
    counts = [len(batch) for batch in labels]
    found = {"loss": float(np.average([float(loss) for loss in losses], weights=counts))}
    if labels[0].dim() == 1:
        right = [(batch.argmax(-1) == wanted).float().sum() for batch, wanted in zip(logits, labels, strict=True)]
        found["accuracy"] = float(sum(right)) / sum(counts)
    return found


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def run(args: argparse.Namespace) -> None:
    from accelerate.utils import send_to_device

    from hf_robustq.trainer.batches import calibration_batches, forward

    settings = parse_settings(args.settings)
    task = load_task(args.model, args)
    plugin, trainer = prepare(task, args, args.out.parent)
    batches = list(calibration_batches(trainer, task.evaluation, args.samples, args.seed))
    call = forward(trainer)
    if any(setting.activations for setting in settings):
        known = calibration_batches(trainer, task.train, args.calibration_samples, args.seed)
        plugin.observe(known, call, activations=True)

    def predict(model: Any, batch: Any) -> tuple[Any, ...]:
        loss, logits, labels = trainer.prediction_step(model, dict(batch), prediction_loss_only=False)
        return loss.cpu(), logits.cpu(), labels.cpu()

    def loss(model: Any, batch: Any) -> Tensor:
        return model(**send_to_device(dict(batch), trainer.args.device)).loss

    result: dict[str, Any] = {"model": args.model, "samples": args.samples, "seed": args.seed}
    if "weights" in args.parts:
        result["weights"] = weight_statistics(plugin)
    for setting in settings:
        own = result.setdefault("settings", {}).setdefault(setting.name, {})
        if "sqnr" in args.parts and setting.weights:
            own["sqnr"] = weight_sqnr(plugin, setting)
        if "divergence" in args.parts:
            own["divergence"] = output_divergence(plugin, batches, call, setting)
        if "sensitivity" in args.parts and not setting.own:
            own["sensitivity"] = layer_sensitivity(plugin, batches, predict, _metrics, setting)
    if "sharpness" in args.parts:
        for rho in args.rho:
            own = result.setdefault("sharpness", {}).setdefault(f"{rho:g}", {})
            for kind, around in itertools.product(("ball", "box"), ("stored", "quantized")):
                value = sharpness(plugin, batches, loss, rho, kind, around=around)
                own[f"{kind}, {around}"] = value
                print(f"sharpness, rho {rho:g}, {kind} around the {around} weights: {value:.4f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(_plain(result), indent=1), encoding="utf-8")
    print(f"{', '.join(args.parts)} in {args.out}")
