"""The probe: a permanent last stage, identity in training, that a sweep and a calibration speak to."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from hf_robustq.functional import along, fake_quantize
from hf_robustq.grid import Grid
from hf_robustq.scales import Sample
from hf_robustq.scales.sample import BINS, accumulate
from hf_robustq.stage import Stage


class Probe(Stage):
    """Identity in training, and in evaluation until told otherwise.

    `name` says whose input or weight it is, in errors.

    mode "off"        identity
    mode "observe"    identity; counts reads and, with `histogram=True`, collects the distribution
                      (an input's probe without a histogram stays identity in every mode)
    mode "quantize"   s * clamp(round(x / s), low, high); range and step are tensors, so that another
                      configuration changes no module and recompiles nothing

    `channels` is the size of `axis`: a step per tensor is stored `channels` times. Nothing of the probe
    is saved with the model.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, name: str, axis: int | None = None, channels: int = 1, histogram: bool = False) -> None:
        super().__init__()
        self.name = name
        self.axis = axis
        self.histogram = histogram
        self.mode: Literal["off", "observe", "quantize"] = "off"
        self.keep = False  # hold on to the quantized tensor: for weights, within one configuration
        self._kept: Tensor | None = None
        self.uses = 0.0  # of the weight in one forward, once observed
        self.register_buffer("scale", torch.ones(channels), persistent=False)
        self.register_buffer("low", torch.zeros(()), persistent=False)
        self.register_buffer("high", torch.zeros(()), persistent=False)
        self.forget()

    def forget(self) -> None:
        """Start counting and observing anew."""
        self.calls = 0
        self.counts: Tensor | None = None
        self.bound, self.minimum, self.maximum = 0.0, 0.0, 0.0

    def sample(self) -> Sample:
        """What has been observed since `forget`."""
        if self.counts is None:
            raise ValueError(f"nothing is known of {self.name}: call plugin.observe(batches, forward) on training data")
        return Sample.of_histogram(self.counts, self.bound, self.minimum, self.maximum)

    def off(self) -> None:
        self.mode, self.keep, self._kept = "off", False, None

    def quantize(self, grid: Grid, scale: Tensor, keep: bool = False) -> None:
        """Quantize from now on with steps `scale` ([C] or [1])."""
        self.scale.copy_(scale.expand_as(self.scale))
        self.low.fill_(grid.low)
        self.high.fill_(grid.high)
        self.mode, self.keep, self._kept = "quantize", keep, None

    def _observe(self, x: Tensor) -> None:
        self.calls += 1
        if self.histogram:
            counts = torch.zeros(BINS + 1, dtype=torch.long, device=x.device) if self.counts is None else self.counts
            low, high = (float(extreme) for extreme in x.detach().aminmax())
            if not math.isfinite(low + high):
                raise ValueError(f"non-finite values in {self.name} in calibration: check the data and the weights")
            self.counts, self.bound = accumulate(counts, self.bound, x)
            self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.mode == "off":
            return x
        if self.mode == "observe":
            self._observe(x)
            return x
        if self.keep and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self._kept is None:
                self._kept = fake_quantize(x, along(self.scale, x, self.axis), self.low, self.high)
            return self._kept
        return fake_quantize(x, along(self.scale, x, self.axis), self.low, self.high)
