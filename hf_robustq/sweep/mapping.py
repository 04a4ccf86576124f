"""Mappings: what quantized hardware makes of a tensor, beyond a step on a symmetric grid. For evaluation only.

A mapping takes a tensor and returns one of the same shape and dtype; arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hf_robustq.functional import Axis, along, others
from hf_robustq.grid import Grid
from hf_robustq.scales import Codebook, Sample

Mapping = Callable[[Tensor], Tensor]
Rounding = Literal["half_even", "half_away", "floor", "stochastic"]
Overflow = Literal["saturate", "wrap", "none"]


def to_integer(x: Tensor, rounding: Rounding, generator: torch.Generator | None = None) -> Tensor:
    """Round: ties to even, ties away from zero, down, or up with the probability of the fractional part."""
    if rounding == "half_away":
        return x.sign() * (x.abs() + 0.5).floor()
    if rounding == "floor":
        return x.floor()
    if rounding == "stochastic":
        return (x + torch.rand(x.shape, generator=generator).to(x)).floor()
    return x.round()


def into_range(codes: Tensor, low: Tensor, high: Tensor, overflow: Overflow) -> Tensor:
    """Codes beyond low .. high: the nearest of them; or modulo 2^bits, down from `high`; or as they are."""
    if overflow == "none":
        return codes
    if overflow == "wrap":
        span = torch.exp2(torch.ceil(torch.log2(high - low + 1)))
        return torch.remainder(codes - high - 1, span) + high + 1 - span
    return codes.clamp(low, high)


def uniform(
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    axis: Axis,
    rounding: Rounding = "half_even",
    overflow: Overflow = "saturate",
    seed: int = 0,
    same: bool = False,
) -> Mapping:
    """s * range(round(x / s)), with [C] or [1] steps and integer ranges.

    Stochastic draws are those of `seed`: with `same` at every call (a weight), else on and on (input after input).
    """
    generator = torch.Generator().manual_seed(seed)

    def quantize(x: Tensor) -> Tensor:
        if same:
            generator.manual_seed(seed)
        step, lowest, highest = (along(values.to(x.device, torch.float32), x, axis) for values in (scale, low, high))
        codes = to_integer(x.float() / step, rounding, generator)
        return (into_range(codes, lowest, highest, overflow) * step).to(x.dtype)

    return quantize


def asymmetric(sample: Sample, grid: Grid, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(step, low, high), each [C]: 2^bits levels with an integer zero point, over what the data and the step cover.

    The range goes from min(x, 0) to max(x, 0) within s * low .. s * high of the symmetric grid whose step is given;
    s' = range / (2^bits - 1), zero point z = round(-from / s'), integers -z .. 2^bits - 1 - z.
    """
    low, high = float(grid.low), float(grid.high)
    bottom = torch.maximum(sample.minimum.clamp(max=0), scale * low)
    top = torch.minimum(sample.maximum.clamp(min=0), scale * high)
    last = 2**grid.bits - 1
    step = torch.where(top > bottom, (top - bottom) / last, scale)
    zero = torch.round(-bottom / step).clamp(0, last)
    return step, -zero, last - zero


def by_codebook(book: Codebook, axis: Axis) -> Mapping:
    return lambda x: book.quantize(x, axis)


def corrected(mapping: Mapping, axis: Axis, variance: bool) -> Mapping:
    """The mapping of a weight with each output channel's mean, or mean and standard deviation, put back.

    mean       q + mean(w) - mean(q)
    variance   (q - mean(q)) * std(w) / std(q) + mean(w)
    (arXiv 1810.05723, section 4.1.) A channel that is quantized to one value is only moved.
    """

    def quantize(x: Tensor) -> Tensor:
        values, quantized = x.float(), mapping(x.float())
        over = others(x, axis)
        mean, centre = values.mean(over, keepdim=True), quantized.mean(over, keepdim=True)
        gain = 1.0
        if variance:
            spread, wanted = (t.std(over, correction=0, keepdim=True) for t in (quantized, values))
            gain = torch.where(spread > 0, wanted / spread, 1.0)
        return ((quantized - centre) * gain + mean).to(x.dtype)

    return quantize


def folded(mapping: Mapping, factor: Tensor, axis: Axis) -> Mapping:
    """The mapping of a weight times [C] factors, seen from before them: Q(w * g) / g; where g is 0, w itself."""

    def quantize(x: Tensor) -> Tensor:
        g = along(factor.to(x.device, torch.float32), x, axis)
        product = mapping(x.float() * g)
        return torch.where(g == 0, x.float(), product / g).to(x.dtype)

    return quantize
