"""WaveQ: gradient-based deep quantization through sinusoidal regularization (arXiv 2003.00146)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from hf_robustq.functional import chunks, flatten, fused, memory_order, unflatten, working_dtype
from hf_robustq.grid import MIN_BITS
from hf_robustq.options import OptionError, Range, checked
from hf_robustq.regularizers.regularizer import Regularizer, add_gradient
from hf_robustq.schedules import rise
from hf_robustq.sharded import clamp_local
from hf_robustq.stage import Moment

HIGHEST = 8
"""Of beta."""

NEGLIGIBLE = 1e-6
"""Shares of the strength below this are not worth their time."""


def _largest(w: Tensor, odd: bool) -> Tensor:
    """max|w| of a flat weight, or max|tanh(w)|."""
    largest = w.abs().amax().to(working_dtype(w))
    return (torch.tanh(largest) if odd else largest).clamp(min=torch.finfo(largest.dtype).tiny)


def wave(x: Tensor, beta: Tensor, variant: int = 1, odd: bool = False) -> Tensor:
    """Elementwise sin^2(pi * x * (2^beta - 1)) / 2^beta: R1, for x in [-1, 1] and beta, 0-dim or of one element.

    variant   0: sin^2(pi * x * 2^beta); 2: R1's sine over 4^beta
    odd       zero at odd multiples of 1 / (2^beta - 1) instead of all: cos^2(pi * x * (2^beta - 1) / 2) / 2^beta
    """
    places = x * (2.0**beta - min(variant, 1)) * (0.5 if odd else 1.0) + (0.5 if odd else 0.0)
    return torch.sin(math.pi * places) ** 2 * 2.0 ** (-variant * beta)


def _add_gradient(
    w: Tensor, grad: Tensor, strength: Tensor, beta: Tensor, variant: int, odd: bool, learn: bool
) -> tuple[Tensor, Tensor | None]:
    """(grad + strength * dR/dw, strength * dR/dbeta), for flat `w` and `grad` and a 0-dim beta."""
    dtype = working_dtype(w)
    largest, beta, strength = _largest(w, odd), beta.to(dtype), strength.to(dtype)
    power, size = torch.exp2(beta), torch.exp2(-variant * beta)
    share = 0.5 if odd else 1.0
    density = (power - (1 if variant else 0)) * share
    slope = strength * size * density * (math.pi / w.numel()) / largest
    turn, height = torch.zeros((), dtype=dtype, device=w.device), torch.zeros((), dtype=dtype, device=w.device)
    out = torch.empty_like(grad)
    for part, g, o in zip(chunks(w), chunks(grad), chunks(out), strict=True):
        value = part.to(dtype)
        value = torch.tanh(value) if odd else value
        unit = value / largest
        place = unit * density + (0.5 if odd else 0.0)
        angle = (place - place.round()) * (2 * math.pi)  # of twice the sine's, within half a turn
        double = torch.sin(angle)
        through = slope * double
        o.copy_(g + (through * (1 - value * value) if odd else through))
        if learn:
            turn = turn + (double * unit).sum()
            height = height + (1 - torch.cos(angle)).sum()
    if not learn:
        return out, None
    of_beta = size * math.log(2) / w.numel() * (math.pi * share * power * turn - variant * height / 2)
    return out, of_beta * strength


_fused_add_gradient = fused(_add_gradient)


class WaveQ(Regularizer):
    """Pulls weights to the levels of their quantizer, and finds how many there should be, one beta for each weight:

    R(w, beta) = mean sin^2(pi * x * (2^beta - 1)) / 2^beta + lambda_beta * beta,   x = w / max|w|

    With `absmax`, whose levels are n / (2^beta - 1), ceil(beta) + 1 storage bits. With `dorefa` x = tanh(w) /
    max|tanh(w)|, the sine is zero at (2n + 1) / (2^beta - 1), its levels for a whole beta, and there are ceil(beta)
    storage bits. max|w| is a constant to the gradient.

    learn          learn beta, from the bits of the quantizer's config down; False: those bits from beginning to end
    variant        R1, which is above; 0: sin^2(pi * x * 2^beta), 2: R1 over 2^beta once more
    beta_strength  height of lambda_beta; a budget takes its place
    rise           where the sine sets in and bits begin to be learned (phase 2)
    fall           where bits are fixed at ceil(beta), and weights go on to snap to their levels (phase 3)
    smoothness     of both (Fig. 8): lambda_w = f1, lambda_beta = beta_strength * (f1 - f2),
                   f = (1 + tanh((i - rise or fall) / smoothness)) / 2
                   All three in shares of the training, or with `fall` above 1 in optimizer steps
    snap           how many times as strong the sine is in phase 3: lambda_w = f1 + (snap - 1) * f2. While beta falls,
                   a strong one drags weights along with its levels, and max|w|, which then lies on none of them

    Choice: `strength` is averaged over the weights, where the paper sums: its lambda_w = 1 is their number. It does not
    act on beta, whose gradient is dR/dbeta as above, so that bits move alike at any strength. beta stays within [1, 8]
    ([2, 8] with dorefa); from `fall` on it is ceil(beta) whatever the optimizer does.
    """

    works_with = ("absmax", "dorefa")

    beta: Tensor
    pull: Tensor
    unit: Tensor
    frozen: Tensor

    @checked("waveq")
    def __init__(
        self,
        learn: bool = True,
        variant: Literal[0, 1, 2] = 1,
        beta_strength: Annotated[float, Range(0, 1e6)] = 0.05,
        rise: Annotated[float, Range(0, 1e12)] = 1 / 3,
        fall: Annotated[float, Range(0, 1e12, above=True)] = 0.75,
        smoothness: Annotated[float, Range(0, 1e12, above=True)] = 0.01,
        snap: Annotated[float, Range(1e-6, 1e6)] = 1.0,
    ) -> None:
        super().__init__()
        self.learn, self.variant, self.beta_strength, self.snap = learn, variant, beta_strength, snap
        self.rise, self.fall, self.smoothness = rise, fall, smoothness
        self.onset, self.odd, self.lowest = 0.0, False, 1
        self.fixed: float | None = None
        self.learning = learn
        beta = torch.full((1,), float(HIGHEST))
        if learn:
            self.beta = nn.Parameter(beta)
        else:
            self.register_buffer("beta", beta)
        self.register_buffer("pull", torch.zeros(()), persistent=False)
        self.register_buffer("unit", torch.zeros(()), persistent=False)
        self.register_buffer("frozen", torch.tensor(not learn))

    @staticmethod
    def check_together(rise: float = 1 / 3, fall: float = 0.75, **_: Any) -> None:
        """Raise `ValueError` for phases in the wrong order, or in two units."""
        if not rise < fall or fall == 1 or (fall > 1 and 0 < rise < 1):
            raise OptionError(
                "rise",
                "phases are 0 <= rise < fall, both in shares of the training below 1 or both in optimizer steps, "
                f"got rise={rise!r}, fall={fall!r}",
            )

    @torch.no_grad()
    def bind(self, quantizer: Any) -> None:
        """Begin at the bits of the weight's quantizer. Raises `ValueError` where beta cannot."""
        super().bind(quantizer)
        beta = quantizer.grid.bits - quantizer.sign_bits
        self.odd, self.lowest = quantizer.odd, MIN_BITS - quantizer.sign_bits
        if self.stacked:
            raise OptionError("waveq", f"works on weights with one step each: add experts to exclude: {quantizer.site}")
        if quantizer.grid.axis is not None:
            raise OptionError("waveq", "works on weights with one step each: remove per_channel from weights")
        if self.learn and not self.lowest <= beta <= HIGHEST:
            high = HIGHEST + quantizer.sign_bits
            raise OptionError(
                "waveq",
                f"beta is learned within {self.lowest} to {HIGHEST} and would begin at {beta}: "
                f"let weights begin at {MIN_BITS} to {high} bits",
            )
        if self.odd and quantizer.grid.narrow:
            raise OptionError("waveq", "with dorefa the levels are those of a full grid: remove narrow from weights")
        self.beta.fill_(beta)
        self.fixed, self.learning = None if self.learn else beta, self.learn
        quantizer.varies = self.learn

    def at(self, moment: Moment) -> None:
        onset, end = (rise(self.time(moment), edge, self.smoothness) for edge in (self.rise, self.fall))
        self.onset = onset if onset > NEGLIGIBLE else 0.0
        self.share = self.onset + (0.0 if self.learning else (self.snap - 1) * end)
        self.pulse = 1 - end / onset if self.onset else 0.0

    def time(self, moment: Moment) -> float:
        """Now, in the unit of the phases."""
        return moment.step if self.fall > 1 else moment.progress

    def check_phases(self, steps: int) -> None:
        """Raise `ValueError` where a run of so many optimizer steps has not a step for each phase."""
        unit = 1 if self.fall > 1 else steps
        begin, end = math.ceil(self.rise * unit), math.ceil(self.fall * unit)
        if self.learn and not begin < end < steps:
            raise ValueError(
                f"waveq: of {steps} optimizer steps bits would be learned from {begin} to {end} and weights snap after "
                f"that, which leaves no step to one of them: train longer, or change rise={self.rise:g} and "
                f"fall={self.fall:g}"
            )

    def penalty_arguments(self) -> tuple[Tensor, ...]:
        return (self.quantizer.beta,)

    def attach(self, x: Tensor, strength: Tensor) -> Tensor:
        return add_gradient(
            self._to_parameters, strength, x, *self.penalty_arguments(), self.pull, self.unit, *self.parameters()
        )

    def carry(self, strength: Tensor | float, factor: float) -> None:
        super().carry(strength, factor)
        self.unit.copy_(self.strength / factor * (self.onset / self.share))

    def penalty(self, w: Tensor, *theta: Tensor) -> Tensor:
        """The mean sine, of beta; lambda_beta * beta comes on top."""
        w = w.to(working_dtype(w)).flatten()
        unit = (torch.tanh(w) if self.odd else w) / _largest(w.detach(), self.odd)
        return wave(unit, theta[0].to(w.dtype), self.variant, self.odd).mean()

    def gradient(self, grad_output: Tensor, strength: Tensor, w: Tensor, *theta: Tensor) -> tuple[Tensor | None, ...]:
        (beta,) = theta
        order = memory_order(w)
        options = self.variant, self.odd, self.learning
        flat, slope = flatten(w, order), flatten(grad_output, order)
        of_w, of_beta = _fused_add_gradient(flat, slope, strength, beta.reshape(()), *options)
        of_beta = torch.zeros_like(beta) if of_beta is None else of_beta.to(beta.dtype).view_as(beta)
        return unflatten(of_w, w.shape, order), of_beta

    def _to_parameters(
        self,
        grad_output: Tensor,
        strength: Tensor,
        w: Tensor,
        beta: Tensor,
        pull: Tensor,
        unit: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """The gradient of what the quantizer has for beta goes to the parameter, with lambda_beta."""
        of_w, of_beta = self.gradient(grad_output, strength, w, beta)
        assert of_beta is not None
        total = (of_beta / strength + pull) * unit if self.learning else of_beta
        return of_w, None, None, None, *(total.to(p.dtype).view_as(p) for p in parameters)

    @torch.no_grad()
    def project(self) -> None:
        """Keep beta in its range, or where it was fixed; called after each optimizer step."""
        if self.learn:
            low, high = (self.lowest, HIGHEST) if self.fixed is None else (self.fixed, self.fixed)
            clamp_local(self.beta, low, high)

    def fix(self, beta: float) -> None:
        """From now on beta is what the quantizer has."""
        self.fixed, self.learning = beta, False
        self.frozen.fill_(True)
        self.quantizer.follow(torch.tensor(beta))
        self.project()

    def restored(self) -> None:
        """Take over what was loaded. Raises `ValueError` for a beta that cannot be."""
        beta = float(self.quantizer.beta)
        frozen = bool(self.frozen)
        if not frozen and not self.lowest <= beta <= HIGHEST:
            raise ValueError(f"beta is {beta:g}, outside {self.lowest} to {HIGHEST}")
        self.fixed, self.learning = (beta, False) if frozen else (None, True)

    def extra_repr(self) -> str:
        return f"learn={self.learn}, variant={self.variant}, rise={self.rise:g}, fall={self.fall:g}"
