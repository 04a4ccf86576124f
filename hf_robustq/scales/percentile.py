"""The step that clips a given share of the elements."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.scales.absmax import absmax
from hf_robustq.scales.sample import Sample


def percentile(sample: Sample, grid: Grid, share: float = 0.9999) -> Tensor:
    """Smallest step whose outer level is at or above the `share`-quantile of |x| (of max(x, 0) where unsigned).

    The quantile is an element (the outer edge of its bin, for a histogram): no interpolation. Never above `absmax`.
    Returns [C], positive.
    """
    size = sample.values.size(1)
    counts = sample.counts[:, :size]
    magnitude = sample.values.abs() if grid.signed else sample.values.clamp(min=0)
    edge, order = (magnitude + (magnitude > 0) * sample.width / 2).sort(1)
    below = sample.zeros[:, None] + counts.gather(1, order).cumsum(1)
    wanted = share * below[:, -1:]
    index = torch.searchsorted(below, wanted).clamp(max=size - 1)
    cover = absmax(sample, grid)
    scale = edge.gather(1, index)[:, 0] / grid.high
    return torch.where(scale > 0, torch.minimum(scale, cover), cover)
