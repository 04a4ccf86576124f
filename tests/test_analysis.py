"""Sensitivity, distributions, divergence and sharpness, each against a slow or another definition."""

import copy
import math

import pytest
import torch
from scipy import stats
from torch import nn

from hf_robustq import RobustQ, sweep
from hf_robustq.analysis import layer_sensitivity, output_divergence, sharpness, weight_sqnr, weight_statistics
from hf_robustq.grid import Grid
from hf_robustq.scales import Sample, mse
from hf_robustq.sweep import Calibration, Steps
from tests.zoo import images, resnet, run


def predict(model, batch):
    return model(**batch).logits


def mean(outputs):
    return {"mean": float(torch.cat(outputs).double().mean())}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def test_sensitivity_is_a_sweep_of_each_layer_by_itself():
    model, batches = resnet().eval(), [images(batch=5) for _ in range(3)]
    plain = copy.deepcopy(model)
    plugin = RobustQ(model, {})
    names = [site.name for site in plugin.sites]
    found = layer_sensitivity(plugin, batches, predict, mean, "w3", limit=1)
    rows = sweep(plugin, batches, predict, mean, ["fp", "w3"])
    assert found[""] == {"only": rows["fp"], "without": rows["w3"]}
    assert list(found) == ["", *names]

    def by_hand(chosen):
        twin = copy.deepcopy(plain)
        with torch.no_grad():
            for name in chosen:
                w = twin.get_parameter(name)
                scale = mse(Sample.of(w), Grid(bits=3, narrow=True)).float()
                w.copy_((w / scale).round().clamp(-3, 3) * scale)
            return mean([predict(twin, batch) for batch in batches])["mean"]

    for name in (names[0], names[-1]):
        assert found[name]["only"]["mean"] == by_hand([name])
        assert found[name]["without"]["mean"] == by_hand([other for other in names if other != name])
    for setting in ("trained", "w4@mse/bn"):
        with pytest.raises(ValueError, match="each layer by itself"):
            layer_sensitivity(plugin, batches, predict, mean, setting)


def test_layers_that_share_a_weight_are_one():
    model = network()
    model[4] = nn.Linear(16, 16)
    model[4].weight = model[2].weight
    plugin = RobustQ(model, {"first_last": "same"})
    x = torch.randn(32, 6)

    def outputs(found):
        return {"mean": float(torch.cat(found).double().mean())}

    found = layer_sensitivity(plugin, [x], lambda model, x: model(x), outputs, "w2")
    assert found["2.weight"] == found["4.weight"]
    assert found["2.weight"]["only"] != found[""]["only"] and found["2.weight"]["without"] != found[""]["without"]
    assert found["0.weight"]["without"] == found["2.weight"]["only"]


def test_modifiers_and_searches_reach_the_analysis():
    model, batches = resnet().eval(), [images(batch=5) for _ in range(2)]
    plugin = RobustQ(model, {})
    calibration = Calibration([images(batch=8)], lambda model, batch: run(model, batch).loss, iterations=1)
    steps = Steps(plugin, calibration=calibration, forward=lambda: run(model, batches[0]))
    plain, fold = (sum(weight_sqnr(plugin, setting, steps).values()) for setting in ("w3", "w3@mse/fold"))
    assert plain != fold
    settings = ("w3", "w3@mse/fold", "w3@mse/bn", "w3@lapq")
    sums = [sum(output_divergence(plugin, batches, run, setting, calibration).values()) for setting in settings]
    assert len(set(sums)) == 4
    with pytest.raises(ValueError, match="w3@lapq: it reads training samples: pass calibration="):
        output_divergence(plugin, batches, run, "w3@lapq")
    with pytest.raises(ValueError, match="pass forward="):
        weight_sqnr(plugin, "w3@mse/fold")


def test_weight_statistics_are_scipys():
    model = network()
    with torch.no_grad():
        model[2].weight.exp_()
    plugin = RobustQ(model, {"first_last": "same"})
    for site in plugin.sites:
        w = site.parameter.detach().double().flatten().numpy()
        got = weight_statistics(plugin)[site.name]
        assert got.skewness == pytest.approx(stats.skew(w)) and got.kurtosis == pytest.approx(stats.kurtosis(w) + 3)
        assert got.mean == pytest.approx(w.mean()) and got.deviation == pytest.approx(w.std())
        assert int(got.counts.sum()) == w.size and len(got.edges) == len(got.counts) + 1
    statistics = weight_statistics(plugin)
    assert statistics["2.weight"].symmetry == pytest.approx(0.0)  # all positive
    with torch.no_grad():
        half = torch.rand(8, 16)
        next(s for s in plugin.sites if s.name == "2.weight").parameter.copy_(torch.cat([half, -half]))
    assert weight_statistics(plugin)["2.weight"].symmetry == pytest.approx(1.0)


