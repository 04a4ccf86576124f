"""What the papers prove of the quantization error, as functions: of KURE (arXiv 2002.07686) and of SymReg and SatNL.

M bits, step `step`, elements of unit scale unless said. Errors are expected squared errors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from hf_robustq.scales.aciq import gauss_error

Density = Callable[[float], float]


def exact_error(density: Density, levels: Sequence[float], low: float = -math.inf, high: float = math.inf) -> float:
    """The integral of density(x) * (x - nearest level)^2 from low to high, by quadrature between the turning points."""
    from scipy.integrate import quad

    levels = sorted(levels)
    ends = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
    total = 0.0
    for level, (left, right) in zip(levels, itertools.pairwise(ends), strict=True):
        left, right = max(left, low), min(right, high)
        if left < right:
            total += quad(lambda x, q=level: density(x) * (x - q) ** 2, left, right, epsabs=1e-14, epsrel=1e-12)[0]
    return total


def uniform_error(a: float, step: float, bits: int) -> float:
    """KURE, lemma 2: the error for the uniform density on [-a, a], for a clip range tau = 2^(M-1) * step <= a.

    (a - tau)^3 / (3a) + 2^M * step^3 / (24a)

    It is exact for integer levels -2^(M-1) .. 2^(M-1): 2^M + 1 of them, one more than M bits have. Raises
    `ValueError` for tau > a, where it does not hold.
    """
    tau = 2 ** (bits - 1) * step
    if tau > a * (1 + 1e-12):
        raise ValueError(f"the clip range {tau:g} is beyond the largest element {a:g}")
    return (a - tau) ** 3 / (3 * a) + 2**bits * step**3 / (24 * a)


def uniform_best_step(a: float, bits: int) -> float:
    """KURE, lemma 3: the step of least `uniform_error`, 2a / (2^M + 1); the error there is step^2 / 12.

    The lemma's other root, 2a / (2^M - 1), has a clip range beyond a: there the formula does not hold, and its cubic
    has a maximum.
    """
    return 2 * a / (2**bits + 1)


def uniform_curvature(a: float, step: float, bits: int) -> float:
    """The second derivative of `uniform_error` by the step: (2^(2M-1) * (a - tau) + 2^(M-2) * step) / a.

    2^(M-1) at `uniform_best_step`. At 2a / 2^M, which the paper takes for it, only 1/2.
    """
    tau = 2 ** (bits - 1) * step
    return (2 ** (2 * bits - 1) * (a - tau) + 2 ** (bits - 2) * step) / a


def normal_curvature(step: float, bits: int) -> float:
    """The second derivative by the step of ACIQ's error of N(0, 1), alpha = 2^(M-1) * step:

    2^(2M-1) * erfc(alpha / sqrt(2)) + 1/6

    Above 1/2 at its optimum for every M from 2 to 8: on this, and on 1/2 for the uniform density, rests the statement
    that uniform weights are less sensitive to the step than normal ones. With the exact errors, equal variances and
    either density's own best step it does not hold in general: at 4 bits and a step 10% too small the uniform density
    loses 2.5e-3 and the normal one 1.0e-3. What does hold is that the uniform density's error itself is smaller.
    """
    alpha = 2 ** (bits - 1) * step
    return 2 ** (2 * bits - 1) * math.erfc(alpha / math.sqrt(2)) + 1 / 6


def sensitivity(error: Callable[[float], float], step: float, change: float) -> float:
    """KURE, lemma 1: Gamma = |error(step + change) - error(step)|, to second order |error''(step)| * change^2 / 2."""
    return abs(error(step + change) - error(step))


def normal_error(step: float, bits: int) -> float:
    """ACIQ's error of N(0, 1) for a clip range of 2^(M-1) * step (see `scales.aciq.gauss_error`)."""
    return gauss_error(2 ** (bits - 1) * step, bits)


def clamped_error(alpha: float, bits: int, d: float) -> float:
    """SymReg and SatNL, equation 7: the error of N(0, 1) clamped to [-d, d] and quantized over [-alpha, alpha].

    2 * (F(-d) * (d - alpha)^2 + integral from alpha to d of f(x) * (x - alpha)^2) + alpha^2 / (3 * 4^M)

    The integral in closed form; d = infinity gives equation 4. (In equation 1 of the paper the limits of the second
    integral and its sign are misprinted; F(-|d|) is F(-d).) Its minimum over alpha lies below that of equation 4 for
    every d, and rises with d. Raises `ValueError` for alpha > d.
    """
    if not 0 < alpha <= d:
        raise ValueError(f"alpha must be positive and at most d = {d:g}, got {alpha:g}")

    def beyond(x: float) -> float:
        """The integral from x to infinity of f(t) * (t - alpha)^2."""
        density = math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        return (1 + alpha**2) * math.erfc(x / math.sqrt(2)) / 2 + (x - 2 * alpha) * density

    outside = beyond(alpha)
    if math.isfinite(d):
        outside += math.erfc(d / math.sqrt(2)) / 2 * (d - alpha) ** 2 - beyond(d)
    return 2 * outside + alpha**2 / (3 * 4**bits)
