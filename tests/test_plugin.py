import copy
import random
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_robustq import RobustQ, RobustQConfig
from hf_robustq.calibrate import weight_probe
from tests.zoo import bert, gpt2, images, resnet, run, tokens

KURE = {"regularizers": {"kure": {}}}


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def forward(model, x):
    return model(x)


def test_calibration_leaves_the_model_and_every_rng_as_they_were():
    model, batch = bert(dropout=0.1), tokens(labels=3)
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    plugin = RobustQ(model, {**KURE, "activations": {"bits": 8}})
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items() if "_stages." not in k}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def noisy(model, batch):
        torch.rand(3), random.random(), np.random.rand()
        return run(model, batch)

    plugin.calibrate([batch, batch], noisy)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_empty_calibration_set_and_missing_calibration_are_errors():
    plugin = RobustQ(mlp(), KURE)
    with pytest.raises(ValueError, match="calibration set is empty"):
        plugin.calibrate([], forward)
    with pytest.raises(RuntimeError, match="calibrate"):
        plugin.step(0.0)


def test_non_finite_calibration_data_names_the_layer():
    plugin = RobustQ(mlp(), {**KURE, "first_last": "same"})
    with pytest.raises(ValueError, match=r"non-finite values in the input of 0\.weight in calibration"):
        plugin.calibrate([torch.full((2, 6), float("nan"))], forward)


def test_activation_grids_are_unsigned_after_relu_and_signed_elsewhere():
    plugin = RobustQ(mlp(), {"activations": {"bits": 4}, "first_last": "same"})
    plugin.calibrate([torch.randn(50, 6)], forward)
    ranges = []
    for site in plugin.sites:
        quantizer = site.activation_stages.get_submodule("quantizer")
        ranges.append((int(quantizer.low), int(quantizer.high)))
    assert ranges == [(-8, 7), (0, 15), (0, 15)]


def test_a_layer_called_twice_is_penalised_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(x)
            for _ in range(3):
                if self.middle.weight.dtype == x.dtype:  # a reader that is no use
                    x = self.middle(x)
            return self.last(x)

    model = Shared()
    plugin = RobustQ(model, KURE)
    plugin.calibrate([torch.randn(2, 4)] * 2, forward)
    assert weight_probe(plugin.sites[0]).uses == 3
    plugin.step(0.0, first=True)
    x = torch.randn(2, 4)
    with_penalty = torch.autograd.grad(model.train()(x).sum(), model.middle._parameters["weight"])[0]
    plugin.end_micro_batch()
    without = torch.autograd.grad(model(x).sum(), model.middle._parameters["weight"])[0]
    w = model.middle._parameters["weight"].detach().double().requires_grad_()
    d = w - w.mean()
    (expected,) = torch.autograd.grad(((d**4).mean() / (d**2).mean() ** 2 - 1.8) ** 2, w)
    torch.testing.assert_close((with_penalty - without).double(), expected, rtol=1e-3, atol=1e-5)


def test_strength_follows_the_schedule_and_the_fp16_scale():
    plugin = RobustQ(mlp(), {"regularizers": {"kure": {"strength": 3.0, "schedule": "linear"}}, "first_last": "same"})
    plugin.calibrate([torch.randn(2, 6)], forward)
    stage = plugin.sites[0].weight_stages.get_submodule("kure")
    plugin.step(0.5, first=True)
    assert float(stage.strength) == pytest.approx(0.5) and stage.active
    plugin.step(0.5, first=False)
    assert not stage.active
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin.step(1.0, first=True, scaler=scaler)
    assert float(stage.strength) == pytest.approx(1024.0)


def test_fp16_with_a_scaler_gives_the_gradient_of_float32():
    def gradient(fp16):
        torch.manual_seed(0)
        model = mlp()
        plugin = RobustQ(model, {"regularizers": {"kure": {"strength": 5.0}}})
        plugin.calibrate([torch.randn(2, 6)], forward)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=512.0)
        plugin.step(0.0, first=True, scaler=scaler)
        with torch.autocast("cpu", dtype=torch.float16, enabled=fp16):
            loss = model.train()(torch.ones(4, 6)).float().pow(2).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return plugin.sites[0].parameter.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("micro", "batch"), [(1, 8), (4, 2), (2, 4)])
