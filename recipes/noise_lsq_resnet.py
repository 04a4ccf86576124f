"""Noise-tempered LSQ on an image classifier (arXiv 2212.05603), against LSQ (arXiv 1902.08153), which is c = 0.

Without arguments: a timm ResNet-18 on scikit-learn's handwritten digits, at 2 bits, without and with noise.

    accelerate launch recipes/noise_lsq_resnet.py
    accelerate launch recipes/noise_lsq_resnet.py --model_name_or_path resnet34 --weight_bits 4 --activation_bits 4
    accelerate launch recipes/noise_lsq_resnet.py --preset imagenet --dataset_name <hub id or folder>

timm's ResNet-18, 34, 50, 152 and WideResNet-50 are resnet18, resnet34, resnet50, resnet152 and wide_resnet50_2.
Every TrainingArguments flag works, and wins over the preset's.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robustq import Sweep
from hf_robustq.config import check_known
from hf_robustq.recipe import ImageArguments, ImageRun, parse


@dataclass
class RecipeArguments(ImageArguments):
    variants: list[str] = field(default_factory=lambda: ["noise"], metadata={"help": "any of: lsq noise"})
    weight_bits: int = 2
    activation_bits: int = field(default=0, metadata={"help": "0: inputs stay float, as in the paper"})
    per_channel: bool = field(default=False, metadata={"help": "a step per output channel of the weights"})
    first_last: str = field(default="same", metadata={"help": "first and last layer: same, 8 or float"})
    c: float = field(default=0.2, metadata={"help": "strength of the noise"})
    k: float = field(default=50.0, metadata={"help": "its decay with the quantization error"})
    k_relative: bool = field(default=False, metadata={"help": "k counts in steps"})
    c_schedule: str = field(default="constant", metadata={"help": "of c: constant, linear_decay, cosine_decay, ..."})
    noise_lr_scale: bool = field(default=False, metadata={"help": "c follows the learning rate"})
    noise_activations: bool = field(default=False, metadata={"help": "noise on the inputs too"})
    scale_lr: float | None = field(default=None, metadata={"help": "learning rate of the steps; default: the weights'"})
    cosine_step_epochs: int | None = field(
        default=None, metadata={"help": "cosine to 0, and also divide the learning rate by 10 every n epochs"}
    )


def quantizers(recipe: RecipeArguments, variant: str) -> dict[str, Any]:
    """The plugin's config of one variant."""
    noise = {"method": "noise", "c": recipe.c, "k": recipe.k, "k_relative": recipe.k_relative}
    noise |= {"schedule": recipe.c_schedule, "noise_lr_scale": recipe.noise_lr_scale}
    lsq = {"method": "lsq"}
    weights = {**(noise if variant == "noise" else lsq), "bits": recipe.weight_bits, "per_channel": recipe.per_channel}
    first_last = int(recipe.first_last) if recipe.first_last.isdigit() else recipe.first_last
    config = {"weights": weights, "first_last": first_last}
    if recipe.activation_bits:
        method = noise if variant == "noise" and recipe.noise_activations else lsq
        config["activations"] = {**method, "bits": recipe.activation_bits}
    return config


def schedule(recipe: RecipeArguments) -> dict[str, Any] | None:
    """The learning-rate schedule of appendix A.3, where it is asked for; None: the Trainer's own."""
    every = recipe.cosine_step_epochs
    return {"name": "cosine_steps", "every": every} if every else None


def main() -> None:
    recipe, args = parse(RecipeArguments, Path(__file__).parent / "configs", "noise_lsq")
    check_known(recipe.variants, ["lsq", "noise"], "variant")
    run = ImageRun(recipe, args)
    options = {"lr_schedule": schedule(recipe)} if schedule(recipe) else {}
    results: dict[str, Sweep] = {}
    for variant in recipe.variants:
        trainer = run.fit(variant, quantizers(recipe, variant), scale_lr=recipe.scale_lr, **options)
        results[variant] = trainer.sweep_callback.sweeps[-1]
    bits = f"W{recipe.weight_bits}" + (f"A{recipe.activation_bits}" if recipe.activation_bits else "")
    facts = {"trained at": bits, "first and last layer": recipe.first_last, "c": recipe.c, "k": recipe.k}
    run.report(results, facts)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
