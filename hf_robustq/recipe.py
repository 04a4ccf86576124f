"""What every recipe begins and ends with: presets under the flags, an output folder nobody loses, a last line."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_robustq.card import plot, table
from hf_robustq.config import RobustQConfig, check_known
from hf_robustq.plugin import RobustQ
from hf_robustq.plugin.mark import PLUGIN
from hf_robustq.sweep import DEFAULT_SETTINGS, Sweep


def parse(arguments: type[Any], configs: Path, prefix: str, argv: Sequence[str] | None = None) -> tuple[Any, Any]:
    """(recipe arguments, TrainingArguments): the flags, over the preset's YAML, over the defaults.

    `--preset NAME` reads `<configs>/<prefix>_NAME.yaml`, whose keys are the flags' names; by default `digits`,
    and `finetune` where a dataset is named. An unknown preset or key is a `ValueError` that names the nearest one.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and importlib.util.find_spec("deepspeed") is None:
        raise ImportError("ZeRO needs DeepSpeed: pip install 'hf_robustq[deepspeed]'")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser([arguments, TrainingArguments], allow_abbrev=False)  # type: ignore[arg-type]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset_name")
    first.add_argument("--preset")
    given, _ = first.parse_known_args(argv)
    preset = given.preset or ("finetune" if given.dataset_name else "digits")
    known = [path.stem.removeprefix(f"{prefix}_") for path in sorted(configs.glob(f"{prefix}_*.yaml"))]
    check_known([preset], known, "preset")
    defaults = yaml.safe_load((configs / f"{prefix}_{preset}.yaml").read_text(encoding="utf-8")) or {}
    fields = [f.name for kind in (arguments, TrainingArguments) for f in dataclasses.fields(kind) if f.init]
    check_known(defaults, fields, f"key in {prefix}_{preset}.yaml")
    gpu = torch.accelerator.is_available()
    parser.set_defaults(**{"preset": preset, "use_cpu": not gpu, "dataloader_pin_memory": gpu, **defaults})
    return parser.parse_args_into_dataclasses(argv)  # type: ignore[return-value]


class ImageRun:
    """What the variants of a recipe share: the data, the model they start from, the output folder.

    Opens the output folder, and trains in float first where `pretrain_epochs` says so.
    """

    def __init__(self, recipe: ImageArguments, args: TrainingArguments) -> None:
        self.recipe, self.args = recipe, args
        if recipe.fast_dtype and not args.fp16:
            args.bf16 = fast_bf16()
        with args.main_process_first(local=False):
            if args.process_index == 0:
                open_output(str(args.output_dir), recipe.resume, recipe.overwrite)
        set_seed(args.seed)
        self.train, self.evaluation, self.model, source = image_task(recipe, args.seed)
        if PLUGIN in vars(self.model):  # a folder of ours: its weights in float, to be staged as this run says
            RobustQ.of(self.model).detach()
        if args.process_index == 0:
            print(f"Preset: {recipe.preset}. Weights: {source}")
        if recipe.pretrain_epochs:
            stage = {"num_train_epochs": recipe.pretrain_epochs, "learning_rate": recipe.pretrain_learning_rate}
            self._fit("float", self.model, {}, stage, sweep=()).robustq.detach()

    def fit(self, name: str, config: Mapping[str, Any], **options: Any) -> Any:
        """Train a copy of the model as `config` says into `<output>/<name>`; returns the trainer, saved and swept.

        `options` go to `RobustTrainer`.
        """
        every = self.recipe.lr_step_epochs
        if every:
            options = {"lr_schedule": {"name": "step", "every": every}, **options}
        return self._fit(name, copy.deepcopy(self.model), config, {}, sweep=self.recipe.sweep, **options)

    def _fit(self, name: str, model: Any, config: Mapping[str, Any], changes: Mapping[str, Any], **options: Any) -> Any:
        from hf_robustq.metrics import compute_accuracy
        from hf_robustq.trainer import RobustTrainer

        args = copy.deepcopy(self.args)
        args.output_dir = str(Path(str(args.output_dir)) / name)
        for key, value in changes.items():
            setattr(args, key, value)
        if self.recipe.warmup_epochs and not args.warmup_steps:
            args.warmup_steps = min(self.recipe.warmup_epochs / args.num_train_epochs, 0.999)  # a share of all steps
        trainer = RobustTrainer(
            model=model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.evaluation,
            calibration_dataset=self.train.evaluation(),
            compute_metrics=compute_accuracy,
            robustq=RobustQConfig.from_dict({"seed": args.seed, **config}),
            **options,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir) if self.recipe.resume else None)
        trainer.save_model()
        if trainer.sweep_callback is not None and not trainer.sweep_callback.sweeps:
            trainer.evaluate()
        dataset = self.recipe.dataset_name
        trainer.create_model_card(dataset=None if dataset is None or Path(dataset).exists() else dataset)
        return trainer

    def report(self, results: Mapping[str, Sweep], facts: Mapping[str, Any]) -> None:
        """Print, on the main process, the table of all variants with what it was made with."""
        if self.args.process_index == 0:
            args = self.args
            facts = {**facts, "pretrain epochs": self.recipe.pretrain_epochs, "epochs": args.num_train_epochs}
            facts |= {"learning rate": args.learning_rate, "batch": args.per_device_train_batch_size, "seed": args.seed}
            print(report(results, "accuracy", str(args.output_dir), facts))


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in an output folder, or None."""
    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None


def open_output(folder: str | Path, resume: bool, overwrite: bool) -> None:
    """Make ready an output folder; on one process, before any other goes on.

    A folder that holds something is a `ValueError` without an explicit choice to overwrite or resume.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not resume:
        if not overwrite:
            choices = "--overwrite to delete it, --resume to go on, or name another --output_dir"
            raise ValueError(f"{folder} is not empty: add {choices}")
        shutil.rmtree(folder)


