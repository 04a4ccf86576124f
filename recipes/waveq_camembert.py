"""WaveQ on a tagger and dependency parser (arXiv 2003.00146, appendix D): weights of 4 and 5 bits, inputs of 8.

Without arguments: a small parser from scratch on sentences made by a grammar, a smoke run whose figures mean nothing.
With a treebank: CamemBERT, or where it is not at hand an encoder and a tokenizer from scratch.

    accelerate launch recipes/waveq_camembert.py
    accelerate launch recipes/waveq_camembert.py --dataset_name <treebank folder>
    accelerate launch recipes/waveq_camembert.py --variants kure lsq --dataset_name <hub id> --dataset_config_name <..>

"waveq" learns which weights get 4 bits and which 5, under a budget of their mean; run first, it says so for the others:
"afterwards" trains in float and is quantized then, "qat" trains with the same quantizers and no regularizer, "kure" so
with KURE, "lsq" with learned steps. LAS is the metric of the sweep; every TrainingArguments flag works.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_robustq import Sweep
from hf_robustq.config import check_known
from hf_robustq.recipe import ParserArguments, ParserRun, parse
from hf_robustq.recipe.parsing import CAMEMBERT

VARIANTS = ("waveq", "afterwards", "qat", "kure", "lsq")


@dataclass
class RecipeArguments(ParserArguments):
    variants: list[str] = field(default_factory=lambda: ["waveq"], metadata={"help": f"any of: {' '.join(VARIANTS)}"})
    weight_bits: int = field(default=4, metadata={"help": "where waveq is not among the variants; 0: float"})
    activation_method: str = field(default="lsq", metadata={"help": "lsq, lsq_plus or fixed"})
    activation_bits: int = 8
    first_last: str = field(default="same", metadata={"help": "first and last layer: same, 8 or float"})
    budget_bits: float = field(default=4.5, metadata={"help": "of the weights, in the mean over layers"})
    strength: float = field(default=4.0, metadata={"help": "lambda_w of waveq"})
    snap: float = field(default=60.0, metadata={"help": "times that in the third phase"})
    phases: list[float] = field(default_factory=lambda: [1.0, 4.0, 5.0], metadata={"help": "ratio of their epochs"})
    bits_lr: float = field(default=0.05, metadata={"help": "learning rate of the bits"})
    kure_strength: float = 1.0


def stages(recipe: RecipeArguments, variant: str, bits: Mapping[str, int]) -> dict[str, Any]:
    """The plugin's config of one variant; `bits` of weights, by name, or else all have `weight_bits`."""
    first_last = int(recipe.first_last) if recipe.first_last.isdigit() else recipe.first_last
    weights: dict[str, Any] = {"method": "absmax", "bits": recipe.weight_bits, "mixed": dict(bits)}
    config: dict[str, Any] = {"first_last": first_last, "weights": weights if recipe.weight_bits else None}
    if recipe.activation_bits:
        config["activations"] = {"method": recipe.activation_method, "bits": recipe.activation_bits}
    if variant == "lsq":
        weights["method"] = "lsq"
    if variant == "kure":
        config["regularizers"] = {"kure": {"strength": recipe.kure_strength}}
    if variant == "waveq":
        config["weights"] = {"method": "absmax", "bits": 9}
        first, second, third = recipe.phases
        total = first + second + third
        phases = {"rise": first / total, "fall": (first + second) / total}
        config["regularizers"] = {"waveq": {"strength": recipe.strength, "snap": recipe.snap, **phases}}
        config["budget"] = {"bits": recipe.budget_bits}
    return config


def preset() -> str:
    """For a treebank: that of trained encoders, where one is named or CamemBERT can be loaded."""
    if any(flag.split("=")[0] == "--model_name_or_path" for flag in sys.argv):
        return "finetune"
    try:
        AutoConfig.from_pretrained(CAMEMBERT)
    except OSError:
        if os.environ.get("RANK", "0") == "0":
            print(f"{CAMEMBERT} cannot be loaded here: an encoder is trained from scratch")
        return "scratch"
    return "finetune"


def main() -> None:
    recipe, args = parse(RecipeArguments, Path(__file__).parent / "configs", "parser", presets=("smoke", preset))
    check_known(recipe.variants, VARIANTS, "variant")
    run = ParserRun(recipe, args)
    results: dict[str, Sweep] = {}

    def note(variant: str, trainer: Any) -> None:
        for name, sweep in run.tested(trainer).items():
            results[variant if len(run.encoded) == 1 else f"{variant} on {name}"] = sweep

    if run.pretrained is not None:
        note("float", run.pretrained)
    bits: dict[str, int] = {}
    float_sweep = [one for one in recipe.sweep if one != "trained" and "@learned" not in one] or ["fp"]
    for variant in sorted(recipe.variants, key=VARIANTS.index):
        if variant == "afterwards":
            tuned = run.fit("finetuned", {}, sweep=float_sweep)
            note("finetuned", tuned)
            tuned.robustq.detach()
            trainer = run.fit(variant, stages(recipe, variant, bits), model=tuned.model, train=False)
        else:
            trainer = run.fit(variant, stages(recipe, variant, bits), bits_lr=recipe.bits_lr)
        note(variant, trainer)
        if variant == "waveq":
            bits = {name: int(b) for name, b in trainer.robustq.bits.by_layer().items()}
        if args.process_index == 0:
            print(f"\n{variant}:\n{trainer.robustq.size()}")
    facts = {"bits": recipe.budget_bits if "waveq" in recipe.variants else recipe.weight_bits}
    run.report(results, {**facts, "inputs": f"{recipe.activation_bits} ({recipe.activation_method})"})
    if recipe.preset == "smoke" and args.process_index == 0:
        print(
            "A smoke run on generated sentences: name a treebank with --dataset_name for figures that mean something."
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
