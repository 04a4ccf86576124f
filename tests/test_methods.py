"""Properties every method has. A new method is a row in `methods.py`."""

import pytest
import torch
from torch import nn

from hf_robustq import Grid, Sample
from hf_robustq import quantizers as q
from hf_robustq import regularizers as r
from tests import methods


def test_every_method_of_the_package_has_a_row():
    assert set(q.QUANTIZERS) <= {row.split()[0] for row in methods.QUANTIZERS}
    assert set(r.REGULARIZERS) <= {row.split()[0] for row in methods.REGULARIZERS}


@pytest.fixture(params=methods.QUANTIZERS)
def quantizer(request):
    return methods.QUANTIZERS[request.param]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("axis", [None, 0])
def test_quantizer_gives_at_most_its_levels_and_is_idempotent(quantizer, bits, axis):
    x = torch.randn(5, 800)
    stage = quantizer(Grid(bits=bits, narrow=True, axis=axis), 5)
    stage.init_from(Sample.of(x, axis))
    y = stage(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    for row in y if axis == 0 else [y]:
        assert row.unique().numel() <= 2**bits - 1
    if stage.uniform:
        torch.testing.assert_close(stage(y), y, rtol=1e-6, atol=0)
    assert bool(stage.initialized) and all(p.dim() >= 1 for p in stage.parameters()) and stage.scale.dim() == 1


def test_quantizer_keeps_dtype_and_its_own_precision(quantizer):
    x = torch.randn(64, 64)
    stage = quantizer(Grid(bits=8, narrow=True))
    stage.init_from(Sample.of(x))
    before = stage.scale.clone()
    stage.to(torch.bfloat16)
    assert torch.equal(stage.scale, before) and stage(x.bfloat16()).dtype == torch.bfloat16


def test_disabled_quantizer_is_identity(quantizer):
    stage = quantizer(Grid(bits=2, narrow=True))
    stage.enabled = False
    x = torch.randn(10)
    assert stage(x) is x


@pytest.fixture(params=methods.REGULARIZERS)
def regularizer(request):
    return methods.REGULARIZERS[request.param]()


@pytest.mark.parametrize("shape", [(40, 30), (6, 5, 3, 3), (200_000,)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_is_the_penaltys(regularizer, shape, memory_format):
    """The closed form against autograd through `penalty`, in float64."""
    if memory_format is torch.channels_last and len(shape) != 4:
        pytest.skip("channels-last is for four dimensions")
    w = torch.distributions.StudentT(6.0).sample(shape).double().contiguous(memory_format=memory_format)
    theta = [p.detach().double().requires_grad_() for p in regularizer.parameters()]
    w.requires_grad_()
    expected = torch.autograd.grad(0.7 * regularizer.penalty(w, *theta), [w, *theta])
    upstream = torch.randn_like(w)
    strength = torch.tensor(0.7, dtype=torch.double)
    with torch.no_grad():
        got = regularizer.gradient(upstream, strength, w.detach(), *theta)
    torch.testing.assert_close(got[0] - upstream, expected[0], rtol=1e-8, atol=1e-12)
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_penalty_passes_gradcheck(regularizer):
    if isinstance(regularizer, r.WaveQ):
        pytest.skip("max|w| is a constant to its gradient, not to a difference quotient")
    w = torch.randn(3, 7, dtype=torch.double, requires_grad=True)
    theta = [p.detach().double().requires_grad_() for p in regularizer.parameters()]
    assert torch.autograd.gradcheck(regularizer.penalty, (w, *theta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regularizer_is_identity_forward_and_adds_its_gradient_backward(regularizer, dtype):
    w = torch.randn(64, 50).to(dtype).requires_grad_()
    regularizer.train()
    regularizer.active = True
    regularizer.strength.fill_(3.0)
    out = regularizer(w)
    assert torch.equal(out, w)
    upstream = torch.randn_like(w)
    (grad,) = torch.autograd.grad(out, w, upstream)
    leaf = w.detach().double().requires_grad_()
    (added,) = torch.autograd.grad(3.0 * regularizer.penalty(leaf, *regularizer.parameters()), leaf)
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(grad.double(), upstream.double() + added, **tolerance)


@pytest.mark.parametrize("how", ["inactive", "evaluation", "no_grad"])
def test_regularizer_does_nothing_when_it_should_not(regularizer, how):
    regularizer.train(how != "evaluation")
    regularizer.active = how != "inactive"
    w = nn.Parameter(torch.randn(10))
    with torch.set_grad_enabled(how != "no_grad"):
        out = regularizer(w)
    learned = list(regularizer.parameters())
    if how == "no_grad" or not learned:
        assert out is w
    else:  # what is learned has a gradient at every step: none
        upstream = torch.randn(10)
        of_w, *rest = torch.autograd.grad(out, [w, *learned], upstream)
        assert torch.equal(out, w) and torch.equal(of_w, upstream) and not any(g.any() for g in rest)
