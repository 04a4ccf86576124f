"""WaveQ: golden values and gradients, its phases and schedules, the quantizers it goes with, budgets."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_robustq import ASAM, RobustQ, from_pretrained
from hf_robustq.grid import Grid
from hf_robustq.plugin.bits import Budget
from hf_robustq.quantizers import Absmax
from hf_robustq.regularizers.waveq import WaveQ, wave
from hf_robustq.stage import Moment
from tests.methods import waveq as stage
from tests.zoo import bert, checkpoint_blocks, images, resnet, run, tokens

CONFIG = {
    "weights": {"method": "absmax", "bits": 9},
    "regularizers": {"waveq": {"strength": 20.0, "smoothness": 0.02}},
    "first_last": 8,
}


@pytest.mark.parametrize(
    ("w", "beta", "variant", "value", "of_w", "of_beta"),
    [
        (0.3, 2.5, 0, 0.66327692, -16.797271, -3.492894),
        (0.3, 2.5, 1, 0.15892292, 1.558586, 0.283538),
        (0.3, 2.5, 2, 0.02809387, 0.275522, 0.030650),
        (0.05, 8.0, 0, 0.34549150, -764.8847, -26.508895),
        (0.05, 8.0, 1, 0.001953125, -3.129321, -0.110233),
        (0.05, 8.0, 2, 7.6294e-6, -0.012224, -0.000436),
        (0.1, 4.0, 1, 0.0625, 0.0, -0.043322),
    ],
)
def test_golden_values(w, beta, variant, value, of_w, of_beta):
    w, beta = torch.tensor(w).double().requires_grad_(), torch.tensor(beta).double().requires_grad_()
    result = wave(w, beta, variant)
    gradients = torch.autograd.grad(result, (w, beta))
    assert result.item() == pytest.approx(value, rel=1e-4)
    assert [float(g) for g in gradients] == pytest.approx([of_w, of_beta], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("count", [7, 300_000])
@pytest.mark.parametrize("method", ["absmax", "dorefa"])
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_the_closed_form_is_the_gradient(method, variant, count):
    """Against autograd of the definition, in float64; the large one goes through the fused kernel."""
    torch.manual_seed(0)
    one = stage(method, 3.3, variant=variant)
    w, grad = 0.4 * torch.randn(count).double(), torch.randn(count).double()
    pull, strength = torch.tensor(0.07).double(), torch.tensor(1.7).double()
    unit = torch.tensor(0.3).double()
    of_w, *none, of_beta = one._to_parameters(grad, strength, w, one.quantizer.beta.double(), pull, unit, one.beta)
    inputs = w.clone().requires_grad_(), torch.tensor(float(one.quantizer.beta)).double().requires_grad_()
    unit = torch.tanh(inputs[0]) if method == "dorefa" else inputs[0]
    unit = unit / unit.detach().abs().max()
    last = 2 ** inputs[1] - (variant > 0) * 1
    odd, every = torch.cos(math.pi * unit * last / 2) ** 2, torch.sin(math.pi * unit * last) ** 2
    penalty = (odd if method == "dorefa" else every).mean() / [1, 2 ** inputs[1], 4 ** inputs[1]][variant]
    expected = torch.autograd.grad(penalty + pull * inputs[1], inputs)
    assert none == [None] * 3
    torch.testing.assert_close(of_w - grad, strength * expected[0], rtol=1e-6, atol=1e-12)
    assert float(of_beta) == pytest.approx(0.3 * float(expected[1]), rel=1e-5)
    assert float(one.penalty(w, one.quantizer.beta)) == pytest.approx(float(penalty.detach()))


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (40, 20, 30, 20)])
def test_the_layout_of_a_weight_changes_nothing(shape):
    torch.manual_seed(0)
    one, w, grad = stage(beta=2.6), torch.randn(shape), torch.randn(shape)
    last = w.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last)
    plain, moved = (one.gradient(g, torch.tensor(1.0), x, one.quantizer.beta) for x, g in ((w, grad), last))
    torch.testing.assert_close(plain[0], moved[0])
    torch.testing.assert_close(plain[1], moved[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("method", "beta"), [("absmax", 1.0), ("absmax", 3.0), ("dorefa", 2.0), ("dorefa", 4.0)])
def test_the_sine_is_zero_exactly_on_the_levels_of_the_quantizer(method, beta):
    """Between any two neighbouring levels it is 1 half-way."""
    one = stage(method, beta)
    w = torch.linspace(-2, 2, 4001)
    levels = one.quantizer.quantize(w).unique()
    if method == "dorefa":  # of the squashed weight, in [-1, 1]
        levels = torch.atanh(levels.double() * math.tanh(2.0)).float()
    assert len(levels) == (2 * 2**beta - 1 if method == "absmax" else 2**beta)
    assert float(one.penalty(levels, one.quantizer.beta)) < 1e-6
    shape = torch.tanh if method == "dorefa" else lambda x: x
    back = torch.atanh if method == "dorefa" else lambda x: x
    between = back((shape(levels[:-1]) + shape(levels[1:])) / 2)
    with_end = torch.cat([between, torch.tensor([2.0])])  # the largest weight is on the last level
    expected = len(between) / len(with_end) / 2**beta
    assert float(one.penalty(with_end, one.quantizer.beta)) == pytest.approx(expected, rel=1e-4)


def test_levels_follow_a_beta_between_whole_numbers():
    w = torch.linspace(-1.5, 1.5, 9000)
    one = stage(beta=2.3)
    levels = one.quantizer(w)
    spacing = 1.5 / (2**2.3 - 1)
    torch.testing.assert_close(levels, (w / spacing).round() * spacing)
    assert one.quantizer.bits == 4 and int(one.quantizer.high) == 7
    squashed = stage("dorefa", 2.3).quantizer(w)
    c = 8 / 2**2.3
    unit = torch.tanh(w) / math.tanh(1.5)
    torch.testing.assert_close(squashed, c * (2 * ((unit / 2 + 0.5) * 7).round() / 7 - 1))
    assert c == pytest.approx(1.6245, abs=1e-4)


def test_absmax_is_round_to_nearest_and_passes_every_gradient():
    torch.manual_seed(0)
    w = torch.randn(50, 40, requires_grad=True)
    for axis in (None, 0):
        quantizer = Absmax(Grid(bits=4, narrow=True, axis=axis), channels=50)
        largest = w.abs().amax() if axis is None else w.abs().amax(1, keepdim=True)
        y = quantizer(w)
        torch.testing.assert_close(y, (7 * w / largest).round() * largest / 7)
        (grad,) = torch.autograd.grad(y.sum(), w)
        assert torch.equal(grad, torch.ones_like(w))
    with pytest.raises(ValueError, match=r"activations\.method: absmax quantizes weights only"):
        RobustQ(resnet(), {"weights": {"bits": 4}, "activations": {"method": "absmax", "bits": 8}})


def test_schedules_are_those_of_the_figure():
    """Fig. 8: lambda_w, and lambda_beta = 0.05 * (f1 - f2), from the table of its formula."""
    one = stage(rise=200, fall=500, smoothness=10)
    table = {0: (0, 0), 190: (0.119203, 0.00596), 200: (0.5, 0.025), 210: (0.880797, 0.04404), 250: (0.99995, 0.05),
             490: (1, 0.04404), 500: (1, 0.025), 510: (1, 0.00596), 550: (1, 2.3e-6)}  # fmt: skip
    for step, (of_w, of_beta) in table.items():
        one.at(Moment(step=step))
        assert one.share == pytest.approx(of_w, abs=5e-6)
        assert 0.05 * one.share * one.pulse == pytest.approx(of_beta, abs=5e-6)
    in_shares = stage(rise=0.2, fall=0.5, smoothness=0.01)
    in_shares.at(Moment(progress=0.21, step=77))
    assert in_shares.share == pytest.approx(0.880797, abs=1e-6)


def test_the_sine_grows_in_phase_3_and_beta_learns_as_before():
    """lambda_w = f1 + (snap - 1) * f2 once bits are fixed; until then f1, and beta's gradient knows nothing of snap."""
    one, plain = stage(rise=200, fall=500, smoothness=10, snap=30.0), stage(rise=200, fall=500, smoothness=10)
    for step in (0, 210, 490, 500, 510, 550):
        for stages in (one, plain):
            stages.at(Moment(step=step))
            if stages.share:
                stages.carry(2.0 * stages.share, 2.0)
        assert one.share == plain.share and float(one.unit) == pytest.approx(float(plain.unit))
    for stages in (one, plain):
        stages.fix(3.0)
    for step, end in ((490, 0.119203), (500, 0.5), (510, 0.880797), (600, 1.0)):
        one.at(Moment(step=step))
        assert one.share == pytest.approx(1 + 29 * end, rel=1e-5)
        plain.at(Moment(step=step))
        assert plain.share == pytest.approx(1)


