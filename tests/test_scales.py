import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch

from hf_robustq import SCALE_RULES, Grid, Sample
from hf_robustq.scales import absmax, aciq_gauss, aciq_laplace, mse, percentile, quantization_error
from hf_robustq.scales.aciq import gauss_clip, gauss_error, laplace_clip, laplace_error
from hf_robustq.scales.sample import BINS, accumulate


def normal(n=400_000):
    return torch.special.ndtri((torch.arange(n, dtype=torch.double) + 0.5) / n)


def error_of(x, scale, grid, p=2.0):
    return float((x - scale * torch.round(x / scale).clamp(grid.low, grid.high)).abs().pow(p).mean())


# The optimal step and error of a unit normal, by numerical integration (not by this package).
GAUSS = {
    (2, False): (1.04839, 0.149431), (3, False): (0.60182, 0.0406382), (4, False): (0.33861, 0.0118640),
    (6, False): (0.104179, 0.00104285), (8, False): (0.0307656, 8.7707e-5),
    (2, True): (1.22401, 0.190174), (3, True): (0.65077, 0.0468600), (4, True): (0.35341, 0.0128894),
}  # fmt: skip


@pytest.mark.parametrize(("bits", "narrow"), GAUSS)
def test_mse_finds_the_optimum_of_the_normal_distribution(bits, narrow):
    x, grid = normal(), Grid(bits=bits, narrow=narrow)
    step, error = GAUSS[bits, narrow]
    found = float(mse(Sample.of(x), grid))
    assert found == pytest.approx(step, rel=0.01)
    # 400,000 quantiles end at 4.7 sigma: at 8 bits the missing tail shows
    assert error_of(x, found, grid) == pytest.approx(error, rel=2e-3 if bits < 8 else 1e-2)


@pytest.mark.parametrize("p", [2.0, 2.4, 3.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_as_good_as_a_fine_search_on_the_elements(bits, p):
    torch.manual_seed(bits)
    x = torch.distributions.Laplace(0.0, 0.1).sample((20_000,)).double()
    grid = Grid(bits=bits, narrow=True)
    found = float(mse(Sample.of(x), grid, p))
    cover = float(x.abs().max()) / grid.high
    best = scipy.optimize.brute(lambda s: error_of(x, float(s[0]), grid, p), [(cover / 50, cover)], Ns=800, finish=None)
    assert error_of(x, found, grid, p) <= 1.003 * error_of(x, float(best), grid, p)


def test_one_sided_and_asymmetric_grids():
    x = normal().relu()
    for grid in (Grid(bits=4, signed=False), Grid(bits=4)):
        found = float(mse(Sample.of(x), grid))
        candidates = torch.linspace(0.02, 0.6, 1500)
        best = min(error_of(x, float(s), grid) for s in candidates)
        assert error_of(x, found, grid) <= 1.003 * best


def test_error_of_a_histogram_is_the_error_of_the_elements():
    x = normal(50_000)
    for bits in (3, 8):
        grid = Grid(bits=bits)
        for step in (0.02, 0.3):
            got = float(quantization_error(Sample.of(x), torch.tensor([step], dtype=torch.double), grid)) / x.numel()
            assert got == pytest.approx(error_of(x, step, grid), rel=2e-3)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_rules_are_positive_and_follow_the_scale_of_the_data(rule):
    x = torch.randn(6, 300) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 0.0, 5.0])[:, None]
    grid = Grid(bits=4, narrow=True, axis=0)
    scale = SCALE_RULES[rule](Sample.of(x, axis=0), grid)
    assert scale.shape == (6,) and bool((scale > 0).all())
    alone = SCALE_RULES[rule](Sample.of(x[3]), Grid(bits=4, narrow=True))
    torch.testing.assert_close(scale[3:4], alone)
    doubled = SCALE_RULES[rule](Sample.of(2 * x, axis=0), grid)
    torch.testing.assert_close(doubled[:4], 2 * scale[:4])


def test_absmax_clips_nothing():
    for grid in (Grid(bits=3), Grid(bits=3, narrow=True)):
        for x in (torch.randn(100), -torch.rand(100), torch.rand(100)):
            scale = float(absmax(Sample.of(x), grid))
            assert float(x.max()) <= scale * grid.high + 1e-6 and float(x.min()) >= scale * grid.low - 1e-6


