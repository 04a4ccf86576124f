"""Oscillation damping (Overcoming Oscillations in Quantization-Aware Training, arXiv 2203.11086, section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_robustq.regularizers.regularizer import Regularizer


class Damping(Regularizer):
    """|| Q(w) - clamp(w, s * low, s * high) ||^2 with a constant Q(w) (eq. 6): pulls weights to their levels.

    Of weights that have a quantizer with steps. The paper sums it over all weights of the network: its lambda is
    `strength` / the number of regularized weights here, and rises with `schedule: cosine`.
    """

    works_with = ("fixed", "lsq", "lsq_plus", "noise")

    def parts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(Q(w), the clamped w), each of the shape of `w`, in float32 or better."""
        quantizer: Any = self.quantizer
        step = quantizer.steps_along(w).to(torch.promote_types(w.dtype, torch.float32))
        clamped = torch.minimum(torch.maximum(w, quantizer.low * step), quantizer.high * step)
        return (clamped.detach() / step).round() * step, clamped

    def penalty(self, w: Tensor, *theta: Tensor) -> Tensor:  # noqa: ARG002
        nearest, clamped = self.parts(w)
        return (nearest.detach() - clamped).pow(2).sum()

    def gradient(self, grad_output: Tensor, strength: Tensor, w: Tensor, *theta: Tensor) -> tuple[Tensor | None, ...]:
        """grad + strength * 2 * (w - Q(w)) inside the range; outside both are the bound."""
        nearest, clamped = self.parts(w)
        return grad_output + (2 * strength * (clamped - nearest)).to(grad_output.dtype), *(None for _ in theta)
