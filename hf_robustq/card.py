"""The model card: how the model does at each bit-width, and exactly how it came about. Takes data, not models."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_robustq.sweep import Row, Sweep

PLOT_FILE = "robustq_curve.png"

VERSIONS = ("hf_robustq", "torch", "transformers", "accelerate", "timm", "datasets")


def table(sweeps: Mapping[str, Sweep], metric: str, percent: bool = True) -> str:
    """A Markdown table: a row for each named sweep, a column for each setting of the first."""
    names = [row.setting for row in next(iter(sweeps.values())).rows]
    head = ["", *(title(name) for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label, sweep in sweeps.items():
        values = {row.setting: row.metrics[metric] for row in sweep.rows}
        cells = [f"{values[name] * (100 if percent else 1):.2f}" if name in values else "" for name in names]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def title(setting: str) -> str:
    """`w4a8` as W4/A8, `w4` as W4, `fp` as FP: what a column is headed with."""
    if setting in ("fp", "trained"):
        return setting.upper() if setting == "fp" else setting
    bits, _, how = setting.partition("@")
    return bits.upper().replace("A", "/A") + (f" {how}" if how else "")


def plot(sweeps: Mapping[str, Sweep], metric: str, path: str | Path) -> None:
    """Metric against weight bits, a line for each named sweep, as PNG. The float value is the dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (label, sweep) in enumerate(sweeps.items()):
        points = sorted((row.weights, row.metrics[metric]) for row in sweep.rows if _on_curve(row))
        axes.plot(*zip(*points, strict=True), marker="o", color=f"C{index}", label=label)
        floats = [row.metrics[metric] for row in sweep.rows if row.setting == "fp"]
        if floats:
            axes.axhline(floats[0], color=f"C{index}", linestyle="--", linewidth=1, label=f"{label}, float")
    axes.set_xlabel("weight bits")
    axes.set_ylabel(metric)
    axes.set_xticks(sorted({row.weights or 0 for sweep in sweeps.values() for row in sweep.rows if _on_curve(row)}))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _on_curve(row: Row) -> bool:
    return row.weights is not None and row.activations is None and "@" not in row.setting


def write_card(
    folder: str | Path,
    config: Mapping[str, Any],
    sweeps: Sequence[Sweep],
    metric: str,
    seed: int,
    base_model: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write `README.md` and the curve into a model's folder; returns the card's path.

    config     the RobustQ config, as it is printed into the card
    sweeps     all sweeps of the run; the last one is the model in the folder
    metric     the metric of the table, a share of one (shown in percent)
    settings   the training settings worth knowing (learning rate, epochs, batch size, ...)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    last = sweeps[-1]
    lines = [
        f"# {folder.resolve().name}",
        "",
        "One checkpoint, measured at every bit-width below. The weights in this folder are the float ones; "
        "stock `transformers` loads them as they are.",
        "",
        f"## {metric.capitalize()} by bit-width (%)",
        "",
        table({"this model": last}, metric),
        "",
        measured_on(last),
        "W is the bits of the weights, A of the activations, sign included; FP is unquantized. Weights take the "
        "symmetric grid of 2^b - 1 levels, activations 2^b levels, signed where calibration saw a negative value. "
        "First and last layers as `first_last` below says; attention products and residual additions stay float.",
        "",
    ]
    if any(_on_curve(row) for row in last.rows):
        plot({"this model": last}, metric, folder / PLOT_FILE)
        lines += [f"![{metric} against weight bits]({PLOT_FILE})", ""]
    if len(sweeps) > 1:
        history = {f"epoch {s.epoch:g}" if s.epoch is not None else f"step {s.step}": s for s in sweeps}
        lines += ["## During training", "", table(history, metric), ""]
    lines += ["## How it was made", "", "```yaml", yaml.safe_dump(dict(config), sort_keys=False).rstrip(), "```", ""]
    versions = {name: importlib.metadata.version(name) for name in VERSIONS if _installed(name)}
    facts = {"seed": seed, **(settings or {}), "python": platform.python_version(), **versions}
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "Not measured: latency, energy, and any setting that is not in the table.", ""]
    data = ModelCardData(
        library_name="transformers",
        base_model=base_model,
        datasets=dataset,
        license=license,
        metrics=[metric],
        tags=["robustq", "quantization", "robust-quantization"],
    )
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)).save(path)
    return path


def measured_on(sweep: Sweep) -> str:
    """What the figures of a sweep are of, in a sentence."""
    sets = {f"{row.samples} samples of `{row.dataset}` ({row.subset})" for row in sweep.rows}
    calibration = sweep.context.get("calibration_samples")
    trained = f" Activation steps come from {calibration} training samples." if calibration else ""
    return f"Measured on {', '.join(sorted(sets))}.{trained}"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
