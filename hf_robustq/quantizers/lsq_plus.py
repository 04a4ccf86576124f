"""LSQ+: learned steps and, for inputs, a learned offset (arXiv 2004.09576)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_robustq.functional import fake_quantize
from hf_robustq.grid import Grid
from hf_robustq.quantizers.lsq import LSQ
from hf_robustq.quantizers.quantizer import Role
from hf_robustq.scales import SCALE_RULES, Sample, quantization_error
from hf_robustq.sharded import assign


class LSQPlus(LSQ):
    """Inputs: s * round(clamp((x - b) / s, 0, 2^bits - 1)) + b with learned s and b (eq. 1 to 5 of the paper).

    For inputs that are a little negative, as after GELU or h-swish, which a signed grid wastes half its levels on.
    The gradient of b is 0 inside the range and 1 outside, scaled like that of s. Weights are as in LSQ, and start
    at max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(bits-1); s and b of inputs start where the squared error is least.
    """

    rules = {"weight": "lsq_plus", "input": "mse"}  # noqa: RUF012

    def __init__(self, grid: Grid, channels: int = 1, role: Role = "weight") -> None:
        super().__init__(grid, channels, role)
        if role == "input":
            self.offset = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    @torch.no_grad()
    def init_from(self, sample: Sample, rule: str | None = None) -> None:
        if self.role == "weight":
            super().init_from(sample, rule)
            return
        self.warn_of_zeros(sample)
        self.grid = replace(self.grid, signed=False, narrow=False)
        lowest = sample.minimum.clamp(max=0)
        offsets = [lowest * share / 10 for share in range(11)]
        shifted = [sample.shifted(offset) for offset in offsets]
        steps = [SCALE_RULES[rule or self.rules["input"]](one, self.grid) for one in shifted]
        errors = [quantization_error(one, step, self.grid) for one, step in zip(shifted, steps, strict=True)]
        best = int(torch.stack(errors).argmin())
        assign(self.offset, offsets[best])
        self.set_steps(steps[best])

    def restored(self) -> None:
        super().restored()
        if self.role == "input" and bool(self.initialized) and not bool(self.offset.isfinite().all()):
            raise ValueError("an offset is not a number")

    def quantize(self, x: Tensor) -> Tensor:
        if self.role == "weight":
            return super().quantize(x)
        return fake_quantize(x, self.steps, self.low, self.high, offset=self.offset, **self.options(x))
