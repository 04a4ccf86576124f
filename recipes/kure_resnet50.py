"""KURE on an image classifier, with a bit-width sweep at every epoch (arXiv 2002.07686, supplement, Tables 1 and 3).

Without arguments: a timm ResNet-50 on scikit-learn's handwritten digits, without and with KURE.

    accelerate launch recipes/kure_resnet50.py
    accelerate launch recipes/kure_resnet50.py --preset imagenet --dataset_name <hub id or folder>
    accelerate launch recipes/kure_resnet50.py --preset cifar10 --weights <file> --dataset_name <cifar10 folder>

Every TrainingArguments flag works, and wins over the preset's.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from hf_robustq import RobustQConfig, RobustTrainer, Sweep
from hf_robustq.data import digits, image_datasets, load_image_splits
from hf_robustq.metrics import compute_accuracy
from hf_robustq.models import image_classifier, load_weights, preprocessing
from hf_robustq.recipe import fast_bf16, open_output, parse, report


@dataclass
class RecipeArguments:
    preset: str = field(default="digits", metadata={"help": "a file of recipes/configs: kure_<preset>.yaml"})
    model_name_or_path: str = field(default="resnet50", metadata={"help": "folder, Hub id, or timm architecture"})
    weights: str | None = field(default=None, metadata={"help": ".safetensors file for the architecture"})
    new_head: bool = field(default=False, metadata={"help": "replace a head that does not fit the labels"})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id, folder of parquet files or of images"})
    image_column_name: str | None = None
    label_column_name: str | None = None
    eval_split: str | None = None
    image_size: int | None = field(default=None, metadata={"help": "default: what the weights were trained with"})
    variants: list[str] = field(default_factory=lambda: ["with"], metadata={"help": "any of: without with"})
    pretrain_epochs: float = field(default=0.0, metadata={"help": "first train in float, shared by the variants"})
    pretrain_learning_rate: float = 0.1
    kure_strength: float = 1.0
    kure_target: float = 1.8
    lr_step_epochs: int | None = field(default=None, metadata={"help": "divide the learning rate by 10 every n epochs"})
    sweep: list[str] = field(default_factory=lambda: ["fp", "w8", "w6", "w5", "w4", "w3", "w2", "w8a8", "w6a6", "w4a4"])
    overwrite: bool = field(default=False, metadata={"help": "delete what the output folder holds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})
    fast_dtype: bool = field(default=False, metadata={"help": "bf16 where this machine is faster with it"})


def datasets_and_model(recipe, seed):
    """(train, eval, model): the model's own preprocessing, augmented by (seed, epoch, index)."""
    if recipe.dataset_name is None:
        size = recipe.image_size or 32
        train, evaluation, labels = digits(size, seed=seed)
        model, source = image_classifier(recipe.model_name_or_path, labels, recipe.new_head)
    else:
        splits = load_image_splits(
            recipe.dataset_name,
            image=recipe.image_column_name,
            label=recipe.label_column_name,
            eval_split=recipe.eval_split,
        )
        model, source = image_classifier(recipe.model_name_or_path, splits[-1], recipe.new_head)
        how = preprocessing(model)
        if recipe.image_size:
            how["image_size"] = recipe.image_size
        train, evaluation = image_datasets(*splits, **how, seed=seed)
    if recipe.weights:
        load_weights(model, recipe.weights)
        source = recipe.weights
    print(f"Weights: {source}")
    return train, evaluation, model.to(memory_format=torch.channels_last)


def main() -> None:
    recipe, args = parse(RecipeArguments, Path(__file__).parent / "configs", "kure")
    if recipe.fast_dtype and not args.fp16:
        args.bf16 = fast_bf16()
    output = Path(args.output_dir)
    open_output(output, recipe.resume, recipe.overwrite)
    set_seed(args.seed)
    train, evaluation, model = datasets_and_model(recipe, args.seed)

    def fit(name: str, model, regularizers: dict, epochs: float, rate: float, sweep: list[str]) -> RobustTrainer:
        own = copy.deepcopy(args)
        own.output_dir, own.num_train_epochs, own.learning_rate = str(output / name), epochs, rate
        steps = {"name": "step", "every": recipe.lr_step_epochs} if recipe.lr_step_epochs and sweep else None
        trainer = RobustTrainer(
            model=model,
            args=own,
            train_dataset=train,
            eval_dataset=evaluation,
            calibration_dataset=train.evaluation(),
            compute_metrics=compute_accuracy,
            robustq=RobustQConfig.from_dict({"regularizers": regularizers}),
            sweep=sweep,
            lr_schedule=steps,
        )
        trainer.train(resume_from_checkpoint=open_output(own.output_dir, True, False))
        trainer.save_model()
        trainer.create_model_card(dataset=recipe.dataset_name)
        return trainer

    if recipe.pretrain_epochs:
        fit("float", model, {}, recipe.pretrain_epochs, recipe.pretrain_learning_rate, sweep=()).robustq.detach()

    kure = {"kure": {"strength": recipe.kure_strength, "target": recipe.kure_target}}
    results: dict[str, Sweep] = {}
    for variant in recipe.variants:
        regularizers = kure if variant == "with" else {}
        name = f"{variant}_kure"
        trainer = fit(name, copy.deepcopy(model), regularizers, args.num_train_epochs, args.learning_rate, recipe.sweep)
        results[name] = trainer.sweep_callback.sweeps[-1]
        kurtosis = trainer.robustq.metrics()["kurtosis"]
        print(f"{name}: mean kurtosis {kurtosis:.2f}")
    if args.process_index == 0:
        settings = {
            "lambda": recipe.kure_strength,
            "target": recipe.kure_target,
            "pretrain epochs": recipe.pretrain_epochs,
            "epochs": args.num_train_epochs,
            "learning rate": args.learning_rate,
            "batch": args.per_device_train_batch_size,
            "seed": args.seed,
        }
        print(report(results, "accuracy", output, settings))


if __name__ == "__main__":
    main()
