"""Levels that are not multiples of a step, against slow definitions and other libraries."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from hf_robustq.grid import Grid
from hf_robustq.quantizers import DoReFa, InputProbe
from hf_robustq.scales import CODEBOOK_RULES, Sample, mse, quantization_error
from hf_robustq.scales.aciq import gauss_clip, gauss_error
from hf_robustq.scales.codebook import Codebook, aciq_levels, allocate, dorefa, kmeans, log2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(book, x, axis=None):
    return float((book.quantize(x.double(), axis) - x.double()).pow(2).sum())


def log2_by_hand(x, largest, bits, signed):
    if x == 0 or (x < 0 and not signed):
        return 0.0
    count = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    top = round(math.log2(largest))
    exponent = round(math.log2(abs(x)))
    return 0.0 if exponent < top - count + 1 else math.copysign(2.0 ** min(exponent, top), x)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_log2_is_its_formula(bits, signed):
    x = normal(5000) * 3
    x[:7] = 0
    if not signed:
        x = x.relu()
    book = log2(Sample.of(x), Grid(bits=bits, signed=signed))
    largest = float(x.abs().max())
    expected = [log2_by_hand(v, largest, bits, signed) for v in x.tolist()]
    assert book.quantize(x, None).tolist() == expected
    assert book.levels.size(1) <= 2**bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kmeans_is_as_good_as_scikit_learns(bits):
    from sklearn.cluster import KMeans

    x = torch.cat([normal(1500), normal(500, seed=1) * 0.2 + 3])
    book = kmeans(Sample.of(x), Grid(bits=bits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KMeans(2**bits, n_init=10, random_state=0).fit(x.numpy()[:, None])
    assert book.levels.size(1) == 2**bits
    assert squared_error(book, x) <= 1.1 * theirs.inertia_


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("axis", [None, 0])
def test_kmeans_lowers_the_error_of_the_best_step(signed, axis):
    x = normal(6, 4000) * torch.arange(1, 7)[:, None]
    x = x if signed else x.relu()  # half of it exact zeros, which a histogram counts apart
    grid = Grid(bits=3, signed=signed, axis=axis)
    sample = Sample.of(x, axis)
    uniform = float(quantization_error(sample, mse(sample, grid), grid).sum())
    error = squared_error(kmeans(sample, grid), x, axis)
    assert error < 0.95 * uniform
    one = [squared_error(kmeans(Sample.of(row), Grid(bits=3, signed=signed)), row) for row in x]
    if axis == 0:
        assert error == pytest.approx(sum(one), rel=0.03)


def test_kmeans_counts_exact_zeros_and_keeps_the_centre_of_an_empty_cluster():
    sample = Sample.of(torch.cat([torch.zeros(9000), torch.full((1000,), 1.0)]))
    book = kmeans(sample, Grid(bits=2, signed=False))
    assert sample.width and bool(book.levels.isfinite().all())
    assert 0.0 in book.levels.tolist()[0]
    few = Sample.of(torch.tensor([-1.0, 1.0]))
    centres = kmeans(few, Grid(bits=3)).levels
    assert bool(centres.isfinite().all()) and centres.unique().numel() == 8
    assert squared_error(kmeans(few, Grid(bits=3)), torch.tensor([-1.0, 1.0])) < 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dorefas_levels_are_those_of_the_quantizer(bits):
    w = normal(64, 3, 3) * 0.8
    quantizer = DoReFa(Grid(bits=bits), rescale=True)
    book = dorefa(Sample.of(w), Grid(bits=bits))
    ours, theirs = book.quantize(w, None), quantizer(w)
    differ = (ours - theirs).abs() > 1e-5
    assert float(differ.float().mean()) < 0.002  # a weight at a threshold, in float32 and in float64


@pytest.mark.parametrize("deviation", [[1.0, 1.0, 1.0], [1.0, 2.0, 5.0], [0.1, 0.3, 4.0], [1.0, 0.0, 2.0]])
def test_allocation_is_near_the_best_of_all(deviation):
    bits, total = 2, 12
    sigma = torch.tensor(deviation)
    levels = allocate(sigma, bits)
    assert int(levels[sigma > 0].sum()) == total and int(levels.min()) >= 1

    def error(counts):
        return sum(s**2 / n**2 for s, n in zip(deviation, counts, strict=True))

    best = min(error(c) for c in itertools.product(range(1, total + 1), repeat=3) if sum(c) <= total + 1)
    equal = error([4, 4, 4])
    assert error(levels.tolist()) <= min(equal, 1.35 * best) + 1e-12


def test_allocated_levels_have_the_error_of_the_formula_and_beat_equal_ones():
    deviation = torch.tensor([0.1, 0.5, 1.0, 4.0])
    x = normal(4, 200_000) * deviation[:, None] + torch.tensor([[0.3], [0.0], [-1.0], [0.0]])
    grid = Grid(bits=6, axis=0)
    book = aciq_levels(Sample.of(x, 0), grid)
    levels = allocate(deviation, 6)
    assert [row.unique().numel() for row in book.levels] == levels.tolist()
    errors = (book.quantize(x, 0) - x).pow(2).mean(1)
    fine = [i for i, n in enumerate(levels.tolist()) if n >= 16]  # below, the formula's even density is off
    for i in fine:
        bits = math.log2(levels[i])
        expected = float(deviation[i] ** 2) * gauss_error(gauss_clip(bits), bits)
        assert float(errors[i]) == pytest.approx(expected, rel=0.08)
    assert len(fine) >= 3
    sample = Sample.of(x, 0)
    assert float(errors.sum()) * x.size(1) < float(quantization_error(sample, mse(sample, grid), grid).sum())
    with pytest.raises(ValueError, match="add /channel"):
        aciq_levels(Sample.of(x), Grid(bits=3))


@pytest.mark.parametrize("rule", CODEBOOK_RULES)
def test_levels_are_sorted_and_follow_the_scale_of_the_data(rule):
    grid = Grid(bits=3, axis=0)
    for x in (normal(3, 50), torch.zeros(3, 50)):
        book, double = (CODEBOOK_RULES[rule](Sample.of(part, 0), grid) for part in (x, x * 2))
        assert book.levels.shape[0] == 3 and bool((book.levels.diff(dim=1) >= 0).all())
        assert book.thresholds.shape[1] == book.levels.shape[1] - 1
        if rule != "dorefa":  # its tanh has a scale of its own
            torch.testing.assert_close(double.quantize(2 * x, 0), 2 * book.quantize(x, 0), rtol=1e-4, atol=1e-5)
        assert bool(book.quantize(x, 0).isfinite().all())


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_codebook_takes_any_layout(axis, dtype):
    x = normal(4, 6, 5, 3).to(dtype).to(memory_format=torch.channels_last)
    channels = 1 if axis is None else x.size(axis)
    levels = normal(channels, 5, seed=2).double().sort(1).values
    y = Codebook.nearest(levels).quantize(x, axis)
    assert y.shape == x.shape and y.dtype == dtype
    rows = [x.float().numpy()] if axis is None else list(x.float().movedim(axis, 0).numpy())
    moved = [y.float().numpy()] if axis is None else list(y.float().movedim(axis, 0).numpy())
    for row, got, values in zip(rows, moved, levels.to(dtype).float().numpy(), strict=True):
        distance = np.abs(row[..., None] - values)
        assert np.allclose(np.abs(row - got), distance.min(-1), atol=0.02 if dtype == torch.bfloat16 else 1e-6)


def test_the_clusters_of_observed_inputs_are_those_of_the_inputs_themselves():
    """From a histogram of batches of different ranges: each centre is the mean of the values nearest to it."""
    batches = [normal(200, 16, seed=seed).relu() * (seed + 1) for seed in range(3)]
    probe = InputProbe("layer.weight")
    for batch in batches:
        probe.observe(batch)
    values = torch.cat(batches).flatten().numpy()
    centres = CODEBOOK_RULES["kmeans"](probe.sample(), Grid(bits=3, signed=False)).levels[0].numpy()
    owner = np.abs(values[:, None] - centres).argmin(1)
    for i, centre in enumerate(centres):
        assert centre == pytest.approx(values[owner == i].mean(), abs=2e-3 * float(values.max()))
