"""What a scale rule sees: the distribution of a tensor, one row per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_robustq.functional import Axis
from hf_robustq.functional import rows as by_step

BINS = 2048
"""Bins of a histogram, half of them each side of zero."""


@dataclass(frozen=True)
class Sample:
    """A weighted sample, `C` rows (channels) of `n` values each.

    values   [C, n] float64   the elements themselves, or bin centres
    counts   [C, n] float64   how many elements each value stands for
    width    bin width; 0 where `values` are the elements themselves
    minimum, maximum  [C]     exact extremes of the elements
    """

    values: Tensor
    counts: Tensor
    width: float
    minimum: Tensor
    maximum: Tensor

    @classmethod
    def of(cls, x: Tensor, axis: Axis = None) -> Sample:
        """The distribution of `x`, per entry of `axis` or over the whole tensor.

        Rows of more than `BINS` elements become a histogram where there is one row (a scale searched on
        it differs from one searched on the elements by less than a bin).
        """
        rows = by_step(x.detach().double(), axis)
        minimum, maximum = rows.amin(1), rows.amax(1)
        if not bool(torch.isfinite(minimum + maximum).all()):
            raise ValueError("non-finite values have no distribution")
        if rows.size(0) > 1 or rows.size(1) <= BINS:
            return cls(rows, torch.ones_like(rows), 0.0, minimum, maximum)
        counts, bound = accumulate(torch.zeros(BINS + 1, dtype=torch.long, device=x.device), 0.0, x)
        return cls.of_histogram(counts, bound, float(minimum), float(maximum))

    @classmethod
    def of_histogram(cls, counts: Tensor, bound: float, minimum: float, maximum: float) -> Sample:
        """The distribution a histogram of `accumulate` stands for; exact zeros stay exact zeros."""
        width = 2.0 * bound / BINS
        centres = (torch.arange(BINS, dtype=torch.double, device=counts.device) + 0.5) * width - bound
        extremes = torch.tensor([[minimum], [maximum]], dtype=torch.double, device=counts.device)
        return cls(centres[None], counts[None].double(), width, extremes[0], extremes[1])

    def shifted(self, offset: Tensor) -> Sample:
        """The distribution of x - offset ([C]); exact zeros of a histogram go with the bins beside zero."""
        size = self.values.size(1)
        counts = self.counts[:, :size].clone()
        if self.counts.size(1) > size:
            beside = self.values.abs() <= self.width / 2 + 1e-12 * self.width
            counts += beside * (self.zeros / beside.sum(1))[:, None]
        lower = offset[:, None]
        return Sample(self.values - lower, counts, self.width, self.minimum - offset, self.maximum - offset)

    @property
    def zeros(self) -> Tensor:
        """[C] exact zeros counted apart from the bins (none where `values` are the elements)."""
        return self.counts[:, self.values.size(1) :].sum(1)

    @property
    def absmax(self) -> Tensor:
        """[C] the largest magnitude, 1 where a row is all zero (any scale does there)."""
        largest = torch.maximum(self.maximum.abs(), self.minimum.abs())
        return torch.where(largest > 0, largest, torch.ones_like(largest))


def accumulate(counts: Tensor, bound: float, x: Tensor) -> tuple[Tensor, float]:
    """Add the elements of `x` to a histogram; returns the new `(counts, bound)`.

    `counts` is [BINS + 1] int64: BINS equal bins over [-bound, bound], then the number of exact zeros
    (half of what comes out of a ReLU). `bound` is a power of two that doubles when an element falls
    outside, merging bins in pairs, so batches can come one by one and in any order: counts are exact.
    """
    flat = x.detach().float().reshape(-1)
    largest = float(flat.abs().amax()) if flat.numel() else 0.0
    if largest > 0 and largest > bound:
        wider = 2.0 ** math.ceil(math.log2(largest))
        counts, bound = (_widen(counts, round(math.log2(wider / bound))) if bound else counts), wider
    zeros = (flat == 0).sum()
    inside = torch.zeros(BINS, dtype=torch.long, device=x.device)
    if bound > 0:
        for part in flat.split(1 << 24):  # histc counts in float32, which is exact only up to here
            inside += torch.histc(part, BINS, -bound, bound).long()
        inside[BINS // 2] -= zeros
    return counts + torch.cat([inside, zeros[None]]), bound


def _widen(counts: Tensor, doublings: int) -> Tensor:
    bins = counts[:-1]
    for _ in range(min(doublings, int(math.log2(BINS)) - 1)):
        merged = bins.view(-1, 2).sum(1)
        side = merged.new_zeros(BINS // 4)
        bins = torch.cat([side, merged, side])
    return torch.cat([bins, counts[-1:]])
