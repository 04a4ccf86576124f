"""The compiled kernels: every method through them against its eager self. Elsewhere in the suite they are off."""

import copy

import pytest
import torch
from torch import nn

from hf_robustq import ASAM, Grid, RobustQ, Sample
from hf_robustq.functional import CACHED, Noise, fake_quantize, fused
from hf_robustq.functional import quantize as kernels
from hf_robustq.optim import asam
from hf_robustq.regularizers import kure, waveq
from hf_robustq.reparam import SATURATING, SatNL, _fused_saturate, _fused_through
from hf_robustq.stage import Moment
from tests import methods

CLOSE = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-5)}


@pytest.fixture
def both(monkeypatch, caplog):
    """both(compute): (what it gives compiled, what it gives eager). A kernel that was given up is a failure."""

    def run(compute):
        found = []
        for on in ("1", "0"):
            monkeypatch.setenv("HF_ROBUSTQ_FUSED", on)
            torch.manual_seed(0)
            found.append(compute())
        assert "No fused kernel" not in caplog.text
        return found

    return run


def close(found, dtype):
    """To rounding: sums are taken in another order."""
    rtol, atol = CLOSE[dtype]
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("noise", [False, True])
def test_fake_quantization(both, dtype, axis, noise):
    x, grad = torch.randn(40, 3000).to(dtype), torch.randn(40, 3000).to(dtype)
    s = torch.rand(40 if axis == 0 else 1) + 0.1
    bounds, extra = (torch.tensor(-8.0), torch.tensor(7.0)), {}
    if noise:
        extra = {"noise": Noise(torch.tensor(0.3), torch.tensor(5.0), torch.tensor(12345678901234))}

    def compute():
        given = [x.clone().requires_grad_(), s.clone().requires_grad_()]
        y = fake_quantize(*given, *bounds, axis=axis, count=100, **extra)
        y.backward(grad)
        return y.detach(), *(t.grad for t in given)

    compiled, eager = both(compute)
    for kernel in (kernels._forward, kernels._backward):
        assert any(dtype in key for key in kernel.compiled)
    assert compiled[0].dtype == dtype
    for one, other in zip(compiled, eager, strict=True):  # the noise has other logarithms and cosines
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-3)
    if not noise:
        assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])


@pytest.mark.parametrize("name", methods.QUANTIZERS)
@pytest.mark.parametrize("axis", [None, 0])
def test_every_quantizer(both, name, axis):
    x, grad = torch.randn(20, 1000), torch.randn(20, 1000)
    stage = methods.QUANTIZERS[name](Grid(bits=3, narrow=True, axis=axis), 20)
    stage.init_from(Sample.of(x, axis))
    stage.at(Moment(step=3))

    def compute():
        w = x.clone().requires_grad_()
        stage.zero_grad()
        y = stage.train()(w)
        y.backward(grad)
        return y.detach(), w.grad, *(p.grad.clone() for p in stage.parameters())

    found = both(compute)
    assert kernels._forward.compiled and kernels._backward.compiled
    close(found, torch.float32)


VARIANTS = {f"waveq {method} {n}": (method, n) for method in ("absmax", "dorefa") for n in (0, 2)}


