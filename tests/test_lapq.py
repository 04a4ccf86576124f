"""The joint search, on functions whose minimum is known and on a network."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_robustq import RobustQ, sweep
from hf_robustq.sweep import Calibration
from hf_robustq.sweep.lapq import best_norm, lapq


def test_the_best_norm_is_the_parabolas_minimum():
    norms = [1.5, 2, 2.5, 3, 3.5]
    assert best_norm(norms, [3 * (p - 2.2) ** 2 + 1 for p in norms]) == pytest.approx(2.2)
    assert best_norm(norms, [(p - 9) ** 2 for p in norms]) == 5.0
    assert best_norm(norms, [-((p - 2.5) ** 2) + p for p in norms]) == pytest.approx(1.5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_powell_finds_the_minimum_of_coupled_steps(seed):
    """A quadratic in the log steps, with an interaction between all of them."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(4, 4))
    curvature = root @ root.T + np.eye(4)
    target = rng.uniform(-0.5, 0.5, 4)

    def loss(steps):
        away = np.log([float(step) for step in steps]) - target
        return float(away @ curvature @ away)

    def start(p):
        return [torch.tensor([1.0 + 0.02 * p])] * 4

    found = lapq(start, loss, iterations=10, evaluations=2000)
    assert loss(found) < 0.01 * min(loss(start(p)) for p in (1.5, 2, 2.5, 3, 3.5))


def test_it_is_never_worse_than_the_best_start_and_survives_infinities():
    best = [torch.tensor([1.0])]

    def loss(steps):
        return 0.0 if torch.equal(steps[0], best[0]) else float("inf")

    assert torch.equal(lapq(lambda p: best, loss, 1)[0], best[0])
    nan_at_first = lapq(
        lambda p: [torch.tensor([p])], lambda steps: float("nan") if float(steps[0]) < 1.9 else float(steps[0]), 1
    )
    assert float(nan_at_first[0]) == pytest.approx(1.9, abs=0.15)
    with pytest.raises(ValueError, match="not finite at any steps"):
        lapq(lambda p: best, lambda steps: float("nan"))
    calls = []
    lapq(lambda p: best * 3, lambda steps: calls.append(1) or float(steps[0]), 5, evaluations=7)
    assert len(calls) <= 6 + 7 + 40  # scipy finishes the line it is on


def test_the_network_quantized_by_it_has_a_lower_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 8)
    labels = (x[:, :4] * x[:, 4:]).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(300):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plugin = RobustQ(model, {"first_last": "same"})
    batches = [(x[:128], labels[:128]), (x[128:], labels[128:])]
    plugin.observe(batches, lambda model, batch: model(batch[0]), activations=True)

    def loss_of(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    settings = ["fp", "w3", "w3@lapq", "w2a3", "w2a3@lapq", "w3@lapq/channel", "w3@mse/channel", "w3@lapq/x1.3"]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rows = sweep(
        plugin,
        batches,
        loss_of,
        lambda losses: {"loss": float(torch.stack(losses).mean())},
        settings,
        calibration=Calibration(batches, loss_of),
    )
    assert rows["w3@lapq"]["loss"] < rows["w3"]["loss"] and rows["w2a3@lapq"]["loss"] < rows["w2a3"]["loss"]
    assert rows["w3@lapq/channel"]["loss"] < rows["w3@mse/channel"]["loss"]
    assert rows["w3@lapq"]["loss"] < rows["w3@lapq/x1.3"]["loss"]
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
