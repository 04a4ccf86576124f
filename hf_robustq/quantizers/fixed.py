"""Uniform quantization with a step that calibration sets and training leaves alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_robustq.functional import fake_quantize
from hf_robustq.grid import Grid
from hf_robustq.quantizers.quantizer import Quantizer, Role


class Fixed(Quantizer):
    """s * clamp(round(x / s), low, high) with a constant s; straight-through gradient inside the range."""

    narrow = True

    def __init__(self, grid: Grid, channels: int = 1, role: Role = "weight") -> None:
        super().__init__(grid, channels, role)
        self.register_buffer("scale", torch.ones(self.channels, dtype=torch.float32))

    def quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.steps, self.low, self.high, **self.options(x))
