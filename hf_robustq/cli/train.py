"""`robustq train`: a recipe as its YAML file says, with flags over it.

    robustq train kure_digits
    robustq train recipes/configs/kure_cifar10.yaml --dataset_name <cifar10 folder> --num_train_epochs 3
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m hf_robustq.cli train my.yaml

The file names its script, `recipe: kure_resnet50`, and has a flag a line; `recipes/configs` has one for each published
result. Every flag of the recipe and of `TrainingArguments` may follow; `robustq train my.yaml --help` lists them.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import hf_robustq


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of one of the project's")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="flags of the recipe")


def recipes() -> Path:
    """The scripts: within an installed package, or beside it in a clone."""
    package = Path(hf_robustq.__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())


def script(config: str) -> tuple[Path, Path]:
    """(the recipe's script, the YAML file). Raises `ValueError` for a file that is none, or names no recipe."""
    from hf_robustq.config import check_known, read_file

    file = Path(config)
    if file.suffix not in (".yaml", ".yml"):
        known = {path.stem: path for path in sorted((recipes() / "configs").glob("*.yaml"))}
        check_known([config], known, "config")
        file = known[config]
    recipe = read_file(file).get("recipe")
    names = sorted({read_file(one)["recipe"] for one in (recipes() / "configs").glob("*.yaml")})
    if recipe is None:
        raise ValueError(f"{file} names no recipe: add a line `recipe: NAME`, one of {', '.join(names)}")
    check_known([str(recipe)], names, "recipe")
    return recipes() / f"{recipe}.py", file


def run(args: argparse.Namespace) -> None:
    path, file = script(args.config)
    sys.argv = [str(path), "--preset", str(file), *args.flags]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