def trained(config, steps=120, model=None, batch=None, bits_lr=0.5, lr=0.02, accumulate=1):
    torch.manual_seed(0)
    model, batch = model or resnet(), batch or images()
    plugin = RobustQ(model.train(), config)
    plugin.calibrate([batch], run)
    optimizer = torch.optim.SGD(plugin.parameter_groups(1e-2, None, bits_lr), lr=lr, momentum=0.9)
    news, betas = [], []
    for i in range(steps):
        for j in range(accumulate):
            plugin.step(i / steps, first=j == 0, index=i)
            (run(model, batch).loss / accumulate).backward()
        if plugin.bits.news:
            news.append((i, plugin.bits.news))
            plugin.bits.news = ""
        optimizer.step()
        optimizer.zero_grad()
        plugin.after_optimizer_step()
        betas.append({name: float(one.beta.detach()) for name, one in plugin.bits.stages().items()})
    return plugin, news, betas


def test_three_phases():
    """Nothing moves but by the task; bits come down; bits stay, though the optimizer's momentum pushes on."""
    plugin, news, betas = trained(CONFIG, steps=120)
    begin, end = 30, 90
    assert all(abs(beta - 8) < 1e-3 for row in betas[:begin] for beta in row.values())
    assert all(beta < 7.5 for beta in betas[end - 1].values())
    fixed = {name: float(one.quantizer.beta) for name, one in plugin.bits.stages().items()}
    assert all(beta == math.ceil(betas[end - 1][name]) for name, beta in fixed.items())
    assert {name: float(one.beta.detach()) for name, one in plugin.bits.stages().items()} == fixed
    assert all(row == fixed for row in betas[end:])
    assert [i for i, _ in news] == [end]
    for name, beta in fixed.items():
        assert f"{name} {beta + 1:.0f}" in news[0][1]
    assert plugin.metrics()["bits"] == pytest.approx(np.mean(list(fixed.values())) + 1)
    assert {layer.name: layer.bits for layer in plugin.size().layers if layer.name in fixed} == {
        name: beta + 1 for name, beta in fixed.items()
    }


