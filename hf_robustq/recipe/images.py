"""Image classification: its flags, its data and model, its run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_robustq.recipe.run import Run, RunArguments


@dataclass
class ImageArguments(RunArguments):
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


class ImageRun(Run):
    """Variants of an image classifier."""

    metrics = ("accuracy",)

    def task(self) -> str:
        recipe = self.recipe
        self.train, self.evaluation, self.model, source = image_task(recipe, self.args.seed)
        self.dataset = "handwritten digits of scikit-learn"
        if recipe.dataset_name is not None:
            local = Path(recipe.dataset_name).exists()
            self.dataset = Path(recipe.dataset_name).resolve().name if local else recipe.dataset_name
            self.dataset_tags = () if local else (recipe.dataset_name,)
        return source

    def options(self) -> dict[str, Any]:
        from hf_robustq.metrics import compute_accuracy

        return {
            "train_dataset": self.train,
            "eval_dataset": self.evaluation,
            "calibration_dataset": self.train.evaluation(),
            "compute_metrics": compute_accuracy,
        }


def image_task(arguments: ImageArguments, seed: int, measured: bool = False) -> tuple[Any, Any, Any, str]:
    """(training set, evaluation set, model, source of its weights) as the flags say; without a dataset, the digits.

    The preprocessing is the model's own; augmentation depends on (seed, epoch, index). The model is in
    channels-last layout. Where it is only `measured`, trained weights keep their labels, and the dataset's are matched
    with them.
    """
    from hf_robustq.data import digits, image_datasets, load_image_splits
    from hf_robustq.data.labels import output_names, outputs_of, renumbered
    from hf_robustq.models import image_classifier, load_weights, preprocessing

    if arguments.dataset_name is None:
        ten = [str(n) for n in range(10)]
        model, source = image_classifier(arguments.model_name_or_path, ten, arguments.new_head, keep_labels=measured)
        outputs_of("the digits", ten, output_names(model))
        how = {key: preprocessing(model)[key] for key in ("mean", "std")}
        train, evaluation, _ = digits(arguments.image_size or 32, **how, seed=seed)
    else:
        train, evaluation, image, label, names = load_image_splits(
            arguments.dataset_name,
            image=arguments.image_column_name,
            label=arguments.label_column_name,
            train_split=arguments.train_split,
            eval_split=arguments.eval_split,
        )
        name = arguments.model_name_or_path
        model, source = image_classifier(name, names, arguments.new_head, keep_labels=measured)
        known = output_names(model)
        train, evaluation = renumbered([train, evaluation], label, names, known)
        how = preprocessing(model)
        how["image_size"] = arguments.image_size or how["image_size"]
        how |= {"seed": seed, "flip": arguments.flip}
        train, evaluation = image_datasets(train, evaluation, image, label, known, **how)
    if arguments.weights:
        load_weights(model, arguments.weights)
        source = arguments.weights
    return train, evaluation, model.to(memory_format=torch.channels_last), source
