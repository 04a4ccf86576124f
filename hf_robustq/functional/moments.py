"""Moments of a tensor's distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_robustq.functional.fused import CACHED, memory_order, working_dtype


def chunks(flat: Tensor) -> tuple[Tensor, ...]:
    """Pieces of a 1-D tensor that a chain of eager operations can work on without leaving a CPU's cache."""
    whole = torch.compiler.is_compiling() or not flat.is_cpu
    return (flat,) if whole else flat.split(CACHED)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """sum(a * b) of 1-D tensors: a library call when eager, left to fusion when compiled."""
    return (a * b).sum() if torch.compiler.is_compiling() else torch.dot(a, b)


Scalar = Tensor | float


def central_moments(x: Tensor) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Mean and central moments (mu, m2, m3, m4) of all elements of `x`, divided by N (population moments).

    One pass: power sums about a provisional mean, combined in float64, so that a large mean costs no digits.
    Returns Python floats for an eager CPU tensor, where nothing waits for a device, else 0-dim float64 tensors.
    """
    flat, dtype = x.detach().permute(memory_order(x)).reshape(-1), working_dtype(x)
    shift = flat[:1024].to(dtype).mean()
    sums = torch.zeros(4, dtype=torch.double, device=x.device)
    for part in chunks(flat):
        d = part.to(dtype) - shift
        square = d * d
        sums = sums + torch.stack([d.sum(), inner(d, d), inner(square, d), inner(square, square)])
    eager_cpu = x.is_cpu and not torch.compiler.is_compiling()
    sums = sums / flat.numel()
    s1, s2, s3, s4 = sums.tolist() if eager_cpu else sums.unbind()
    m2 = s2 - s1**2
    m3 = s3 - 3 * s1 * s2 + 2 * s1**3
    m4 = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
    return s1 + (shift.item() if eager_cpu else shift), m2, m3, m4


def kurtosis(x: Tensor) -> Tensor:
    """Kurt[x] = E[((x - mu) / sigma)^4] over all elements: uniform 1.8, normal 3, Laplace 6. 0-dim; NaN if constant."""
    _, m2, _, m4 = (torch.as_tensor(m, dtype=torch.double) for m in central_moments(x))
    return m4 / m2**2
