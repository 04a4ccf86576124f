"""The abstract regularizer and the one autograd function through which a penalty reaches the gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_robustq.functional import no_autocast, working_dtype
from hf_robustq.stage import Stage

Gradient = Callable[..., tuple[Tensor | None, ...]]


class _AddGradient(torch.autograd.Function):
    """Identity in forward; backward adds strength * d penalty / d(w, theta)."""

    @staticmethod
    def forward(ctx: Any, gradient: Gradient, strength: Tensor, w: Tensor, *theta: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(strength, w, *theta)
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        strength, w, *theta = ctx.saved_tensors
        with no_autocast(w):
            return None, None, *ctx.gradient(grad_output, strength, w, *theta)


add_gradient = _AddGradient.apply


class _Connect(torch.autograd.Function):
    """Identity in forward; backward adds no gradient to what is learned, instead of none: DDP waits for one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad_output, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class Regularizer(Stage, ABC):
    """A stage: identity forward, adds `strength * d penalty / d(w, theta)` to the gradient in backward.

    The task loss is left alone, so nothing multiplies the penalty by the number of micro-batches, and
    the weight is whole here under every sharding.

    strength   0-dim float32, written by the plugin once per optimizer step: lambda * schedule / number of
               regularised weights / reads per forward, times the fp16 loss scale where there is one
    active     True on the first micro-batch of an optimizer step, which carries the whole penalty
    share      of the strength, by a schedule of its own
    stacked    the weight is a stack of matrices: the penalty is the mean of those of each
    """

    share = 1.0
    stacked = False

    works_with: tuple[str, ...] = ()
    """Methods of `QUANTIZERS`, one of which the weight must have; it is then the stage's `quantizer`. Empty: none."""

    quantizer: Any = None
    strength: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.register_buffer("strength", torch.zeros((), dtype=torch.float32), persistent=False)

    def refuses(self, module: nn.Module) -> str:  # noqa: ARG002
        """Why it does not act on the weight of this layer; empty where it does."""
        return ""

    def bind(self, quantizer: Any) -> None:
        """Told the quantizer of the same weight, where it works with one."""
        object.__setattr__(self, "quantizer", quantizer)

    def penalty_arguments(self) -> tuple[Tensor, ...]:
        """What the penalty depends on besides the weight."""
        return tuple(self.parameters())

    @abstractmethod
    def penalty(self, w: Tensor, *theta: Tensor) -> Tensor:
        """The penalty of one weight: a 0-dim tensor, float32 or better, a pure function of its arguments."""

    def gradient(self, grad_output: Tensor, strength: Tensor, w: Tensor, *theta: Tensor) -> tuple[Tensor | None, ...]:
        """`grad_output` + strength * d penalty / dw, then strength * d penalty / d theta.

        By autograd; a subclass with a closed form overrides it.
        """
        with torch.enable_grad():
            inputs = [t.detach().to(working_dtype(t)).requires_grad_() for t in (w, *theta)]
            of_w, *of_theta = torch.autograd.grad(self.penalty(*inputs) * strength, inputs)
        return grad_output + of_w.to(grad_output.dtype), *(g.to(t.dtype) for g, t in zip(of_theta, theta, strict=True))

    def value(self, w: Tensor) -> Tensor:
        """0-dim: the penalty of a weight, or of a stack of them."""
        parts = w.unbind() if self.stacked else [w]
        return torch.stack([self.penalty(one, *self.penalty_arguments()).float() for one in parts]).nanmean()

    def _of_each(self, grad_output: Tensor, strength: Tensor, w: Tensor, *theta: Tensor) -> tuple[Tensor | None, ...]:
        """`gradient` of the mean over a stack."""
        share = strength / w.size(0)
        found = [self.gradient(g, share, one, *theta) for g, one in zip(grad_output, w, strict=True)]
        of_w, *of_theta = zip(*found, strict=True)
        return torch.stack(of_w), *(None if one[0] is None else torch.stack(one).sum(0) for one in of_theta)

    def carry(self, strength: Tensor | float, factor: float) -> None:  # noqa: ARG002
        """Take the strength of this optimizer step, of which `factor` is lambda * schedule / number of weights."""
        if isinstance(strength, Tensor):
            self.strength.copy_(strength)
        else:
            self.strength.fill_(strength)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x
        if self.active and self.training:
            return self.attach(x, self.strength)
        learned = list(self.parameters())
        return _Connect.apply(x, *learned) if learned else x

    def attach(self, x: Tensor, strength: Tensor) -> Tensor:
        """`x`, with the gradient of the penalty behind it."""
        gradient = self._of_each if self.stacked else self.gradient
        return add_gradient(gradient, strength, x, *self.penalty_arguments())
