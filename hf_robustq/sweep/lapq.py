"""LAPQ, loss-aware post-training quantization (arXiv 1911.07190): all steps together, by the loss of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

NORMS = (1.5, 2.0, 2.5, 3.0, 3.5)
REACH = math.log(2.0)

Start = Callable[[float], list[Tensor]]
Loss = Callable[[Sequence[Tensor]], float]


def best_norm(norms: Sequence[float], losses: Sequence[float]) -> float:
    """The minimum of the parabola through (p, loss), by least squares, within [1, 5]; the best p where it has none."""
    square, linear, _ = np.polyfit(norms, losses, 2)
    if not square > 0:
        return norms[int(np.argmin(losses))]
    return float(np.clip(-linear / (2 * square), 1.0, 5.0))


def lapq(start: Start, loss: Loss, iterations: int = 2, evaluations: int | None = None) -> list[Tensor]:
    """Steps of the least loss: `start(p)` are those of least Lp error, `loss(steps)` is the calibration set's.

    1. for p in 1.5, 2, 2.5, 3, 3.5 the loss of start(p); a parabola through them says p*
    2. the best of these and start(p*)
    3. Powell's method on one factor for each tensor, within 1/2 .. 2, `iterations` rounds over all of them

    evaluations   of `loss` in step 3 at most; default: 20 for each tensor and round
    Never worse than the best start. A loss that is not finite counts as infinite; `ValueError` where all are.
    Choice: the paper's grid of p is {2, 2.5, 3}; Powell works on log factors.
    """
    from scipy.optimize import minimize

    def finite(steps: Sequence[Tensor]) -> float:
        value = loss(steps)
        return value if math.isfinite(value) else math.inf

    candidates = [start(p) for p in NORMS]
    losses = [finite(steps) for steps in candidates]
    known = [(p, value) for p, value in zip(NORMS, losses, strict=True) if value < math.inf]
    if not known:
        raise ValueError("the loss of the calibration set is not finite at any steps: check the data and the labels")
    if len(known) > 2:
        candidates.append(start(best_norm(*zip(*known, strict=True))))
        losses.append(finite(candidates[-1]))
    steps = candidates[int(np.argmin(losses))]

    def at(factors: Sequence[float]) -> list[Tensor]:
        return [step * math.exp(factor) for step, factor in zip(steps, factors, strict=True)]

    best: tuple[float, list[Tensor]] = min(losses), steps

    def objective(factors: Sequence[float]) -> float:
        nonlocal best
        tried = at(factors)
        value = finite(tried)
        if value < best[0]:
            best = value, tried
        return min(value, 1e30)  # Powell computes with it

    minimize(
        objective,
        np.zeros(len(steps)),
        method="Powell",
        bounds=[(-REACH, REACH)] * len(steps),
        options={
            "maxiter": iterations,
            "maxfev": evaluations or 20 * iterations * len(steps),
            "xtol": 1e-2,
            "ftol": 1e-4,
        },
    )
    return best[1]
