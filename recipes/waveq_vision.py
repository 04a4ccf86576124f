"""WaveQ on an image classifier (arXiv 2003.00146): weights drawn to the levels of their quantizer, bits learned.

Without arguments: a timm ResNet-18 on scikit-learn's handwritten digits, its bits learned under a budget of 4.

    accelerate launch recipes/waveq_vision.py
    accelerate launch recipes/waveq_vision.py --budget_bits 0 --budget_megabytes 4
    accelerate launch recipes/waveq_vision.py --learn false --weight_bits 3 --variants without with
    accelerate launch recipes/waveq_vision.py --preset resnet20_cifar10 --dataset_name <cifar10 folder>

"without" is training with the same quantizer and bits, and no regularizer. `--phases` shares the epochs out: the task
alone; with the sine, bits learned; bits fixed, weights snapping to their levels.
Every TrainingArguments flag works, and wins over the preset's.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robustq import Sweep
from hf_robustq.config import check_known
from hf_robustq.recipe import ImageArguments, ImageRun, parse

MEASURES = ("bits", "megabytes", "bit_operations")


@dataclass
class RecipeArguments(ImageArguments):
    variants: list[str] = field(default_factory=lambda: ["with"], metadata={"help": "any of: without with"})
    method: str = field(default="absmax", metadata={"help": "quantizer of the weights: absmax or dorefa"})
    rescale: bool = field(default=False, metadata={"help": "dorefa: times max|w|, for networks without norms"})
    weight_bits: int = field(default=4, metadata={"help": "of weights whose bits are not learned"})
    activation_bits: int = field(default=0, metadata={"help": "0: inputs stay float; else LSQ, or with dorefa its own"})
    first_last: str = field(default="8", metadata={"help": "first and last layer: same, 8 or float"})
    learn: bool = field(default=True, metadata={"help": "learn the bits of each weight, from 8 (and a sign) down"})
    budget_bits: float = field(default=0.0, metadata={"help": "of learned bits, in the mean; 0: no budget"})
    budget_megabytes: float = 0.0
    budget_bit_operations: float = 0.0
    strength: float = field(default=20.0, metadata={"help": "lambda_w times the number of weights"})
    snap: float = field(default=1.0, metadata={"help": "times that in the third phase"})
    beta_strength: float = field(default=0.05, metadata={"help": "lambda_beta, where there is no budget"})
    phases: list[float] = field(default_factory=lambda: [4.0, 5.0, 3.0], metadata={"help": "ratio of their epochs"})
    smoothness: float = field(default=0.01, metadata={"help": "of their edges, a share of the training"})
    bits_lr: float = field(default=0.05, metadata={"help": "learning rate of the bits"})


def stages(recipe: RecipeArguments, variant: str) -> dict[str, Any]:
    """The plugin's config of one variant."""
    learn = recipe.learn and variant == "with"
    first_last = int(recipe.first_last) if recipe.first_last.isdigit() else recipe.first_last
    bits = (9 if recipe.method == "absmax" else 8) if learn else recipe.weight_bits
    options = {"rescale": True} if recipe.rescale else {}
    config: dict[str, Any] = {"first_last": first_last, "weights": {"method": recipe.method, "bits": bits, **options}}
    if recipe.activation_bits:
        method = "dorefa" if recipe.method == "dorefa" else "lsq"
        config["activations"] = {"method": method, "bits": recipe.activation_bits}
    if variant == "with":
        first, second, third = recipe.phases
        total = first + second + third
        phases = {"rise": first / total, "fall": (first + second) / total, "smoothness": recipe.smoothness}
        options = {"strength": recipe.strength, "beta_strength": recipe.beta_strength, "learn": recipe.learn}
        options["snap"] = recipe.snap
        config["regularizers"] = {"waveq": {**options, **phases}}
        budget = {name: limit for name in MEASURES if (limit := getattr(recipe, f"budget_{name}"))}
        if learn and budget:
            config["budget"] = budget
    return config


def main() -> None:
    recipe, args = parse(RecipeArguments, Path(__file__).parent / "configs", "waveq")
    check_known(recipe.variants, ["without", "with"], "variant")
    if len(recipe.phases) != 3 or min(recipe.phases) < 0 or not sum(recipe.phases):
        raise ValueError(f"--phases takes three numbers, such as 4 5 3, got {recipe.phases}")
    run = ImageRun(recipe, args)
    results: dict[str, Sweep] = {}
    for variant in recipe.variants:
        trainer = run.fit(variant, stages(recipe, variant), bits_lr=recipe.bits_lr)
        results[variant] = trainer.sweep_callback.sweeps[-1]
        if args.process_index == 0:
            print(f"\n{variant}:\n{trainer.robustq.size()}")
    bits = {f"budget of {name}": limit for name in MEASURES if (limit := getattr(recipe, f"budget_{name}"))}
    facts = {"weights": recipe.method, **(bits if recipe.learn else {"bits": recipe.weight_bits})}
    run.report(results, {**facts, "lambda": recipe.strength, "phases": recipe.phases})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
