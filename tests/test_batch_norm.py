"""Which batch norm follows which layer, and statistics estimated anew."""

import copy

import pytest
import torch
from torch import nn

from hf_robustq import RobustQ, sweep
from hf_robustq.sweep import Calibration
from hf_robustq.sweep.batch_norm import batch_norms, followers, reestimated, with_statistics
from tests.zoo import images, mobilenet_v2, resnet, run


class Tangle(nn.Module):
    """Layers whose batch norm is easy to get wrong."""

    def __init__(self):
        super().__init__()
        self.plain, self.plain_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.before_relu, self.after_relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.in_place, self.after_in_place = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.one, self.other = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.up, self.up_norm = nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6)
        self.rows, self.rows_norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.flat, self.flat_norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.plain_norm(self.plain(x))
        x = self.after_relu(self.before_relu(x).relu())
        x = self.after_in_place(self.in_place(x).relu_())
        x = self.one(self.twice(x)) + self.other(self.twice(x))
        x = self.up_norm(self.up(x)).mean(3)[..., :6]  # [N, 6, 6]: channels, then positions
        return self.flat_norm(self.flat(self.rows_norm(self.rows(x)).mean(1)))


def test_only_a_batch_norm_that_takes_the_output_as_it_is():
    model = Tangle().eval()
    plugin = RobustQ(model, {"first_last": "same"})
    x = torch.randn(2, 3, 6, 6)
    pairs = followers(model, plugin.sites, lambda: model(x))
    names = {name: next(key for key, module in model.named_modules() if module is norm) for name, norm in pairs.items()}
    assert names == {"plain.weight": "plain_norm", "up.weight": "up_norm", "flat.weight": "flat_norm"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in batch_norms(model).values())


@pytest.mark.parametrize("build", [resnet, mobilenet_v2])
def test_every_convolution_of_a_plain_network_has_one(build):
    model = build().eval()
    plugin = RobustQ(model, {"first_last": "same"})
    pairs = followers(model, plugin.sites, lambda: run(model, images()))
    convolutions = {site.name for site in plugin.sites if isinstance(site.module, nn.Conv2d)}
    assert set(pairs) == convolutions and len(set(map(id, pairs.values()))) == len(pairs)


def test_reestimated_statistics_are_the_average_over_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()
    model[1].running_mean.normal_()
    batches = [torch.randn(5, 3, 8, 8) * (i + 1) + i for i in range(4)]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        got = reestimated(model, lambda: [model(batch) for batch in batches])
        outputs = [model[0](batch).double().movedim(1, 0).flatten(1) for batch in batches]
    mean = torch.stack([out.mean(1) for out in outputs]).mean(0)
    variance = torch.stack([out.var(1) for out in outputs]).mean(0)
    torch.testing.assert_close(got["1"][0].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["1"][1].double(), variance, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules()) and model[1].momentum == 0.1
    with with_statistics(model, got):
        assert torch.equal(model[1].running_mean, got["1"][0])
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


def prediction(model, batch):
    return model(**batch).logits


def mean(outputs):
    return {"mean": float(torch.cat(outputs).double().mean())}


def test_a_setting_has_statistics_of_its_own_model_and_leaves_none_behind():
    """Against a model whose weights were overwritten and whose norms saw the calibration set in training mode."""
    model, batches = resnet().eval(), [images(batch=6) for _ in range(3)]
    calibration = [images(batch=8) for _ in range(2)]
    plain = copy.deepcopy(model)
    plugin = RobustQ(model, {})
    state = copy.deepcopy(model.state_dict())
    loss = Calibration(calibration, lambda model, batch: run(model, batch).loss)
    rows = sweep(plugin, batches, prediction, mean, ["fp", "w3@mse/bn", "w3", "fp/bn"], calibration=loss)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())

    def by_hand(bits):
        twin = copy.deepcopy(plain)
        if bits:
            other = RobustQ(twin, {"weights": {"bits": bits, "narrow": True}})
            other.calibrate(batches, run)
            other.bake()
        for norm in batch_norms(twin).values():
            norm.reset_running_stats()
            norm.momentum = None
        twin.train()
        with torch.no_grad():
            for batch in calibration:
                twin(**batch)
            twin.eval()
            return mean([prediction(twin, batch) for batch in batches])["mean"]

    assert rows["w3@mse/bn"]["mean"] == pytest.approx(by_hand(3), rel=1e-5)
    assert rows["fp/bn"]["mean"] == pytest.approx(by_hand(None), rel=1e-5)
    assert len({row["mean"] for row in rows.values()}) == 4


def test_models_without_batch_norm_are_told():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    plugin = RobustQ(model, {})
    batches = [torch.randn(3, 4)]
    call = {"predict": lambda model, x: model(x), "metric": mean}
    calibration = Calibration(batches, lambda model, x: model(x).sum())
    with pytest.raises(ValueError, match="no batch norm with running statistics: drop /bn"):
        sweep(plugin, batches, **call, settings=["w4@mse/bn"], calibration=calibration)
    with pytest.raises(ValueError, match="followed by a batch norm: drop /fold"):
        sweep(plugin, batches, **call, settings=["w4@mse/fold"])
    with pytest.raises(ValueError, match="w4@mse/bn: it reads training samples: pass calibration="):
        sweep(plugin, batches, **call, settings=["fp", "w4@mse/bn", "w4@lapq"])
    with pytest.raises(ValueError, match="calibration set is empty"):
        Calibration([], lambda model, x: model(x).sum())
