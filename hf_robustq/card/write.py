"""`README.md` of a folder, and what it is written from as JSON."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_robustq.card.facts import versions as current_versions
from hf_robustq.card.tables import escaped, moment, table_by_method
from hf_robustq.files import write_json, written
from hf_robustq.report import RUN_FILE, Bars, Lines, read_facts, save_png
from hf_robustq.report.chart import is_share
from hf_robustq.report.charts import by_bits, step_ratios, title
from hf_robustq.size import Size
from hf_robustq.sweep import Setting, Sweep

logger = logging.getLogger(__name__)

TAG = "robustq"
"""Of every card; a model on the Hub that has it may be replaced."""
TAGS = (TAG, "quantization", "robust-quantization")
VERSION = 1
"""Of `RUN_FILE`."""


def write_card(
    folder: str | Path,
    config: Mapping[str, Any],
    sweeps: Sequence[Sweep],
    metric: str,
    seed: int,
    name: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    language: str | Sequence[str] | None = None,
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    command: str | None = None,
    versions: Mapping[str, str] | None = None,
    step: int | None = None,
    size: Size | None = None,
    measured: Mapping[str, Sweep] | None = None,
) -> Path:
    """Write `README.md`, its figures, and `RUN_FILE`, which has the same facts as JSON; returns the card's path.

    config     the RobustQ config, as it is printed into the card
    sweeps     all sweeps of the run
    metric     the metric of the table; shown in percent, unless it is a loss
    name       of the model; default: the folder's
    datasets   Hub ids, for the metadata
    dataset    what the figures are of, in words; default: the Hub ids
    task       as the Hub names it, "image-classification"
    settings   the training settings worth knowing (learning rate, epochs, batch size, ...)
    command    what was run; default: not said
    versions   default: those of now
    step       the optimizer step of the model in the folder; default: that of the last sweep
    size       of the model as its own quantizers have it; shown where it has some
    measured   sweeps of the same folder made since, by what they are of

    The metadata has a `model-index` with every figure of the tables. All text is escaped.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = name or folder.resolve().name
    step = sweeps[-1].step if step is None else step
    own = {sweep.rows[0].dataset: sweep for sweep in sweeps if sweep.step == step}
    versions = dict(versions or current_versions())
    facts = {"name": name, "base_model": base_model, "datasets": datasets, "dataset": dataset, "license": license}
    facts |= {"tags": [*tags], "language": language, "task": task, "seed": seed, "command": command}
    facts |= {"settings": dict(settings or {}), "versions": versions, "metric": metric, "step": step}
    facts |= {"config": dict(config)}
    write_json({"version": VERSION, **facts, "size": size and size.to_dict()}, folder / RUN_FILE)

    percent = " (%)" if is_share(metric) else ""
    lines = [
        f"# {escaped(name)}",
        "",
        "One checkpoint, measured at every bit-width below. The weights in this folder are the float ones; "
        "stock `transformers` loads them as they are (an architecture of `hf_robustq.models` after importing that). "
        "`hf_robustq.from_pretrained(<class>, <this folder>, bits=4, activation_bits=8)` loads them at any other.",
        "",
        f"## {escaped(metric).capitalize()} by bit-width{percent}",
        "",
        table_by_method(own, metric),
        "",
        " ".join(escaped(sweep.origin) for sweep in own.values()),
        "W is the bits of the weights, A of the activations, sign included; FP is unquantized. Weights take the "
        "symmetric grid of 2^b - 1 levels, activations 2^b levels, signed where calibration saw a negative value; in "
        "`trained` columns and `learned` rows both take those of the model's own quantizers. "
        "First and last layers as `first_last` below says; attention products and residual additions stay float.",
        "",
    ]
    lines += _picture(by_bits(own, metric), folder / "robustq_curve.png")
    lines += _picture(step_ratios(own, metric), folder / "robustq_steps.png")
    for number, (what, sweep) in enumerate((measured or {}).items()):
        lines += [f"## Measured afterwards: {escaped(what)}{percent}", "", table_by_method({what: sweep}, metric), ""]
        lines += [escaped(sweep.origin), ""]
        lines += _picture(by_bits({what: sweep}, metric), folder / f"robustq_measured_{number}.png")
        lines += _picture(step_ratios({what: sweep}, metric), folder / f"robustq_measured_steps_{number}.png")
    if len(sweeps) > len(own):
        history = {f"{s.rows[0].dataset}, {moment(s)}": s for s in sweeps}
        lines += [f"## During training{percent}", "", table_by_method(history, metric), ""]
    if size is not None and any(layer.quantized for layer in size.layers):
        shown = replace(size, layers=tuple(replace(one, name=escaped(one.name)) for one in size.layers))
        lines += ["## Size, as it was trained", "", str(shown), ""]
        lines += [escaped(size.products.sentence), ""] if size.products is not None and size.products.unstaged else []
        layers = [one for one in size.layers if one.quantized]
        if len({one.bits for one in layers}) > 1:
            bits = {"bits": [one.bits for one in layers]}
            x = f"weight bits, {size.bits:.2f} in the mean over elements"
            chart = Bars(title="Bits of each weight", x=x, names=[one.name for one in layers], series=bits)
            lines += _picture(chart, folder / "robustq_bits.png")
    text = yaml.safe_dump(dict(config), sort_keys=False).rstrip()
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    lines += ["## How it was made", "", f"{fence}yaml", text, fence, ""]
    said = {"seed": seed, **({"command": command} if command else {}), **(settings or {}), **versions}
    lines += [f"- {escaped(key)}: {escaped(value)}" for key, value in said.items()]
    lines += ["", *not_measured([*own.values(), *(measured or {}).values()]), ""]
    data = ModelCardData(
        library_name="transformers",
        base_model=base_model,
        datasets=[datasets] if isinstance(datasets, str) else list(datasets or ()) or None,
        language=language,  # pyright: ignore[reportArgumentType]
        license=license,
        metrics=[metric],
        pipeline_tag=task,
        tags=[*dict.fromkeys((*TAGS, *tags))],
        model_name=name,
        eval_results=eval_results([*own.items(), *(measured or {}).items()], task, dataset or datasets),
    )
    path = folder / "README.md"
    with written(path) as draft:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)).save(draft)
    return path


