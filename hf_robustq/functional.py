"""Pure tensor functions of quantization, and the one door to fused kernels.

Everything here computes in float32 (float64 stays float64), whatever the dtype of its input, and
returns the dtype of its input.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

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


def fused(eager: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `eager` once, for any length, and use it for tensors of `CACHED` elements or more.

    The first argument decides. Small tensors, a tracing compiler, and machines without a working
    compiler (noticed once, logged) use `eager` itself. `HF_ROBUSTQ_FUSED=0` switches compilation off.
    """
    compiled: Callable[..., Any] | None = None
    broken = os.environ.get("HF_ROBUSTQ_FUSED", "1") == "0"

    @functools.wraps(eager)
    def call(x: Tensor, *rest: Any) -> Any:
        nonlocal compiled, broken
        if broken or x.numel() < CACHED or torch.compiler.is_compiling():
            return eager(x, *rest)
        if compiled is None:
            compiled = torch.compile(eager, dynamic=True, fullgraph=True)
        try:
            return compiled(x, *rest)
        except TorchDynamoException as error:
            broken = True
            reason = str(error).strip().splitlines()[0]
            logger.warning("No fused kernel for %s, using the eager one: %s", eager.__name__, reason)
            return eager(x, *rest)

    return call


def memory_order(x: Tensor) -> list[int]:
    """The permutation of dimensions in which a dense `x` can be flattened without a copy (channels-last, say)."""
    if x.dim() in (4, 5) and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return [0, *range(2, x.dim()), 1]
    return list(range(x.dim()))


def along(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """View a 1-D `scale` so that it broadcasts along `axis` of `x` (one element: any axis)."""
    if axis is None or scale.numel() == 1:
        return scale.reshape([1] * x.dim())
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


class _FakeQuantize(torch.autograd.Function):
    """s * clamp(round(x / s), low, high); the gradient passes straight through inside the range.

    Saves `x` and `s` and nothing else of the size of `x`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, low, high)
        dtype = working_dtype(x)
        return (torch.round(x.to(dtype) / scale).clamp(low, high) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale, low, high = ctx.saved_tensors
        position = x.to(working_dtype(x)) / scale
        inside = (position > low) & (position < high)
        return grad_output * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round `x` to the grid `scale * {low, ..., high}`: s * clamp(round(x / s), low, high).

    `round` is half-to-even. `scale` broadcasts against `x` (see `along`); `low` and `high` are 0-dim
    tensors of integers. Backward is the straight-through estimator with the clip mask of LSQ
    (arXiv 1902.08153, eq. 5): 1 where low < x / s < high, else 0.
    """
    with no_autocast(x):
        return _FakeQuantize.apply(x, scale.to(working_dtype(x)), low, high)


def chunks(flat: Tensor) -> tuple[Tensor, ...]:
    """Pieces of a 1-D tensor that a chain of eager operations can work on without leaving a CPU's cache."""
    whole = torch.compiler.is_compiling() or not flat.is_cpu
    return (flat,) if whole else flat.split(CACHED)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """sum(a * b) of 1-D tensors: a library call when eager, left to fusion when compiled."""
    return (a * b).sum() if torch.compiler.is_compiling() else torch.dot(a, b)


Scalar = Tensor | float


def central_moments(x: Tensor) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Mean and central moments (mu, m2, m3, m4) of all elements of `x`, divided by N (population moments).

    One pass: power sums about a provisional mean, combined in float64, so that a large mean costs no digits.
    Returns Python floats for an eager CPU tensor, where nothing waits for a device, else 0-dim float64 tensors.
    """
    flat, dtype = x.detach().permute(memory_order(x)).reshape(-1), working_dtype(x)
    shift = flat[:1024].to(dtype).mean()
    sums = torch.zeros(4, dtype=torch.double, device=x.device)
    for part in chunks(flat):
        d = part.to(dtype) - shift
        square = d * d
        sums = sums + torch.stack([d.sum(), inner(d, d), inner(square, d), inner(square, square)])
    eager_cpu = x.is_cpu and not torch.compiler.is_compiling()
    sums = sums / flat.numel()
    s1, s2, s3, s4 = sums.tolist() if eager_cpu else sums.unbind()
    m2 = s2 - s1**2
    m3 = s3 - 3 * s1 * s2 + 2 * s1**3
    m4 = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
    return s1 + (shift.item() if eager_cpu else shift), m2, m3, m4


def kurtosis(x: Tensor) -> Tensor:
    """Kurt[x] = E[((x - mu) / sigma)^4] over all elements: uniform 1.8, normal 3, Laplace 6. 0-dim; NaN if constant."""
    _, m2, _, m4 = (torch.as_tensor(m, dtype=torch.double) for m in central_moments(x))
    return m4 / m2**2
