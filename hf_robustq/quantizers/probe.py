"""Probes: permanent last stages, identity in training, that a sweep and a calibration speak to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hf_robustq.functional import Axis, fake_quantize
from hf_robustq.grid import Grid
from hf_robustq.scales import Sample
from hf_robustq.scales.sample import BINS, accumulate
from hf_robustq.stage import Stage


@torch.compiler.disable
def _outside_the_graph(mapping: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Mappings are for evaluation, each used for a while: not worth a compilation."""
    return mapping(x)


class Probe(Stage):
    """Identity in training, and in evaluation until told otherwise.

    mode "off"        identity
    mode "observe"    identity; counts calls
    mode "quantize"   s * clamp(round(x / s), low, high); range and step are tensors, so that another
                      configuration changes no module and recompiles nothing
    mode "map"        whatever function it was given

    `channels` is the number of steps along `axis`: a step per tensor is stored `channels` times.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, axis: Axis = None, channels: int = 1) -> None:
        super().__init__()
        self.axis = axis
        self.mode: Literal["off", "observe", "quantize", "map"] = "off"
        self.mapping: Callable[[Tensor], Tensor] | None = None
        self.calls = 0
        self.register_buffer("scale", torch.zeros(channels, dtype=torch.float32), persistent=False)
        self.register_buffer("low", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("high", torch.zeros((), dtype=torch.float32), persistent=False)

    def forget(self) -> None:
        """Start counting and observing anew."""
        self.calls = 0

    def off(self) -> None:
        self.mode, self.mapping = "off", None

    def map(self, mapping: Callable[[Tensor], Tensor]) -> None:
        """Pass everything through a function of the same shape and dtype from now on."""
        self.mode, self.mapping = "map", mapping

    def quantize(self, grid: Grid, scale: Tensor) -> None:
        """Quantize from now on with steps `scale` ([C], [1], or one for each matrix of a stack)."""
        self.scale.copy_(scale.repeat_interleave(self.scale.numel() // scale.numel()))
        self.low.fill_(grid.low)
        self.high.fill_(grid.high)
        self.mode = "quantize"

    def observe(self, x: Tensor) -> None:  # noqa: ARG002
        self.calls += 1

    def quantized(self, x: Tensor) -> Tensor:
        if self.mode == "map":
            assert self.mapping is not None
            return _outside_the_graph(self.mapping, x)  # pyright: ignore[reportCallIssue]
        return fake_quantize(x, self.scale, self.low, self.high, axis=self.axis)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.mode == "off":
            return x
        if self.mode == "observe":
            self.observe(x)
            return x
        return self.quantized(x)


class WeightProbe(Probe):
    """The probe of a weight.

    uses   [1] reads of the weight in one forward, once calibrated; saved with the model
    macs   [1] multiply-accumulates with it for one sample, once calibrated; saved with the model
    keep   hold on to the quantized tensor, within one configuration
    """

    uses: Tensor
    macs: Tensor

    def __init__(self, axis: Axis, channels: int) -> None:
        super().__init__(axis, channels)
        self.keep = False
        self._kept: Tensor | None = None
        self.register_buffer("uses", torch.zeros(1, dtype=torch.float32))
        self.register_buffer("macs", torch.zeros(1, dtype=torch.float32))

    def off(self) -> None:
        super().off()
        self.keep, self._kept = False, None

    def quantize(self, grid: Grid, scale: Tensor) -> None:
        super().quantize(grid, scale)
        self._kept = None

    def map(self, mapping: Callable[[Tensor], Tensor]) -> None:
        super().map(mapping)
        self._kept = None

    def quantized(self, x: Tensor) -> Tensor:
        if not self.keep or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().quantized(x)
        if self._kept is None:
            self._kept = super().quantized(x)
        return self._kept


class InputProbe(Probe):
    """The probe of a layer's input; `name` is the layer's weight, for errors.

    Saved with the model, so that a checkpoint takes any activation quantizer without data:

    counts   [BINS + 1] int64, the histogram of `scales.sample.accumulate` over all that was observed
    range    [3] bound of the histogram, smallest and largest element (or 0)
    """

    counts: Tensor
    range: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("counts", torch.zeros(BINS + 1, dtype=torch.long))
        self.register_buffer("range", torch.zeros(3, dtype=torch.float32))

    def forget(self) -> None:
        super().forget()
        self.counts.zero_()
        self.range.zero_()

    def sample(self) -> Sample:
        """The distribution of what has been observed since `forget`."""
        if not bool(self.counts.any()):
            raise ValueError(
                f"nothing is known of the input of {self.name}: "
                "call plugin.observe(batches, forward) on training data, then save again"
            )
        return Sample.of_histogram(self.counts, *self.range.tolist())

    def restored(self) -> None:
        """Raise `ValueError` where what was loaded cannot be a histogram."""
        bound, minimum, maximum = self.range.tolist()
        if int(self.counts.min()) < 0 or not -bound <= minimum <= maximum <= bound < math.inf:
            raise ValueError("the statistics of its input are no histogram")

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        if not x.numel():
            return
        low, high = (float(extreme) for extreme in x.detach().aminmax())
        if not math.isfinite(low + high):
            raise ValueError(
                f"non-finite values in the input of {self.name} in calibration: check the data and the weights"
            )
        bound, minimum, maximum = self.range.tolist()
        counts, bound = accumulate(self.counts, bound, x)
        self.counts.copy_(counts)
        self.range.copy_(torch.tensor([bound, min(minimum, low), max(maximum, high)]))


class CallProbe(Probe):
    """The probe of an input that stays float: it counts calls and never quantizes."""

    def quantized(self, x: Tensor) -> Tensor:
        return x