def test_plain_accelerate_loop_gives_the_same_weights_whatever_the_accumulation(micro, batch):
    """Five steps of 8 samples in `micro` micro-batches, against one plain loop with the penalty in the loss."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    model = mlp()
    plain = copy.deepcopy(model)

    accelerator = Accelerator(gradient_accumulation_steps=micro, cpu=True)
    plugin = RobustQ(model, {"regularizers": {"kure": {"strength": 2.0}}, "first_last": "same"})
    plugin.calibrate([x], forward)
    loader = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=batch)
    optimizer = torch.optim.SGD(plugin.parameter_groups(0.01), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for i, (xs, ys) in enumerate(loader):
        plugin.step(i / len(loader))
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(xs), ys))
            optimizer.step()
            optimizer.zero_grad()

    weights = [p for p in plain.parameters() if p.dim() == 2]
    biases = [p for p in plain.parameters() if p.dim() == 1]
    reference = torch.optim.SGD([{"params": weights, "weight_decay": 0.01}, {"params": biases}], lr=0.1)
    for xs, ys in zip(x.split(8), y.split(8), strict=True):
        penalty = 0.0
        for w in weights:
            d = w - w.mean()
            penalty = penalty + ((d**4).mean() / (d**2).mean() ** 2 - 1.8) ** 2 / len(weights)
        (nn.functional.cross_entropy(plain(xs), ys) + 2.0 * penalty).backward()
        reference.step()
        reference.zero_grad()
    own = dict(plain.named_parameters())
    for site in plugin.sites:
        torch.testing.assert_close(site.parameter, own[site.name], rtol=0, atol=1e-5)


def test_metrics_are_the_mean_kurtosis_and_the_mean_penalty():
    import scipy.stats

    plugin = RobustQ(resnet(), KURE)
    kurtoses = [scipy.stats.kurtosis(s.parameter.detach().double().flatten(), fisher=False) for s in plugin.sites]
    metrics = plugin.metrics()
    assert metrics["kurtosis"] == pytest.approx(np.mean(kurtoses), rel=1e-4)
    assert metrics["kure"] == pytest.approx(np.mean([(k - 1.8) ** 2 for k in kurtoses]), rel=1e-3)


def test_parameter_groups_decay_matrices_and_leave_out_what_is_frozen():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    plugin = RobustQ(model, KURE)
    decayed, rest = plugin.parameter_groups(0.1)
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert all(p.dim() > 1 for p in decayed["params"]) and all(p.dim() <= 1 for p in rest["params"])
    trainable = sum(p.requires_grad for p in model.parameters())
    assert len(decayed["params"]) + len(rest["params"]) == trainable


def test_kure_alone_moves_the_kurtosis_to_its_target():
    model = mlp()
    plugin = RobustQ(model, {"regularizers": {"kure": {"strength": 1.0, "target": 2.2}}, "first_last": "same"})
    with torch.no_grad():
        for site in plugin.sites:
            site.parameter.copy_(torch.distributions.StudentT(5.0).sample(site.parameter.shape))
    plugin.calibrate([torch.randn(2, 6)], forward)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(400):
        plugin.step(0.0, first=True)
        optimizer.zero_grad()
        (0.0 * model(torch.ones(1, 6)).sum()).backward()
        optimizer.step()
    assert plugin.metrics()["kurtosis"] == pytest.approx(2.2, abs=0.05)


def test_per_channel_steps_beat_the_neighbouring_ones_in_every_channel():
    plugin = RobustQ(resnet(), {"weights": {"bits": 3, "per_channel": True}})
    plugin.calibrate([images()], run)
    site = plugin.sites[1]
    w, scale = site.parameter.detach().double(), site.weight_stages.get_submodule("quantizer").scale.double()

    def errors(scale):
        s = scale.view(-1, 1, 1, 1)
        return ((w - (w / s).round().clamp(-3, 3) * s) ** 2).sum((1, 2, 3))

    for factor in (0.7, 0.9, 1.1, 1.3):
        assert bool((errors(scale) <= errors(scale * factor) * (1 + 1e-9)).all())


def gradient_of_kure(weight):
    w = weight.detach().double().requires_grad_()
    d = w - w.mean()
    return torch.autograd.grad(((d**4).mean() / (d**2).mean() ** 2 - 1.8) ** 2, w)[0]


@pytest.mark.parametrize("kind", ["attention", "tied", "T5"])
def test_a_weight_is_penalised_once_however_it_is_read(kind):
    """Read functionally, by an embedding and a head, or also for its dtype: the penalty's gradient counts once."""
    if kind == "attention":
        model = nn.Sequential(
            nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), nn.Linear(16, 2)
        )
        batch, call = torch.randn(2, 5, 16), forward
        config = {}
    elif kind == "tied":
        model, batch, call = gpt2(), tokens(), run
        config = {"embeddings": True, "first_last": "same", "exclude": ["*wpe*"]}
    else:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))
        batch, call, config = tokens(), run, {"weights_only": ["*.wo.weight"]}
    plugin = RobustQ(model, {"regularizers": {"kure": {}}, **config})
    plugin.calibrate([batch], call)
    model.train()

    def gradients(penalised):
        plugin.step(0.0, first=penalised)
        model.zero_grad()
        out = call(model, batch)
        (out.loss if hasattr(out, "loss") else out.sum()).backward()
        return {site.name: site.parameter.grad.clone() for site in plugin.sites}

    with_penalty, without = gradients(True), gradients(False)
    count = len({id(site.parameter) for site in plugin.sites})
    for site in plugin.sites:
        added = count * (with_penalty[site.name] - without[site.name]).double()
        expected = gradient_of_kure(site.parameter)
        ratio = float((added * expected).sum() / (expected**2).sum())
        assert ratio == pytest.approx(1.0, abs=0.02), site.name