def test_sqnr_of_a_uniform_weight_gains_six_decibels_a_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 2))
    with torch.no_grad():
        model[2].weight.uniform_(-1, 1)
    plugin = RobustQ(model, {})
    values = [weight_sqnr(plugin, f"w{bits}")["2.weight"] for bits in (3, 4, 5, 8)]
    for bits, value in zip((3, 4, 5, 8), values, strict=True):
        assert value == pytest.approx(20 * math.log10(2**bits - 1), abs=0.3)
    assert weight_sqnr(plugin, "fp")["2.weight"] == math.inf


def test_divergence_is_that_of_two_histograms():
    model, batches = resnet().eval(), [images(batch=4) for _ in range(3)]
    plugin = RobustQ(model, {"first_last": "same"})
    none = output_divergence(plugin, batches, run, "fp")
    assert all(value == 0.0 for value in none.values())
    fine, rough = (output_divergence(plugin, batches, run, bits) for bits in ("w8", "w3"))
    assert set(rough) == {site.name for site in plugin.sites}
    assert sum(fine.values()) < sum(rough.values())

    first = plugin.sites[0]
    seen = {"float": [], "w3": []}
    handle = first.module.register_forward_hook(lambda m, a, out: seen[which].append(out.double().flatten().numpy()))
    import numpy as np

    with torch.no_grad():
        which = "float"
        for batch in batches:
            run(model, batch)
        which = "w3"
        sweep(plugin, batches, predict, mean, ["w3"])
    handle.remove()
    p, q = (np.concatenate(seen[key]) for key in seen)
    edges = np.concatenate([[-np.inf], np.linspace(p.min(), p.max(), 257), [np.inf]])
    edges[-2] = np.nextafter(edges[-2], np.inf)
    counts = [np.histogram(x, edges)[0] + 0.5 for x in (p, q)]
    assert rough[first.name] == pytest.approx(stats.entropy(*counts), rel=0.02)


def quadratic(model, target):
    """0.5 * sum (w - target)^2: its maxima over a ball and a box are in the corners."""
    return sum(0.5 * ((p - t) ** 2).sum() for p, t in zip(model.parameters(), target, strict=True))


@pytest.mark.parametrize("kind", ["ball", "box"])
def test_sharpness_of_a_quadratic_is_its_corner(kind):
    model = nn.Linear(4, 3)
    plugin = RobustQ(model, {"first_last": "same"})
    target = [p.detach() + torch.randn_like(p) * 0.3 for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    rho = 1e-2
    got = sharpness(plugin, [target], quadratic, rho, kind)
    base = quadratic(model, target).item()
    corner = 0.0
    for p, t in zip(model.parameters(), target, strict=True):
        reach = rho * (p.detach().abs() + 1) if kind == "box" else rho
        corner += float((0.5 * ((p.detach() - t).abs() + reach) ** 2).sum())
    expected = 100 * (corner - base) / (1 + base) if kind == "box" else corner - base
    assert got == pytest.approx(expected, rel=1e-3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_sharpness_moves_the_float_weights_and_nothing_of_the_quantizers():
    model = network()
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 2}, "first_last": "same"})
    batch = (torch.randn(64, 6), torch.randint(3, (64,)))
    plugin.calibrate([batch], lambda model, batch: model(batch[0]))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    before = copy.deepcopy(model.state_dict())
    small, large = (sharpness(plugin, [batch, batch], loss, rho) for rho in (1e-3, 5e-2))
    assert 0 <= small < large
    assert sharpness(plugin, [batch], loss, 5e-2) == pytest.approx(large, rel=1e-4)
    assert sharpness(plugin, [batch], loss, 1e-2, "box") > 0
    baked = copy.deepcopy(plugin).bake()
    around = sharpness(plugin, [batch], loss, 1e-2, around="quantized")
    assert around == pytest.approx(sharpness(RobustQ(baked, {"first_last": "same"}), [batch], loss, 1e-2), rel=1e-4)
    assert around != pytest.approx(sharpness(plugin, [batch], loss, 1e-2), rel=1e-3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    frozen = next(site for site in plugin.sites if site.name == "2.weight").parameter
    frozen.requires_grad_(False)
    assert 0 < sharpness(plugin, [batch], loss, 5e-2, around="quantized") != pytest.approx(large)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="load the model in float32"):
        sharpness(RobustQ(network().bfloat16(), {}), [batch], loss)
    with pytest.raises(ValueError, match="positive rho"):
        sharpness(plugin, [batch], loss, 0.0)
