"""DoReFa: weights squashed by tanh, inputs clamped to [0, 1], nothing to learn (arXiv 1606.06160)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_robustq.functional import fake_quantize, no_autocast, others, working_dtype
from hf_robustq.grid import Grid
from hf_robustq.options import Range, checked
from hf_robustq.quantizers.quantizer import Role
from hf_robustq.quantizers.variable_bits import VariableBits
from hf_robustq.scales import Sample


class DoReFa(VariableBits):
    """Nothing to learn and nothing to calibrate; with n = 2^bits - 1 and q(x) = round(n * x) / n:

    weights   2 * q(tanh(w) / (2 * max|tanh(w)|) + 1/2) - 1 (eq. 9); always in [-1, 1], so a norm must follow
    inputs    q(clamp(x, 0, 1)) (eq. 11)

    Where WaveQ learns beta, bits are ceil(beta), and weights are times c = 2^ceil(beta) / 2^beta (its eq. B.2).

    The gradient passes straight through the rounding, and through tanh and the maximum as they are. The maximum's falls
    on one weight: a learning rate that is too high makes it an outlier, against which all others are small and lose
    their levels (the kurtosis in the logs shows it).

    rescale   weights times max|w|, a constant to the gradient: for layers without a norm
    clip      inputs are clamped at it instead of 1
    """

    uniform = False
    sign_bits, odd = 0, True

    @checked("dorefa")
    def __init__(
        self,
        grid: Grid,
        channels: int = 1,
        role: Role = "weight",
        rescale: bool = False,
        clip: Annotated[float, Range(1e-6, 1e6)] = 1.0,
    ) -> None:
        super().__init__(grid, channels, role)
        self.rescale, self.clip = rescale, clip
        self.register_buffer("scale", torch.ones(self.channels, dtype=torch.float32))

    @torch.no_grad()
    def init_from(self, sample: Sample, rule: str | None = None) -> None:  # noqa: ARG002
        """The steps do not depend on the data; an input's grid is the unsigned one."""
        self.grid = replace(self.grid, signed=self.role == "weight", narrow=self.grid.narrow and self.role == "weight")
        self.warn_of_losses(sample)
        reach = 2.0 if self.role == "weight" else self.clip
        self.set_steps(torch.full_like(self.scale, reach / (self.grid.levels - 1)))

    @staticmethod
    def ends(beta: Tensor) -> tuple[Tensor, Tensor]:
        half = 2.0 ** (beta.ceil() - 1)
        return -half, half - 1

    def quantize(self, x: Tensor) -> Tensor:
        if self.role == "input":
            return fake_quantize(x, self.steps, self.low, self.high, dtype=self.dtype(x))
        # tanh and what follows it are as large as the weight: made again in the backward
        return checkpoint(self._quantize_weight, x, use_reentrant=False, preserve_rng_state=False)

    def distance(self, weight: Tensor) -> Tensor:
        """0-dim: mean distance of tanh(w) / max|tanh(w)| from its nearest level, in spacings."""
        squashed = torch.tanh(weight.to(working_dtype(weight)))
        place = (squashed / self._largest(squashed).clamp(min=torch.finfo(squashed.dtype).tiny) + 1) / 2
        place = place * (self.high - self.low)
        return (place - place.round()).abs().mean()

    def _largest(self, x: Tensor) -> Tensor:
        """max|x|, of everything or of each output channel, to divide by."""
        if self.grid.axis is None:
            return x.abs().amax()
        return x.abs().amax(others(x, self.grid.axis), keepdim=True)

    def _quantize_weight(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            w = x.to(working_dtype(x))
            squashed = torch.tanh(w)
            unit = squashed / self._largest(squashed).clamp(min=torch.finfo(w.dtype).tiny)
            last = self.high - self.low
            step, below = 2.0 / last, last.new_full((), -1.0)
            # one level more at each end, so that +-1 count as inside and the gradient passes everywhere
            value = fake_quantize(unit, step, below, last + 1, offset=below)
            if self.varies and self.stretch is None:
                value = value * 2.0 ** (self.beta.ceil() - self.beta)
            if self.rescale:
                value = value * self._largest(w.detach())
        return value.to(self.dtype(x))
