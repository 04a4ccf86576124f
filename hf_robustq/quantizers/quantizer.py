"""The abstract quantizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.scales import SCALE_RULES, Sample
from hf_robustq.stage import Stage


class Quantizer(Stage, ABC):
    """A stage that puts its input on a grid: the same shape and dtype out.

    scale         [C] positive steps, C = 1 or the size of `grid.axis`: a Parameter where it is learned
    low, high     0-dim integer range, in float32
    initialized   bool; part of the state, so that a resumed run never calibrates again; never read in forward
    enabled       False: identity (a sweep looks at the float tensor)
    """

    scale: Tensor
    low: Tensor
    high: Tensor
    initialized: Tensor

    def __init__(self, grid: Grid, channels: int = 1) -> None:
        super().__init__()
        self.grid = grid
        self.channels = channels if grid.axis is not None else 1
        self.enabled = True
        self.register_buffer("low", torch.tensor(grid.low, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(grid.high, dtype=torch.float32))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def init_from(self, sample: Sample, rule: str = "mse") -> None:
        """Set the steps from the distribution of what passes through, by a rule of `SCALE_RULES`."""
        self.scale.copy_(SCALE_RULES[rule](sample, self.grid))
        self.low.fill_(self.grid.low)
        self.high.fill_(self.grid.high)
        self.initialized.fill_(True)

    def restored(self) -> None:
        """Take the grid from `low` and `high`, which were loaded or received. Raises `ValueError` for nonsense."""
        if not bool(self.initialized):
            return
        low, high = float(self.low), float(self.high)
        self.grid = replace(self.grid, signed=low < 0, narrow=self.grid.narrow and low < 0)
        if (low, high) != (self.grid.low, self.grid.high):
            raise ValueError(f"levels {low:g}..{high:g} are not those of {self.grid.bits} bits")
        if not bool((self.scale.isfinite() & (self.scale > 0)).all()):
            raise ValueError("a step is not a positive number")

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """`x` on the grid."""

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x) if self.enabled else x

    def extra_repr(self) -> str:
        axis = "" if self.grid.axis is None else f", axis={self.grid.axis}"
        return f"bits={self.grid.bits}, levels={int(self.low)}..{int(self.high)}{axis}"