@pytest.mark.parametrize("name", [*methods.REGULARIZERS, *VARIANTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_regularizer(both, name, dtype):
    if name in VARIANTS:
        method, variant = VARIANTS[name]
        stage = methods.waveq(method, variant=variant)
    else:
        stage = methods.REGULARIZERS[name]()
    w = torch.distributions.StudentT(6.0).sample((CACHED + 1000,)).to(dtype)
    grad, strength = 1e-6 * torch.randn_like(w), torch.tensor(0.7, dtype=dtype)
    theta = [p.detach().to(dtype) for p in stage.parameters()]

    def compute():
        with torch.no_grad():
            return [g for g in stage.gradient(grad.clone(), strength, w, *theta) if g is not None]

    found = both(compute)
    for own, kernel in ((kure.KURE, kure._fused_add_gradient), (waveq.WaveQ, waveq._fused_add_gradient)):
        assert not isinstance(stage, own) or any(dtype in key for key in kernel.compiled)
    assert any(bool(g.any()) for g in found[0])
    close(found, dtype)


@pytest.mark.parametrize("function", SATURATING)
def test_saturation(both, function):
    stage, v, grad = SatNL(function, d=1.5), torch.randn(CACHED + 1000), torch.randn(CACHED + 1000)

    def compute():
        stored = v.clone().requires_grad_()
        w = stage(stored)
        w.backward(grad)
        return w.detach(), stored.grad

    found = both(compute)
    assert _fused_saturate.compiled and _fused_through.compiled
    close(found, torch.float32)


def test_the_two_passes_of_asam(both):
    start, slope = torch.randn(700, 300), torch.randn(700, 300)

    def compute():
        model, seen = nn.ParameterDict({"weight": nn.Parameter(start.clone())}), []

        def once():
            seen.append(model["weight"].detach().clone())
            loss = (model["weight"] * slope).sum()
            loss.backward()
            return loss.detach()

        ASAM(model, rho=1.0)(once)
        return seen

    found = both(compute)
    assert asam._square.compiled and asam._move.compiled
    assert not torch.equal(*found[0])
    close(found, torch.float32)


def test_a_training_step(both):
    """Weights and inputs, a penalty, SatNL: forward and every gradient."""
    model = nn.Sequential(nn.Conv2d(8, 128, 3), nn.ReLU(), nn.Conv2d(128, 120, 3), nn.Flatten(), nn.Linear(1920, 5))
    x = torch.randn(16, 8, 8, 8)
    config = {
        "weights": {"method": "noise", "bits": 4},
        "activations": {"method": "lsq", "bits": 6},
        "regularizers": {"kure": {"strength": 3.0}},
        "satnl": {},
        "first_last": "same",
    }

    def compute():
        twin = copy.deepcopy(model)
        plugin = RobustQ(twin, config)
        plugin.calibrate([x], lambda model, x: model(x))
        plugin.step(0.0, first=True)
        y = twin.train()(x)
        y.pow(2).mean().backward()
        return y.detach(), *(p.grad for p in twin.parameters())

    compiled, eager = both(compute)
    for one, other in zip(compiled, eager, strict=True):  # an input next to a tie may fall to its other side
        assert float((one - other).norm() / other.norm()) < 1e-2


def test_without_a_compiler_the_eager_function_is_used(monkeypatch, caplog):
    def refuse(*args, **kwargs):
        def call(*inner):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

        return call

    monkeypatch.setenv("HF_ROBUSTQ_FUSED", "1")
    monkeypatch.setattr(torch, "compile", refuse)
    double = fused(lambda x: 2 * x)
    x = torch.ones(CACHED)
    assert double(x).sum() == 2 * CACHED
    assert double(x).sum() == 2 * CACHED
    assert len(caplog.records) == 1 and "no C++ compiler" in caplog.text


def divide(x, scale):
    return x / scale


def test_one_variant_serves_every_shape_and_every_view(monkeypatch, caplog):
    """Weights may be views of flat buffers, steps views of anything: none costs a compilation, none gives it up.

    Warnings are errors here: one raised while compiling shows as a kernel given up.
    """
    monkeypatch.setenv("HF_ROBUSTQ_FUSED", "1")
    kernel = fused(divide, smallest=1)
    base = torch.randn(12, 20, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in (base[:8], base.view(24, 10), (2 * base).view(5, 48), torch.randn(7, 9), base):
            scale = 0.1 + torch.rand(x.shape[0] * x.shape[1], requires_grad=True)[: x.shape[0]].reshape(-1, 1)
            torch.testing.assert_close(kernel(x, scale), (x / scale).detach())
    assert len(kernel.compiled) == 1 and "No fused kernel" not in caplog.text
