"""Each learned quantizer against its definition, written out element by element in float64."""

import math
from contextlib import nullcontext

import pytest
import scipy.stats
import torch

from hf_robustq import Grid, RobustQ, Sample
from hf_robustq.functional import Noise, fake_quantize, normal
from hf_robustq.quantizers import LSQ, DoReFa, LSQPlus, NoiseTempered
from hf_robustq.stage import Moment


def slow_lsq(x, scale, offset, low, high, grad, count):
    """(value, d x, d scale, d offset) of one group that shares a step, in Python floats."""
    value, of_x, of_scale, of_offset = [], [], 0.0, 0.0
    for v, g in zip(x.flatten().tolist(), grad.flatten().tolist(), strict=True):
        position = (v - offset) / scale
        if position <= low:
            value.append(low * scale + offset)
            of_x.append(0.0)
            of_scale += g * low
            of_offset += g
        elif position >= high:
            value.append(high * scale + offset)
            of_x.append(0.0)
            of_scale += g * high
            of_offset += g
        else:
            value.append(round(position) * scale + offset)
            of_x.append(g)
            of_scale += g * (round(position) - position)
    factor = 1.0 / math.sqrt(count * high)
    return torch.tensor(value).double(), torch.tensor(of_x).double(), of_scale * factor, of_offset * factor


V = [-1.3, -0.9, -0.2, 0.24, 0.26, 0.8, 1.6]


@pytest.mark.parametrize(
    ("low", "high", "values", "of_step"),
    [
        (-4, 3, [-1.5, -1, 0, 0, 0.5, 1, 1.5], 0.6982972),
        (-2, 1, [-1, -1, 0, 0, 0.5, 0.5, 0.5], 0.0755929),
        (0, 3, [0, 0, 0, 0, 0.5, 1, 1.5], (-0.48 + 0.48 + 0.4 + 3) / math.sqrt(7 * 3)),
    ],
)
def test_golden_values_of_lsq(low, high, values, of_step):
    x, s = torch.tensor(V, dtype=torch.double), torch.tensor([0.5], dtype=torch.double, requires_grad=True)
    y = fake_quantize(x, s, torch.tensor(float(low)), torch.tensor(float(high)), count=7)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor(values, dtype=torch.double))
    assert float(s.grad) == pytest.approx(of_step, abs=1e-7)


@pytest.mark.parametrize("offset", [None, 0.07])
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-7, 7), (0, 3)])
def test_values_and_gradients_are_those_of_the_slow_definition(offset, axis, memory_format, low, high):
    shape = (3, 4, 5, 2)
    x = (torch.randn(shape, dtype=torch.double) * 2).contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn(shape, dtype=torch.double)
    channels = 1 if axis is None else shape[axis]
    s = (torch.rand(channels, dtype=torch.double) + 0.2).requires_grad_()
    b = None if offset is None else torch.full((channels,), offset, dtype=torch.double, requires_grad=True)
    bounds = torch.tensor(float(low)), torch.tensor(float(high))
    y = fake_quantize(x, s, *bounds, axis=axis, offset=b, count=11)
    y.backward(grad)
    assert y.stride() == x.stride() == x.grad.stride()

    def rows(t):
        return t.detach().reshape(1, -1) if axis is None else t.detach().movedim(axis, 0).reshape(channels, -1)

    for c in range(channels):
        slow = slow_lsq(rows(x)[c], float(s.detach()[c]), offset or 0.0, low, high, rows(grad)[c], 11)
        torch.testing.assert_close(rows(y)[c], slow[0])
        torch.testing.assert_close(rows(x.grad)[c], slow[1])
        assert float(s.grad[c]) == pytest.approx(slow[2], rel=1e-9, abs=1e-12)
        if b is not None:
            assert float(b.grad[c]) == pytest.approx(slow[3], rel=1e-9, abs=1e-12)


