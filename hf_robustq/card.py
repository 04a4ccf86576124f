"""The model card: how the model does at each bit-width, and exactly how it came about. Takes data, not models."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_robustq.size import Size
from hf_robustq.sweep import Sweep, curves

logger = logging.getLogger(__name__)

PLOT_FILE = "robustq_curve.png"
BITS_FILE = "robustq_bits.png"

STYLES = ("-", ":", "-.", (0, (1, 3)))

VERSIONS = ("hf_robustq", "torch", "transformers", "accelerate", "timm", "datasets")


def is_share(metric: str) -> bool:
    """Whether a metric is a share of one, shown in percent; a loss is not."""
    return not metric.endswith("loss")


def table(sweeps: Mapping[str, Sweep], metric: str) -> str:
    """A Markdown table: a row for each named sweep, a column for each setting of any; shares in percent."""
    names = list(dict.fromkeys(row.setting for sweep in sweeps.values() for row in sweep.rows))
    head = ["", *(title(name) for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label, sweep in sweeps.items():
        values = {row.setting: row.metrics[metric] for row in sweep.rows}
        cells = [f"{values[name] * (100 if is_share(metric) else 1):.2f}" if name in values else "" for name in names]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def title(setting: str) -> str:
    """`w4a8` as W4/A8, `w4` as W4, `fp` as FP: what a column is headed with."""
    head, slash, rest = setting.partition("/")
    if head in ("fp", "trained"):
        return (head.upper() if head == "fp" else head) + slash + rest
    bits, _, how = setting.partition("@")
    return bits.upper().replace("A", "/A") + (f" {how}" if how else "")


def plot(sweeps: Mapping[str, Sweep], metric: str, path: str | Path) -> None:
    """Metric against weight bits as PNG: of each named sweep a line per kind of setting (weights only, `a4@learned`).

    The float value is the dashed line, the bits the model was trained at the star. Raises `ImportError` without
    matplotlib (the `report` extra).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ticks: set[float] = set()
    for index, (label, sweep) in enumerate(sweeps.items()):
        color = f"C{index}"
        for style, (kind, points) in zip(itertools.cycle(STYLES), curves(sweep.rows, metric).items()):
            name = f"{label}, {title(kind).strip(' /')}" if kind else label
            axes.plot(*zip(*points, strict=True), marker="o", linestyle=style, color=color, label=name)
            ticks.update(bits for bits, _ in points)
        for row in sweep.rows:
            if row.setting == "fp":
                axes.axhline(row.metrics[metric], color=color, linestyle="--", linewidth=1, label=f"{label}, float")
            if row.setting == "trained" and row.weights is not None:
                axes.plot(
                    [row.weights], [row.metrics[metric]], "*", markersize=14, color=color, label=f"{label}, trained"
                )
                ticks.add(row.weights)
    axes.set_xlabel("weight bits")
    axes.set_ylabel(metric)
    axes.set_xticks(sorted(ticks))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_bits(size: Size, path: str | Path) -> None:
    """Storage bits of every quantized weight as PNG, a bar each, in the order of the model. `ImportError` as above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [layer for layer in size.layers if layer.quantized]
    figure = Figure(figsize=(6.4, 1.0 + 0.2 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bars = axes.barh([layer.name for layer in layers], [layer.bits for layer in layers], color="C0")
    axes.bar_label(bars, fontsize=7, padding=2)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel(f"weight bits, {size.bits:.2f} in the mean over elements")
    axes.margins(x=0.08)
    figure.savefig(path, dpi=150)


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
    step: int | None = None,
    size: Size | None = None,
) -> Path:
    """Write `README.md` and the curve into a model's folder; returns the card's path.

    config     the RobustQ config, as it is printed into the card
    sweeps     all sweeps of the run
    metric     the metric of the table; shown in percent, unless it is a loss
    settings   the training settings worth knowing (learning rate, epochs, batch size, ...)
    step       the optimizer step of the model in the folder; default: that of the last sweep
    size       of the model as its own quantizers have it; shown where it has some
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    step = sweeps[-1].step if step is None else step
    own = {sweep.rows[0].dataset: sweep for sweep in sweeps if sweep.step == step}
    percent = " (%)" if is_share(metric) else ""
    lines = [
        f"# {folder.resolve().name}",
        "",
        "One checkpoint, measured at every bit-width below. The weights in this folder are the float ones; "
        "stock `transformers` loads them as they are (an architecture of `hf_robustq.models` after importing that). "
        "`hf_robustq.from_pretrained(<class>, <this folder>, bits=4, activation_bits=8)` loads them at any other.",
        "",
        f"## {metric.capitalize()} by bit-width{percent}",
        "",
        table(own, metric),
        "",
        " ".join(measured_on(sweep) for sweep in own.values()),
        "W is the bits of the weights, A of the activations, sign included; FP is unquantized. Weights take the "
        "symmetric grid of 2^b - 1 levels, activations 2^b levels, signed where calibration saw a negative value; in "
        "`trained` and `learned` columns both take those of the model's own quantizers. "
        "First and last layers as `first_last` below says; attention products and residual additions stay float.",
        "",
    ]
    if any(curves(sweep.rows, metric) for sweep in own.values()):
        try:
            plot(own, metric, folder / PLOT_FILE)
            lines += [f"![{metric} against weight bits]({PLOT_FILE})", ""]
        except ImportError:
            logger.warning("The card has no plot, for want of matplotlib: pip install 'hf_robustq[report]'")
    if len(sweeps) > len(own):
        history = {f"{s.rows[0].dataset}, {_moment(s)}": s for s in sweeps}
        lines += [f"## During training{percent}", "", table(history, metric), ""]
    if size is not None and any(layer.quantized for layer in size.layers):
        lines += ["## Size, as it was trained", "", str(size), ""]
        if len({layer.bits for layer in size.layers if layer.quantized}) > 1:
            try:
                plot_bits(size, folder / BITS_FILE)
                lines += [f"![bits of each weight]({BITS_FILE})", ""]
            except ImportError:
                pass  # said above
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


def _moment(sweep: Sweep) -> str:
    return f"step {sweep.step}" if sweep.epoch is None else f"epoch {sweep.epoch:g}"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def training_settings(
    args: Any,
    lr_schedule: Mapping[str, Any] | None,
    steps: float | None,
    bits: float | None,
    **options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The training arguments that a reader needs to repeat the run; `steps`, `bits`: learning rates of their own."""
    names = ("learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size",
             "gradient_accumulation_steps", "world_size", "max_grad_norm", "bf16", "fp16")  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    schedule = dict(lr_schedule) if lr_schedule else args.lr_scheduler_type
    settings |= {f"learning_rate of {k}": v for k, v in (("steps", steps), ("bits", bits)) if v is not None}
    settings |= {name: str(dict(values)) for name, values in options.items() if values is not None}
    return {"optimizer": f"{args.optim} {args.optim_args or ''}".strip(), **settings, "lr_schedule": str(schedule)}
