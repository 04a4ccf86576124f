"""`robustq sweep`: saved models under every quantizer they may meet.

    robustq sweep outputs/kure --data <cifar10 folder> --bits 8 6 5 4 3 2 --methods mse aciq lapq --out sweeps/kure
    robustq sweep resnet20_cifar --weights <file> --data <cifar10 folder> --bits 4 3 --steps 0.7:1.3 --out sweeps/steps
    robustq sweep outputs/float outputs/kure --data <cifar10 folder> --settings w4 w4@log2 w4@kmeans --out sweeps/all
    robustq sweep outputs/ctc --data <folder> --metric metrics.py:wer --bits 8 4 --out sweeps/ctc

Each --bits is crossed with each of --methods, --also and --steps; --settings are added as they are. The folder gets
rows.json, rows.csv, rows.parquet (a row for each model and setting, with the seed and the calibration set) and
table.md: models down, settings across, so with models trained for different quantizers the transfer matrix. What is
measured already is not measured again: the same command goes on after an interruption, and several commands may write
one folder at the same time.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_robustq.card import table
from hf_robustq.cli.tasks import Task, add_task, check_calibration, load_task, prepare
from hf_robustq.files import locked, read_json, write_json, write_text, written
from hf_robustq.quantizers import LEARNED
from hf_robustq.scales import CODEBOOK_RULES, SCALE_RULES
from hf_robustq.sweep import MODIFIERS, Setting, measured_sweeps, parse_settings
from hf_robustq.sweep.rows import FACTS, VERSION, check_rows
from hf_robustq.sweep.settings import LAPQ

IDENTITY = (
    *("data", "weights", "first_last", "exclude", "weights_only", "calibration_split", "calibration_samples"),
    *("eval_split", "max_samples", "batch_size", "lapq_iterations", "seed", "image_column_name", "label_column_name"),
    *("text_column_name", "audio_column_name", "image_size", "block_size", "metric"),
)
"""The arguments that rows of one folder have in common."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modifiers = f"Modifiers: x0.9 (any ratio of steps), {', '.join(MODIFIERS)}; README.md says what each does."
    parser.epilog = f"{parser.epilog}\n{modifiers}\n"
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder, Hub id, or timm architecture (with --weights)")
    add("--out", required=True, type=Path, help="folder for the rows")
    add("--bits", nargs="*", default=[], metavar="B", help="4: weights; w4a8: weights and inputs; a8: inputs")
    methods = ", ".join([*SCALE_RULES, LAPQ, LEARNED, *CODEBOOK_RULES])
    add("--methods", nargs="*", default=["mse"], metavar="M", help=f"default: mse; known: {methods}")
    add(
        "--also",
        nargs="*",
        default=[],
        metavar="X",
        help="each with these modifiers too: bc, bn, channel/bc",
    )
    add("--steps", metavar="LOW:HIGH[:N]", help="each also at N step ratios, 9 by default")
    add("--settings", nargs="*", default=[], metavar="S", help="w4@kmeans/channel, trained, w6@learned/x0.9, ...")
    add("--lapq_iterations", type=int, default=2, help="rounds of LAPQ's search over all tensors")
    add("--max_samples", type=int, help="measure on a random subset of that many")
    add_task(parser)


def ratios(text: str) -> list[float]:
    """`0.8:1.2` or `0.8:1.2:5`: that many step ratios, evenly spaced (9 where it does not say)."""
    match = re.fullmatch(r"(\d+\.?\d*):(\d+\.?\d*)(?::(\d+))?", text)
    if match is None or not 0 < float(match[1]) < float(match[2]) or int(match[3] or 9) < 2:
        raise ValueError(f"--steps takes LOW:HIGH or LOW:HIGH:N with N at least 2, such as 0.8:1.2:5, got {text!r}")
    low, high, count = float(match[1]), float(match[2]), int(match[3] or 9)
    return [round(low + (high - low) * i / (count - 1), 6) for i in range(count)]


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """What is to be measured: the float model first, each setting once."""
    if (args.steps or args.also) and not args.bits:
        raise ValueError("--steps and --also go with --bits: write --settings with their modifiers")
    perturbed = [f"/x{ratio:g}" for ratio in ratios(args.steps) if ratio != 1] if args.steps else []
    texts = ["fp"]
    for bits in args.bits:
        bits = f"w{bits}" if bits.isdigit() else bits.lower()
        for method in args.methods:
            for more in ("", *(f"/{modifier}" for modifier in args.also)):
                texts += [f"{bits}@{method}{more}{ratio}" for ratio in ("", *perturbed)]
    found = [Setting.parse(text) for text in (*texts, *args.settings)]
    return list(dict.fromkeys(found))