def test_the_published_codes_kurtosis_is_ours_times_the_known_factor():
    """It divides by torch.std, which makes it ((N - 1) / N)^2 times the biased kurtosis."""
    from hf_robustq.functional import kurtosis

    for values, published in (([1.0, 2.0, 3.0, 4.0], 0.9225), ([1.0, 2.0, 3.0, 4.0, 10.0], 1.78432)):
        w = torch.tensor(values)
        theirs = (((w - w.mean()) / w.std()) ** 4).mean().item()
        assert theirs == pytest.approx(published, rel=1e-5)
        assert kurtosis(w).item() * ((len(w) - 1) / len(w)) ** 2 == pytest.approx(theirs, rel=1e-5)


def test_a_constant_weight_is_left_alone_until_it_moves():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    plugin = RobustQ(model, KURE)
    plugin.calibrate([torch.randn(2, 6)], forward)
    plugin.step(0.0, first=True)
    model.train()(torch.randn(4, 6)).pow(2).sum().backward()
    assert bool(plugin.sites[0].parameter.grad.isfinite().all()) and "kurtosis" not in plugin.metrics()


def test_config_may_be_a_dict_or_the_dataclass():
    as_dict = {"regularizers": {"kure": {"target": 2.0}}, "weights": {"bits": 4}}
    assert RobustQ(mlp(), as_dict).config == RobustQ(mlp(), RobustQConfig.from_dict(as_dict)).config


