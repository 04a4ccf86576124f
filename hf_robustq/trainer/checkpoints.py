"""Which checkpoints are whole, and what is wrong with the others."""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_robustq.files import read_json, read_mapping

logger = logging.getLogger(__name__)

LAST = "trainer_state.json"
"""What the Trainer writes last."""
WEIGHTS = ("*.safetensors", "pytorch_model_fsdp*", "global_step*")
STATES = {
    "optimizer": ("optimizer*", "global_step*"),
    "learning-rate schedule": ("scheduler.pt", "global_step*"),
    "random numbers": ("rng_state*.pth",),
}
"""What a resumed run goes on with besides the weights, and how the files are called."""


def damaged(checkpoint: Path) -> str:
    """What is wrong with a checkpoint that cannot be read, with the file's name; empty where nothing is."""
    if not (checkpoint / LAST).is_file():
        return f"it has no {LAST}, which is written last"
    weights = [path for pattern in WEIGHTS for path in checkpoint.glob(pattern)]
    if not any(not path.name.startswith("robustq_") for path in weights):  # these lie beside the weights
        return "it has no weights in safetensors"
    for file in sorted(checkpoint.iterdir()):
        if reason := _damage(file):
            return f"{file.name} is {reason}"
    index = checkpoint / "model.safetensors.index.json"
    shards = read_mapping(index).get("weight_map", {}).values() if index.is_file() else ()
    missing = sorted({shard for shard in shards if not (checkpoint / shard).is_file()})
    return f"{missing[0]} is missing" if missing else ""


def _damage(file: Path) -> str:
    try:
        if file.suffix == ".json":
            read_json(file)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix in (".pt", ".pth", ".bin") and file.is_file() and not zipfile.is_zipfile(file):
            return "cut short or damaged"
    except (ValueError, SafetensorError, OSError) as error:
        return f"cut short or damaged ({str(error).removeprefix(f'{file} is ')[:80]})"
    return ""


def lacking(checkpoint: Path) -> list[str]:
    """What a run that goes on from here would begin anew."""
    return [what for what, names in STATES.items() if not any(any(checkpoint.glob(name)) for name in names)]


def last_whole(folder: Path, model_only: bool) -> Path:
    """The newest whole checkpoint of a run; newer ones that are not whole are named in warnings.

    `model_only`: the run saves nothing besides the model. Raises `ValueError` where there is none.
    """
    numbered = [(int(found[1]), path) for path in folder.glob("checkpoint-*") if (found := _numbered(path))]
    reasons = []
    for _, checkpoint in sorted(numbered, reverse=True):
        missing = [] if model_only else lacking(checkpoint)
        reason = damaged(checkpoint) or (f"it lacks {', '.join(missing)}" if missing else "")
        if not reason:
            return checkpoint
        reasons.append(f"{checkpoint.name}: {reason}")
        logger.warning("%s is not whole and passed over: %s", checkpoint, reason)
    if reasons:
        raise ValueError(
            f"no whole checkpoint in {folder} ({'; '.join(reasons)}): train without resume_from_checkpoint"
        )
    raise ValueError(f"no checkpoint in {folder}: train without resume_from_checkpoint")


def _numbered(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def check(checkpoint: Path) -> None:
    """Raise `ValueError`, naming the file, for a checkpoint that is not whole; say what begins anew."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder: name a checkpoint to resume from")
    if reason := damaged(checkpoint):
        raise ValueError(
            f"{checkpoint} cannot be resumed from, {reason}: resume from the one before, or load it as the model"
        )
    if missing := lacking(checkpoint):
        logger.warning("%s lacks %s: they begin anew", checkpoint, ", ".join(missing))
