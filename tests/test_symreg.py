"""SymReg: definitions by hand, its symmetries, and where it acts."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_robustq import RobustQ, SymReg, SymReg2
from hf_robustq.regularizers.symreg import sort
from tests.zoo import images, mobilenet_v2, resnet, run


def sum_by_hand(values, group):
    """Peels `group` elements off either end of the sorted list, until there are too few."""
    left, total, groups = sorted(values), 0.0, 0
    while len(left) >= 2 * group:
        total, groups = total + abs(sum(left[:group] + left[-group:])), groups + 1
        left = left[group:-group]
    return (total + abs(sum(left)), groups + 1) if left else (total, groups)


@pytest.mark.parametrize(("stage", "group"), [(SymReg(), 1), (SymReg2(), 2)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 1001])
def test_penalty_is_its_definition(stage, group, count):
    w = torch.distributions.Gumbel(0.0, 1.0).sample((count,)).double()
    total, groups = sum_by_hand(w.tolist(), group)
    assert float(stage.penalty(w)) == pytest.approx(total / groups)
    scaled = type(stage)(relative=True).penalty(w)
    assert float(scaled) == pytest.approx(total / groups / float(w.abs().mean()))


def test_golden_values():
    six, eight = [-0.9, -0.4, -0.1, 0.2, 0.3, 0.5], [-0.9, -0.4, -0.1, 0.05, 0.2, 0.3, 0.5, 0.8]
    assert float(SymReg().penalty(torch.tensor(six).double())) * 3 == pytest.approx(0.6, rel=1e-6)
    assert float(SymReg().penalty(torch.tensor(eight).double())) * 4 == pytest.approx(0.65, rel=1e-6)
    assert float(SymReg2().penalty(torch.tensor(eight).double())) * 2 == pytest.approx(0.45, rel=1e-6)


@pytest.mark.parametrize("stage", [SymReg(), SymReg2(), SymReg(relative=True)])
def test_symmetries(stage):
    w = torch.distributions.Gumbel(0.0, 1.0).sample((40, 25)).double()
    value = stage.penalty(w)
    shuffled = w.flatten()[torch.randperm(1000)].view(25, 40)
    torch.testing.assert_close(stage.penalty(shuffled), value)
    torch.testing.assert_close(stage.penalty(-w), value)
    torch.testing.assert_close(stage.penalty(3 * w), value if stage.relative else 3 * value)
    assert float(stage.penalty(torch.cat([w, -w]))) < 1e-12 < float(value)
    assert float(SymReg2().penalty(w)) * 250 <= float(SymReg().penalty(w)) * 500


def test_descent_makes_a_weight_symmetric():
    w = torch.distributions.Gumbel(0.3, 1.0).sample((64, 50))
    stage = SymReg()
    start = float(stage.penalty(w))
    for _ in range(300):
        w -= stage.gradient(torch.zeros_like(w), torch.tensor(1.0), w)[0] * 30
    assert float(stage.penalty(w)) < 0.1 * start and abs(float(w.mean())) < 0.05


@pytest.mark.parametrize("count", [1, 2, 100_001])
def test_sorting_is_torchs(count):
    x = torch.randn(count)
    x[: count // 3] = 0
    x[: count // 6] *= -1  # zeros of both signs
    values, places = sort(x)
    assert torch.equal(values, x.sort().values) and torch.equal(x[places], values)
    assert np.array_equal(np.sort(places.numpy()), np.arange(count))


def test_depthwise_convolutions_are_left_alone_unless_asked_for():
    def carrying(**options):
        plugin = RobustQ(mobilenet_v2(), {"regularizers": {"sym1": options, "kure": {}}})
        depthwise = {s.name for s in plugin.sites if isinstance(s.module, nn.Conv2d) and s.module.groups > 1}
        acting = {site.name for site in plugin.sites if "sym1" in site.weight_stages._modules}
        assert depthwise and all("kure" in site.weight_stages._modules for site in plugin.sites)
        return depthwise, acting, {site.name for site in plugin.sites}

    depthwise, acting, every = carrying()
    assert acting == every - depthwise
    assert carrying(depthwise=True)[1] == every
    assert SymReg().refuses(nn.ConvTranspose2d(8, 8, 3, groups=8)) and not SymReg().refuses(nn.ConvTranspose2d(8, 8, 3))


def test_weights_that_leave_nothing_to_act_on_are_refused():
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match=r"sym1: every weight it would act on is depthwise \(add depthwise: true\)"):
        RobustQ(grouped, {"regularizers": {"sym1": {}}})
    assert type(grouped[1]) is nn.Conv2d  # as it was


def test_every_nth_step_n_times_as_strongly():
    """Weights that do not move: what reaches the gradient over 6 steps is the same in sum."""

    def gradients(**options):
        torch.manual_seed(0)
        model = resnet().train()
        plugin = RobustQ(model, {"regularizers": {"sym1": options}})
        plugin.calibrate([images()], run)
        found = []
        for i in range(6):
            plugin.step(0.0, first=True, index=i)
            model.zero_grad()
            run(model, images()).loss.backward()
            found.append(plugin.sites[0].parameter.grad.clone())
        return torch.stack(found)

    plain = gradients(strength=0.0)
    always, third = (gradients(strength=0.5, every=every) - plain for every in (1, 3))
    assert [bool(g.any()) for g in always] == [True] * 6
    assert [bool(g.any()) for g in third] == [True, False, False] * 2
    torch.testing.assert_close(third.sum(0), always.sum(0), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="every must be a whole number from 1"):
        RobustQ(resnet(), {"regularizers": {"sym1": {"every": 0}}})
