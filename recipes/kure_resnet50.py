"""KURE on an image classifier, with a bit-width sweep at every epoch (arXiv 2002.07686, supplement, Tables 1 and 3).

Without arguments: a timm ResNet-50 on scikit-learn's handwritten digits, without and with KURE.

    accelerate launch recipes/kure_resnet50.py
    accelerate launch recipes/kure_resnet50.py --model_name_or_path <name> --dataset_name <hub id or folder>
    accelerate launch recipes/kure_resnet50.py --preset imagenet --dataset_name <hub id or folder>

Every TrainingArguments flag works, and wins over the preset's.
"""

from dataclasses import dataclass, field
from pathlib import Path

from hf_robustq import Sweep
from hf_robustq.config import check_known
from hf_robustq.recipe import ImageArguments, ImageRun, parse


@dataclass
class RecipeArguments(ImageArguments):
    variants: list[str] = field(default_factory=lambda: ["with"], metadata={"help": "any of: without with"})
    kure_strength: float = 1.0
    kure_target: float = 1.8


def main() -> None:
    recipe, args = parse(RecipeArguments, Path(__file__).parent / "configs", "kure")
    check_known(recipe.variants, ["without", "with"], "variant")
    run = ImageRun(recipe, args)
    kure = {"kure": {"strength": recipe.kure_strength, "target": recipe.kure_target}}
    results: dict[str, Sweep] = {}
    kurtosis = []
    for variant in recipe.variants:
        trainer = run.fit(f"{variant}_kure", {"regularizers": kure if variant == "with" else {}})
        results[f"{variant}_kure"] = trainer.sweep_callback.sweeps[-1]
        kurtosis.append(f"{variant} {trainer.robustq.metrics()['kurtosis']:.2f}")
    facts = {"lambda": recipe.kure_strength, "target": recipe.kure_target, "mean kurtosis": " / ".join(kurtosis)}
    run.report(results, facts)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
