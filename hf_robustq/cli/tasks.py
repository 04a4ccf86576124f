"""What a saved model does, and the data it is measured on."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from hf_robustq.cli.kinds import KINDS, Kind, Task
from hf_robustq.cli.scores import metric_function
from hf_robustq.config import RobustQConfig
from hf_robustq.data.splits import EVAL_SPLITS
from hf_robustq.files import loading
from hf_robustq.hub import check_folder
from hf_robustq.plugin import RobustQ


def kind_of(name: str) -> Kind:
    """By the class that `config.json` names; timm's wrapper for a name that is neither a folder nor a Hub id.

    Raises `ValueError` for a class of none of `KINDS`.
    """
    from transformers import AutoConfig

    if "/" not in name and not Path(name).exists():
        import timm

        import hf_robustq.models  # noqa: F401 (adds its architectures)

        if not timm.is_model(name):
            raise ValueError(f"{name} is no folder, no Hub id (owner/name) and no architecture of timm")
        return KINDS[0]
    check_folder(Path(name))
    with loading(name):
        config = AutoConfig.from_pretrained(name)
        if config.model_type == "timm_wrapper":
            return KINDS[0]
        if not config.architectures:
            raise ValueError(f"{name}/config.json names no architecture: save the model with save_pretrained")
        found = next((kind for kind in KINDS if kind.has(config)), None)
    if found is None:
        raise ValueError(
            f"{name} is a {config.architectures[0]}: this command knows {', '.join(kind.name for kind in KINDS)}; for "
            "others call hf_robustq.sweep(plugin, batches, predict, metric, settings)"
        )
    return found


def check_calibration(args: argparse.Namespace) -> None:
    """Fill in the evaluation split. Raises `ValueError` for a missing split, and where calibration would flatter."""
    from datasets import get_dataset_split_names

    if args.calibration_samples < args.batch_size:
        raise ValueError(
            f"{args.calibration_samples} calibration samples are fewer than a batch of {args.batch_size}: "
            "raise --calibration_samples or lower --batch_size"
        )
    if args.data is None:
        return
    splits = list(map(str, get_dataset_split_names(args.data)))
    args.eval_split = args.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    for split, flag in ((args.calibration_split, "--calibration_split"), (args.eval_split, "--eval_split")):
        if split not in splits:
            raise ValueError(f"{args.data} has no split {split!r}: choose with {flag} from {', '.join(splits)}")
    if args.calibration_split == args.eval_split and not args.force:
        raise ValueError(
            f"calibrating on {args.eval_split!r}, which is measured on, flatters every figure: choose another "
            "--calibration_split, or --force it"
        )


def load_task(name: str, args: argparse.Namespace) -> Task:
    """Raises `ValueError` for a model of none of `KINDS`, or with a tensor that is not finite."""
    import transformers

    kind = kind_of(name)
    if kind.own_metric and args.metric is None:
        raise ValueError(
            f"{name} is for {kind.name}, which has no metric here: give yours with --metric module:function, a "
            "Trainer's compute_metrics"
        )
    own = metric_function(args.metric) if args.metric else {}
    if args.data is None and kind is not KINDS[0]:
        raise ValueError(f"{name} is for {kind.name}: name a dataset with --data")
    task = kind.load(getattr(transformers, kind.auto), name, args)
    if own:
        task = dataclasses.replace(task, options={**task.options, "preprocess_logits_for_metrics": None, **own})
    for tensor, values in task.model.state_dict().items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise ValueError(f"{name}: non-finite values in {tensor}")
    if len(task.train) < args.batch_size:
        raise ValueError(f"{len(task.train)} samples to calibrate on are fewer than a batch: lower --batch_size")
    return task


def add_task(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what model, and on what data."""
    add = parser.add_argument
    add("--data", help="Hub id or folder of the dataset; default, for images: the embedded digits")
    add("--metric", metavar="WHERE:FUNCTION", help="of a module or a .py file: compute_metrics instead of the task's")
    add("--weights", help=".safetensors file for an architecture")
    add("--first_last", default="float", help="first and last layer of a model without quantizers: float, 8 or same")
    add("--exclude", nargs="+", default=[], help="patterns of weights to leave alone, of such a model")
    add("--weights_only", nargs="+", default=[], help="patterns of weights whose layer's input stays float")
    add("--calibration_split", default="train", help="default: train")
    add("--calibration_samples", type=int, default=512, help="default: 512")
    add("--eval_split", help="default: validation, valid or test")
    add("--force", action="store_true", help="calibrate on the evaluation split all the same")
    add("--batch_size", type=int, default=128, help="default: 128")
    add("--seed", type=int, default=0, help="of the calibration set and of stochastic rounding")
    add("--image_column_name")
    add("--audio_column_name")
    add("--label_column_name", help="of classes, of a word's tags, of answers, or of objects with their boxes")
    add("--text_column_name", nargs="+", default=[], help="two for a pair: SOURCE TARGET, QUESTION CONTEXT")
    add("--image_size", type=int)
    add("--block_size", type=int, default=512, help="tokens of a language model's sample, or of a question's window")


def prepare(task: Task, args: argparse.Namespace, folder: Path) -> tuple[RobustQ, Any]:
    """The plugin of a model, its own or a new one without quantizers, and a Trainer that runs it."""
    from transformers import TrainingArguments

    from hf_robustq.trainer import RobustTrainer

    try:
        plugin = RobustQ.of(task.model)
        plugin.config = dataclasses.replace(plugin.config, seed=args.seed, calibration_samples=args.calibration_samples)
    except ValueError:
        edges = int(args.first_last) if args.first_last.isdigit() else args.first_last
        own = {"first_last": edges, "seed": args.seed, "calibration_samples": args.calibration_samples}
        own |= {"exclude": args.exclude, "weights_only": args.weights_only}
        plugin = RobustQ(task.model, RobustQConfig.from_dict(own))
    training = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=args.batch_size,
        report_to=[],
        seed=args.seed,
        dataloader_pin_memory=False,
        disable_tqdm=not sys.stderr.isatty(),
        **task.training,
    )
    trainer = RobustTrainer(
        model=task.model,
        args=training,
        eval_dataset=task.evaluation,
        train_dataset=task.train,
        robustq=plugin,
        sweep=(),
        **task.options,
    )
    return plugin, trainer