def groups(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings measured together, the data read once: those of one method; of LAPQ, those of one search."""
    found: dict[Any, list[Setting]] = {}
    for setting in settings:
        key = setting.steps if setting.scale == LAPQ else "own" if setting.own else setting.scale
        found.setdefault(key, []).append(setting)
    return list(found.values())


class Records:
    """The rows of a folder: read where it was begun, written whole after each group.

    Several commands may write one folder: each takes in what the others wrote. Raises `ValueError` for a folder of
    something else.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], settings: Sequence[Setting]) -> None:
        self.folder, self.identity, self.file = folder, identity, folder / "rows.json"
        self.order = [setting.name for setting in settings]
        self.rows: list[dict[str, Any]] = []
        self.models: dict[str, str] = {}
        strange = folder.exists() and any(not one.name.startswith(".rows.") for one in folder.iterdir())
        if strange and not self.file.exists():
            raise ValueError(f"{folder} is not empty and no sweep's: name another --out")
        with locked(folder / "rows"):  # a folder that cannot be written to is said before anything is measured
            self.read()

    def read(self) -> None:
        """Take in the rows that are in the folder now; what both have measured is as it is there."""
        if not self.file.exists():
            return
        known = read_json(self.file)
        try:
            check_rows(known)
        except ValueError as error:
            raise ValueError(f"{self.file} is no sweep's: name another --out ({error})") from None
        differ = [key for key in self.identity if known["sweep"].get(key) != self.identity[key]]
        if differ:
            raise ValueError(f"{self.folder} holds another sweep ({', '.join(differ)} differ): name another --out")
        for model, digest in known["models"].items():
            self.check(model, digest)
        there = {(row["model"], row["setting"]) for row in known["rows"]}
        self.rows = known["rows"] + [row for row in self.rows if (row["model"], row["setting"]) not in there]

    def check(self, model: str, digest: str) -> None:
        """Raise `ValueError` for a model that is not the one its rows are of."""
        if self.models.setdefault(model, digest) != digest:
            raise ValueError(f"{model} is not what it was when its rows in {self.folder} were made: name another --out")

    def missing(self, model: str, settings: Sequence[Setting]) -> list[Setting]:
        """What no command has measured yet."""
        self.read()
        known = {row["setting"] for row in self.rows if row["model"] == model}
        return [setting for setting in settings if setting.name not in known]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += rows
        self.write()

    def write(self) -> None:
        """All files, from the rows here and in the folder."""
        import datasets

        with locked(self.folder / "rows"):
            for left in (*self.folder.glob(".rows.*.tmp"), *self.folder.glob(".table.md.*.tmp")):  # of a killed command
                left.unlink(missing_ok=True)
            self.read()
            columns = list(dict.fromkeys(key for row in self.rows for key in row))
            flat = datasets.Dataset.from_dict({key: [row.get(key) for row in self.rows] for key in columns})
            values = {"version": VERSION, "sweep": self.identity, "models": self.models, "rows": self.rows}
            write_json(values, self.file)
            with written(self.folder / "rows.csv") as draft:
                flat.to_csv(str(draft))
            with written(self.folder / "rows.parquet") as draft:
                flat.to_parquet(str(draft))
            write_text(self.table() + "\n", self.folder / "table.md")

    def table(self) -> str:
        """Models down, settings across, this command's first, of the metric that the first row has first."""
        metric = next((key for key in self.rows[0] if key not in FACTS), "loss")
        order = {name: i for i, name in enumerate([*self.order, *(row["setting"] for row in self.rows)][::-1])}
        rows = sorted(self.rows, key=lambda row: -order[row["setting"]])
        return table(measured_sweeps(rows, self.identity), metric)


def measure(name: str, task: Task, settings: Sequence[Setting], args: argparse.Namespace, records: Records) -> None:
    """Measure what is missing of one model."""
    from hf_robustq.trainer import BitWidthSweepCallback

    plugin, trainer = prepare(task, args, args.out)
    records.check(name, digest(task.model))
    if not any(plugin.config.to_dict()[key] for key in ("weights", "activations")):
        left = [setting.name for setting in settings if setting.own]
        if left:
            print(f"{name}: no quantizers of its own, so no {', '.join(left)}")
        settings = [setting for setting in settings if not setting.own]
    for group in groups(settings):
        group = records.missing(name, group)
        if not group:
            continue
        start = time.perf_counter()
        callback = BitWidthSweepCallback(
            trainer,
            plugin,
            group,
            max_samples=args.max_samples if task.samples is None else None,
            calibration_dataset=task.train,
            lapq_iterations=args.lapq_iterations,
        )
        found = callback.run(trainer.get_eval_dataloader())
        seconds = round((time.perf_counter() - start) / len(group), 2)
        rows, said = [], []
        for row, setting in zip(found.rows, group, strict=True):
            reads = setting.needs_calibration or (setting.activations and not setting.own)
            samples = found.context.get("calibration_samples")
            calibration = f"{args.calibration_split}: {samples} samples, seed {args.seed}" if reads else None
            if taken := sorted(FACTS & row.metrics.keys()):
                raise ValueError(f"rows have a column {taken[0]!r} already: give this metric another name")
            metric, value = next(iter(row.metrics.items()))
            said.append(f"{name}  {row.setting:24s} {metric} {value:.4f}")
            facts = {"model": name, "setting": row.setting, **dataclasses.asdict(setting)}
            facts |= {"weights": row.weights, "activations": row.activations}
            method = facts.pop("scale")
            facts["method"] = method if setting.weights or setting.activations else None
            facts |= {**row.metrics, "samples": row.samples, "subset": row.subset, "staged": row.staged}
            facts["calibration"] = calibration
            facts |= {"samples": task.samples, "subset": task.subset} if task.samples is not None else {}
            rows.append({**facts, "data": args.data, "split": args.eval_split, "seed": args.seed, "seconds": seconds})
        records.add(rows)
        print("\n".join(said), flush=True)


def digest(model: Any) -> str:
    """Alike only for models of the same tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def run(args: argparse.Namespace) -> None:
    settings = parse_settings(settings_of(args))
    check_calibration(args)
    records = Records(args.out, {key: getattr(args, key) for key in IDENTITY}, settings)
    for name in args.models:
        if records.missing(name, settings):
            measure(name, load_task(name, args), settings, args, records)
    records.write()
    print(f"\n{records.table()}\n\n{len(records.rows)} rows in {args.out}/rows.json, rows.csv, rows.parquet")
