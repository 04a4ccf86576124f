"""Tensors stored in pieces over the ranks: FSDP2's DTensors, ZeRO-3's partitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is stored in pieces over the ranks (FSDP2, ZeRO-3)."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the unsharded parameter: ZeRO-3 leaves an empty tensor in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def held(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this rank holds, to be read or written in place; all of it where it is not sharded."""
    return tensor.to_local().data if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor).data


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` for a tensor that is not finite, in the piece this rank holds."""
    piece = held(tensor)
    if piece.is_floating_point() and not piece.is_meta and not bool(piece.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite")


def share_held(tensor: Tensor) -> float:
    """1 over the number of ranks that hold the same piece: a sum over all ranks then counts every element once."""
    if not dist.is_initialized():
        return 1.0
    pieces = 1
    if isinstance(tensor, DTensor):
        for dimension, placement in enumerate(tensor.placements):
            pieces *= tensor.device_mesh.size(dimension) if placement.is_shard() else 1
    return pieces / dist.get_world_size()


def uses_deepspeed(parameter: Tensor) -> bool:
    """Whether DeepSpeed optimizes a parameter, by ZeRO of any stage."""
    return any(hasattr(parameter, name) for name in ("ds_id", "_hp_mapping", "_z3_optimizer"))


@contextmanager
def whole(parameter: Tensor) -> Iterator[Tensor]:
    """The unsharded values of a parameter: gathered from FSDP2 or ZeRO-3 where it is sharded (a collective then)."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id") and parameter.shape != whole_shape(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield parameter.data


def settle(model: nn.Module) -> None:
    """Put everything back into pieces, which what is written to them would not reach otherwise.

    Under FSDP2 a root stays whole after a forward, and so do small parameters under ZeRO-3.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id") and parameter.shape == whole_shape(parameter):
            parameter.partition()  # type: ignore[attr-defined]


@contextmanager
def values_kept(model: nn.Module, pieces: Sequence[Tensor]) -> Iterator[None]:
    """For writing to the `held` pieces of a settled model's parameters: afterwards they are as before, to the bit."""
    own = [piece.detach().clone() for piece in pieces]
    try:
        yield
    finally:
        settle(model)
        with torch.no_grad():
            for piece, values in zip(pieces, own, strict=True):
                piece.copy_(values)


@torch.no_grad()
def clamp_local(tensor: Tensor, low: float, high: float | None = None) -> None:
    """Clamp the values, in the pieces this rank holds and in DeepSpeed's float32 master of them."""
    held(tensor).clamp_(low, high)
    if hasattr(tensor, "_z3_optimizer"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        safe_set_local_fp32_param(tensor, safe_get_local_fp32_param(tensor).clamp(low, high))
    elif (mapping := getattr(tensor, "_hp_mapping", None)) is not None:
        mapping.hp_fragment.clamp_(low, high)


@torch.no_grad()
def single_values(parameters: Sequence[Tensor]) -> Tensor:
    """[n] the values of parameters of one element each, on every rank; one collective where they are in pieces."""
    pieces = []
    for parameter in parameters:
        piece = held(parameter)
        mine = piece.numel() > 0 and (not hasattr(parameter, "ds_id") or dist.get_rank() == 0)
        pieces.append(piece.reshape(-1)[:1].float() if mine else piece.new_full((1,), -torch.inf, dtype=torch.float32))
    values = torch.cat(pieces)
    if any(is_sharded(parameter) for parameter in parameters):
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


@torch.no_grad()
def assign(tensor: Tensor, values: Tensor) -> None:
    """Write whole `values` into a tensor, in place; into its pieces where it is sharded, rank 0's values then.

    DeepSpeed's float32 master copy, where there is one by now, gets them too: it would overwrite them at the
    next optimizer step.
    """
    values = values.detach().to(tensor.device, tensor.dtype).expand(whole_shape(tensor))
    if isinstance(tensor, DTensor):
        tensor.copy_(distribute_tensor(values.contiguous(), tensor.device_mesh, tensor.placements))
        return
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            if dist.get_rank() == 0:
                tensor.data.copy_(values)
    else:
        tensor.detach().copy_(values)
    if hasattr(tensor, "_z3_optimizer"):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(tensor, tensor.ds_tensor.float())  # type: ignore[attr-defined]
    elif hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(tensor, values.float())
