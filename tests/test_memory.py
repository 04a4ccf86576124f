"""What training with quantizers keeps in memory, against the float model."""

import copy
import sys

import pytest
import timm
import torch
from torch import nn

from hf_robustq import RobustQ
from tests.zoo import ZOO, run

attaching = sys.modules["hf_robustq.sites.attach"]  # of the same name as its function

W4A4 = {
    "weights": {"method": "lsq", "bits": 4},
    "activations": {"method": "lsq", "bits": 4},
    "first_last": 8,
}


def training_bytes(monkeypatch, model, loss):
    """Parameters, SGD's momentum, and the distinct storages that one forward keeps for its backward."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    pack = attaching._pack

    def counting_pack(reads, saved):  # of nested hooks only the inner ones are called
        packed = pack(reads, saved)
        return keep(packed) if isinstance(packed, torch.Tensor) else packed

    monkeypatch.setattr(attaching, "_pack", counting_pack)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model)
    parameters = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    activations = {address: t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters}
    return 2 * sum(parameters.values()) + sum(activations.values())


@pytest.mark.parametrize(("memory", "limit"), [("keep", 1.5), ("recompute", 1.15)])
def test_memory_of_a_training_step(monkeypatch, memory, limit):
    torch.manual_seed(0)
    model = timm.create_model("resnet18").to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, 112, 112).to(memory_format=torch.channels_last)
    float_bytes = training_bytes(monkeypatch, model.train(), lambda model: model(x).sum())
    plugin = RobustQ(model, {**W4A4, "memory": memory})
    plugin.calibrate([x], lambda model, x: model(x))
    ratio = training_bytes(monkeypatch, model, lambda model: model(x).sum()) / float_bytes
    print(f"{memory}: {ratio:.3f}")
    assert 1.0 < ratio <= limit


@pytest.mark.parametrize("method", ["lsq", "lsq_plus", "noise", "dorefa"])
def test_a_quantized_weight_keeps_nothing_more(method):
    """Of one linear layer on one row: the weight is a parameter, its quantized form the only copy of its size."""
    torch.manual_seed(0)
    model, x = nn.Linear(512, 512), torch.rand(1, 512)
    plugin = RobustQ(model, {"weights": {"method": method, "bits": 4}, "first_last": "same"})
    plugin.calibrate([x], lambda model, x: model(x))
    plugin.step(0.0, first=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        out = model.train()(x.requires_grad_())
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    extra = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)
    assert extra <= 1.05 * 512 * 512 * 4
    out.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("name", ["timm resnet", "gpt2", "bert", "albert", "timm swinv2", "t5", "torch encoder"])
def test_recomputing_changes_no_gradient(name):
    entry = ZOO[name]
    torch.manual_seed(0)
    model, batch = entry.build(), entry.batch()
    config = {"regularizers": {"kure": {}}, "weights": {"method": "noise", "bits": 4}, "activations": {"bits": 4}}
    gradients = []
    for memory in ("keep", "recompute"):
        twin = copy.deepcopy(model)
        plugin = RobustQ(twin, {**config, "memory": memory, "weights_only": list(entry.weights_only)})
        plugin.calibrate([batch], run)
        twin.train()
        plugin.step(0.0, first=True)
        run(twin, batch).loss.backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    kept, made = gradients
    assert kept.keys() == made.keys()
    for gradient_kept, gradient_made in zip(kept.values(), made.values(), strict=True):
        torch.testing.assert_close(gradient_made, gradient_kept, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recomputing_outside_the_forwards_autocast(dtype):
    gradients = []
    for memory in ("keep", "recompute"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        x = torch.randn(4, 3, 8, 8)
        plugin = RobustQ(model, {**W4A4, "memory": memory, "first_last": "same"})
        plugin.calibrate([x], lambda model, x: model(x))
        with torch.autocast("cpu", dtype):
            loss = model(x).float().pow(2).sum()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, made in zip(*gradients, strict=True):
        torch.testing.assert_close(made, kept)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_recomputing_from_what_has_changed_is_an_error(what):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    plugin = RobustQ(model, {**W4A4, "memory": "recompute", "first_last": "same"})
    x = torch.randn(3, 6)
    plugin.calibrate([x], lambda model, x: model(x))
    loss = model(x).sum()
    with torch.no_grad():
        (x if what == "input" else dict(model.named_parameters())["1.weight"]).mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_was_changed_meanwhile_is_quantized_anew():
    """By a second pass of an optimizer that looks ahead, say."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}, "first_last": "same"})
    x = torch.randn(3, 6)
    plugin.calibrate([x], lambda model, x: model(x))
    plugin.step(0.0, first=True, accumulating=True)
    before = model(x)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    changed = model(x)
    expected = model.eval()(x)
    assert torch.equal(changed, expected) and not torch.equal(changed, before)


def test_the_trainer_quantizes_weights_once_for_all_micro_batches(monkeypatch, tmp_path):
    from transformers import TrainerCallback

    from hf_robustq import RobustTrainer
    from hf_robustq.functional import quantize as kernels
    from tests.test_trainer import arguments, resnet
    from tests.test_trainer import pictures as rows

    calls, forward = [], kernels._forward
    monkeypatch.setattr(kernels, "_forward", lambda x, *rest: calls.append(x.numel()) or forward(x, *rest))
    args = arguments(tmp_path, gradient_accumulation_steps=3, max_steps=2, eval_strategy="no", logging_strategy="no")
    config = {"weights": {"method": "lsq", "bits": 4}, "first_last": "same", "calibration_samples": 8}
    trainer = RobustTrainer(model=resnet(), args=args, train_dataset=rows(), robustq=config, sweep=())
    counts = []

    class Count(TrainerCallback):
        def on_train_end(self, *_, **__):
            counts.append(len(calls))

    trainer.add_callback(Count())
    trainer.train()
    assert counts == [2 * len(trainer.robustq.sites)]


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_weights_are_quantized_once_for_all_micro_batches(monkeypatch, memory):
    from accelerate import Accelerator

    from hf_robustq.functional import quantize as kernels

    accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}, "memory": memory, "first_last": "same"})
    batches = [torch.randn(4, 8) for _ in range(6)]
    plugin.calibrate(batches, lambda model, x: model(x))
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plugin.parameter_groups(0.0), lr=0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    calls, forward = [], kernels._forward
    monkeypatch.setattr(kernels, "_forward", lambda *args: calls.append(1) or forward(*args))
    counts = []
    for i, x in enumerate(batches):
        calls.clear()
        plugin.step(0.0, first=i % 3 == 0)
        accelerator.backward(model(x).pow(2).sum())
        counts.append(len(calls))
        twin(x).pow(2).sum().div(3).backward()
        if i % 3 == 2:
            for one in (optimizer, plain):
                one.step()
                one.zero_grad()
    assert counts == ([3, 0, 0, 3, 0, 0] if memory == "keep" else [5] * 6)  # the first layer's weight is not needed
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    model.eval()
    expected = twin.eval()(batches[0])
    torch.testing.assert_close(model(batches[0]), expected)
