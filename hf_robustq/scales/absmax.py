"""The step at which nothing is clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.scales.sample import Sample


def absmax(sample: Sample, grid: Grid) -> Tensor:
    """Smallest step whose grid covers every element: max(max x / high, min x / low). Returns [C], positive."""
    positive = sample.maximum.clamp(min=0) / grid.high
    negative = sample.minimum.clamp(max=0) / grid.low if grid.low else torch.zeros_like(positive)
    scale = torch.maximum(positive, negative)
    return torch.where(scale > 0, scale, sample.absmax / grid.high)
