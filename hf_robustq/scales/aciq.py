"""ACIQ, analytical clipping for integer quantization (arXiv 1810.05723): the step from two moments of the elements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.scales.absmax import absmax
from hf_robustq.scales.mse import quantization_error
from hf_robustq.scales.sample import Sample


def gauss_error(alpha: float, bits: float) -> float:
    """Expected squared error of `bits` bits over [-alpha, alpha] for N(0, 1): clipping on both sides, and rounding.

    (alpha^2 + 1) * erfc(alpha / sqrt(2)) - sqrt(2 / pi) * alpha * exp(-alpha^2 / 2) + alpha^2 / (3 * 4^bits)
    """
    outside = (alpha**2 + 1) * math.erfc(alpha / math.sqrt(2)) - _gauss(alpha) * alpha
    return outside + alpha**2 / (3 * 4**bits)


def laplace_error(alpha: float, bits: float) -> float:
    """The same for Laplace(0, 1): 2 * exp(-alpha) + alpha^2 / (3 * 4^bits)."""
    return 2 * math.exp(-alpha) + alpha**2 / (3 * 4**bits)


def _gauss(alpha: float) -> float:
    return math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2)


@functools.cache
def gauss_clip(bits: float) -> float:
    """The alpha that minimises `gauss_error`: the root of its derivative, which rises."""
    return _root(lambda a: a * math.erfc(a / math.sqrt(2)) - _gauss(a) + a / (3 * 4**bits))


@functools.cache
def laplace_clip(bits: float) -> float:
    """The alpha that minimises `laplace_error`: W(3 * 4^bits), the Lambert function."""
    return _root(lambda a: a / (3 * 4**bits) - math.exp(-a))


def _root(rising: Callable[[float], float], low: float = 0.0, high: float = 64.0) -> float:
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def _step(sample: Sample, grid: Grid, deviation: Tensor, mean: Tensor, clip: Callable[[float], float]) -> Tensor:
    """Two-sided: 2^bits levels over [-a, a]. One-sided: those of the upper half of a grid of one bit more."""
    bits = grid.bits + int(not grid.signed)
    reach = mean.abs() + deviation * clip(bits) if grid.signed else mean.clamp(min=0) + deviation * clip(bits)
    cover = absmax(sample, grid)
    return torch.where(deviation > 0, torch.minimum(reach / grid.high, cover), cover)


def moments(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """[C] mean, standard deviation and mean absolute deviation of the elements, exact zeros included."""
    counts = sample.counts[:, : sample.values.size(1)]
    total = sample.counts.sum(1)
    mean = (counts * sample.values).sum(1) / total
    centred = sample.values - mean[:, None]
    variance = ((counts * centred**2).sum(1) + sample.zeros * mean**2) / total
    return mean, variance.sqrt(), ((counts * centred.abs()).sum(1) + sample.zeros * mean.abs()) / total


def aciq_gauss(sample: Sample, grid: Grid) -> Tensor:
    """The step that is best for a normal distribution of the same mean and standard deviation. Returns [C], positive.

    Choice: the paper's range is [mean - alpha, mean + alpha]; a symmetric grid reaches |mean| + alpha. One-sided
    elements count as the upper half of a distribution, so alpha is that of one bit more (section 3.3).
    """
    mean, deviation, _ = moments(sample)
    return _step(sample, grid, deviation, mean, gauss_clip)


def aciq_laplace(sample: Sample, grid: Grid) -> Tensor:
    """The step that is best for a Laplace distribution of the same mean and mean absolute deviation."""
    mean, _, deviation = moments(sample)
    return _step(sample, grid, deviation, mean, laplace_clip)


def aciq(sample: Sample, grid: Grid) -> Tensor:
    """The better of `aciq_gauss` and `aciq_laplace` on these very elements."""
    steps = aciq_gauss(sample, grid), aciq_laplace(sample, grid)
    errors = [quantization_error(sample, step, grid) for step in steps]
    return torch.where(errors[1] < errors[0], steps[1], steps[0])
