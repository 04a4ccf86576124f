"""What every recipe does: variants of one model trained, each into its folder, and one report of them all."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainingArguments, set_seed

from hf_robustq.card import table
from hf_robustq.config import RobustQConfig
from hf_robustq.files import disk, write_text
from hf_robustq.plugin import RobustQ
from hf_robustq.plugin.mark import PLUGIN
from hf_robustq.recipe.flags import last_checkpoint, open_output
from hf_robustq.report import check_resumable, read, save_png, write_report
from hf_robustq.report.charts import by_bits
from hf_robustq.sweep import DEFAULT_SETTINGS, Sweep


@dataclass
class RunArguments:
    """Flags of every recipe."""

    pretrain_epochs: float = field(default=0.0, metadata={"help": "first train in float, shared by the variants"})
    pretrain_learning_rate: float = 0.1
    warmup_epochs: float = field(default=0.0, metadata={"help": "the learning rate rises from 0 for so many epochs"})
    lr_step_epochs: int | None = field(default=None, metadata={"help": "divide the learning rate by 10 every n epochs"})
    sweep: list[str] = field(default_factory=lambda: [setting.name for setting in DEFAULT_SETTINGS])
    fast_dtype: bool = field(default=False, metadata={"help": "bf16 where this machine is faster with it"})
    overwrite: bool = field(default=False, metadata={"help": "delete what the output folder holds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})


class Run:
    """What the variants of a recipe share: the data, the model they start from, the output folder.

    Opens the output folder, and trains in float first where `pretrain_epochs` says so. A subclass brings the task:
    `task` sets `model` and returns where its weights come from; `options` is what `RobustTrainer` needs for it.
    """

    metrics: tuple[str, ...]
    """What the report has a table of; the first is plotted."""
    model: Any
    float_sweep: tuple[str, ...] = ()
    """What is measured of the model trained in float first."""
    dataset: str | None = None
    """For the card: what it is trained on, in words."""
    dataset_tags: tuple[str, ...] = ()
    """The same as Hub ids, where it is there."""

    def __init__(self, recipe: Any, args: TrainingArguments) -> None:
        self.recipe, self.args = recipe, args
        if recipe.fast_dtype and not args.fp16:
            args.bf16 = fast_bf16()
        with args.main_process_first(local=False):
            if args.process_index == 0:
                open_output(str(args.output_dir), recipe.resume, recipe.overwrite)
        set_seed(args.seed)
        source = self.task()
        if PLUGIN in vars(self.model):  # a folder of ours: its weights in float, to be staged as this run says
            RobustQ.of(self.model).detach()
        if args.process_index == 0:
            print(f"Preset: {recipe.preset}. Weights: {source}{threads_unused(args)}")
        self.pretrained = self._pretrain() if recipe.pretrain_epochs else None

    def task(self) -> str:
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        raise NotImplementedError

    def finish(self, trainer: Any) -> None:
        """What is measured of a trained model: here the evaluation set, where no epoch has."""
        if trainer.sweep_callback is not None and not trainer.sweep_callback.sweeps:
            trainer.evaluate()

    def fit(self, name: str, config: Mapping[str, Any], model: Any = None, train: bool = True, **options: Any) -> Any:
        """Train a copy of the model as `config` says into `<output>/<name>`; returns the trainer, saved and swept.

        `options` go to `RobustTrainer`. Without `train`, a copy of `model` is quantized as it is.
        """
        every = self.recipe.lr_step_epochs
        if every:
            options = {"lr_schedule": {"name": "step", "every": every}, **options}
        options = {"sweep": self.recipe.sweep, **options}
        return self._fit(name, copy.deepcopy(model or self.model), config, {}, train, **options)

    def _pretrain(self) -> Any:
        recipe = self.recipe
        stage = {"num_train_epochs": recipe.pretrain_epochs, "learning_rate": recipe.pretrain_learning_rate}
        stage["push_to_hub"] = False
        trainer = self._fit("float", self.model, {}, stage, sweep=self.float_sweep)
        trainer.robustq.detach()
        return trainer

    def _fit(
        self,
        name: str,
        model: Any,
        config: Mapping[str, Any],
        changes: Mapping[str, Any],
        train: bool = True,
        **options: Any,
    ) -> Any:
        from hf_robustq.trainer import RobustTrainer
        from hf_robustq.trainer.progress import show_progress

        args = copy.deepcopy(self.args)
        if args.push_to_hub:  # each into a repo of its own
            args.hub_model_id = f"{args.hub_model_id or Path(str(args.output_dir)).resolve().name}-{name}"
        args.output_dir = str(Path(str(args.output_dir)) / name)
        for key, value in changes.items():
            setattr(args, key, value)
        if self.recipe.warmup_epochs and not args.warmup_steps:
            args.warmup_steps = min(self.recipe.warmup_epochs / args.num_train_epochs, 0.999)  # a share of all steps
        trainer = RobustTrainer(
            model=model,
            args=args,
            robustq=RobustQConfig.from_dict({"seed": args.seed, **config}),
            **{**self.options(), **options},
        )
        show_progress(trainer, name, self.metrics)
        with disk(args.output_dir):
            if train:
                self._train(trainer, args)
            self.finish(trainer)
            if not train:
                trainer.save_model(_internal_call=True)
            trainer.save_state()
            about = {"dataset": self.dataset, "dataset_tags": self.dataset_tags}
            if args.push_to_hub:
                trainer.push_to_hub(**about)  # with the card
            else:
                trainer.create_model_card(**about)
        return trainer

    def _train(self, trainer: Any, args: TrainingArguments) -> None:
        """From the last checkpoint where the run goes on; saved, and not pushed yet: later it is, with the card."""
        checkpoint = last_checkpoint(str(args.output_dir)) if self.recipe.resume else None
        if self.recipe.resume:
            check_resumable(Path(str(args.output_dir)), Path(checkpoint) if checkpoint else None)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(_internal_call=True)

    def report(self, results: Mapping[str, Sweep], facts: Mapping[str, Any]) -> None:
        """Print, on the main process, the table of all variants with what it was made with."""
        if self.args.process_index == 0:
            args = self.args
            facts = {**facts, "pretrain epochs": self.recipe.pretrain_epochs, "epochs": args.num_train_epochs}
            facts |= {"learning rate": args.learning_rate, "batch": args.per_device_train_batch_size, "seed": args.seed}
            print(report(results, self.metrics, str(args.output_dir), facts))


def threads_unused(args: TrainingArguments) -> str:
    """What to say of cores that a single process on a CPU leaves idle: `accelerate launch` gives it one thread."""
    cores, threads = psutil.cpu_count(logical=False) or 1, torch.get_num_threads()
    if args.device.type != "cpu" or args.world_size > 1 or threads >= cores:
        return ""
    return f"\nRuns on {threads} of {cores} cores: accelerate launch --num_cpu_threads_per_process {cores} uses all"


def fast_bf16() -> bool:
    """Whether bfloat16 is faster than float32 here: a GPU that has it, or a CPU with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def report(
    results: Mapping[str, Sweep], metrics: Sequence[str], folder: str | Path, settings: Mapping[str, Any]
) -> str:
    """A table for each metric, one PNG and one page of all variants; returns the text to print.

    Its last line says where everything is. The page is `robustq report`'s, without its pictures.
    """
    folder = Path(folder)
    chart = by_bits(results, metrics[0])
    try:
        curves = f"{folder}/robustness.png" if chart else "no curves of one setting"
        if chart:
            save_png(chart, folder / "robustness.png")
    except ImportError:
        curves = "no plot without matplotlib (pip install 'hf_robustq[report]')"
    try:
        (page,) = write_report(read([folder]), folder / "report", pictures=False)
    except ImportError:
        page = "none without Plotly (pip install 'hf_robustq[report]')"
    tables = [table(results, metric, aligned=True) for metric in metrics]
    if len(metrics) > 1:
        tables = [f"{metric.upper()}:\n\n{text}" for metric, text in zip(metrics, tables, strict=True)]
    text = "\n\n".join(tables)
    facts = ", ".join(f"{key} {value}" for key, value in settings.items())
    write_text(f"{text}\n\n{facts}\n", folder / "results.md")
    places = ", ".join(str(folder / name) for name in results)
    where = f"Table and curves: {folder}/results.md, {curves}; models: {places}; report: {page}"
    return f"\n{text}\n\nSettings: {facts}\n{where}"
