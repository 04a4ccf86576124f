"""The papers' closed forms against exact integrals, and where their statements hold."""

import math

import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from hf_robustq.analysis.theory import (
    clamped_error,
    exact_error,
    normal_curvature,
    normal_error,
    sensitivity,
    uniform_best_step,
    uniform_curvature,
    uniform_error,
)
from hf_robustq.scales.aciq import gauss_clip, gauss_error


def normal(x):
    return math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def levels(step, low, high):
    return [step * i for i in range(low, high + 1)]


@pytest.mark.parametrize(
    ("bits", "step", "value"),
    [
        (2, 0.36, 0.01509333),
        (2, 0.4, 0.01333333),
        (2, 0.5, 0.02083333),
        (3, 2 / 9, 4.115226e-3),
        (4, 0.1176471, 1.153403e-3),
        (4, 0.125, 1.302083e-3),
        (8, 0.00778210, 5.046758e-6),
    ],
)
def test_golden_values_of_lemma_2(bits, step, value):
    assert uniform_error(1.0, step, bits) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("share", [0.6, 0.9, 1.0])
def test_lemma_2_is_the_exact_integral_of_one_level_too_many(bits, share):
    a, half = 1.7, 2 ** (bits - 1)
    step = share * a / half
    exact = exact_error(lambda x: 1 / (2 * a), levels(step, -half, half), -a, a)
    assert uniform_error(a, step, bits) == pytest.approx(exact, rel=1e-9)
    fewer = exact_error(lambda x: 1 / (2 * a), levels(step, -half, half - 1), -a, a)
    assert fewer > exact * 1.05
    with pytest.raises(ValueError, match="beyond the largest element"):
        uniform_error(a, 1.01 * a / half, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lemma_3s_minimum(bits):
    best = uniform_best_step(1.0, bits)
    largest = 2 / 2**bits
    found = minimize_scalar(
        lambda s: uniform_error(1.0, s, bits), bounds=(largest / 2, largest), method="bounded", options={"xatol": 1e-12}
    )
    assert best == pytest.approx(found.x, rel=1e-4)
    assert uniform_error(1.0, best, bits) == pytest.approx(best**2 / 12)
    assert uniform_curvature(1.0, best, bits) == pytest.approx(2 ** (bits - 1))
    assert uniform_curvature(1.0, largest, bits) == pytest.approx(0.5)
    h = best * 1e-4
    second = (
        uniform_error(1, best + h, bits) - 2 * uniform_error(1, best, bits) + uniform_error(1, best - h, bits)
    ) / h**2
    assert uniform_curvature(1.0, best, bits) == pytest.approx(second, rel=1e-3)
    gamma = sensitivity(lambda s: uniform_error(1.0, s, bits), best, h)
    assert gamma == pytest.approx(2 ** (bits - 2) * h**2, rel=0.05)


@pytest.mark.parametrize(
    ("bits", "value"), [(2, 0.8639), (3, 1.1724), (4, 1.5098), (5, 1.8678), (6, 2.2411), (8, 3.0200)]
)
def test_the_normal_densitys_curvature_at_its_optimum(bits, value):
    step = gauss_clip(bits) / 2 ** (bits - 1)
    assert normal_curvature(step, bits) == pytest.approx(value, abs=1e-4)
    h = step * 1e-3
    second = (normal_error(step + h, bits) - 2 * normal_error(step, bits) + normal_error(step - h, bits)) / h**2
    assert normal_curvature(step, bits) == pytest.approx(second, rel=1e-3)
    assert normal_curvature(step, bits) > 0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_uniform_densitys_exact_error_is_smaller_but_its_sensitivity_is_not(bits):
    """Equal variances, 2^M levels between the outer ones, each density's own best step."""
    a = math.sqrt(3)
    half = 2**bits

    def mid_rise(step):
        return [step * (i + 0.5 - half / 2) for i in range(half)]

    def best(density, low, high):
        error = lambda s: exact_error(density, mid_rise(s), low, high)  # noqa: E731
        found = minimize_scalar(error, bounds=(0.3 * 2 * a / half, 3 * 2 * a / half), method="bounded")
        return error, found.x

    of_uniform, uniform_step = best(lambda x: 1 / (2 * a), -a, a)
    of_normal, normal_step = best(normal, -math.inf, math.inf)
    golden = {2: 0.118846, 3: 0.0374397, 4: 0.0115429, 5: 0.00349521}[bits]
    assert of_normal(normal_step) == pytest.approx(golden, rel=1e-4)
    assert of_uniform(uniform_step) == pytest.approx(4.0**-bits, rel=1e-3)
    assert of_uniform(uniform_step) < of_normal(normal_step)
    if bits == 4:
        uniform_loss = sensitivity(of_uniform, uniform_step, -0.1 * uniform_step)
        normal_loss = sensitivity(of_normal, normal_step, -0.1 * normal_step)
        assert uniform_loss == pytest.approx(2.5e-3, rel=0.05) and normal_loss == pytest.approx(1.0e-3, rel=0.05)


CLAMPED = [
    (2, 1.0, 0.94093, 0.0195857),
    (2, 1.5, 1.32551, 0.0411614),
    (2, 3.0, 1.70360, 0.0847653),
    (3, 1.0, 0.98404, 0.00512489),
    (3, 2.0, 1.82934, 0.0189498),
    (4, 1.5, 1.48572, 0.00290167),
    (4, 3.0, 2.49918, 0.00936548),
    (8, 1.0, 0.99998, 5.08618e-6),
    (8, 3.0, 2.99441, 4.56908e-5),
]


@pytest.mark.parametrize(("bits", "d", "alpha", "error"), CLAMPED)
def test_clamping_lowers_the_error(bits, d, alpha, error):
    found = minimize_scalar(
        lambda a: clamped_error(a, bits, d), bounds=(1e-3, d), method="bounded", options={"xatol": 1e-9}
    )
    assert found.x == pytest.approx(alpha, abs=1e-4) and found.fun == pytest.approx(error, rel=1e-5)
    unbounded = gauss_error(gauss_clip(bits), bits)
    assert found.fun < unbounded
    assert clamped_error(gauss_clip(bits), bits, math.inf) == pytest.approx(unbounded)


def test_the_clamped_error_is_the_integral_it_stands_for():
    alpha, d, bits = 0.8, 1.6, 3
    between = quad(lambda x: normal(x) * (x - alpha) ** 2, alpha, d)[0]
    outside = quad(normal, d, math.inf)[0] * (d - alpha) ** 2
    expected = 2 * (between + outside) + alpha**2 / (3 * 4**bits)
    assert clamped_error(alpha, bits, d) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="at most d"):
        clamped_error(2.0, bits, 1.0)