def test_weights_come_to_lie_on_their_levels():
    """A quarter of a spacing is the mean distance of a weight that knows nothing of levels."""
    plugin, _, _ = trained({**CONFIG, "budget": {"bits": 4}}, steps=240)
    distances = []
    for site in plugin.sites:
        quantizer = site.weight_stages.quantizer
        place = site.parameter.detach() / site.parameter.detach().abs().max() * (2**quantizer.beta - 1)
        distances.append(float((place - place.round()).abs().mean()))
    names = [site.name for site in plugin.sites]
    telemetry = plugin.telemetry()
    assert [telemetry[name]["distance"] for name in names] == pytest.approx(distances, rel=1e-3)
    edges = [distances[names.index(name)] for name in plugin.edges]
    inner = [d for name, d in zip(names, distances, strict=True) if name not in plugin.edges]
    assert all(d > 0.2 for d in edges) and np.mean(inner[:6]) < 0.1


@pytest.mark.parametrize(
    "budget", [{"bits": 4}, {"bits": 5.5}, {"megabytes": 0.25}, {"bit_operations": 6e8}, {"bits": 3}]
)
@pytest.mark.parametrize("method", ["absmax", "dorefa"])
def test_a_budget_is_met(budget, method):
    config = {**CONFIG, "weights": {"method": method, "bits": 9 if method == "absmax" else 8}, "budget": budget}
    plugin, _, betas = trained(config, steps=120)
    ((measure, limit),) = budget.items()
    learned = [layer for layer in plugin.size().layers if layer.name in betas[0]]
    got = np.mean([layer.bits for layer in learned]) if measure == "bits" else getattr(plugin.size(), measure)
    assert got <= limit * (1 + 1e-6)
    assert measure != "bits" or got > limit - 0.5  # and it is used
    before = {**betas[89]}
    sign = learned and plugin.bits.stages()[learned[0].name].quantizer.sign_bits
    for layer in learned:  # and what was learned had come near it by itself
        assert measure != "bits" or layer.bits - sign - before[layer.name] > -1
    if measure != "bits":
        smallest = min(layer.megabytes / layer.bits for layer in learned)
        assert got > limit * 0.8 or all(layer.bits == 2 for layer in learned), smallest


