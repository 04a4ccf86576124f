"""The initial steps of LSQ and of LSQ+."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.scales.sample import Sample


def lsq(sample: Sample, grid: Grid) -> Tensor:
    """2 * mean|x| / sqrt(high) (arXiv 1902.08153, section 2.1). Returns [C], positive."""
    size = sample.values.size(1)
    mean = (sample.counts[:, :size] * sample.values.abs()).sum(1) / sample.counts.sum(1)
    return torch.where(mean > 0, 2.0 * mean / math.sqrt(grid.high), sample.absmax / grid.high)


def lsq_plus(sample: Sample, grid: Grid) -> Tensor:
    """max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1) (arXiv 2004.09576, section 3.2.2). Returns [C], positive."""
    size, count = sample.values.size(1), sample.counts.sum(1)
    weights = sample.counts[:, :size]
    mean = (weights * sample.values).sum(1) / count
    spread = ((weights * sample.values**2).sum(1) / count - mean**2).clamp(min=0).sqrt()
    reach = torch.maximum((mean - 3 * spread).abs(), (mean + 3 * spread).abs())
    return torch.where(reach > 0, reach, sample.absmax) / 2.0 ** (grid.bits - 1)
