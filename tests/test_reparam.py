"""SatNL: the properties of section 4.2, wrapping, folding, saving."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_robustq import RobustQ, SatNL, from_pretrained, sweep
from hf_robustq.analysis import sharpness, weight_statistics
from hf_robustq.reparam import SATURATING, network_weight
from tests.zoo import bert, gpt2, images, llama, mobilenet_v2, resnet, run, tokens

FUNCTIONS = sorted(SATURATING)


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return request.param


def test_it_is_odd_bounded_and_its_slope_falls_from_one(function):
    stage, x = SatNL(function, d=0.7).double(), torch.linspace(0, 20, 2001, dtype=torch.double)
    y = stage(x.requires_grad_())
    assert torch.equal(stage(-x), -y) and y[0].item() == 0 and bool((y.abs() <= 0.7).all())
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert float(slope[0]) == pytest.approx(1.0)
    visible = slope[slope > 1e-12]
    assert bool((visible.diff() < 0).all()) and slope[-1].item() < 0.02
    torch.testing.assert_close(SatNL(function, d=1.3)(x * 1.3 / 0.7), y * 1.3 / 0.7)  # one shape for every d


@pytest.mark.parametrize("shape", [(300,), (6, 5, 3, 3), (500, 400)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_is_autograds(function, shape, memory_format):
    if memory_format is torch.channels_last and len(shape) != 4:
        pytest.skip("channels-last is for four dimensions")
    v = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(shape)
    w = SatNL(function, d=0.8)(v)
    (got,) = torch.autograd.grad(w, v, upstream)
    other = v.detach().double().requires_grad_()
    expected = 0.8 * SATURATING[function].value(other / 0.8)
    torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        got.double(), torch.autograd.grad(expected, other, upstream.double())[0], rtol=1e-4, atol=1e-6
    )
    assert w.stride() == v.stride()


def test_gradcheck(function):
    v = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    stage = SatNL(function, d=0.9)
    assert torch.autograd.gradcheck(lambda v: stage(v), v)


def test_wrapping_leaves_the_network_as_it_is(function):
    torch.manual_seed(0)
    model = mobilenet_v2().eval()
    plain = copy.deepcopy(model)
    plugin = RobustQ(model, {"satnl": {"function": function}, "first_last": "same"})
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    for site in plugin.sites:
        with network_weight(site) as weight:
            original = plain.get_parameter(site.name)
            torch.testing.assert_close(weight, original, rtol=0, atol=1e-6)
            largest = float(original.detach().abs().max())
            assert float(site.weight_stages.satnl.d) == pytest.approx(1.05 * largest, rel=1e-6)
    batch = images()
    torch.testing.assert_close(run(model, batch).logits, run(plain, batch).logits, rtol=1e-4, atol=1e-5)
    plugin.detach()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert type(model) is type(plain) and not hasattr(model, "hf_quantizer")


def test_from_scratch_the_weights_that_are_there_are_the_stored_ones():
    model = resnet()
    before = {name: p.clone() for name, p in model.named_parameters()}
    RobustQ(model, {"satnl": {"d": 1.0, "invert": False}})
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_weight_beyond_d_is_refused_with_the_d_that_would_do():
    model = resnet()
    plugin = RobustQ(model, {})
    parameter, name = plugin.sites[3].parameter, plugin.sites[3].name
    plugin.detach()
    with torch.no_grad():
        parameter[0, 0, 0, 0] = 2.0
    before = {key: p.clone() for key, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"satnl: {name}: its largest weight, 2, .* d = 1: d of 2.1 or more"):
        RobustQ(model, {"satnl": {"d": 1.0}})
    assert all(torch.equal(before[key], p) for key, p in model.named_parameters())
    RobustQ(model, {"satnl": {"d": 2.1}})


def test_a_tied_weight_is_refused():
    with pytest.raises(ValueError, match=r"satnl: .*wte.* is tied to .*lm_head.*exclude"):
        RobustQ(gpt2(), {"satnl": {}, "embeddings": True, "first_last": "same"})
    one = torch.nn.Linear(4, 4)
    plugin = RobustQ(torch.nn.ModuleList([one, one]), {"satnl": {}, "first_last": "same"})  # a module under two names
    assert len(plugin.sites) == 1
    for options in ({"d": 0.0}, {"d": -1}, {"d": "big"}, {"function": "relu"}, {"dd": 1}):
        with pytest.raises(ValueError, match="satnl"):
            RobustQ(resnet(), {"satnl": options})
    with pytest.raises(ValueError, match="satnl: expected a mapping"):
        RobustQ(resnet(), {"satnl": 3})


def training(model, batch, steps=3, **config):
    """A few steps of SGD with what the plugin adds."""
    plugin = RobustQ(
        model, {"satnl": {}, "regularizers": {"sym1": {"strength": 0.1}, "kure": {"strength": 0.1}}, **config}
    )
    plugin.calibrate([batch], run)
    optimizer = torch.optim.SGD(plugin.parameter_groups(0.0), lr=0.05)
    model.train()
    for i in range(steps):
        plugin.step(i / steps, first=True)
        run(model, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plugin.after_optimizer_step()
    return plugin


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("weights", [None, {"method": "lsq", "bits": 4}])
def test_a_stock_load_of_a_saved_folder_is_the_network(tmp_path, steps, weights):
    torch.manual_seed(0)
    model, batch = bert(), tokens(labels=3)
    plugin = training(model, batch, steps, **({"weights": weights} if weights else {}))
    stored = {name: p.clone() for name, p in model.named_parameters()}
    model.eval()
    model.save_pretrained(tmp_path)
    assert all(torch.equal(stored[name], p) for name, p in model.named_parameters())  # saving moved nothing
    logits = run(model, batch).logits

    plugin.enable(False)
    for _, stage in [(s, s.weight_stages.satnl) for s in plugin.sites]:
        stage.enabled = True
    float_logits = run(model, batch).logits
    plugin.enable(True)
    names = {site.name for site in plugin.sites}
    saved = load_file(tmp_path / "model.safetensors")
    stock = bert().eval()
    _, unexpected = stock.load_state_dict({k: v for k, v in saved.items() if "stages" not in k}, strict=False)
    assert not unexpected
    torch.testing.assert_close(run(stock, batch).logits, float_logits, rtol=1e-4, atol=1e-5)
    assert steps == 0 or any(not torch.allclose(saved[name], stored[name], atol=1e-4) for name in names)

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(loaded, batch).logits, logits, rtol=1e-4, atol=1e-5)
    for name, p in loaded.named_parameters():
        torch.testing.assert_close(p, stored[name], rtol=1e-4, atol=1e-5)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name, values in load_file(again / "model.safetensors").items():
        torch.testing.assert_close(values, saved[name], rtol=0, atol=1e-6)


def test_a_new_head_is_wrapped_anew(tmp_path):
    model, batch = bert(), tokens(labels=3)
    training(model, batch, first_last="same")
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    d = RobustQ.of(other).sites[-1].weight_stages.satnl.d
    assert bool(d.isfinite()) and float(d) != float(RobustQ.of(model).sites[-1].weight_stages.satnl.d)
    assert bool(run(other.eval(), tokens(labels=5)).logits.isfinite().all())


@pytest.mark.parametrize("trainable", [False, True])
def test_a_folder_at_other_bits_is_the_sweeps_row(tmp_path, trainable):
    model, batch = llama(), tokens()
    plugin = training(model, batch)
    model.eval().save_pretrained(tmp_path)

    def predict(model, batch):
        with torch.no_grad():
            return run(model, batch).loss

    rows = sweep(
        plugin, [batch], predict, lambda outputs: {"loss": float(torch.stack(outputs).mean())}, ["w4", "w3@kmeans"]
    )
    loaded = from_pretrained(AutoModelForCausalLM, tmp_path, bits=4, trainable=trainable).eval()
    assert float(predict(loaded, batch)) == pytest.approx(rows["w4"]["loss"], rel=1e-4)
    if trainable:
        kept = RobustQ.of(loaded)
        assert kept.config.satnl == plugin.config.satnl and float(kept.sites[0].weight_stages.satnl.d) == pytest.approx(
            float(plugin.sites[0].weight_stages.satnl.d)
        )
    else:
        assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear


def test_bake_sweep_telemetry_and_analysis_see_the_networks_weights():
    """Against a network whose parameters were overwritten by hand with d * tanh(v / d)."""
    torch.manual_seed(0)
    model, batch = resnet(), images()
    plain = copy.deepcopy(model)
    plugin = training(model, batch, weights={"method": "lsq", "bits": 4})
    own = plain.state_dict()
    own.update({name: values for name, values in model.state_dict().items() if name in own})
    plain.load_state_dict(own)
    with torch.no_grad():
        for site in plugin.sites:
            d = site.weight_stages.satnl.d
            plain.get_parameter(site.name).copy_(torch.tanh(site.parameter / d) * d)
    twin = RobustQ(plain, {"regularizers": {"kure": {}, "sym1": {}}, "weights": {"method": "lsq", "bits": 4}})
    twin.calibrate([batch], run)
    for mine, theirs in zip(plugin.sites, twin.sites, strict=True):
        theirs.weight_stages.quantizer.set_steps(mine.weight_stages.quantizer.scale.detach())
    assert plugin.metrics() == pytest.approx(twin.metrics(), rel=1e-3)
    ours, theirs = weight_statistics(plugin), weight_statistics(twin)
    for name, one in ours.items():
        assert one.kurtosis == pytest.approx(theirs[name].kurtosis, rel=1e-4)

    def predict(model, batch):
        with torch.no_grad():
            return run(model, batch).loss

    def loss(outputs):
        return {"loss": float(torch.stack(outputs).mean())}

    settings = ["fp", "w4", "w3@kmeans/channel", "trained"]
    model.eval()
    plain.eval()
    rows = [sweep(one, [batch], predict, loss, settings) for one in (plugin, twin)]
    for name in settings:
        assert rows[0][name]["loss"] == pytest.approx(rows[1][name]["loss"], rel=1e-4), name
    sharp = [sharpness(one, [batch], lambda model, batch: run(model, batch).loss, rho=1e-3) for one in (plugin, twin)]
    assert sharp[0] == pytest.approx(sharp[1], rel=0.05)
    with torch.no_grad():
        before = run(model, batch).logits
        torch.testing.assert_close(run(plugin.bake(), batch).logits, before, rtol=1e-4, atol=1e-5)
