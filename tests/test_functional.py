import pytest
import scipy.stats
import torch

from hf_robustq.functional import (
    CACHED,
    central_moments,
    fake_quantize,
    kurtosis,
    memory_order,
)


def slow_fake_quantize(x, scale, low, high):
    """Element by element in Python: the nearest level, ties to even."""
    levels = [min(max(round(v / scale), low), high) for v in x.tolist()]
    return torch.tensor([scale * level for level in levels], dtype=x.dtype)


@pytest.mark.parametrize(("low", "high"), [(-7, 7), (-8, 7), (0, 15), (-1, 1)])
def test_fake_quantize_is_the_slow_definition(low, high):
    x = torch.randn(500, dtype=torch.double) * 3
    got = fake_quantize(x, torch.tensor(0.37, dtype=torch.double), torch.tensor(float(low)), torch.tensor(float(high)))
    torch.testing.assert_close(got, slow_fake_quantize(x, 0.37, low, high), rtol=0, atol=1e-15)


def test_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    got = fake_quantize(x, torch.tensor(1.0), torch.tensor(-7.0), torch.tensor(7.0))
    assert got.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


def test_gradient_is_straight_through_inside_the_range_and_zero_outside():
    x = torch.tensor([-9.0, -7.0, -6.9, 0.2, 6.9, 7.0, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), torch.tensor(-7.0), torch.tensor(7.0)).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_is_quantized_in_float32(dtype):
    x = torch.randn(1000).to(dtype)
    arguments = torch.tensor(0.013), torch.tensor(-127.0), torch.tensor(127.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fake_quantize(x, *arguments)
    assert got.dtype == dtype
    torch.testing.assert_close(got, fake_quantize(x.float(), *arguments).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [9, 576, 5000, CACHED + 1])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_moments_are_scipys(size, mean):
    x = torch.randn(size) * 0.02 + mean * 0.02
    mu, m2, m3, m4 = central_moments(x)
    exact = x.double().numpy()
    assert float(mu) == pytest.approx(exact.mean(), rel=1e-5, abs=1e-8)
    for order, got in ((2, m2), (3, m3), (4, m4)):
        want = scipy.stats.moment(exact, order)
        assert float(got) == pytest.approx(want, rel=2e-4, abs=2e-4 * exact.std() ** order)
    assert float(kurtosis(x)) == pytest.approx(scipy.stats.kurtosis(exact, fisher=False), rel=5e-4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.64),
        ([1.0, 2.0, 3.0, 4.0, 10.0], 2.788),
        (torch.linspace(-1, 1, 101, dtype=torch.double).tolist(), 1.7997648),
        ([-1.0, 1.0], 1.0),
        *[(list(range(n)), 0.6 * (3 * n**2 - 7) / (n**2 - 1)) for n in (3, 5, 8, 16, 256)],
    ],
)
def test_kurtosis_of_known_sets(values, expected):
    assert float(kurtosis(torch.tensor(values, dtype=torch.double))) == pytest.approx(expected, rel=1e-6)


def test_kurtosis_of_known_distributions():
    level = (torch.arange(200_000, dtype=torch.double) + 0.5) / 200_000
    normal = torch.special.ndtri(level)
    laplace = -(level - 0.5).sign() * torch.log1p(-2 * (level - 0.5).abs())
    for x, expected in ((level, 1.8), (normal, 3.0), (laplace, 6.0)):
        assert float(kurtosis(x)) == pytest.approx(expected, rel=2e-3)


def test_memory_order_flattens_channels_last_without_a_copy():
    x = torch.randn(8, 6, 3, 3).to(memory_format=torch.channels_last)
    flat = x.permute(memory_order(x)).reshape(-1)
    assert flat.data_ptr() == x.data_ptr()
    assert memory_order(torch.randn(8, 6, 3, 3)) == [0, 1, 2, 3]
