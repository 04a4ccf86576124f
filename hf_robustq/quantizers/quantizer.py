"""The abstract quantizer."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from hf_robustq.functional import SMALLEST, along, autocast_dtype
from hf_robustq.grid import Grid
from hf_robustq.scales import SCALE_RULES, Sample
from hf_robustq.sharded import assign, clamp_local, whole
from hf_robustq.stage import Stage

LEARNED = "learned"
"""The rule that is no search: the steps a quantizer has, at other bits within its clip range."""

Role = Literal["weight", "input"]


class Quantizer(Stage, ABC):
    """A stage that puts its input on a grid: the same shape out, and the dtype that autocast wants for a product.

    scale         [C] positive steps, C = 1 or the size of `grid.axis`: a Parameter where it is learned
    low, high     0-dim integer range, in float32
    initialized   bool; part of the state, so that a resumed run never calibrates again; never read in forward
    enabled       False: identity (a sweep looks at the float tensor)
    role          what it quantizes: a weight, or a layer's input
    site          the name of the weight, which random draws are a function of
    keep, kept    whether to hold on to the result for the next micro-batch, whose weight is the same; the result
    product       whether its result goes into a matrix product; else its dtype is left alone under autocast
    """

    rules: Mapping[Role, str] = {"weight": "mse", "input": "mse"}
    """The scale rules that set the first steps, where the config names none."""
    calibrated = True
    """Whether its steps are set by such a rule."""
    uniform = True
    """Whether it rounds x to multiples of `scale`."""
    narrow = False
    """Whether a weight's grid is the narrow one, where the config does not say."""
    only_narrow = False
    """Whether it cannot be another."""
    roles: tuple[Role, ...] = ("weight", "input")
    """What it can quantize."""

    scale: Tensor
    low: Tensor
    high: Tensor
    initialized: Tensor

    def __init__(self, grid: Grid, channels: int = 1, role: Role = "weight") -> None:
        super().__init__()
        self.grid = grid
        self.channels = channels if grid.axis is not None else 1
        self.role: Role = role
        self.site = ""
        self.enabled = True
        self.stretch: float | None = None
        self.other_steps: Tensor | None = None
        self.keep = False
        self.kept: tuple[tuple[int, int], Tensor] | None = None
        self.product = True
        self.register_buffer("low", torch.tensor(grid.low, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(grid.high, dtype=torch.float32))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def init_from(self, sample: Sample, rule: str | None = None) -> None:
        """Set the steps from the distribution of what passes through, by a rule of `SCALE_RULES`."""
        self.warn_of_zeros(sample)
        self.warn_of_losses(sample)
        self.set_steps(SCALE_RULES[rule or self.rules[self.role]](sample, self.grid))

    def set_steps(self, scale: Tensor) -> None:
        """Take over steps, and the range of the grid."""
        assign(self.scale, scale.clamp(min=SMALLEST))
        self.low.fill_(self.grid.low)
        self.high.fill_(self.grid.high)
        self.initialized.fill_(True)

    @property
    def bits(self) -> int:
        """Storage bits, sign included."""
        return self.grid.bits

    @property
    def what(self) -> str:
        """What passes through, in a message."""
        return f"{'the input of ' if self.role == 'input' else ''}{self.site or 'a tensor'}"

    def warn_of_zeros(self, sample: Sample) -> None:
        """Warn where calibration saw nothing but zeros."""
        if not bool((sample.minimum.abs() + sample.maximum.abs()).any()):
            warnings.warn(f"{self.what} is zero everywhere in calibration: its step is arbitrary", stacklevel=3)

    def warn_of_losses(self, sample: Sample) -> None:
        """Warn of what the grid cannot hold: negative values on an unsigned one."""
        lost = float((sample.counts[:, : sample.values.size(1)] * (sample.values < 0)).sum() / sample.counts.sum())
        if not self.grid.signed and lost:
            warnings.warn(f"{self.what} has negative values, {lost:.1%}, which an unsigned grid loses", stacklevel=3)

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
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        if self.scale.requires_grad:
            clamp_local(self.scale, SMALLEST)

    def sharing(self, x: Tensor) -> int:
        """How many elements of `x` share a step: those of a weight's channel, those of one sample of an input."""
        return x.numel() // (self.channels if self.role == "weight" else max(x.size(0), 1))

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the result."""
        return autocast_dtype(x) if self.product else x.dtype

    @property
    def steps(self) -> Tensor:
        """The steps in use: `scale`, or what `set_bits` and `change_steps` make of it."""
        if self.other_steps is not None:
            return self.other_steps
        return self.scale if self.stretch is None else self.scale * self.stretch

    def steps_of(self, weight: Tensor) -> AbstractContextManager[Tensor]:  # noqa: ARG002
        """`scale`, whole, as it is for this whole weight."""
        return whole(self.scale)

    def steps_along(self, x: Tensor) -> Tensor:
        """`scale`, a constant, in the shape that broadcasts along its axis of `x`."""
        with whole(self.scale) as scale:
            return along(scale.clamp(min=SMALLEST), x, self.grid.axis)

    def set_bits(self, bits: int | None) -> None:
        """Quantize to other bits within the same clip range; None: to the own ones again.

        The range is s * low .. s * high; a full signed grid, whose ends are not alike, keeps the lower one (the levels
        of fewer bits are then among those of more).
        """
        grid = self.grid if bits is None else replace(self.grid, bits=bits)
        self.stretch = None if bits is None else (self.grid.low / grid.low if grid.low else self.grid.high / grid.high)
        self.other_steps = None
        self.low.fill_(grid.low)
        self.high.fill_(grid.high)

    def change_steps(self, change: Callable[[Tensor], Tensor]) -> None:
        """Use `change(steps)` ([C]) on the same integers, until `set_bits` is called next."""
        with whole(self.scale) as scale:
            steps = scale.detach().clamp(min=SMALLEST)
            self.other_steps = change(steps if self.stretch is None else steps * self.stretch)

    def change_bits(self, bits: int) -> None:
        """`set_bits`, for good."""
        self.set_bits(bits)
        assign(self.scale, self.steps)
        self.grid, self.stretch = replace(self.grid, bits=bits), None

    @property
    def _keeps(self) -> bool:
        return self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def options(self, x: Tensor) -> dict[str, Any]:
        """What `fake_quantize` is to know of `x`."""
        known = None
        if self.kept is not None and self._keeps:
            source, result = self.kept
            known = result if source == identity(x) and result.dtype == self.dtype(x) else None
        return {"axis": self.grid.axis, "count": self.sharing(x), "dtype": self.dtype(x), "known": known}

    @abstractmethod
    def quantize(self, x: Tensor) -> Tensor:
        """`x` on the grid."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        y = self.quantize(x)
        if self.keep and self._keeps:
            self.kept = identity(x), y.detach()
        return y

    def extra_repr(self) -> str:
        axis = "" if self.grid.axis is None else f", axis={self.grid.axis}"
        return f"bits={self.bits}, levels={int(self.low)}..{int(self.high)}{axis}"


def identity(x: Tensor) -> tuple[int, int]:
    """Alike only where a tensor's storage is the same and has not been written to."""
    return x.data_ptr(), x._version
