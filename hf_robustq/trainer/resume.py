"""Going on from a checkpoint: the same config, whatever backend wrote it."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_robustq.config import RobustQConfig
from hf_robustq.distributed import differences
from hf_robustq.files import read_mapping
from hf_robustq.plugin import BESIDES, METHOD, RobustQ

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def check_config(checkpoint: Path, plugin: RobustQ) -> None:
    """Raise `ValueError`, listing the differences, for a checkpoint that another config wrote."""
    file = checkpoint / "config.json"
    if not file.is_file():
        return  # not a model of transformers
    saved = read_mapping(file).get("quantization_config") or {}
    if saved.get("quant_method") != METHOD:
        raise ValueError(f"{checkpoint} was written without RobustQ: load it as the model instead of resuming from it")
    saved = {key: value for key, value in saved.items() if key not in BESIDES}
    found = differences(RobustQConfig.from_dict(saved).to_dict(), plugin.config.to_dict())  # what it lacks is default
    if found:
        named = "; ".join(f"{key} is {theirs!r} there and {ours!r} here" for key, theirs, ours in found)
        raise ValueError(
            f"{checkpoint} is of another config: {named}: resume with its config, or start from its weights"
        )


@contextmanager
def readable(checkpoint: Path, sharded: bool) -> Iterator[Path]:
    """A checkpoint as one process or DDP can read it, when FSDP or DeepSpeed wrote it; else itself.

    `sharded`: this run is FSDP or DeepSpeed, which read their own only. FSDP's optimizer state comes along,
    DeepSpeed's stays behind.
    """
    files = {path.name: path for path in checkpoint.iterdir()} if checkpoint.is_dir() else {}
    fsdp = any(name.startswith("pytorch_model_fsdp") for name in files)
    deepspeed = any(name.startswith("global_step") for name in files)
    if sharded or not (fsdp or deepspeed):
        yield checkpoint
        return
    if not any(name in files for name in WEIGHTS):
        raise ValueError(
            f"{checkpoint} holds its weights in pieces only: save with fsdp_state_dict_type: FULL_STATE_DICT "
            "(zero3_save_16bit_model: true for DeepSpeed), or join them with `accelerate merge-weights`"
        )
    with tempfile.TemporaryDirectory() as folder:
        view = Path(folder)
        for name, path in files.items():
            if not name.startswith(("pytorch_model_fsdp", "optimizer", "global_step", "latest")):
                (view / name).symlink_to(path.resolve())
        if "optimizer.bin" in files:
            state = torch.load(files["optimizer.bin"], map_location="cpu", weights_only=True)
            torch.save(by_number(state), view / "optimizer.pt")
        else:
            logger.warning("%s: DeepSpeed's optimizer state cannot be read here: the optimizer starts anew", checkpoint)
        yield view


def by_own_names(checkpoint: Path, model: Any) -> dict[str, Tensor] | None:
    """What a checkpoint holds of a model, under the model's names, where its file has others; else None.

    transformers renames, joins and splits tensors when it saves many architectures; its `from_pretrained` undoes that,
    its Trainer does not. Raises `ValueError` where weights are missing.
    """
    files = sorted(checkpoint.glob("model*.safetensors"))
    names = {name for file in files for name in _names(file)}
    if not files:
        return None  # FSDP's, DeepSpeed's, or an adapter's
    if not hasattr(type(model), "from_pretrained") or names <= model.state_dict().keys():
        _check_missing(checkpoint, _missing(names, model))
        return None
    loaded, info = type(model).from_pretrained(checkpoint, output_loading_info=True)
    _check_missing(checkpoint, sorted(info["missing_keys"]))
    with RobustQ.of(loaded).published():
        return {name: tensor.detach().clone() for name, tensor in loaded.state_dict().items()}


def _missing(names: set[str], model: Any) -> list[str]:
    """What a model has and a file with these names lacks; of tensors that are tied a file has one."""
    state, ignored = model.state_dict(), getattr(model, "_keys_to_ignore_on_save", None) or ()
    there = {state[name].data_ptr() for name in names & state.keys()}
    missing = [name for name in state.keys() - names if state[name].numel() and state[name].data_ptr() not in there]
    return sorted(name for name in missing if not any(re.search(pattern, name) for pattern in ignored))


def _check_missing(checkpoint: Path, missing: list[str]) -> None:
    if missing:
        raise ValueError(f"{checkpoint}: {len(missing)} weights of the model are missing, {missing[0]} among them")


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


@contextmanager
def own_names(checkpoint: Path, model: Any) -> Iterator[Path]:
    """A checkpoint as the Trainer reads it into this model: itself, or a view of it under the model's names."""
    state = by_own_names(checkpoint, model)
    if state is None:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        view = Path(folder)
        for path in checkpoint.iterdir():
            if not path.match("model*.safetensors*"):
                (view / path.name).symlink_to(path.resolve())
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, view / WEIGHTS[0], {"format": "pt"})
        yield view


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """FSDP's optimizer state, keyed by parameter names, as `Optimizer.load_state_dict` takes it: by position."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: value for name, value in state["state"].items()}, "param_groups": groups}
