"""KURE on an image classifier, with a bit-width sweep at every epoch (arXiv 2002.07686, supplement, Tables 1 and 3).

Without arguments: a timm ResNet-50 on scikit-learn's handwritten digits, without and with KURE.

    accelerate launch recipes/kure_resnet50.py
    accelerate launch recipes/kure_resnet50.py --model_name_or_path <name> --dataset_name <hub id or folder>
    accelerate launch recipes/kure_resnet50.py --preset imagenet --dataset_name <hub id or folder>

Every TrainingArguments flag works, and wins over the preset's.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from hf_robustq import RobustQConfig, RobustTrainer, Sweep
from hf_robustq.config import check_known
from hf_robustq.metrics import compute_accuracy
from hf_robustq.recipe import ImageArguments, fast_bf16, image_task, last_checkpoint, open_output, parse, report


@dataclass
class RecipeArguments(ImageArguments):
    preset: str = field(default="digits", metadata={"help": "a file of recipes/configs: kure_<preset>.yaml"})
    variants: list[str] = field(default_factory=lambda: ["with"], metadata={"help": "any of: without with"})
    pretrain_epochs: float = field(default=0.0, metadata={"help": "first train in float, shared by the variants"})
    pretrain_learning_rate: float = 0.1
    kure_strength: float = 1.0
    kure_target: float = 1.8
    lr_step_epochs: int | None = field(default=None, metadata={"help": "divide the learning rate by 10 every n epochs"})
    sweep: list[str] = field(default_factory=lambda: ["fp", "w8", "w6", "w5", "w4", "w3", "w2", "w8a8", "w6a6", "w4a4"])
    fast_dtype: bool = field(default=False, metadata={"help": "bf16 where this machine is faster with it"})
    overwrite: bool = field(default=False, metadata={"help": "delete what the output folder holds"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})


def main() -> None:
    recipe, args = parse(RecipeArguments, Path(__file__).parent / "configs", "kure")
    check_known(recipe.variants, ["without", "with"], "variant")
    if recipe.fast_dtype and not args.fp16:
        args.bf16 = fast_bf16()
    output = Path(args.output_dir)
    with args.main_process_first(local=False):
        if args.process_index == 0:
            open_output(output, recipe.resume, recipe.overwrite)
    set_seed(args.seed)
    train, evaluation, model, source = image_task(recipe, args.seed)
    if args.process_index == 0:
        print(f"Preset: {recipe.preset}. Weights: {source}")

    def fit(name: str, model, regularizers: dict, **options) -> RobustTrainer:
        own = copy.deepcopy(args)
        own.output_dir = str(output / name)
        for key in options.keys() & {"num_train_epochs", "learning_rate"}:
            setattr(own, key, options.pop(key))
        trainer = RobustTrainer(
            model=model,
            args=own,
            train_dataset=train,
            eval_dataset=evaluation,
            calibration_dataset=train.evaluation(),
            compute_metrics=compute_accuracy,
            robustq=RobustQConfig.from_dict({"regularizers": regularizers}),
            **options,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(own.output_dir) if recipe.resume else None)
        trainer.save_model()
        if options.get("sweep") and not trainer.sweep_callback.sweeps:
            trainer.evaluate()
        local = recipe.dataset_name is None or Path(recipe.dataset_name).exists()
        trainer.create_model_card(dataset=None if local else recipe.dataset_name)
        return trainer

    if recipe.pretrain_epochs:
        stage = {"num_train_epochs": recipe.pretrain_epochs, "learning_rate": recipe.pretrain_learning_rate}
        fit("float", model, {}, sweep=(), **stage).robustq.detach()

    kure = {"kure": {"strength": recipe.kure_strength, "target": recipe.kure_target}}
    steps = {"name": "step", "every": recipe.lr_step_epochs} if recipe.lr_step_epochs else None
    results: dict[str, Sweep] = {}
    kurtosis = {}
    for variant in recipe.variants:
        regularizers = kure if variant == "with" else {}
        trainer = fit(f"{variant}_kure", copy.deepcopy(model), regularizers, sweep=recipe.sweep, lr_schedule=steps)
        results[f"{variant}_kure"] = trainer.sweep_callback.sweeps[-1]
        kurtosis[variant] = round(trainer.robustq.metrics()["kurtosis"], 2)
    if args.process_index == 0:
        settings = {"lambda": recipe.kure_strength, "target": recipe.kure_target, "mean kurtosis": kurtosis}
        settings |= {"pretrain epochs": recipe.pretrain_epochs, "epochs": args.num_train_epochs}
        settings |= {"learning rate": args.learning_rate, "batch": args.per_device_train_batch_size, "seed": args.seed}
        print(report(results, "accuracy", output, settings))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
