"""KURE with quantization-aware training, read at other bit-widths (arXiv 2002.07686, Fig. 5; supplement, Tables 2, 4).

Without arguments: a timm ResNet-18 on scikit-learn's handwritten digits, LSQ at 4/4, without and with KURE.

    accelerate launch recipes/kure_qat.py
    accelerate launch recipes/kure_qat.py --method dorefa --model_name_or_path <name> --dataset_name <hub id or folder>
    accelerate launch recipes/kure_qat.py --preset imagenet_lsq44 --dataset_name <hub id or folder>

The curves take the weights to other bits: within the clip range they were trained to, beside the trained activation
quantizers (`w3a4@learned`), and both with steps of least error (`w3a4`). The star is the trained model.
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
    variants: list[str] = field(default_factory=lambda: ["with"], metadata={"help": "any of: without with"})
    method: str = field(default="lsq", metadata={"help": "lsq, lsq_plus, noise or dorefa"})
    weight_bits: int = 4
    activation_bits: int = 4
    per_channel: bool = field(default=False, metadata={"help": "a step per output channel of the weights"})
    first_last: str = field(default="float", metadata={"help": "first and last layer: same, 8 or float"})
    kure_strength: float = 1.0
    kure_target: float = 1.8
    scale_lr: float | None = field(default=None, metadata={"help": "learning rate of the steps; default: the weights'"})
    sweep_weight_bits: list[int] = field(default_factory=lambda: [8, 6, 5, 4, 3])
    sweep: list[str] = field(default_factory=list, metadata={"help": "settings; default: from sweep_weight_bits"})


def quantizers(recipe: RecipeArguments) -> dict[str, Any]:
    """The quantizers both variants have; inputs take LSQ's where the weights take a method for weights."""
    inputs = "lsq" if recipe.method == "noise" else recipe.method
    first_last = int(recipe.first_last) if recipe.first_last.isdigit() else recipe.first_last
    return {
        "weights": {"method": recipe.method, "bits": recipe.weight_bits, "per_channel": recipe.per_channel},
        "activations": {"method": inputs, "bits": recipe.activation_bits},
        "first_last": first_last,
    }


def settings(recipe: RecipeArguments) -> list[str]:
    """The sweep: the trained model, and its weights at other bits by both rules."""
    reshaped = recipe.method == "dorefa"  # the network's weights are under a tanh, the stored ones are not
    rules = ("@learned",) if reshaped else ("@learned", "")
    others = [f"w{bits}a{recipe.activation_bits}{rule}" for rule in rules for bits in recipe.sweep_weight_bits]
    return recipe.sweep or [*([] if reshaped else ["fp"]), "trained", *others]


def main() -> None:
    recipe, args = parse(RecipeArguments, Path(__file__).parent / "configs", "qat")
    check_known(recipe.variants, ["without", "with"], "variant")
    recipe.sweep = settings(recipe)
    run = ImageRun(recipe, args)
    kure = {"kure": {"strength": recipe.kure_strength, "target": recipe.kure_target}}
    results: dict[str, Sweep] = {}
    kurtosis = []
    for variant in recipe.variants:
        config = {**quantizers(recipe), "regularizers": kure if variant == "with" else {}}
        trainer = run.fit(f"{variant}_kure", config, scale_lr=recipe.scale_lr)
        results[f"{variant}_kure"] = trainer.sweep_callback.sweeps[-1]
        kurtosis.append(f"{variant} {trainer.robustq.metrics()['kurtosis']:.2f}")
    trained = f"{recipe.method} W{recipe.weight_bits}A{recipe.activation_bits}"
    facts = {"trained": trained, "first and last layer": recipe.first_last, "lambda": recipe.kure_strength}
    run.report(results, {**facts, "target": recipe.kure_target, "mean kurtosis": " / ".join(kurtosis)})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
