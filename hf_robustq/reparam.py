"""SatNL: a saturating nonlinearity between the stored weight and the network's (arXiv 2208.00338, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from hf_robustq.functional import chunks, flatten, fused, memory_order, no_autocast, unflatten, working_dtype
from hf_robustq.options import Range, check_known, checked, under
from hf_robustq.sharded import whole
from hf_robustq.sites import Site
from hf_robustq.stage import Stage


class Saturating(NamedTuple):
    """An odd function with slope 1 at 0, falling slope and range (-1, 1); its slope, of its value; its inverse."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


SATURATING = {
    "tanh": Saturating(torch.tanh, lambda y: 1 - y**2, torch.atanh),
    "softsign": Saturating(lambda u: u / (1 + u.abs()), lambda y: (1 - y.abs()) ** 2, lambda y: y / (1 - y.abs())),
    "arctan": Saturating(
        lambda u: torch.atan(u * (math.pi / 2)) * (2 / math.pi),
        lambda y: torch.cos(y * (math.pi / 2)) ** 2,
        lambda y: torch.tan(y * (math.pi / 2)) * (2 / math.pi),
    ),
}
MARGIN = 1.05
"""Where d is not given: this times the largest weight."""


def _saturate(v: Tensor, d: Tensor, function: str) -> Tensor:
    out = torch.empty_like(v)
    for part, o in zip(chunks(v), chunks(out), strict=True):
        o.copy_(SATURATING[function].value(part.to(d.dtype) / d) * d)
    return out


def _through(w: Tensor, grad: Tensor, d: Tensor, function: str) -> Tensor:
    out = torch.empty_like(w)
    for part, g, o in zip(chunks(w), chunks(grad), chunks(out), strict=True):
        o.copy_(SATURATING[function].slope(part.to(d.dtype) / d) * g)
    return out


_fused_saturate, _fused_through = fused(_saturate), fused(_through)


class _Saturate(torch.autograd.Function):
    """w = d * f(v / d), which keeps nothing but w, as its consumer does: f'(v / d) times the gradient is of w / d."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, d: Tensor, function: str) -> Tensor:
        order = memory_order(v)
        w = unflatten(_fused_saturate(flatten(v, order), d, function), v.shape, order)
        ctx.save_for_backward(w, d)
        ctx.function = function
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w, d = ctx.saved_tensors
        order = memory_order(w)
        with no_autocast(w):
            of_v = _fused_through(flatten(w, order), flatten(grad, order), d, ctx.function)
        return unflatten(of_v, w.shape, order), None, None


class SatNL(Stage):
    """The first stage of a weight: w = d * f(v / d) with the stored v, so that |w| < d and large weights cost more.

    function  "tanh", "softsign" (x / (1 + |x|)) or "arctan" ((2 / pi) * atan(pi * x / 2)); all are odd, with slope 1
              at 0
    d         the bound, one for the whole weight; None: 1.05 times the largest weight found when it is wrapped
    invert    wrap a weight so that the network stays what it is (v = d * f^-1(w / d)); False takes the weight that is
              there as v, for training from scratch

    Optimizers and weight decay act on v; regularizers and quantizers see w, and saved folders hold w.

    Choice: the sources do not say the form; with f'(0) = 1 and a fixed d small weights stay what they are.
    """

    d: Tensor

    @checked("satnl")
    def __init__(
        self,
        function: str = "tanh",
        d: Annotated[float, Range(1e-6, 1e6)] | None = None,
        invert: bool = True,
    ) -> None:
        super().__init__()
        self.function = function
        self.invert = invert
        self.enabled = True
        self.register_buffer("d", torch.tensor([math.nan if d is None else float(d)]))

    @staticmethod
    def check_together(function: str = "tanh", **_: Any) -> None:
        """Raise `ValueError` for a function that is not known."""
        with under("function"):
            check_known([function], SATURATING, "function of satnl")

    def forward(self, v: Tensor) -> Tensor:
        return _Saturate.apply(v, self.d.to(working_dtype(v)), self.function) if self.enabled else v

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """v of a weight within the bound. At the bound itself, which rounding may reach, a large finite v."""
        d = self.d.double()
        y = (w.double() / d).clamp(-1 + 1e-8, 1 - 1e-8)
        return (SATURATING[self.function].inverse(y) * d).to(w.dtype)

    @torch.no_grad()
    def bound(self, weight: Tensor) -> None:
        """Set d for a whole weight, if it is not. Raises `ValueError` for one to be inverted that reaches d."""
        largest = float(weight.abs().amax())
        if not math.isfinite(largest):
            raise ValueError("it is not finite")
        if math.isnan(float(self.d)):
            self.d.fill_(MARGIN * largest or 1.0)
        if self.invert and not largest < float(self.d):
            raise ValueError(
                f"its largest weight, {largest:.4g}, is not within d = {float(self.d):g}: d of {MARGIN * largest:.2g} "
                "or more would do, or none given (each weight then gets its own)"
            )

    def extra_repr(self) -> str:
        return f"{self.function}, d={float(self.d):.4g}"


def satnl(site: Site) -> SatNL | None:
    """The nonlinearity of a site's weight, where it has one."""
    stage = site.weight_stages._modules.get("satnl")
    return stage if isinstance(stage, SatNL) else None


@contextmanager
def network_weight(site: Site) -> Iterator[Tensor]:
    """The whole weight that the network in float works with: the stored one, or what SatNL makes of it."""
    stage = satnl(site)
    with whole(site.parameter) as weight:
        yield weight if stage is None else stage(weight.detach())
