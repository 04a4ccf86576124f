"""What hardware makes of a tensor, against numpy's integers, decimal's rounding and torch's own quantizers."""

import decimal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hf_robustq import Setting
from hf_robustq.grid import Grid
from hf_robustq.scales import Sample, absmax, mse
from hf_robustq.sweep.mapping import asymmetric, corrected, folded, to_integer, uniform
from hf_robustq.sweep.steps import perturbed


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ends(grid):
    return torch.tensor([float(grid.low)]), torch.tensor([float(grid.high)])


@pytest.mark.parametrize(
    ("rounding", "mode"),
    [
        ("half_even", decimal.ROUND_HALF_EVEN),
        ("half_away", decimal.ROUND_HALF_UP),
        ("floor", decimal.ROUND_FLOOR),
    ],
)
def test_rounding_is_decimals(rounding, mode):
    x = torch.cat([torch.arange(-40, 41) / 8, normal(200) * 3])
    expected = [int(decimal.Decimal(v).to_integral_value(mode)) for v in x.tolist()]
    assert to_integer(x, rounding).tolist() == expected


def test_stochastic_rounding_is_unbiased_and_the_same_for_the_same_seed():
    x = torch.full((40_000,), 2.3)
    codes = to_integer(x, "stochastic", torch.Generator().manual_seed(0))
    assert set(codes.tolist()) == {2.0, 3.0} and abs(float(codes.mean()) - 2.3) < 0.01

    def drawn(seed, same):
        mapping = uniform(torch.ones(1), *ends(Grid(bits=4)), None, "stochastic", seed=seed, same=same)
        return mapping(x), mapping(x)

    (one, two), (first, second) = drawn(0, True), drawn(0, False)
    assert torch.equal(one, two) and torch.equal(one, first) and not torch.equal(first, second)
    assert not torch.equal(one, drawn(1, True)[0])


@pytest.mark.parametrize(("bits", "kind"), [(8, np.int8), (16, np.int16)])
@pytest.mark.parametrize("narrow", [False, True])
def test_wrapping_is_that_of_machine_integers(bits, kind, narrow):
    x = normal(5000) * 2.0**bits / 2
    codes = uniform(torch.ones(1), *ends(Grid(bits=bits, narrow=narrow)), None, overflow="wrap")(x)
    assert codes.tolist() == np.round(x.numpy()).astype(np.int64).astype(kind).astype(float).tolist()
    unsigned = uniform(torch.ones(1), *ends(Grid(bits=8, signed=False)), None, overflow="wrap")(x)
    assert unsigned.tolist() == np.round(x.numpy()).astype(np.int64).astype(np.uint8).astype(float).tolist()


def test_unclipped_rounds_and_nothing_else():
    x = normal(1000) * 10
    assert torch.equal(uniform(torch.tensor([0.5]), *ends(Grid(bits=2)), None, overflow="none")(x), (x * 2).round() / 2)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_integer_zero_point_is_torchs_affine_quantizer(axis, bits):
    x = normal(5, 6, 40).exp() - 0.5
    grid = Grid(bits=bits, narrow=True, axis=axis)
    sample = Sample.of(x, axis)
    step, low, high = asymmetric(sample, grid, absmax(sample, grid))
    got = uniform(step, low, high, axis)(x)
    if axis is None:
        theirs = torch.fake_quantize_per_tensor_affine(x, float(step.float()), int(-low), 0, 2**bits - 1)
    else:
        theirs = torch.fake_quantize_per_channel_affine(x, step.float(), (-low).int(), axis, 0, 2**bits - 1)
    assert float((got - theirs).abs().max()) <= float(step.max()) * 1.01  # a tie may fall to either side
    assert float(((got - theirs).abs() > 1e-4).float().mean()) < 0.01
    flat = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    assert torch.allclose(step * (2**bits - 1), (flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)).double())


def test_an_asymmetric_range_keeps_within_the_clip_of_the_rule():
    x = torch.cat([normal(5000), torch.tensor([9.0])])
    grid = Grid(bits=3)
    clip = mse(Sample.of(x), grid)
    step, _, high = asymmetric(Sample.of(x), grid, clip)
    assert float(high * step) <= float(clip * grid.high) + float(step) < 9.0
    one_sided = Grid(bits=3, signed=False)
    sample = Sample.of(x.relu())
    same = asymmetric(sample, one_sided, absmax(sample, one_sided))
    assert float(same[1]) == 0 and float(same[0]) == pytest.approx(float(absmax(sample, one_sided)))


@pytest.mark.parametrize("axis", [0, 1])
def test_correction_puts_moments_back(axis):
    w = normal(6, 8, 3, 3) + 0.2
    rough = uniform(torch.tensor([0.9]), *ends(Grid(bits=2)), None)
    over = [d for d in range(4) if d != axis]
    for variance in (False, True):
        q = corrected(rough, axis, variance)(w)
        torch.testing.assert_close(q.mean(over), w.mean(over))
        wanted = w if variance else rough(w)
        torch.testing.assert_close(q.std(over), wanted.std(over))
    flat = corrected(lambda x: torch.zeros_like(x), axis, variance=True)(w)
    torch.testing.assert_close(flat, w.mean(over, keepdim=True).expand_as(w))


def test_folding_is_what_fusing_and_then_quantizing_gives():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.weight.data[3] = 0
    conv.eval(), norm.eval()
    fused = fuse_conv_bn_eval(conv, norm)
    grid = Grid(bits=3, narrow=True)
    quantize = uniform(mse(Sample.of(fused.weight), grid), *ends(grid), None)
    fused.weight.data = quantize(fused.weight.data)
    from hf_robustq.sweep.batch_norm import gain

    x = normal(2, 3, 9, 9)
    expected = fused(x)
    conv.weight.data = folded(quantize, gain(norm), 0)(conv.weight.data)
    torch.testing.assert_close(norm(conv(x)), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_are_folded_in_float32():
    w, factor = normal(8, 64).bfloat16(), torch.rand(8) + 0.5
    grid = Grid(bits=4, narrow=True)
    quantize = uniform(torch.tensor([0.3]), *ends(grid), None)
    expected = quantize(w.float() * factor[:, None]) / factor[:, None]
    assert torch.equal(folded(quantize, factor, 0)(w), expected.bfloat16())
    plain = corrected(quantize, 0, variance=False)(w.float())
    assert torch.equal(corrected(quantize, 0, variance=False)(w), plain.bfloat16())


@pytest.mark.parametrize(("step", "log", "value"), [(0.7, 0.5, 0.5), (0.72, 1.0, 0.5), (0.76, 1.0, 1.0), (3.0, 4, 4)])
def test_powers_of_two_turn_where_they_should(step, log, value):
    scale = torch.tensor([step])
    assert float(perturbed(scale, Setting.parse("w4@mse/pow2"))) == log
    assert float(perturbed(scale, Setting.parse("w4@mse/pow2v"))) == value
    assert float(perturbed(scale, Setting.parse("w4@mse/pow2/x0.5"))) == log / 2
