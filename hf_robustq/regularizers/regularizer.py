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


class Regularizer(Stage, ABC):
    """A stage: identity forward, adds `strength * d penalty / d(w, theta)` to the gradient in backward.

    The task loss is left alone, so nothing multiplies the penalty by the number of micro-batches, and
    the weight is whole here under every sharding.

    strength   0-dim float32, written by the plugin once per optimizer step: lambda * schedule / number of
               regularised weights / reads per forward, times the fp16 loss scale where there is one
    active     True on the first micro-batch of an optimizer step, which carries the whole penalty
    """

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

    def forward(self, x: Tensor) -> Tensor:
        if not (self.active and self.training and torch.is_grad_enabled()):
            return x
        return _AddGradient.apply(self.gradient, self.strength, x, *self.parameters())