def test_weights_in_pieces_are_calibrated_after_wrapping_and_grouped_by_their_whole_shape():
    """As `zero.Init` leaves a parameter: empty, with its shape beside it."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    plugin = RobustQ(model, {**KURE, "first_last": "same", "weights": {"bits": 4, "per_channel": True}})
    assert [site.weight_stages.get_submodule("quantizer").scale.shape for site in plugin.sites] == [(16,), (3,)]
    assert [len(group["params"]) for group in plugin.parameter_groups(0.1)] == [2, 2]
    assert "16x6" in repr(plugin)
    with pytest.raises(RuntimeError, match=r"the weights are in pieces: if this came before accelerator\.prepare"):
        plugin.calibrate([torch.randn(2, 6)], forward)


def test_the_stages_tensors_are_not_sent_at_every_forward_and_the_users_own_choice_stays():
    model = mlp()
    model._ddp_params_and_buffers_to_ignore = ["0.bias"]
    RobustQ(model, {**KURE, "weights": {"bits": 4}})
    names = model._ddp_params_and_buffers_to_ignore
    assert "0.bias" in names and {name for name, _ in model.named_buffers()} <= set(names)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_an_optimizer_built_before_the_quantizers_is_an_error(early, after, fused):
    """In a plain loop after the first step, by whichever call comes first."""
    model = mlp()
    before = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}, "first_last": "same"})
    plugin.calibrate([torch.randn(2, 6)], forward)
    optimizer = before if early else torch.optim.AdamW(plugin.parameter_groups(0.0), lr=1e-3, fused=fused)

    def loop():
        for _ in range(3):
            plugin.step(0.0, first=True)
            model(torch.randn(2, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if after:
                plugin.after_optimizer_step()

    if early:
        with pytest.raises(RuntimeError, match=r"does not train .*quantizer\.scale: build it after RobustQ"):
            loop()
        with pytest.raises(RuntimeError, match="does not train"):
            plugin.check_optimizer(optimizer)
    else:
        loop()
        plugin.check_optimizer(optimizer)


def test_weights_that_are_written_in_place_do_not_make_an_optimizer_look_wrong():
    model = mlp()
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}, "first_last": "same"})
    plugin.calibrate([torch.randn(2, 6)], forward)
    weights = torch.optim.SGD([p for p in model.parameters() if id(p) not in map(id, plugin.own_parameters().values())])
    scales = torch.optim.SGD(plugin.own_parameters().values(), lr=1e-3)
    for i in range(3):
        plugin.step(0.0, first=True)
        with torch.no_grad():
            plugin.sites[0].parameter.clamp_(-1, 1)
        model(torch.randn(2, 6)).sum().backward()
        if i:  # as a scaler would skip the first
            weights.step()
            scales.step()
        weights.zero_grad()
        scales.zero_grad()
    plugin.after_optimizer_step()


def test_steps_that_the_user_has_frozen_may_stay_out_of_the_optimizer():
    model = mlp()
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}, "first_last": "same"})
    plugin.calibrate([torch.randn(2, 6)], forward)
    for parameter in plugin.own_parameters().values():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model[0].weight.detach().clone()
    for _ in range(2):
        plugin.step(0.0, first=True)
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    plugin.check_optimizer(optimizer)
    assert not torch.equal(model[0].weight, before)


def test_learned_steps_have_a_group_of_their_own_without_decay():
    plugin = RobustQ(mlp(), {"weights": {"method": "lsq", "bits": 4}, "first_last": "same"})
    *_, group = plugin.parameter_groups(0.1, scale_lr=1e-4)
    assert group["weight_decay"] == 0 and group["lr"] == 1e-4
    assert {id(p) for p in group["params"]} == {id(p) for p in plugin.own_parameters().values()} != set()


def test_mixed_bits_are_those_of_the_first_pattern_that_matches():
    weights = {"bits": 4, "mixed": {"1.weight": 7, "*.weight": 5}}
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    plugin = RobustQ(model, {"weights": weights, "activations": {"bits": 8, "mixed": {"2.*": 6}}, "first_last": "same"})
    plugin.calibrate([torch.randn(8, 4)], lambda model, x: model(x))
    assert [(layer.bits, layer.activation_bits) for layer in plugin.size().layers] == [(5, 8), (7, 8), (5, 6)]
    assert plugin.trained_bits() == {"weights": pytest.approx(17 / 3), "activations": pytest.approx(22 / 3)}
    assert RobustQConfig.from_dict(plugin.config.to_dict()) == plugin.config
    for wrong, message in (
        ({"mixed": {"nothing.*": 4}}, "mixed: pattern 'nothing.*' matches no staged weight"),
        ({"mixed": 5}, "weights.mixed must be a mapping, got 5"),
        ({"mixed": {"1.weight": 17}}, "weights.mixed['1.weight'] must be a whole number from 2 to 16"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            RobustQ(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"weights": {"bits": 4, **wrong}, "first_last": "same"})


def test_mixed_bits_leave_the_edges_alone_and_go_with_a_change_of_bits():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    with pytest.raises(ValueError, match="mixed: pattern '0.*' matches no staged weight"):
        RobustQ(model, {"weights": {"bits": 4, "mixed": {"0.*": 5}}, "first_last": 8})
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4, "mixed": {"1.*": 6}}, "first_last": 8})
    plugin.calibrate([torch.randn(8, 4)], lambda model, x: model(x))
    assert plugin.trained_bits()["weights"] == 6
    plugin.change_bits(3, None)
    assert [layer.bits for layer in plugin.size().layers] == [8, 3, 8] and plugin.trained_bits()["weights"] == 3
    assert plugin.config.weights.bits_of("1.weight") == 3


def test_mixed_bits_round_each_weight_to_its_own_grid():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(2)))
    config = {"weights": {"method": "absmax", "bits": 3, "mixed": {"1.weight": 5}}, "first_last": "same"}
    plugin = RobustQ(model, config)
    plugin.calibrate([torch.randn(8, 64)], lambda model, x: model(x))
    assert [len(model[i].weight.unique()) for i in range(2)] == [7, 31]
