"""The step that minimises the quantization error in an Lp norm (MMSE for p = 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.scales.absmax import absmax
from hf_robustq.scales.sample import Sample


def quantization_error(sample: Sample, scale: Tensor, grid: Grid, p: float = 2.0) -> Tensor:
    """[C] the sum over elements of |x - s * clamp(round(x / s), low, high)|^p, for a step per row.

    A bin of a histogram counts as a uniform density over its width, integrated in closed form: with
    u = x / s, k = clamp(round(u), low, high) and r = u - k, the antiderivative of |r|^p is
    k * 2 * 0.5^(p+1) / (p+1) + sign(r) * |r|^(p+1) / (p+1).
    """
    step = scale[:, None]

    def residual(x: Tensor) -> tuple[Tensor, Tensor]:
        nearest = torch.round(x / step).clamp(grid.low, grid.high)
        return nearest, x / step - nearest

    counts = sample.counts[:, : sample.values.size(1)]
    if sample.width == 0.0:
        return scale**p * (counts * residual(sample.values)[1].abs() ** p).sum(1)

    def antiderivative(x: Tensor) -> Tensor:
        nearest, r = residual(x)
        return (nearest * 2 * 0.5 ** (p + 1) + r.sign() * r.abs() ** (p + 1)) / (p + 1)

    half = sample.width / 2
    density = antiderivative(sample.values + half) - antiderivative(sample.values - half)
    return scale ** (p + 1) / sample.width * (counts * density).sum(1)


def mse(sample: Sample, grid: Grid, p: float = 2.0) -> Tensor:
    """The step that minimises `quantization_error`, searched from the covering step down to 1/64 of it.

    Geometric candidates 5% apart, then two refinements between the neighbours of the best. Returns [C], positive.
    """
    cover = absmax(sample, grid)
    best = cover
    least = quantization_error(sample, cover, grid, p)

    def consider(candidate: Tensor) -> None:
        nonlocal best, least
        error = quantization_error(sample, candidate, grid, p)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)

    for k in range(1, 82):
        consider(cover * 0.95**k)
    for spacing in (0.01, 0.002):
        centre = best
        for k in (-4, -3, -2, -1, 1, 2, 3, 4):
            consider(torch.minimum(centre * (1.0 + spacing * k), cover))
    return best
