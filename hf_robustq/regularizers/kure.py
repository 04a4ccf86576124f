"""KURE: kurtosis regularization (Robust Quantization: One Model to Rule Them All, NeurIPS 2020, arXiv 2002.07686)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hf_robustq.functional import (
    central_moments,
    chunks,
    flatten,
    fused,
    kurtosis,
    memory_order,
    unflatten,
    working_dtype,
)
from hf_robustq.options import Range, checked
from hf_robustq.regularizers.regularizer import Regularizer


def _add_gradient(w: Tensor, grad: Tensor, strength: Tensor, target: float) -> Tensor:
    """grad + strength * d |Kurt(w) - target|^2 / dw, for flat `w` and `grad`."""
    mean, m2, m3, m4 = central_moments(w)
    safe = m2 + (m2 == 0)  # of a constant weight all other factors are zero
    kurt = m4 / safe**2
    cubic = (strength.item() if isinstance(m2, float) else strength) * 8.0 * (kurt - target) / (w.numel() * safe**2)
    dtype = working_dtype(w)
    linear, offset = -cubic * kurt * m2, -cubic * m3
    if isinstance(mean, Tensor):
        mean, cubic, linear, offset = (torch.as_tensor(t, dtype=dtype) for t in (mean, cubic, linear, offset))
    out = torch.empty_like(grad)
    for part, g, o in zip(chunks(w), chunks(grad), chunks(out), strict=True):
        d = part.to(dtype) - mean
        o.copy_(((d * d).mul_(cubic).add_(linear)).mul_(d).add_(offset).add_(g))
    return out


_fused_add_gradient = fused(_add_gradient)


class KURE(Regularizer):
    """Pulls the kurtosis of a weight to `target`: |Kurt(W) - target|^2, eq. 14 and 15.

    Kurt(W) = E[((W - mu) / sigma)^4] over all elements of one weight tensor; 1.8 is the kurtosis of
    the uniform distribution, the most robust one to quantize. The plugin averages over the weights
    actually regularised.

    With d = w - mu, m_k = E[d^k], N elements and K the kurtosis, the gradient is
    2 * (K - target) * 4 / (N * m2^2) * (d^3 - m3 - K * m2 * d).

    A constant weight has no kurtosis: its gradient is left alone until it moves.

    Choice: the biased kurtosis (population moments), in float32. The authors' code uses torch.std, which
    makes it ((N - 1) / N)^2 times this one.
    """

    @checked("kure")
    def __init__(self, target: Annotated[float, Range(1, 1000), "(a kurtosis: uniform 1.8, normal 3)"] = 1.8) -> None:
        super().__init__()
        self.target = target

    def penalty(self, w: Tensor, *theta: Tensor) -> Tensor:  # noqa: ARG002 (KURE learns nothing of its own)
        if not torch.is_grad_enabled():
            return (kurtosis(w) - self.target) ** 2
        d = w.to(working_dtype(w)) - w.to(working_dtype(w)).mean()
        return ((d**4).mean() / (d**2).mean() ** 2 - self.target) ** 2

    def gradient(self, grad_output: Tensor, strength: Tensor, w: Tensor, *theta: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG002
        order = memory_order(w)
        added = _fused_add_gradient(flatten(w, order), flatten(grad_output, order), strength, self.target)
        return (unflatten(added, w.shape, order),)

    def extra_repr(self) -> str:
        return f"target={self.target}"