@dataclass
class ImageArguments:
    """Flags of every recipe that trains an image classifier."""

    preset: str = field(default="digits", metadata={"help": "of recipes/configs: <recipe>_<preset>.yaml"})
    model_name_or_path: str = field(default="resnet50", metadata={"help": "folder, Hub id, or timm architecture"})
    weights: str | None = field(default=None, metadata={"help": ".safetensors file for the architecture"})
    new_head: bool = field(default=False, metadata={"help": "replace a head that does not fit the labels"})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, folder of parquet files or of images"})
    image_column_name: str | None = None
    label_column_name: str | None = None
    train_split: str = "train"
    eval_split: str | None = field(default=None, metadata={"help": "default: validation, valid or test"})
    image_size: int | None = field(default=None, metadata={"help": "default: what the weights were trained with"})
    flip: bool = field(default=True, metadata={"help": "mirror training images of up to 64 pixels; not for digits"})
    pretrain_epochs: float = field(default=0.0, metadata={"help": "first train in float, shared by the variants"})
    pretrain_learning_rate: float = 0.1
    warmup_epochs: float = field(default=0.0, metadata={"help": "the learning rate rises from 0 for so many epochs"})
    lr_step_epochs: int | None = field(default=None, metadata={"help": "divide the learning rate by 10 every n epochs"})
    sweep: list[str] = field(default_factory=lambda: [setting.name for setting in DEFAULT_SETTINGS])
    fast_dtype: bool = field(default=False, metadata={"help": "bf16 where this machine is faster with it"})
    overwrite: bool = field(default=False, metadata={"help": "delete what the output folder holds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})


def image_task(arguments: ImageArguments, seed: int) -> tuple[Any, Any, Any, str]:
    """(training set, evaluation set, model, source of its weights) as the flags say; without a dataset, the digits.

    The preprocessing is the model's own; augmentation depends on (seed, epoch, index). The model is in
    channels-last layout.
    """
    from hf_robustq.data import digits, image_datasets, load_image_splits
    from hf_robustq.models import image_classifier, load_weights, preprocessing

    if arguments.dataset_name is None:
        model, source = image_classifier(arguments.model_name_or_path, [str(n) for n in range(10)], arguments.new_head)
        how = {key: preprocessing(model)[key] for key in ("mean", "std")}
        train, evaluation, _ = digits(arguments.image_size or 32, **how, seed=seed)
    else:
        splits = load_image_splits(
            arguments.dataset_name,
            image=arguments.image_column_name,
            label=arguments.label_column_name,
            train_split=arguments.train_split,
            eval_split=arguments.eval_split,
        )
        model, source = image_classifier(arguments.model_name_or_path, splits[-1], arguments.new_head)
        how = preprocessing(model)
        how["image_size"] = arguments.image_size or how["image_size"]
        train, evaluation = image_datasets(*splits, **how, seed=seed, flip=arguments.flip)
    if arguments.weights:
        load_weights(model, arguments.weights)
        source = arguments.weights
    return train, evaluation, model.to(memory_format=torch.channels_last), source


def fast_bf16() -> bool:
    """Whether bfloat16 is faster than float32 here: a GPU that has it, or a CPU with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def report(results: Mapping[str, Sweep], metric: str, folder: str | Path, settings: Mapping[str, Any]) -> str:
    """One table and one PNG of all variants; returns the text to print, whose last line says where everything is."""
    folder = Path(folder)
    try:
        plot(results, metric, folder / "robustness.png")
        curves = f"{folder}/robustness.png"
    except ImportError:
        curves = "no plot without matplotlib (pip install 'hf_robustq[report]')"
    text = table(results, metric)
    facts = ", ".join(f"{key} {value}" for key, value in settings.items())
    (folder / "results.md").write_text(f"{text}\n\n{facts}\n", encoding="utf-8")
    places = ", ".join(str(folder / name) for name in results)
    where = f"Table and curves: {folder}/results.md, {curves}; models: {places}"
    return f"\n{text}\n\nSettings: {facts}\n{where}"