def test_a_budget_takes_bits_where_least_is_lost():
    """Against every choice of floor and ceiling there is."""
    from itertools import product

    generator = np.random.default_rng(0)
    for _ in range(20):
        betas, costs = generator.uniform(1.1, 6.9, 6), (1.0,) * 6
        up = sum(math.ceil(b) + 1 for b in betas)
        budget = Budget("bits", (up - 3) / 6, 0.0, tuple(c / 6 for c in costs))
        bits = budget.within(list(betas), 1, 2)
        assert budget.at(bits) <= budget.limit + 1e-9

        def lost(choice, betas=betas):
            return sum(max(0.0, beta + 1 - b) for beta, b in zip(betas, choice, strict=True))

        choices = product(*((math.floor(beta) + 1, math.ceil(beta) + 1) for beta in betas))
        best = min(lost(choice) for choice in choices if budget.at(choice) <= budget.limit + 1e-9)
        assert lost(bits) == pytest.approx(best)


def test_a_budget_that_cannot_be_met_names_the_nearest():
    batch = images()
    for budget, nearest in (({"bits": 1.5}, "2"), ({"megabytes": 0.01}, None), ({"bit_operations": 10.0}, None)):
        plugin = RobustQ(resnet(), {**CONFIG, "budget": budget})
        with pytest.raises(
            ValueError, match=r"budget: .* cannot be met.*: the nearest that can is [0-9.e+]+$"
        ) as error:
            plugin.calibrate([batch], run)
        said = str(error.value).split()[-1]
        assert nearest is None or said == nearest
        ((measure, _),) = budget.items()
        plugin = RobustQ(resnet(), {**CONFIG, "budget": {measure: float(said) * (1 + 1e-5)}})
        plugin.calibrate([batch], run)
    for budget in ({}, {"bits": 4, "megabytes": 1}, {"bits": 0}, {"bits": "4"}, {"bit": 4}):
        with pytest.raises(ValueError, match="budget"):
            RobustQ(resnet(), {**CONFIG, "budget": budget})
    with pytest.raises(ValueError, match="budget: bits are learned by the regularizer waveq"):
        RobustQ(resnet(), {"weights": {"bits": 4}, "budget": {"bits": 4}})


