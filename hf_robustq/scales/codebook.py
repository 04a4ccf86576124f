"""Levels that are not multiples of one step: pure functions `rule(sample, grid) -> Codebook`.

Of the grid they use the bits, the sign and the axis; how many of its 2^bits codes they need is their own affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_robustq.functional import Axis, from_rows, rows
from hf_robustq.grid import Grid
from hf_robustq.scales.aciq import gauss_clip, moments
from hf_robustq.scales.mse import mse
from hf_robustq.scales.sample import Sample

MOST_BITS = 8
MOST_LEVELS = 4096


class Codebook(NamedTuple):
    """C rows of levels (C = 1: one row for the whole tensor).

    levels       [C, L] ascending
    thresholds   [C, L - 1] a value above the i-th goes to level i + 1
    """

    levels: Tensor
    thresholds: Tensor

    @classmethod
    def nearest(cls, levels: Tensor) -> Codebook:
        """Every value goes to the nearest of the levels."""
        return cls(levels, (levels[:, 1:] + levels[:, :-1]) / 2)

    def scaled(self, factor: float) -> Codebook:
        return Codebook(self.levels * factor, self.thresholds * factor)

    def quantize(self, x: Tensor, axis: Axis) -> Tensor:
        """`x` on the levels, a row for each entry of `axis`; the same shape and dtype."""
        flat = rows(x, axis).float().contiguous()
        codes = torch.searchsorted(self.thresholds.to(flat), flat)
        return from_rows(self.levels.to(flat).gather(1, codes).to(x.dtype), x, axis)


CodebookRule = Callable[[Sample, Grid], Codebook]


def log2(sample: Sample, grid: Grid) -> Codebook:
    """Zero and powers of two: sign(x) * 2^clip(round(log2|x|), top - n + 1, top), zero below that range.

    top = round(log2(max|x|)); n = 2^(b-1) - 1 exponents where signed, 2^b - 1 where not. Rounding is in the log domain,
    so x goes up to 2^e from sqrt(2) * 2^(e-1) (the nearest power would take over at 1.5 * 2^(e-1)).
    Choice: which variant papers mean by "log2" they do not say; this is LogQuant's (arXiv 1603.01025), with a zero.
    """
    count = 2 ** (grid.bits - 1) - 1 if grid.signed else 2**grid.bits - 1
    top = torch.round(torch.log2(sample.absmax))
    powers = torch.exp2(top[:, None] - torch.arange(count, device=top.device).flip(0))
    turns, zero = powers / math.sqrt(2), torch.zeros_like(powers[:, :1])
    if not grid.signed:
        return Codebook(torch.cat([zero, powers], 1), turns)
    return Codebook(torch.cat([-powers.flip(1), zero, powers], 1), torch.cat([-turns.flip(1), turns], 1))


def kmeans(sample: Sample, grid: Grid, iterations: int = 100, tolerance: float = 1e-5) -> Codebook:
    """2^bits levels at the centres of 1-D clusters, by Lloyd's algorithm.

    Started from the levels of `mse`, whose error it then lowers, and from quantiles of the cube root of the
    density (the best for many levels); the better of the two is taken. Exact zeros count like every
    element; an empty cluster keeps its centre. Stops where no centre moves by more than `tolerance` of the largest
    element.
    """
    values, counts = sample.values, sample.counts[:, : sample.values.size(1)]
    if sample.counts.size(1) > values.size(1):
        values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
        counts = torch.cat([counts, sample.zeros[:, None]], 1)
    values, order = values.sort(1)
    counts = counts.gather(1, order)
    grid = Grid(bits=grid.bits, signed=grid.signed, axis=grid.axis)
    even = mse(sample, grid)[:, None] * torch.arange(grid.low, grid.high + 1, device=values.device)
    below = (counts ** (1 / 3)).cumsum(1)
    wanted = (torch.arange(grid.levels, device=values.device) + 0.5) / grid.levels * below[:, -1:]
    spread = values.gather(1, torch.searchsorted(below, wanted).clamp(max=values.size(1) - 1))
    limit = tolerance * sample.absmax
    found = [_lloyd(values, counts, start, iterations, limit) for start in (even, spread)]
    errors = [(counts * (_assigned(values, centres) - values) ** 2).sum(1, keepdim=True) for centres in found]
    return Codebook.nearest(torch.where(errors[1] < errors[0], found[1], found[0]))


def _assigned(values: Tensor, centres: Tensor) -> Tensor:
    return centres.gather(1, torch.searchsorted(Codebook.nearest(centres).thresholds, values))


def _lloyd(values: Tensor, counts: Tensor, centres: Tensor, iterations: int, limit: Tensor) -> Tensor:
    for _ in range(iterations):
        owner = torch.searchsorted(Codebook.nearest(centres).thresholds, values)
        mass = torch.zeros_like(centres).scatter_add_(1, owner, counts)
        moment = torch.zeros_like(centres).scatter_add_(1, owner, counts * values)
        moved = torch.where(mass > 0, moment / mass.clamp(min=1), centres)
        settled = bool(((moved - centres).abs().amax(1) <= limit).all())
        centres = moved.sort(1).values
        if settled:
            break
    return centres


def dorefa(sample: Sample, grid: Grid) -> Codebook:
    """DoReFa's weights (arXiv 1606.06160, eq. 9), rescaled to max|w|: 2^bits levels, evenly spaced from -m to m.

    Its tanh makes the outer intervals longer: the thresholds are atanh(tanh(m) * middle).
    """
    if not grid.signed:
        raise ValueError("dorefa's levels are for weights")
    largest = sample.absmax[:, None]
    levels = torch.linspace(-1, 1, 2**grid.bits, dtype=torch.double, device=largest.device)[None]
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    return Codebook(largest * levels, torch.atanh(torch.tanh(largest) * middles))


def allocate(deviation: Tensor, bits: int) -> Tensor:
    """[C] levels of each channel, C * 2^bits of them together, for channels of these standard deviations.

    In proportion to sigma^(2/3), which minimises the sum of sigma_i^2 / levels_i^2 (arXiv 1810.05723, section 4.2),
    rounded by largest remainder. A channel whose share is none gets one level besides, none more than `MOST_LEVELS`.
    """
    channels = deviation.numel()
    share = deviation.double() ** (2 / 3)
    total = share.sum()
    wanted = channels * 2**bits * (share / total if bool(total > 0) else torch.full_like(share, 1 / channels))
    levels = wanted.floor()
    missing = channels * 2**bits - int(levels.sum())
    levels[(wanted - levels).argsort(descending=True, stable=True)[:missing]] += 1
    return levels.clamp(1, MOST_LEVELS).long()


def aciq_levels(sample: Sample, grid: Grid) -> Codebook:
    """ACIQ with per-channel bit allocation (arXiv 1810.05723): `allocate`d levels, evenly spaced over mean +- alpha.

    alpha is that of log2(levels) bits for a normal density. Raises `ValueError` for one row: nothing to allocate.
    Choice: levels are the middles of n equal parts of that range, as the error formula has them; zero is one of them
    where n is odd and the mean is zero.
    """
    if grid.axis is None:
        raise ValueError("aciq_levels shares levels out among channels: add /channel")
    mean, deviation, _ = moments(sample)
    levels = allocate(deviation, grid.bits)
    alpha = deviation * torch.tensor([gauss_clip(math.log2(n)) for n in levels.tolist()]).to(deviation)
    code = torch.arange(int(levels.max()), device=deviation.device)
    count = levels[:, None]
    values = mean[:, None] + alpha[:, None] * ((2 * code + 1).clamp(max=2 * count - 1) / count - 1)
    return Codebook(values, (values[:, 1:] + values[:, :-1]) / 2)


CODEBOOK_RULES: dict[str, CodebookRule] = {
    "aciq_levels": aciq_levels,
    "dorefa": dorefa,
    "kmeans": kmeans,
    "log2": log2,
}
