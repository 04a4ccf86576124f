"""Parameter groups and learning rates of a Trainer's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hf_robustq.options import check_known, check_mapping, check_options, under
from hf_robustq.schedules import LR_SCHEDULES


def group_apart(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Move parameters of a new optimizer into groups of their own."""
    chosen = {id(p) for group in groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    for group in groups:
        optimizer.add_param_group(group)


def check_section(optimizer: Mapping[str, Any] | None, apart: bool) -> None:
    """Raise `ValueError` for an optimizer in a DeepSpeed config that would treat learned steps like weights.

    The Trainer gives such an optimizer all parameters in one group.
    """
    decay = (optimizer or {}).get("params", {}).get("weight_decay", 0.0)
    if optimizer is not None and (apart or decay != 0):
        raise ValueError(
            "the optimizer of the DeepSpeed config has one group for all parameters, so learned steps would be decayed "
            "and have no learning rate of their own: take its `optimizer` section out (TrainingArguments' `optim` is "
            "sharded all the same), or set its weight_decay to 0, and leave scale_lr out and bits as they are"
        )


def checked_schedule(schedule: Any) -> dict[str, Any] | None:
    """`lr_schedule` as a dict, None for an empty one. Raises `ValueError` for a name or options not known."""
    found = dict(check_mapping("lr_schedule", schedule))
    if not found:
        return None
    with under("lr_schedule"):
        options = {key: value for key, value in found.items() if key != "name"}
        with under("name"):
            check_known([found.get("name")], LR_SCHEDULES, "learning-rate schedule")
        check_options(found["name"], LR_SCHEDULES[found["name"]], options)
    return found


def learning_rate_factor(
    schedule: Mapping[str, Any], steps: int, steps_per_epoch: int, warmup: int
) -> Callable[[int], float]:
    """What an optimizer step's learning rate is multiplied by: `schedule` by the epoch, after a linear warm-up."""
    options = {key: value for key, value in schedule.items() if key != "name"}
    shape = LR_SCHEDULES[schedule["name"]]

    def factor(step: int) -> float:
        ramp = min(1.0, step / warmup) if warmup else 1.0
        return ramp * shape(step / steps_per_epoch, steps / steps_per_epoch, **options)

    return factor
