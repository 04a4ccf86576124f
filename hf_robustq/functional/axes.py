"""What has a step of its own: everything (None), each entry of an axis, or each pair of entries of two axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Axis = int | tuple[int, ...] | None


def _axes(axis: Axis) -> tuple[int, ...]:
    return () if axis is None else (axis,) if isinstance(axis, int) else axis


def channels_along(shape: Sequence[int], axis: Axis) -> int:
    """C, the number of steps for a tensor of this shape."""
    return math.prod(shape[one] for one in _axes(axis))


def along(values: Tensor, x: Tensor, axis: Axis) -> Tensor:
    """[C] or [1] values in the shape that broadcasts over `x`."""
    shape = [1] * x.dim()
    if values.numel() > 1:
        for one in _axes(axis):
            shape[one] = x.size(one)
    return values.view(shape)


def others(x: Tensor, axis: Axis) -> list[int]:
    """The dimensions of `x` whose entries share a step."""
    own = {one % x.dim() for one in _axes(axis)}
    return [d for d in range(x.dim()) if d not in own]


def rows(x: Tensor, axis: Axis) -> Tensor:
    """[C, n]: `x` with a row for each step."""
    own = _axes(axis)
    return x.movedim(own, tuple(range(len(own)))).reshape(channels_along(x.shape, axis), -1)


def from_rows(found: Tensor, x: Tensor, axis: Axis) -> Tensor:
    """What `rows` made of `x`, or something of its shape, in the shape of `x` again."""
    own = _axes(axis)
    moved = x.movedim(own, tuple(range(len(own))))
    return found.view(moved.shape).movedim(tuple(range(len(own))), own)
