"""Uniform fake quantization with fixed or learned steps and offsets: one forward kernel, one backward kernel.

Both work on the tensor flattened in its memory order (or on [before, channel, after] blocks of it) and are
compiled where a compiler is available; the backward recomputes everything from the input and the step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_robustq.functional.axes import Axis
from hf_robustq.functional.fused import fused, memory_order, no_autocast, unflatten, working_dtype
from hf_robustq.functional.noise import Noise, moved_places, normal

SMALL = 1 << 14
"""Elements up to which ten eager operations cost no more than the call of a compiled one."""

SMALLEST = 1e-8
"""Steps are never taken smaller than this: one that an optimizer has brought to zero or below would give NaN."""


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast wants the operands of a matrix product; `x`'s own where it has no say."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


@partial(fused, smallest=SMALL)
def _forward(
    x: Tensor, scale: Tensor, offset: Tensor | None, low: Tensor, high: Tensor, dtype: torch.dtype, noise: Noise | None
) -> Tensor:
    step, x = scale.clamp(min=SMALLEST), x.to(scale.dtype)
    centred = x if offset is None else x - offset
    value = (centred / step).clamp(low, high).round() * step
    if offset is not None:
        value = value + offset
    if noise is not None:
        error = (value - x).abs()
        decay = torch.exp(-noise.k * (error / step if noise.relative else error))
        value = value + noise.c * decay * error.sqrt() * normal(x, noise.key, noise.places)
    return value.to(dtype)


@partial(fused, smallest=SMALL)
def _backward(
    x: Tensor, grad: Tensor, scale: Tensor, offset: Tensor | None, low: Tensor, high: Tensor, learned: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    step, dtype, grad = scale.clamp(min=SMALLEST), x.dtype, grad.to(scale.dtype)
    position = x.to(scale.dtype)
    position = (position if offset is None else position - offset) / step
    inside = (position > low) & (position < high)
    through = grad * inside
    if not learned:
        return through.to(dtype), None, None
    clipped = position.clamp(low, high)
    of_step = grad * torch.where(inside, clipped.round() - position, clipped)
    of_offset = None if offset is None else grad - through
    if x.dim() == 1:
        return through.to(dtype), of_step.sum()[None], None if of_offset is None else of_offset.sum()[None]
    shared = (0, 2) if x.dim() == 3 else (1, 3)
    return through.to(dtype), of_step.sum(shared), None if of_offset is None else of_offset.sum(shared)


def _blocks(x: Tensor, order: list[int], axis: Axis) -> Tensor:
    """`x` in the given order of dimensions, as [n], as [before, channels, after] around `axis`.

    Around two axes, 0 and another, as [entries of 0, before, channels, after].
    """
    ordered = x.permute(order)
    if axis is None:
        return ordered.reshape(-1)
    if isinstance(axis, tuple):
        one = axis[1]
        return ordered.reshape(x.size(0), math.prod(x.shape[1:one]), x.size(one), math.prod(x.shape[one + 1 :]))
    at = order.index(axis)
    before, after = math.prod(ordered.shape[:at]), math.prod(ordered.shape[at + 1 :])
    return ordered.reshape(before, ordered.shape[at], after)


def _order(x: Tensor, axis: Axis) -> list[int]:
    return list(range(x.dim())) if isinstance(axis, tuple) else memory_order(x)


def _along(axis: Axis, x: Tensor) -> list[int]:
    """The shape in which steps broadcast over the blocks."""
    if isinstance(axis, tuple):
        return [x.size(0), 1, -1, 1]
    return [-1] if axis is None else [-1, 1]


class _FakeQuantize(torch.autograd.Function):
    """Saves the input, the steps and the offsets: nothing else of the input's size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        low: Tensor,
        high: Tensor,
        axis: Axis,
        count: int,
        learned: bool,
        dtype: torch.dtype,
        noise: Noise | None,
        known: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset, low, high)
        ctx.axis, ctx.count, ctx.learned = axis, count, learned
        if known is not None:
            return known.detach()
        order = _order(x, axis)
        blocks, along = _blocks(x, order, axis), _along(axis, x)
        if noise is not None and order[-1] == 1 < x.dim() - 1:  # what is drawn must not depend on the strides
            blocks = x.permute(order).reshape(x.size(0), -1, x.size(1))
            n, positions, channels = blocks.shape
            noise = noise._replace(places=moved_places(n, positions, channels, x.device))
            along = {None: [-1], 0: [-1, 1, 1], 1: [1, 1, -1]}[axis]  # pyright: ignore[reportArgumentType]
        steps = scale.to(working_dtype(x)).reshape(along)
        offsets = None if offset is None else offset.to(steps.dtype).reshape(along)
        return unflatten(_forward(blocks, steps, offsets, low, high, dtype, noise), x.shape, order)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, offset, low, high = ctx.saved_tensors
        axis, order = ctx.axis, _order(x, ctx.axis)
        steps = scale.to(working_dtype(x)).reshape(_along(axis, x))
        offsets = None if offset is None else offset.to(steps.dtype).reshape(_along(axis, x))
        blocks = _blocks(x, order, axis), _blocks(grad_output, order, axis)
        of_x, of_scale, of_offset = _backward(*blocks, steps, offsets, low, high, ctx.learned)
        if of_scale is not None:
            factor = (high.to(steps.dtype) * ctx.count).rsqrt()
            of_scale = (of_scale * factor).to(scale.dtype).view(scale.shape)
            of_offset = None if offset is None or of_offset is None else (of_offset * factor).view(offset.shape)
        return unflatten(of_x, x.shape, order), of_scale, of_offset, *(None,) * 8


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    axis: Axis = None,
    offset: Tensor | None = None,
    count: int = 1,
    dtype: torch.dtype | None = None,
    noise: Noise | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Round `x` to the grid s * {low, ..., high} + b: s * round(clamp((x - b) / s, low, high)) + b, ties to even.

    scale, offset   [C] steps s and offsets b (none: 0), along `axis` of `x`; [1], or 0-dim, for one in all
    axis            of the steps; or two, the first of which is 0, with a step for each pair of entries
    low, high       0-dim tensors of integers
    count           elements that share a step: the gradients of s and b are scaled by 1 / sqrt(count * high)
    dtype           of the result; default: `x`'s. The arithmetic is in float32 (float64 stays float64)
    noise           added to the result; no gradient goes through it
    known           the result, where it is known already

    Gradients (LSQ, arXiv 1902.08153, eq. 3 and 5; LSQ+, arXiv 2004.09576), with v = (x - b) / s: by x, 1 where
    low < v < high, else 0; by s, round(v) - v inside and the bound outside; by b, 0 inside and 1 outside.
    """
    if axis is not None and x.dim() < 2:
        raise ValueError("a step per channel needs a tensor of two or more dimensions: use one for the tensor")
    if scale.numel() == 1:
        axis = None
    learned = scale.requires_grad or (offset is not None and offset.requires_grad)
    with no_autocast(x):
        return _FakeQuantize.apply(x, scale, offset, low, high, axis, count, learned, dtype or x.dtype, noise, known)