def rewrite_card(folder: str | Path, sweeps: Sequence[Sweep], measured: Mapping[str, Sweep], **facts: Any) -> Path:
    """The card of a folder again, with what was measured since, and other `facts` than its `RUN_FILE` says."""
    file = Path(folder) / RUN_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {RUN_FILE}: trainer.create_model_card() writes it with the card")
    known = {key: value for key, value in read_facts(file).items() if key != "version"}
    taken = inspect.signature(write_card).parameters
    if odd := [*({"config", "metric", "seed"} - known.keys()), *(known.keys() - taken.keys())]:
        raise ValueError(f"{file} is not as this version writes it ({odd[0][:80]!r}): write the card again")
    known |= {"size": Size.from_dict(known["size"]) if known.get("size") else None, **facts}
    for what, sweep in measured.items():
        if any(known["metric"] not in row.metrics for row in sweep.rows):
            metric = known["metric"][:80]
            raise ValueError(f"{what} has not measured {metric}, which the card is about ({file}): leave it out")
    return write_card(folder, sweeps=sweeps, measured=measured, **known)


def eval_results(sweeps: Iterable[tuple[str, Sweep]], task: str | None, dataset: Any) -> list[EvalResult]:
    """Every metric of every row, as the Hub's `model-index` has it; shares stay shares of one."""
    name = dataset if isinstance(dataset, str) else ", ".join(dataset or ()) or "not named"
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=name,
            dataset_name=f"{name}, {label}",
            dataset_split=label,
            metric_type=metric,
            metric_name=f"{metric} at {title(row.setting)}",
            metric_value=value,
            metric_args={"setting": row.setting, "samples": row.samples, "subset": row.subset},
        )
        for label, sweep in sweeps
        for row in sweep.rows
        for metric, value in row.metrics.items()
    ]


def not_measured(sweeps: Sequence[Sweep]) -> list[str]:
    """What the card does not know."""
    settings = [Setting.parse(row.setting) for sweep in sweeps for row in sweep.rows]
    missing = ["latency, energy, and memory on any hardware"]
    if not any(setting.activations or setting.trained for setting in settings):
        missing.append("quantized activations")
    if all(setting.ratio == 1 and setting.power_of_two == "no" for setting in settings):
        missing.append("steps other than those of the methods in the table")
    if all(setting.rounding == "half_even" and setting.overflow == "saturate" for setting in settings):
        missing.append("other rounding than to nearest even, and overflow other than saturation")
    missing.append("other data, other seeds of the training, and any setting that is not in a table")
    return ["Not measured:", "", *(f"- {one}" for one in missing)]


def _picture(chart: Bars | Lines | None, path: Path) -> list[str]:
    """A chart as PNG beside the card, and the lines that show it; nothing without matplotlib."""
    if chart is None:
        return []
    try:
        save_png(chart, path)
    except ImportError:
        logger.warning("The card has no plot, for want of matplotlib: pip install 'hf_robustq[report]'")
        return []
    return [f"![{escaped(chart.title)}]({path.name})", ""]
