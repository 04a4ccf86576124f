"""The door to fused kernels, and what they ask of a tensor: its dtype for arithmetic, its order in memory."""

from __future__ import annotations

import functools
import logging
import os
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

logger = logging.getLogger(__name__)

CACHED = 1 << 17
"""Elements that stay in a CPU's cache: up to here eager operations are as good as a fused kernel, and beyond it
they work on pieces of this size."""


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype arithmetic is done in: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast leaves `x`'s device alone."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def fused(eager: Callable[..., Any], smallest: int = CACHED) -> Callable[..., Any]:
    """Compile `eager` once, for any length, and use it for tensors of `smallest` elements or more.

    The first argument decides. Small tensors, a tracing compiler, and machines without a working
    compiler (noticed once, logged) use `eager` itself; so does everything inside a dispatch mode (a profiler, a
    counter of operations), to which compiled code would be hidden, and while the environment says
    `HF_ROBUSTQ_FUSED=0`.
    A compiled kernel is not differentiated, and is given views stripped of their bases, by which the compiler
    would tell apart shapes that are the same to it.
    """
    compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
    broken = False

    @functools.wraps(eager)
    def call(x: Tensor, *rest: Any) -> Any:
        nonlocal broken
        if broken or x.numel() < smallest or torch.compiler.is_compiling() or os.environ.get("HF_ROBUSTQ_FUSED") == "0":
            return eager(x, *rest)
        if is_in_torch_dispatch_mode():
            return eager(x, *rest)
        key = (x.dim(), *(one.dtype if isinstance(one, Tensor) else one.__class__ for one in (x, *rest)))
        if key not in compiled:  # a code object of its own: torch bounds the variants compiled of one
            own = types.FunctionType(eager.__code__.replace(), eager.__globals__, eager.__name__)
            compiled[key] = torch.compile(own, dynamic=True, fullgraph=True)
        try:
            return compiled[key](*(one.data if isinstance(one, Tensor) else one for one in (x, *rest)))
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            broken = True
            reason = str(error).strip().splitlines()[0]
            logger.warning("No fused kernel for %s, using the eager one: %s", eager.__name__, reason)
            return eager(x, *rest)

    call.compiled = compiled  # type: ignore[attr-defined]
    return call


def memory_order(x: Tensor) -> list[int]:
    """The permutation of dimensions in which a dense `x` can be flattened without a copy (channels-last, say)."""
    if x.dim() in (4, 5) and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return [0, *range(2, x.dim()), 1]
    return list(range(x.dim()))


def flatten(x: Tensor, order: list[int] | None = None) -> Tensor:
    """[N] `x` in the order of its memory, or in another tensor's `memory_order`: a view where there is one."""
    return x.permute(memory_order(x) if order is None else order).reshape(-1)


def unflatten(flat: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """The inverse of `flatten`."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[i] for i in order]).permute(inverse)