def test_histogram_does_not_depend_on_how_the_data_is_batched():
    x = torch.cat([torch.randn(3000) * s for s in (0.01, 1.0, 30.0)] + [torch.zeros(500)])

    def collect(parts):
        counts, bound = torch.zeros(BINS + 1, dtype=torch.long), 0.0
        for part in parts:
            counts, bound = accumulate(counts, bound, part)
        return counts, bound

    counts, bound = collect([x])
    for parts in (x.split(100), x.flip(0).split(333), [x[:1], x[1:]]):
        other, other_bound = collect(parts)
        assert other_bound == bound and int(other[-1]) == 500 and int(other.sum()) == x.numel()
        assert int((other - counts).abs().sum()) == 0
    numpys = np.histogram(x[x != 0].numpy(), BINS, (-bound, bound))[0]
    assert int(np.abs(numpys - counts[:-1].numpy()).sum()) <= 4  # elements on an edge, in float32 or float64


def test_non_finite_data_is_refused():
    for bad in (float("nan"), float("inf")):
        x = torch.randn(5000)
        x[7] = bad
        with pytest.raises(ValueError, match="non-finite"):
            Sample.of(x)


# Optimal clips and errors for 1 to 8 bits, unit scale (methods of arXiv 1810.05723, integrated numerically).
GAUSS_CLIPS = [1.239905, 1.710635, 2.151593, 2.559137, 2.936201, 3.286914, 3.615115, 3.924035]
GAUSS_ERRORS = [0.215010, 0.0871485, 0.0314294, 0.0104933, 0.00332259, 0.00101292, 3.00215e-4, 8.70779e-5]
LAPLACE_CLIPS = [1.862817, 2.830683, 3.897229, 5.028640, 6.204766, 7.413126, 8.645620, 9.896760]
LAPLACE_ERRORS = [0.599643, 0.284878, 0.119702, 0.0460215, 0.0165718, 0.00567877, 0.00187252, 5.98853e-4]


@pytest.mark.parametrize("bits", range(1, 9))
def test_golden_values_of_aciq(bits):
    assert gauss_clip(bits) == pytest.approx(GAUSS_CLIPS[bits - 1], abs=2e-6)
    assert gauss_error(gauss_clip(bits), bits) == pytest.approx(GAUSS_ERRORS[bits - 1], rel=1e-5)
    assert laplace_clip(bits) == pytest.approx(scipy.special.lambertw(3 * 4**bits).real, rel=1e-9)
    assert laplace_clip(bits) == pytest.approx(LAPLACE_CLIPS[bits - 1], abs=2e-6)
    assert laplace_error(laplace_clip(bits), bits) == pytest.approx(LAPLACE_ERRORS[bits - 1], rel=1e-5)


@pytest.mark.parametrize("rule", [aciq_gauss, aciq_laplace])
@pytest.mark.parametrize("signed", [True, False])
def test_aciq_reads_the_moments_of_a_histogram_as_of_the_elements(rule, signed):
    """Several rows are not made a histogram; the formula is written out here."""
    torch.manual_seed(0)
    x = torch.randn(1, 20_000).double() * 0.3 + 0.05
    x = x if signed else x.relu()
    grid = Grid(bits=4, signed=signed)
    mean = x.mean()
    spread = x.std(correction=0) if rule is aciq_gauss else (x - mean).abs().mean()
    clips = GAUSS_CLIPS if rule is aciq_gauss else LAPLACE_CLIPS
    expected = min(float(mean + spread * clips[3 + (not signed)]), float(x.max())) / grid.high
    assert float(rule(Sample.of(x), grid)) == pytest.approx(expected, rel=2e-3)
    assert rule(Sample.of(torch.cat([x, 2 * x]), axis=0), grid).tolist() == pytest.approx([expected, 2 * expected])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("signed", [True, False])
def test_percentile_clips_the_share_it_says(rows, signed):
    torch.manual_seed(0)
    x = torch.randn(rows, 50_000).double()
    x = x if signed else x.relu()
    grid = Grid(bits=4, signed=signed)
    clip = percentile(Sample.of(x, None if rows == 1 else 0), grid, share=0.99) * grid.high
    quantile = np.quantile(x.abs().numpy(), 0.99, axis=1)
    assert clip.tolist() == pytest.approx(quantile.tolist(), rel=5e-3)
    assert torch.equal(percentile(Sample.of(x), grid, share=1.0), absmax(Sample.of(x), grid))


@pytest.mark.parametrize("rule", [percentile, aciq_gauss, aciq_laplace])
def test_rules_on_zeros_and_constants_give_a_positive_step_within_the_cover(rule):
    for value in (0.0, 0.7, -0.7):
        sample, grid = Sample.of(torch.full((100,), value)), Grid(bits=4)
        step = rule(sample, grid)
        assert bool((step > 0).all()) and bool((step <= absmax(sample, grid)).all())
