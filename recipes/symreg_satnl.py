"""SymReg, SatNL and ASAM on an image classifier, from scratch, with averaged weights (arXiv 2208.00338), and KURE.

Without arguments: a timm ResNet-18 on scikit-learn's handwritten digits, plain and with the three.

    accelerate launch recipes/symreg_satnl.py
    accelerate launch recipes/symreg_satnl.py --variants baseline ours kure ours_kure
    accelerate launch recipes/symreg_satnl.py --preset imagenet_resnet18 --dataset_name <hub id or folder>
    accelerate launch recipes/symreg_satnl.py --preset imagenet_qat --model_name_or_path <folder of the first stage> \\
      --dataset_name <hub id or folder>

"ours" is the paper's word for SymReg, SatNL and ASAM together. With --weight_bits it is quantization-aware training.
Every TrainingArguments flag works, and wins over the preset's.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robustq import Sweep
from hf_robustq.config import check_known
from hf_robustq.recipe import ImageArguments, ImageRun, parse

VARIANTS = ["baseline", "ours", "kure", "ours_kure"]


@dataclass
class RecipeArguments(ImageArguments):
    variants: list[str] = field(default_factory=lambda: ["ours"], metadata={"help": f"any of: {' '.join(VARIANTS)}"})
    symreg: str = field(default="sym1", metadata={"help": "sym1: pairs, sym2: quadruples"})
    symreg_strength: float = 1.0
    symreg_every: int = field(default=1, metadata={"help": "act at every n-th step, n times as strongly"})
    satnl: str = field(default="tanh", metadata={"help": "tanh, softsign or arctan"})
    satnl_d: float | None = field(default=1.0, metadata={"help": "the bound of every weight"})
    satnl_invert: bool = field(default=False, metadata={"help": "keep the network that is there: trained weights"})
    rho: float = field(default=1.0, metadata={"help": "ASAM's radius; 0: one pass"})
    eta: float = 0.01
    ema_decay: float = field(default=0.9999, metadata={"help": "of the averaged weights; 0: none"})
    kure_strength: float = 1.0
    kure_target: float = 1.8
    weight_bits: int = field(default=0, metadata={"help": "train with LSQ at these bits; 0: in float"})
    activation_bits: int = 0
    first_last: str = field(default="8", metadata={"help": "first and last layer: same, 8 or float"})


def stages(recipe: RecipeArguments, variant: str) -> dict[str, Any]:
    """The plugin's config of one variant."""
    first_last = int(recipe.first_last) if recipe.first_last.isdigit() else recipe.first_last
    config: dict[str, Any] = {"first_last": first_last, "regularizers": {}}
    if variant.startswith("ours"):
        config["satnl"] = {"function": recipe.satnl, "d": recipe.satnl_d, "invert": recipe.satnl_invert}
        config["regularizers"][recipe.symreg] = {"strength": recipe.symreg_strength, "every": recipe.symreg_every}
    if variant.endswith("kure"):
        config["regularizers"]["kure"] = {"strength": recipe.kure_strength, "target": recipe.kure_target}
    for name, bits in (("weights", recipe.weight_bits), ("activations", recipe.activation_bits)):
        if bits:
            config[name] = {"method": "lsq", "bits": bits}
    return config


def options(recipe: RecipeArguments, variant: str) -> dict[str, Any]:
    """What goes to the trainer: averaged weights for every variant, two passes for "ours"."""
    averages = {"ema": {"decay": recipe.ema_decay}} if recipe.ema_decay else {}
    passes = {"asam": {"rho": recipe.rho, "eta": recipe.eta}} if variant.startswith("ours") and recipe.rho else {}
    return {**averages, **passes}


def main() -> None:
    recipe, args = parse(RecipeArguments, Path(__file__).parent / "configs", "symreg_satnl")
    check_known(recipe.variants, VARIANTS, "variant")
    run = ImageRun(recipe, args)
    results: dict[str, Sweep] = {}
    for variant in recipe.variants:
        trainer = run.fit(variant, stages(recipe, variant), **options(recipe, variant))
        results[variant] = trainer.sweep_callback.sweeps[-1]
    facts = {recipe.symreg: recipe.symreg_strength, "SatNL": f"{recipe.satnl} d {recipe.satnl_d}", "rho": recipe.rho}
    run.report(results, {**facts, "lambda of KURE": recipe.kure_strength, "EMA": recipe.ema_decay})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
