"""Quantizers whose number of levels may change from step to step, as WaveQ learns it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_robustq.grid import Grid
from hf_robustq.quantizers.quantizer import Quantizer, Role


class VariableBits(Quantizer):
    """A quantizer with a continuous number of bits, beta, of which levels there are by the ceiling.

    Its steps follow from the tensor itself.

    beta    0-dim float32; storage bits are ceil(beta) + `sign_bits`
    varies  whether beta is told it from outside (`follow`), and is not what the config says
    """

    calibrated = False
    sign_bits: int
    """Storage bits beyond beta's."""
    odd: bool
    """Whether the levels are the odd multiples of half a spacing, 0 not among them; else all multiples of one."""

    beta: Tensor

    def __init__(self, grid: Grid, channels: int = 1, role: Role = "weight") -> None:
        super().__init__(grid, channels, role)
        self.varies = False
        self.register_buffer("beta", torch.tensor(float(grid.bits - self.sign_bits)))

    @staticmethod
    @abstractmethod
    def ends(beta: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) of the integers, elementwise."""

    @torch.no_grad()
    def follow(self, beta: Tensor) -> None:
        """Take a 0-dim beta."""
        self.beta.copy_(beta)
        for own, end in zip((self.low, self.high), self.ends(self.beta), strict=True):
            own.copy_(end)

    @property
    def bits(self) -> int:
        """Storage bits now."""
        return math.ceil(float(self.beta)) + self.sign_bits if self.varies else self.grid.bits

    def set_bits(self, bits: int | None) -> None:
        if self.varies:
            self.grid = replace(self.grid, bits=self.bits)
        super().set_bits(bits)

    def change_bits(self, bits: int) -> None:
        super().change_bits(bits)
        self.beta.fill_(bits - self.sign_bits)

    def restored(self) -> None:
        if self.varies and bool(self.initialized):
            if not 0 < float(self.beta) < math.inf:
                raise ValueError(f"a number of bits is {float(self.beta):g}")
            self.grid = replace(self.grid, bits=self.bits)
        super().restored()


@torch.no_grad()
def follow(quantizers: Sequence[VariableBits], betas: Tensor) -> None:
    """`follow` of several, which are of one method, with [n] betas."""
    low, high = quantizers[0].ends(betas)
    for name, values in (("beta", betas), ("low", low), ("high", high)):
        for quantizer, value in zip(quantizers, values.unbind(), strict=True):
            getattr(quantizer, name).copy_(value)
