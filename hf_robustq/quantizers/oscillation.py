"""Weights that go back and forth between two levels (Overcoming Oscillations in QAT, arXiv 2203.11086)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_robustq.quantizers.quantizer import Quantizer
from hf_robustq.stage import Stage

OFTEN = 0.005
"""The frequency from which on a weight counts as oscillating (section 2.3)."""


class Oscillation(Stage):
    """Watches one weight from optimizer step to optimizer step; the identity where it is read.

    A weight oscillates in a step where its level changes in the direction opposite to its last change (section
    2.2). f = m * o + (1 - m) * f is how often it does (eq. 4), with o = 1 in such a step, else 0.

    freeze    a weight whose f is above goes to the level it was nearest to on average, and stays there (section 4.3);
              None: only watch
    momentum  m, of f and of that average

    Choice: a frozen weight is written back after each step; its gradient goes on in the optimizer's state.
    """

    level: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    def __init__(self, shape: torch.Size, freeze: float | None = None, momentum: float = 0.01) -> None:
        super().__init__()
        self.freeze, self.momentum = freeze, momentum
        self.register_buffer("level", torch.zeros(shape, dtype=torch.int16))
        self.register_buffer("direction", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("average", torch.zeros(shape if freeze is not None else (0,), dtype=torch.float32))
        self.register_buffer("frozen", torch.zeros(shape if freeze is not None else (0,), dtype=torch.bool))
        self.register_buffer("begun", torch.tensor(False))

    @torch.no_grad()
    def update(self, weight: Tensor, quantizer: Quantizer) -> None:
        """After an optimizer step: look where each weight has gone, and put back the frozen ones."""
        step = quantizer.steps_along(weight)
        if self.freeze is not None:
            weight.copy_(torch.where(self.frozen, self.average.round() * step, weight))
        level = (weight.float() / step).round().clamp(quantizer.low, quantizer.high)
        begun = self.get_buffer("begun")
        moved = torch.where(begun, level - self.level, 0).sign().to(torch.int8)
        turned = (moved * self.direction) < 0
        self.frequency.lerp_(turned.float(), self.momentum)
        self.direction.copy_(torch.where(moved != 0, moved, self.direction))
        self.level.copy_(level)
        if self.freeze is not None:
            now = torch.where(begun, self.average.lerp(level, self.momentum), level)
            self.average.copy_(torch.where(self.frozen, self.average, now))
            new = (self.frequency > self.freeze) & ~self.frozen
            self.average.copy_(torch.where(new, self.average.round(), self.average))
            self.frozen.logical_or_(new)
        begun.fill_(True)

    @property
    def share(self) -> Tensor:
        """0-dim: the share of weights that oscillate."""
        return (self.frequency > OFTEN).float().mean()

    def forward(self, x: Tensor) -> Tensor:
        return x
