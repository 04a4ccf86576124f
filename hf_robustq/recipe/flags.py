"""Flags over presets over defaults, and an output folder nobody loses."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from hf_robustq.config import check_known, read_file


def parse(
    arguments: type[Any],
    configs: Path,
    prefix: str,
    argv: Sequence[str] | None = None,
    presets: tuple[str, str | Callable[[], str]] = ("digits", "finetune"),
) -> tuple[Any, Any]:
    """(recipe arguments, TrainingArguments): the flags, over the preset's YAML, over the defaults.

    `--preset NAME` reads `<configs>/<prefix>_NAME.yaml`, whose keys are the flags' names, and `recipe`, the script;
    `--preset FILE.yaml` any such file. By default the first of `presets`, and the second, or what it returns, where a
    dataset is named. An unknown preset or key is a `ValueError` that names the nearest one.
    """
    no_bars_without_a_terminal()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and importlib.util.find_spec("deepspeed") is None:
        raise ImportError("ZeRO needs DeepSpeed: pip install 'hf_robustq[deepspeed]'")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser([arguments, TrainingArguments], allow_abbrev=False)  # type: ignore[arg-type]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset_name", nargs="+")
    first.add_argument("--preset")
    given, _ = first.parse_known_args(argv)
    usual = presets[bool(given.dataset_name)]
    preset = given.preset or (usual if isinstance(usual, str) else usual())
    file = Path(preset)
    if file.suffix not in (".yaml", ".yml"):
        known = [path.stem.removeprefix(f"{prefix}_") for path in sorted(configs.glob(f"{prefix}_*.yaml"))]
        check_known([preset], known, "preset")
        file = configs / f"{prefix}_{preset}.yaml"
    defaults = {key: value for key, value in read_file(file).items() if key != "recipe"}
    fields = [f.name for kind in (arguments, TrainingArguments) for f in dataclasses.fields(kind) if f.init]
    check_known(defaults, fields, f"key in {file.name}")
    gpu = torch.accelerator.is_available()
    machine = {"use_cpu": not gpu, "dataloader_pin_memory": gpu, "disable_tqdm": not sys.stderr.isatty()}
    parser.set_defaults(**{"preset": preset, **machine, **defaults})
    recipe, args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    check_known([word.removeprefix("--").partition("=")[0] for word in rest], fields, "flag")
    return recipe, args


def no_bars_without_a_terminal() -> None:
    """Progress bars are for who watches; a log file has none."""
    if not sys.stderr.isatty():
        disable_progress_bar()
        disable_progress_bars()
        if importlib.util.find_spec("datasets"):
            import datasets

            datasets.disable_progress_bars()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in an output folder, or None."""
    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None


def open_output(folder: str | Path, resume: bool, overwrite: bool) -> None:
    """Make ready an output folder; on one process, before any other goes on.

    A folder that holds something is a `ValueError` without an explicit choice to overwrite or resume.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not resume:
        if not overwrite:
            choices = "--overwrite to delete it, --resume to go on, or name another --output_dir"
            raise ValueError(f"{folder} is not empty: add {choices}")
        shutil.rmtree(folder)
