"""What ranks must agree on, and what one rank tells the others. Everything is a no-op for one process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_robustq.sharded import is_sharded


def several() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return dist.get_rank() if several() else 0


def weights_on_rank_0(model: nn.Module) -> bool:
    """FSDP's `cpu_ram_efficient_loading`: until the model is wrapped, only rank 0 holds its weights."""
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    asked = all(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)
    return asked and several() and not any(is_sharded(parameter) for parameter in model.parameters())


def agree(value: dict[str, Any], what: str) -> None:
    """Raise `ValueError` on every rank, naming the differences, where `value` is not the same on all."""
    if not several():
        return
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        found = differences(values[0], other)
        if found:
            named = "; ".join(f"{key} is {a!r} on rank 0 and {b!r} on rank {rank}" for key, a, b in found)
            raise ValueError(f"the ranks disagree on {what}: {named}: start every process with the same")


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Rank 0's values, in place on every other."""
    if not several():
        return
    for tensor in tensors:
        data = tensor.detach()
        if data.dtype == torch.bool:  # not every backend sends them
            as_bytes = data.to(torch.uint8)
            dist.broadcast(as_bytes, src=0)
            data.copy_(as_bytes)
        else:
            dist.broadcast(data, src=0)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """The mean over the ranks, in place, in one collective for each dtype."""
    if not several():
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, values in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(values.view_as(tensor))


def differences(ours: Any, theirs: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(key, ours, theirs) of every leaf in which two nested dicts differ; a missing one is None."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted({*ours, *theirs})
        pairs = ((f"{key}.{name}" if key else name, ours.get(name), theirs.get(name)) for name in names)
        return [found for name, a, b in pairs for found in differences(a, b, name)]
    return [] if ours == theirs else [(key, ours, theirs)]
