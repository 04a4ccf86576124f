"""Uniform quantization of weights from their largest magnitude: the grid of WaveQ (arXiv 2003.00146)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hf_robustq.functional import SMALLEST, fake_quantize, others, working_dtype
from hf_robustq.grid import Grid
from hf_robustq.quantizers.quantizer import Role
from hf_robustq.quantizers.variable_bits import VariableBits


class Absmax(VariableBits):
    """max|w| * round(k * w / max|w|) / k with k = 2^beta - 1: the levels -1, ..., -1/k, 0, 1/k, ..., 1 times max|w|.

    Of weights only, with max|w| of the moment, for the tensor or for each output channel; it is a constant to the
    gradient, which passes straight through. 2^(ceil(beta) + 1) - 1 levels take ceil(beta) + 1 bits.
    """

    rules = {"weight": "absmax", "input": "absmax"}  # noqa: RUF012
    narrow = only_narrow = True
    roles = ("weight",)
    sign_bits, odd = 1, False

    def __init__(self, grid: Grid, channels: int = 1, role: Role = "weight") -> None:
        super().__init__(grid, channels, role)
        if role == "input":
            raise ValueError("absmax: quantizes weights; inputs take fixed, lsq or another method")
        if not grid.narrow:
            raise ValueError("absmax: its grid is symmetric: leave narrow out")
        self.register_buffer("scale", torch.ones(self.channels, dtype=torch.float32))

    @staticmethod
    def ends(beta: Tensor) -> tuple[Tensor, Tensor]:
        last = 2.0 ** beta.ceil() - 1
        return -last, last

    def set_bits(self, bits: int | None) -> None:
        super().set_bits(bits)
        if bits is not None:  # the range is the largest weight's, between whole numbers of bits too
            self.stretch = (2 ** float(self.beta) - 1) / float(self.high)

    def steps_of(self, weight: Tensor) -> AbstractContextManager[Tensor]:
        return nullcontext(self._steps(weight))

    @torch.no_grad()
    def _steps(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(others(x, self.grid.axis)).to(working_dtype(x)).view(-1)
        return (largest / (2.0**self.beta - 1)).clamp(min=SMALLEST)

    def quantize(self, x: Tensor) -> Tensor:
        options = self.options(x)
        if self.stretch is not None or self.other_steps is not None:  # a sweep's
            return fake_quantize(x, self.steps, self.low, self.high, **options)
        steps = self._steps(x)
        with torch.no_grad():
            self.scale.copy_(steps)
        # nothing lies beyond the outer levels, and what lies on them is to have a gradient
        return fake_quantize(x, steps, self.low - 1, self.high + 1, **options)