def test_what_makes_no_sense_is_refused():
    known = "waveq: needs weights with method absmax or dorefa"
    for weights in (None, {"bits": 4}, {"bits": 4, "method": "lsq"}):
        with pytest.raises(ValueError, match=known):
            RobustQ(resnet(), {"weights": weights, "regularizers": {"waveq": {}}})
    with pytest.raises(ValueError, match=r"beta is learned within 1 to 8 and would begin at 11: .* 2 to 9 bits"):
        RobustQ(resnet(), {**CONFIG, "weights": {"method": "absmax", "bits": 12}})
    with pytest.raises(ValueError, match="remove per_channel"):
        RobustQ(resnet(), {**CONFIG, "weights": {"method": "absmax", "bits": 4, "per_channel": True}})
    for options in ({"variant": 3}, {"beta_strength": -1}, {"rise": 0.8}, {"fall": 1}, {"smoothness": 0}, {"rise": -1},
                    {"snap": 0.0}, {"rise": 0.5, "fall": 3.0}):  # fmt: skip
        with pytest.raises(ValueError, match="waveq"):
            WaveQ(**options)
    for options, message in (
        ({"learn": "no"}, "waveq.learn must be true or false, got 'no'"),
        ({"rise": "0.5"}, "waveq.rise must be a number from 0 to 1000000000000, got '0.5'"),
        ({"variant": 1.5}, "waveq.variant must be 0, 1 or 2, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            RobustQ(resnet(), {**CONFIG, "regularizers": {"waveq": options}})
    for method in ("absmax", "dorefa"):
        with pytest.raises(ValueError, match=f"{method} has no steps to set by a rule: leave scale out"):
            RobustQ(resnet(), {"weights": {"method": method, "bits": 4, "scale": "mse"}})
    for phases, steps in (({"rise": 200, "fall": 500, "smoothness": 10}, 400), ({}, 2)):
        one = stage(**phases)
        with pytest.raises(
            ValueError, match=f"of {steps} optimizer steps bits would be learned from .* leaves no step"
        ):
            one.check_phases(steps)
    stage(rise=200, fall=500, smoothness=10).check_phases(501)
    plugin = RobustQ(resnet().train(), {**CONFIG, "regularizers": {"waveq": {"rise": 5, "fall": 20, "smoothness": 1}}})
    plugin.calibrate([images()], run)
    plugin.step(0.0, first=True, index=0)
    with pytest.raises(ValueError, match="of 10 optimizer steps"):
        plugin.step(0.1, first=True, index=1)


@pytest.mark.parametrize("when", [20, 45, 100])
def test_resumed_in_any_phase_it_ends_where_it_would_have(when):
    """Weights, bits and steps to the bit; `when` lies before, within and after the learning of bits."""
    config = {**CONFIG, "budget": {"bits": 4}}

    def go(plugin, optimizer, begin, end, steps=120):
        for i in range(begin, end):
            plugin.step(i / steps, first=True, index=i)
            run(plugin.model, images()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            plugin.after_optimizer_step()

    def start():
        torch.manual_seed(0)
        plugin = RobustQ(resnet().train(), config)
        plugin.calibrate([images()], run)
        return plugin, torch.optim.SGD(plugin.parameter_groups(1e-2, None, 0.05), lr=0.02, momentum=0.9)

    whole, optimizer = start()
    go(whole, optimizer, 0, when)
    saved = copy.deepcopy((whole.model.state_dict(), optimizer.state_dict()))
    go(whole, optimizer, when, 120)
    again, optimizer = start()
    again.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again.restored()
    go(again, optimizer, when, 120)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize("method", ["absmax", "dorefa"])
def test_a_saved_folder_has_the_bits_that_were_learned(tmp_path, method):
    config = {**CONFIG, "weights": {"method": method, "bits": 9 if method == "absmax" else 8}, "first_last": "same"}
    batch = tokens(labels=3)
    plugin, _, _ = trained(config, model=bert(), batch=batch)
    plugin.model.eval()
    with torch.no_grad():
        expected = run(plugin.model, batch).logits
    bits = {layer.name: layer.bits for layer in plugin.size().layers}
    plugin.model.save_pretrained(tmp_path)
    for trainable in (True, False):
        model = from_pretrained(AutoModelForSequenceClassification, tmp_path, trainable=trainable)
        with torch.no_grad():
            torch.testing.assert_close(run(model.eval(), batch).logits, expected)
    again = RobustQ.of(from_pretrained(AutoModelForSequenceClassification, tmp_path, trainable=True))
    assert {layer.name: layer.bits for layer in again.size().layers} == bits
    assert all(one.fixed == float(one.quantizer.beta) for one in again.bits.stages().values())
    stored = load_file(tmp_path / "model.safetensors")
    name = next(iter(bits))
    assert torch.equal(stored[name], plugin.sites[0].parameter.detach())
    for other in (4, None):  # any other quantizer goes without it
        model = from_pretrained(AutoModelForSequenceClassification, tmp_path, bits=other, trainable=True)
        assert not RobustQ.of(model).config.regularizers and RobustQ.of(model).config.budget is None
    if method == "absmax":
        model = from_pretrained(AutoModelForSequenceClassification, tmp_path, bits=3, scale="learned", trainable=True)
        assert {layer.bits for layer in RobustQ.of(model).size().layers if layer.name in bits} == {3}
        model.eval()
        weight = model.get_submodule(name.removesuffix(".weight")).weight.detach()
        assert weight.unique().numel() <= 7


def test_fixed_bits_from_beginning_to_end():
    config = {**CONFIG, "weights": {"method": "absmax", "bits": 4}}
    config["regularizers"] = {"waveq": {"strength": 20.0, "learn": False, "rise": 0.0}}
    plugin, news, betas = trained(config)
    assert not news and betas == [{}] * 120 and not plugin.own_parameters()
    assert {layer.bits for layer in plugin.size().layers} == {4, 8}
    assert "bits" not in plugin.metrics()


def test_micro_batches_without_a_penalty_still_have_a_gradient_of_beta():
    """DDP waits for one of every parameter in the last micro-batch."""
    plugin = RobustQ(resnet().train(), CONFIG)
    plugin.calibrate([images()], run)
    for progress, first in ((0.5, True), (0.5, False), (0.0, True)):
        plugin.model.zero_grad()
        plugin.step(progress, first=first, index=0)
        run(plugin.model, images()).loss.backward()
        gradients = [float(one.beta.grad) for one in plugin.bits.stages().values()]
        assert all(gradients) if progress and first else not any(gradients)


@pytest.mark.parametrize(("minima", "nearest"), [((0.7, -0.2), 0.7), ((0.45, -0.35), -0.35), ((0.1, -0.85), 0.1)])
def test_the_minima_of_theorem_2(minima, nearest):
    """The minima of F + delta * G tend, as delta falls, to that minimum of F which lies closest to a level.

    G is ours, of a weight w beside one of 1, so that levels are the multiples of 1/3; F(w) = (w - a)^2 (w - b)^2.
    """
    one = stage(beta=2.0)
    w = torch.linspace(-1, 1, 20_001).double()
    pairs = torch.stack([w, torch.ones_like(w)], 1)
    sine = torch.vmap(lambda pair: one.penalty(pair, one.quantizer.beta.double()))(pairs)
    fit = (w - minima[0]) ** 2 * (w - minima[1]) ** 2
    distances = {a: abs(a * 3 - round(a * 3)) for a in minima}
    assert min(distances, key=distances.get) == nearest
    ends = [float(w[(fit + delta * sine).argmin()]) for delta in (1.0, 1e-2, 1e-4, 1e-6)]
    errors = [abs(end - nearest) for end in ends]
    assert errors == sorted(errors, reverse=True) and errors[-1] <= 1e-4 < errors[0]
    assert abs(ends[0] * 3 - round(ends[0] * 3)) < 0.05  # and of a large one to a level


@pytest.mark.parametrize("steps", [60, 120])
@pytest.mark.parametrize("bits_lr", [0.05, 0.5])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_budget_is_neither_missed_nor_overshot(steps, bits_lr, kind):
    """Whatever the optimizer; where learning alone is too slow the bits still are within it."""
    torch.manual_seed(0)
    plugin = RobustQ(resnet().train(), {**CONFIG, "budget": {"bits": 4}})
    plugin.calibrate([images()], run)
    groups = plugin.parameter_groups(0.0, None, bits_lr)
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups, lr=1e-4)
    for i in range(steps):
        plugin.step(i / steps, first=True, index=i)
        run(plugin.model, images()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plugin.after_optimizer_step()
    assert 3.5 <= plugin.metrics()["bits"] <= 4 and not plugin.bits.learning()


def test_a_limit_that_every_layer_meets_exactly_is_no_error():
    for count in range(1, 200):
        assert Budget("bits", 2.0, 0.0, (1 / count,) * count).holds([2] * count)


def test_layers_that_join_later_learn_what_the_budget_has_left():
    """Of two layers one is fixed at 6 bits: four in the mean leave two for the other."""
    plugin = RobustQ(resnet().train(), {**CONFIG, "budget": {"bits": 4}})
    plugin.calibrate([images()], run)
    stages = list(plugin.bits.stages().values())
    half = len(stages) // 2
    for one in stages[:half]:
        one.fix(5.0)
    stages = dict(list(plugin.bits.stages().items()))
    budget = plugin.bits.budget()
    left = (4 * len(stages) - 6 * half) / (len(stages) - half)
    assert budget.holds([left] * (len(stages) - half)) and not budget.holds([left + 0.01] * (len(stages) - half))
    plugin.step(0.5, first=True, index=1000)
    plugin.step(0.9, first=True, index=1001)
    assert plugin.metrics()["bits"] <= 4 and not plugin.bits.learning()


def test_bits_taken_over_for_good_are_not_learned_again():
    plugin, _, _ = trained({**CONFIG, "budget": {"bits": 4}}, steps=60)
    plugin.change_bits(12, None)
    state = copy.deepcopy(plugin.model.state_dict())
    for i in range(10):
        plugin.step(0.4 + i / 100, first=True, index=1000 + i)
        run(plugin.model, images()).loss.backward()
    assert {layer.bits for layer in plugin.size().layers} == {12, 8}
    plugin.model.load_state_dict(state)
    plugin.restored()
    assert "w12" in repr(plugin) and "w9" not in repr(plugin)


def test_other_bits_in_the_middle_of_learning_keep_the_range():
    plugin = RobustQ(resnet().train(), CONFIG)
    plugin.calibrate([images()], run)
    site = plugin.sites[3]
    quantizer, w = site.weight_stages.quantizer, site.parameter.detach()
    quantizer.follow(torch.tensor(2.3))
    before = quantizer(w)
    quantizer.set_bits(5)
    torch.testing.assert_close(quantizer(w), (w / w.abs().max() * 15).round() / 15 * w.abs().max())
    quantizer.set_bits(None)
    assert torch.equal(quantizer(w), before)


def test_a_compiled_layer_is_compiled_once_for_all_bits():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    models = []
    for beta in range(1, 7):
        one = stage(beta=float(beta))
        one.train()
        one.active = True
        one.strength.fill_(1.0)
        one.fix(float(beta))
        models.append(one)
    for one in models:
        compiled = torch.compile(one, backend=counter, fullgraph=True)
        compiled(torch.randn(8, 8, requires_grad=True)).sum().backward()
    assert counter.frame_count <= 2


def test_what_waveq_does_not_go_with_is_refused():
    with pytest.raises(ValueError, match="oscillations: levels move while waveq learns bits"):
        RobustQ(resnet(), {**CONFIG, "oscillations": "watch"})
    with pytest.raises(ValueError, match="waveq: with dorefa .* remove narrow"):
        RobustQ(resnet(), {**CONFIG, "weights": {"method": "dorefa", "bits": 8, "narrow": True}})
    plugin = RobustQ(resnet().train(), CONFIG)
    plugin.calibrate([images()], run)
    plugin.step(0.5, first=True, index=1000)
    with torch.no_grad():
        next(iter(plugin.bits.stages().values())).beta.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the bits of timm_model.* are nan"):
        plugin.step(0.9, first=True, index=1001)


@pytest.mark.parametrize("per_channel", [False, True])
def test_distance_from_the_levels_of_dorefa(per_channel):
    """Against the nearest of all levels, 2n / (2^b - 1) - 1, one by one."""
    config = {"weights": {"method": "dorefa", "bits": 3, "per_channel": per_channel}, "first_last": "same"}
    plugin = RobustQ(resnet(), config)
    plugin.calibrate([images()], run)
    site = plugin.sites[3]
    unit = np.tanh(site.parameter.detach().double().numpy())
    unit = unit / np.abs(unit).max((1, 2, 3) if per_channel else None, keepdims=True)
    levels = np.linspace(-1, 1, 8)
    nearest = np.abs(unit[..., None] - levels).min(-1).mean() / (levels[1] - levels[0])
    telemetry = plugin.telemetry()[site.name]
    assert telemetry.keys() == {"kurtosis", "bits", "distance"} and telemetry["bits"] == 3
    assert telemetry["distance"] == pytest.approx(nearest, rel=1e-5)
    assert 0.2 < plugin.metrics()["distance"] < 0.3 and "step" not in plugin.metrics()


def gradients(model, micro_batches=1):
    """Of one optimizer step in phase 2, by name: of weights, and of the bits that are learned."""
    torch.manual_seed(0)
    model.load_state_dict(resnet().state_dict())
    plugin = RobustQ(model.train(), {**CONFIG, "budget": {"bits": 4}})
    plugin.calibrate([images()], run)
    for i in range(micro_batches):
        plugin.step(0.5, first=i == 0, index=1000)
        (run(model, images()).loss / micro_batches).backward()
    assert all(abs(float(one.beta.grad)) > 0 for one in plugin.bits.stages().values())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_changes_nothing():
    model = resnet()
    checkpoint_blocks(model, reentrant=False)
    torch.testing.assert_close(gradients(model), gradients(resnet()), rtol=1e-5, atol=1e-5)


def test_accumulated_micro_batches_are_one_batch():
    torch.testing.assert_close(gradients(resnet(), 3), gradients(resnet()), rtol=1e-5, atol=1e-5)


def test_under_autocast_beta_is_learned_in_float32():
    """Its gradient is of the stored weight, whatever the task computes in."""
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        plugin = RobustQ(resnet().train(), CONFIG)
        plugin.calibrate([images()], run)
        plugin.step(0.5, first=True, index=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = run(plugin.model, images()).loss
        loss.backward()
        gradients.append([one.beta.grad for one in plugin.bits.stages().values()])
    assert all(g.dtype == torch.float32 for g in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=0)


def test_with_satnl_the_sine_is_of_the_weight_of_the_network():
    """Of d * tanh(v / d): the gradient of v against autograd of the definition."""
    torch.manual_seed(0)
    plugin = RobustQ(resnet().train(), {**CONFIG, "satnl": {"d": 2.0}})
    plugin.calibrate([images()], run)
    plugin.step(0.5, first=True, index=1000)
    stages = plugin.bits.stages()
    for site in plugin.sites:
        if site.name not in stages:
            continue
        one = stages[site.name]
        v, x = (site.parameter.detach().clone().requires_grad_() for _ in range(2))
        w = 2 * torch.tanh(v / 2)
        (w.sum() + wave(w / w.detach().abs().max(), one.quantizer.beta).mean() * one.strength).backward()
        site.weight_stages(x).sum().backward()
        assert float((v.grad - (1 - torch.tanh(v.detach() / 2) ** 2)).abs().max()) > 1e-4  # the sine's share
        torch.testing.assert_close(x.grad, v.grad, rtol=1e-6, atol=2e-7)


def test_averages_and_two_passes_leave_bits_alone():
    """The averages are of the model's weights; ASAM does not climb along beta."""
    torch.manual_seed(0)
    plugin = RobustQ(resnet().train(), {**CONFIG, "budget": {"bits": 4}})
    plugin.calibrate([images()], run)
    ema, twice = plugin.average(0.5), ASAM(plugin.model, rho=0.5, exclude=plugin.own_parameters())
    optimizer = torch.optim.SGD(plugin.parameter_groups(0.0, None, 0.5), lr=0.01)

    def once():
        seen.append([float(one.beta.detach()) for one in plugin.bits.stages().values()])
        loss = run(plugin.model, images()).loss
        loss.backward()
        return loss.detach()

    for i in range(60):
        seen = []
        plugin.step(i / 60, first=True, index=i)
        twice(once)
        assert len(seen) == 2 and seen[0] == seen[1]
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        plugin.after_optimizer_step()
    assert not plugin.bits.learning() and 3.5 <= plugin.metrics()["bits"] <= 4
    bits = plugin.bits.by_layer()
    with plugin.published():
        shown = plugin.model.state_dict()
        for site in plugin.sites:
            if site.name in bits:
                quantizer = site.weight_stages.quantizer
                assert quantizer(shown[site.name]).unique().numel() <= 2 ** bits[site.name] - 1
                assert torch.equal(shown[site.name], ema.state_dict()["averages"][site.name])
    assert plugin.bits.by_layer() == bits


def test_products_of_attention_count_its_output_projection():
    """`nn.MultiheadAttention` does not call it: 5 tokens, 3 * E * E and E * E products each."""
    net = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plugin = RobustQ(net, {"weights": {"bits": 4}, "first_last": "same"})
    plugin.calibrate([torch.randn(7, 5, 8)], lambda model, x: model(x))
    macs = {layer.name: layer.macs for layer in plugin.size().layers}
    assert macs == {
        "self_attn.in_proj_weight": 5 * 3 * 64,
        "self_attn.out_proj.weight": 5 * 64,
        "linear1.weight": 5 * 128,
        "linear2.weight": 5 * 128,
    }


def test_sizes_by_hand():
    """Two convolutions and a linear layer on 8x8 images; biases and norms count in float."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 6, 3, stride=2, groups=2),
        torch.nn.Flatten(), torch.nn.Linear(54, 5),
    )  # fmt: skip
    config = {"weights": {"bits": 4}, "activations": {"bits": 8}, "first_last": "same"}
    plugin = RobustQ(net, config)
    plugin.calibrate([torch.randn(7, 3, 8, 8)], lambda model, x: model(x))
    first, second, last = plugin.size().layers
    assert (first.weights, second.weights, last.weights) == (108, 108, 270)
    assert {layer.grid for layer in plugin.size().layers} == {"fixed, 15 levels"}
    assert "| 0.weight | 108 | 4 | fixed, 15 levels | 8 |" in str(plugin.size())
    assert (first.macs, second.macs, last.macs) == (108 * 64, 108 * 9, 270)
    assert first.bit_operations == 108 * 64 * 4 * 8
    others = 4 + 4 * 4 + 6 + 5
    assert plugin.size().others == others
    assert plugin.size().megabytes == pytest.approx((486 * 4 + 3 * 32 + others * 32) / 8e6)
    assert plugin.size().float_megabytes == pytest.approx((486 + others) * 32 / 8e6)