def test_half_precision_is_computed_in_float32_and_the_autocast_dtype_comes_out():
    stage = LSQ(Grid(bits=4))
    x = torch.randn(3, 200)
    stage.init_from(Sample.of(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stage(x).dtype == torch.bfloat16
        assert torch.equal(stage(x), fake_quantize(x, stage.scale, stage.low, stage.high).bfloat16())
        stage.product = False
        assert stage(x).dtype == torch.float32
    assert stage(x).dtype == torch.float32 and stage(x.double()).dtype == torch.double


def test_the_backward_keeps_the_input_and_nothing_else_of_its_size():
    x = torch.randn(64, 1000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        LSQ(Grid(bits=4))(x)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("role", "shape", "count"), [("weight", (6, 5, 3, 3), 270), ("input", (6, 5, 3, 3), 45)])
def test_the_gradient_of_the_step_is_scaled_by_what_shares_it(role, shape, count):
    stage = LSQ(Grid(bits=4), role=role)
    x = torch.randn(shape)
    stage(x).sum().backward()
    raw = torch.ones(1, requires_grad=True)
    fake_quantize(x, raw, stage.low, stage.high).sum().backward()
    torch.testing.assert_close(stage.scale.grad, raw.grad / math.sqrt(count))
    per_channel = LSQ(Grid(bits=4, axis=0), 6)
    assert per_channel.sharing(x) == 45


def test_initial_steps_are_the_papers():
    w = torch.randn(8, 500)
    stage = LSQ(Grid(bits=3, axis=0), 8)
    stage.init_from(Sample.of(w, 0))
    torch.testing.assert_close(stage.scale.detach(), 2 * w.abs().mean(1) / math.sqrt(3))
    stage = LSQPlus(Grid(bits=4))
    stage.init_from(Sample.of(w[0]))
    mean, spread = w[0].mean(), w[0].std(correction=0)
    torch.testing.assert_close(stage.scale.detach()[0], max(abs(mean - 3 * spread), abs(mean + 3 * spread)) / 8)


@pytest.mark.parametrize("function", [torch.nn.functional.gelu, torch.nn.functional.hardswish, torch.relu])
def test_the_offset_starts_where_the_error_is_least(function):
    """On GELU and h-swish LSQ+ must beat both an unsigned grid without offset and a signed one."""
    torch.manual_seed(0)
    x = function(torch.randn(50_000) * 2)
    stage = LSQPlus(Grid(bits=3, signed=bool((x < 0).any())), role="input")
    stage.init_from(Sample.of(x))
    ours = error(stage, x)
    others = []
    for signed in (False, True):
        lsq = LSQ(Grid(bits=3, signed=signed), role="input")
        with pytest.warns(UserWarning) if not signed and bool((x < 0).any()) else nullcontext():
            lsq.init_from(Sample.of(x))
        others.append(error(lsq, x))
    assert ours <= min(others) * (1.001 if function is torch.relu else 0.95)
    assert (float(stage.offset.detach()) == 0) == (function is torch.relu) and int(stage.low) == 0


@torch.no_grad()
def error(stage, x):
    return float(((stage(x) - x) ** 2).mean())


GOLDEN = {
    2: [-1, -1 / 3, 1 / 3, 1 / 3, 1],
    3: [-0.714286, -0.142857, 0.142857, 0.428571, 1],
    4: [-0.733333, -0.2, 0.066667, 0.333333, 1],
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_values_of_dorefa(bits):
    w = torch.tensor([-0.5, -0.1, 0.05, 0.2, 0.7])
    torch.testing.assert_close(DoReFa(Grid(bits=bits))(w), torch.tensor(GOLDEN[bits]), rtol=0, atol=1e-6)
    rescaled = DoReFa(Grid(bits=bits), rescale=True)(w)
    torch.testing.assert_close(rescaled, torch.tensor(GOLDEN[bits]) * 0.7, rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", [None, 0])
def test_dorefas_gradient_is_that_of_tanh_over_its_maximum(axis):
    w = torch.randn(3, 40, dtype=torch.double, requires_grad=True)
    grad = torch.randn(3, 40, dtype=torch.double)
    DoReFa(Grid(bits=2, axis=axis), 3)(w).backward(grad)

    def smooth(w):
        t = torch.tanh(w)
        return (t / (t.abs().amax() if axis is None else t.abs().amax(1, keepdim=True)) * grad).sum()

    step, expected = 1e-6, torch.zeros_like(w)
    for i in range(w.numel()):
        d = torch.zeros(w.numel(), dtype=torch.double)
        d[i] = step
        d = d.view_as(w)
        expected.view(-1)[i] = (smooth(w.detach() + d) - smooth(w.detach() - d)) / (2 * step)
    torch.testing.assert_close(w.grad, expected, rtol=1e-5, atol=1e-7)


def test_dorefas_inputs_are_clamped_to_one():
    stage = DoReFa(Grid(bits=2), role="input")
    x = torch.tensor([[0.0, 0.1, 0.4, 0.9, 3.0]], requires_grad=True)
    stage.init_from(Sample.of(x.detach()))
    y = stage(x)
    torch.testing.assert_close(y.detach(), torch.tensor([[0, 0, 1 / 3, 1, 1]]))
    y.sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_normal_noise_is_normal_and_no_two_draws_are_alike():
    x = torch.empty(200_000)
    draws = [normal(x, torch.tensor(key)).double() for key in (1, 2, 1 << 40, 2**63 - 1)]
    for draw in draws:
        assert scipy.stats.kstest(draw.numpy(), "norm").pvalue > 1e-3
        assert float(draw.mean()) == pytest.approx(0, abs=0.01) and float(draw.std()) == pytest.approx(1, abs=0.01)
        assert abs(float(torch.corrcoef(torch.stack([draw[:-1], draw[1:]]))[0, 1])) < 0.01
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert float(correlations.abs().max()) < 0.01


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (6, 1, 3, 3), (40, 30, 5, 5)])
def test_noise_and_result_do_not_depend_on_the_order_in_memory(shape, axis):
    """And a channels-last tensor stays one."""
    x = torch.randn(shape)
    scale = torch.rand(1 if axis is None else shape[axis]) + 0.1
    noise = Noise(torch.tensor(0.3), torch.tensor(5.0), torch.tensor(12345678901234))
    options = {"low": torch.tensor(-2.0), "high": torch.tensor(1.0), "axis": axis, "noise": noise}
    last = fake_quantize(x.to(memory_format=torch.channels_last), scale, **options)
    torch.testing.assert_close(last, fake_quantize(x, scale, **options))
    assert last.is_contiguous(memory_format=torch.channels_last)


def noisy(**options):
    stage = NoiseTempered(Grid(bits=2), **options)
    stage.site = "layer.weight"
    return stage


@pytest.mark.parametrize("relative", [False, True])
def test_noise_is_equation_7_and_its_gradient_is_lsqs(relative):
    torch.manual_seed(0)
    w = torch.randn(100, 300) * 0.1
    stage, plain = noisy(c=0.4, k=7.0, k_relative=relative), LSQ(Grid(bits=2))
    for one in (stage, plain):
        one.init_from(Sample.of(w))
    stage.at(Moment(step=5))
    a, b = w.clone().requires_grad_(), w.clone().requires_grad_()
    noise = (stage(a) - plain(b)).detach()
    error = (plain(w) - w).detach().abs().double()
    deviation = 0.4 * torch.exp(-7.0 * error / (float(stage.scale.detach()) if relative else 1.0)) * error.sqrt()
    assert scipy.stats.kstest((noise / deviation).flatten().numpy(), "norm").pvalue > 1e-3
    grad = torch.randn_like(w)
    stage(a).backward(grad)
    plain(b).backward(grad)
    assert torch.equal(a.grad, b.grad)
    torch.testing.assert_close(stage.scale.grad, plain.scale.grad, rtol=1e-5, atol=1e-7)


def test_noise_is_a_function_of_seed_step_micro_batch_and_site():
    w, stage = torch.randn(50, 50), noisy()
    stage.init_from(Sample.of(w))

    def draw(**moment):
        stage.at(Moment(**moment))
        return stage(w).detach()

    first = draw(step=3)
    assert torch.equal(first, draw(step=3))
    for other in ({"step": 4}, {"step": 3, "micro_batch": 1}, {"step": 3, "seed": 1}):
        assert not torch.equal(first, draw(**other))
    stage.site = "other.weight"
    assert not torch.equal(first, draw(step=3))
    channels_last = torch.randn(4, 5, 6, 7)
    assert torch.equal(stage(channels_last), stage(channels_last.contiguous(memory_format=torch.channels_last)))


def test_no_noise_in_evaluation_nor_with_c_0():
    w = torch.randn(50, 50)
    plain = LSQ(Grid(bits=2))
    plain.init_from(Sample.of(w))
    for c, training in ((0.3, False), (0.0, True)):
        stage = noisy(c=c).train(training)
        stage.init_from(Sample.of(w))
        stage.at(Moment(step=1))
        assert torch.equal(stage(w), plain(w))


def test_the_temperature_follows_its_schedule_and_the_learning_rate():
    stage = noisy(c=0.2, schedule="linear", noise_lr_scale=True)
    stage.at(Moment(progress=0.5, learning_rate=0.1))
    assert float(stage.temperature) == pytest.approx(0.2 * 0.5 * 0.1)
    with pytest.raises(ValueError, match="unknown schedule 'up'"):
        noisy(schedule="up")
    with pytest.raises(ValueError, match=r"noise\.c must be a number from 0 to 100"):
        noisy(c=-1)


@pytest.mark.parametrize("start", [0.0, -0.3])
def test_a_step_at_or_below_zero_stays_finite_and_comes_back(start):
    x, stage = torch.randn(20, 30), LSQ(Grid(bits=4))
    stage.init_from(Sample.of(x))
    with torch.no_grad():
        stage.scale.fill_(start)
    stage(x).pow(2).sum().backward()
    assert bool(stage(x).isfinite().all()) and bool(stage.scale.grad.isfinite().all())
    stage.project()
    assert float(stage.scale.detach()) > 0


@pytest.mark.parametrize("kind", [LSQ, LSQPlus, NoiseTempered, DoReFa])
def test_an_empty_batch_passes(kind):
    """An expert that no token was routed to."""
    stage = kind(Grid(bits=4), role="input")
    stage.init_from(Sample.of(torch.rand(50)))
    x = torch.zeros(0, 8, requires_grad=True)
    stage(x).sum().backward()
    assert x.grad.shape == x.shape


def test_calibration_of_zeros_and_of_negative_values_for_an_unsigned_grid_warns():
    with pytest.warns(UserWarning, match="is zero everywhere in calibration"):
        LSQ(Grid(bits=4)).init_from(Sample.of(torch.zeros(10)))
    with pytest.warns(UserWarning, match=r"has negative values, 25\.0%, which an unsigned grid loses"):
        DoReFa(Grid(bits=4), role="input").init_from(Sample.of(torch.tensor([-1.0, 0.0, 0.5, 1.0])))
    with pytest.warns(UserWarning, match="is zero everywhere in calibration"):
        LSQPlus(Grid(bits=4), role="input").init_from(Sample.of(torch.zeros(10)))
    with pytest.raises(ValueError, match="non-finite"):
        Sample.of(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="a step per channel needs a tensor of two or more dimensions"):
        LSQ(Grid(bits=4, axis=0), 3)(torch.randn(3))
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 16"):
        LSQ(Grid(bits=1))
    with pytest.raises(ValueError, match="unknown option of lsq 'c'"):
        RobustQ(torch.nn.Linear(2, 2), {"weights": {"bits": 4, "method": "lsq", "options": {"c": 1}}})
