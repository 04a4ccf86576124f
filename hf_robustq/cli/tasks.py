"""What a saved model does, and the data it is measured on."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_robustq.config import RobustQConfig
from hf_robustq.data.splits import EVAL_SPLITS
from hf_robustq.hub import check_folder
from hf_robustq.metrics import accuracy
from hf_robustq.plugin import RobustQ
from hf_robustq.recipe import ImageArguments, image_task

TIMM = "TimmWrapperForImageClassification"


@dataclass(frozen=True)
class Task:
    """A model with its training set (for calibration) and evaluation set, as a Trainer takes them."""

    model: Any
    train: Any
    evaluation: Any
    metric: str
    options: dict[str, Any]


def classes(logits: Any, labels: Any) -> torch.Tensor:  # noqa: ARG001
    """What `compute_metrics` needs of logits: the sweep keeps the predictions of every setting until the end."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def class_accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": accuracy(predicted.predictions, predicted.label_ids)}


def architecture(name: str) -> str:
    """The class that `config.json` names; timm's wrapper for a name that is neither a folder nor a Hub id."""
    from transformers import AutoConfig

    if "/" not in name and not Path(name).exists():
        import timm

        import hf_robustq.models  # noqa: F401 (adds its architectures)

        if not timm.is_model(name):
            raise ValueError(f"{name} is no folder, no Hub id (owner/name) and no architecture of timm")
        return TIMM
    check_folder(Path(name))
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "timm_wrapper":
        return TIMM
    if not config.architectures:
        raise ValueError(f"{name}/config.json names no architecture: save the model with save_pretrained")
    return config.architectures[0]


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
    """Raises `ValueError` for a model whose task is none of those known, or with a tensor that is not finite."""
    task = _load(name, args)
    for tensor, values in task.model.state_dict().items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise ValueError(f"{name}: non-finite values in {tensor}")
    if len(task.train) < args.batch_size:
        raise ValueError(f"{len(task.train)} samples to calibrate on are fewer than a batch: lower --batch_size")
    return task


def _load(name: str, args: argparse.Namespace) -> Task:
    kind = architecture(name)
    if kind.endswith("ForImageClassification"):
        flags = ImageArguments(
            model_name_or_path=name,
            weights=args.weights,
            dataset_name=args.data,
            image_column_name=args.image_column_name,
            label_column_name=args.label_column_name,
            train_split=args.calibration_split,
            eval_split=args.eval_split,
            image_size=args.image_size,
        )
        train, evaluation, model, _ = image_task(flags, args.seed)
        return Task(model, train, evaluation, "accuracy", _classification())
    if kind.endswith("ForSequenceClassification"):
        return _texts(name, args)
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return _language(name, args)
    raise ValueError(
        f"{name} is a {kind}: this command knows image classification, sequence classification and causal language "
        "models; for others call hf_robustq.sweep(plugin, batches, predict, metric, settings)"
    )


def _classification() -> dict[str, Any]:
    return {"compute_metrics": class_accuracy, "preprocess_logits_for_metrics": classes}


def _texts(name: str, args: argparse.Namespace) -> Task:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from hf_robustq.data.texts import classified_texts

    tokenizer = AutoTokenizer.from_pretrained(name)
    splits = {"train_split": args.calibration_split, "eval_split": args.eval_split}
    columns = {"text": args.text_column_name, "label": args.label_column_name}
    train, evaluation, labels = classified_texts(_named(args), tokenizer, **columns, **splits)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    if model.config.num_labels != len(labels):
        raise ValueError(f"{name} has {model.config.num_labels} outputs but the dataset has {len(labels)} labels")
    options = {**_classification(), "data_collator": DataCollatorWithPadding(tokenizer)}
    return Task(model, train, evaluation, "accuracy", options)


def _language(name: str, args: argparse.Namespace) -> Task:
    from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

    from hf_robustq.data.texts import running_text

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    length = min(args.block_size, getattr(model.config, "max_position_embeddings", args.block_size))
    splits = {"train_split": args.calibration_split, "eval_split": args.eval_split}
    train, evaluation = running_text(_named(args), tokenizer, text=args.text_column_name, length=length, **splits)
    return Task(model, train, evaluation, "loss", {"data_collator": default_data_collator})


def _named(args: argparse.Namespace) -> str:
    if args.data is None:
        raise ValueError("name a dataset of texts with --data")
    return args.data


def add_task(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what model, and on what data."""
    add = parser.add_argument
    add("--data", help="Hub id or folder of the dataset; default, for images: the embedded digits")
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
    add("--label_column_name")
    add("--text_column_name", nargs="+", default=[])
    add("--image_size", type=int)
    add("--block_size", type=int, default=512, help="tokens of a language model's sample")


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
