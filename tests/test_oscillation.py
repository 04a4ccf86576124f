"""Oscillating weights, against the definition written out weight by weight."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_robustq import LSQ, Grid, RobustQ
from hf_robustq.quantizers import Oscillation


def slow(history, freeze, m=0.01):
    """(frequency, final value, whether frozen) of one weight whose values before pinning are `history`, at step 1."""
    frequency, average, direction, level, frozen = 0.0, None, 0, None, None
    for value in history:
        if frozen is not None:
            value = frozen
        now = round(value)
        average = now if average is None else (1 - m) * average + m * now
        moved = 0 if level is None else (now > level) - (now < level)
        turned = moved * direction < 0
        frequency = (1 - m) * frequency + m * turned
        direction, level = moved or direction, now
        if freeze is not None and frozen is None and frequency > freeze:
            frozen = round(average)
    return frequency, value, frozen is not None


@pytest.mark.parametrize("freeze", [None, 0.03])
def test_frequency_and_freezing_are_the_definition(freeze):
    torch.manual_seed(0)
    steps = 40
    walks = torch.stack([
        torch.tensor([0.5 + 0.2 * (-1) ** t for t in range(steps)]),  # back and forth
        torch.tensor([-1.5 + 0.2 * (-1) ** (t // 5) for t in range(steps)]),  # now and then
        torch.linspace(-3, 3, steps) + 0.01,  # one way
        torch.randn(steps) * 2,
    ])  # fmt: skip
    quantizer = LSQ(Grid(bits=8))
    watcher = Oscillation(torch.Size([4]), freeze)
    for t in range(steps):
        weight = walks[:, t].clone()
        watcher.update(weight, quantizer)
    for i in range(4):
        frequency, value, frozen = slow(walks[i].tolist(), freeze)
        assert freeze is None or bool(watcher.frozen[i]) == frozen
        assert float(watcher.frequency[i]) == pytest.approx(frequency, rel=1e-4)
        assert float(weight[i]) == pytest.approx(value)
    assert watcher.frequency[2] == 0
    assert float(watcher.share) == pytest.approx(3 / 4)
    if freeze is not None:
        assert watcher.frozen[0] and not watcher.frozen[2]


def train(plugin, batches, finish=True):
    optimizer = torch.optim.SGD(plugin.parameter_groups(0.0), lr=0.3)
    for i, x in enumerate(batches):
        plugin.step(i / len(batches), first=True)
        optimizer.zero_grad()
        (plugin.model(x) - x[:, :2]).pow(2).mean().backward()
        optimizer.step()
    if finish:
        plugin.after_optimizer_step()


def staged(**config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 2))
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 3}, "first_last": "same", **config})
    plugin.calibrate([torch.randn(32, 6)], lambda model, x: model(x))
    return plugin


def test_frozen_weights_stay_on_their_level_and_are_reported():
    batches = [torch.randn(8, 6) for _ in range(120)]
    plugin = staged(oscillations="freeze", freeze_above=0.01)
    train(plugin, batches)
    frozen = 0
    for site in plugin.sites:
        watcher, quantizer = (site.weight_stages.get_submodule(name) for name in ("oscillation", "quantizer"))
        frozen += int(watcher.frozen.sum())
        levels = site.parameter.detach() / quantizer.scale.detach()
        torch.testing.assert_close(levels[watcher.frozen], watcher.average[watcher.frozen], rtol=0, atol=1e-5)
        assert all(value == round(value) for value in watcher.average[watcher.frozen].tolist())
    assert frozen > 0 and 0 < plugin.metrics()["oscillating"] < 1


def test_damping_leaves_fewer_oscillations_and_smaller_errors():
    batches = [torch.randn(8, 6) for _ in range(200)]
    figures = []
    for strength in (0.0, 1.0):
        regularizers = {"damping": {"strength": strength, "schedule": "linear"}}
        plugin = staged(oscillations="watch", regularizers=regularizers)
        train(plugin, batches)
        figures.append(plugin.metrics())
    assert figures[1]["damping"] < 0.5 * figures[0]["damping"]
    assert figures[1]["quantization_error"] < figures[0]["quantization_error"]
    assert figures[1]["oscillating"] <= figures[0]["oscillating"]


def test_watching_changes_nothing_and_survives_a_checkpoint():
    batches = [torch.randn(8, 6) for _ in range(30)]
    plain, watched = staged(), staged(oscillations="watch")
    for plugin in (plain, watched):
        train(plugin, batches)
    own = dict(watched.model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in plain.model.named_parameters())
    resumed = staged(oscillations="watch")
    train(resumed, batches[:15])
    again = staged(oscillations="watch")
    again.model.load_state_dict(copy.deepcopy(resumed.model.state_dict()))
    again.restored()
    train(again, batches[15:])
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in watched.model.state_dict().items())


def test_what_needs_steps_says_so():
    steps = "oscillations: needs weights with a quantizer that rounds to steps"
    methods = "damping: needs weights with method fixed or lsq or lsq_plus or noise"
    for config, message in (({"oscillations": "watch"}, steps), ({"regularizers": {"damping": {}}}, methods)):
        with pytest.raises(ValueError, match=message):
            RobustQ(nn.Linear(2, 2), config)
        with pytest.raises(ValueError, match=message):
            RobustQ(nn.Linear(2, 2), {**config, "weights": {"bits": 4, "method": "dorefa"}})
    with pytest.raises(ValueError, match="oscillations must be 'ignore', 'watch' or 'freeze'"):
        RobustQ(nn.Linear(2, 2), {"oscillations": "stop"})
    with pytest.raises(ValueError, match="freeze_above must be a number .a frequency. above 0 and below 1"):
        RobustQ(nn.Linear(2, 2), {"freeze_above": math.inf})
