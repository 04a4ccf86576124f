"""ASAM against its algorithm written out, EMA against torch's AveragedModel and timm's."""

import copy
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hf_robustq import ASAM, EMA, RobustQ
from hf_robustq.optim.asam import check_optimizer
from tests.zoo import bert, images, resnet, run, tokens


def norms():
    """With batch norm, which sees each batch once, and a bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def batches(count, size=6):
    generator = torch.Generator().manual_seed(1)
    labels = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(3, (size,), generator=labels))
        for _ in range(count)
    ]


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def asam_by_hand(model, steps, rho, eta, adaptive, accumulation=1, lr=0.1, clip=None):
    """Plain autograd, float64 norms, the whole algorithm in one loop; running statistics put back after pass two."""
    named = list(model.named_parameters())
    losses = []
    for step in steps:
        total = [torch.zeros_like(p) for _, p in named]
        for batch in step:
            loss = loss_of(model, batch) / accumulation
            losses.append(float(loss.detach()))
            grads = torch.autograd.grad(loss, [p for _, p in named])
            scale = [(p.detach().abs() + eta) if adaptive and "weight" in n else torch.ones_like(p) for n, p in named]
            norm = sum(((t * g).double() ** 2).sum() for t, g in zip(scale, grads, strict=True)).sqrt()
            origin = [p.detach().clone() for _, p in named]
            running = {k: b.clone() for k, b in model.named_buffers()}
            with torch.no_grad():
                for (_, p), t, g in zip(named, scale, grads, strict=True):
                    p += rho * t * t * g / norm
            grads = torch.autograd.grad(loss_of(model, batch) / accumulation, [p for _, p in named])
            with torch.no_grad():
                for (_, p), w, s, g in zip(named, origin, total, grads, strict=True):
                    p.copy_(w)
                    s += g
                for k, b in model.named_buffers():
                    b.copy_(running[k])
        if clip:
            norm = torch.stack([g.norm() for g in total]).norm()
            total = [g * min(1.0, clip / float(norm)) for g in total]
        with torch.no_grad():
            for (_, p), g in zip(named, total, strict=True):
                p -= lr * g
    return losses


def trained(model, steps, asam, accumulation=1, lr=0.1, clip=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for step in steps:
        for batch in step:

            def once(batch=batch):
                loss = loss_of(model, batch) / accumulation
                loss.backward()
                return loss.detach()

            losses.append(float(asam(once)))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("adaptive", "rho"), [(True, 0.5), (True, 2.0), (False, 0.05)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_two_passes_are_the_algorithm(adaptive, rho, accumulation, clip, channels_last):
    ours = norms().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    theirs, parts = norms(), batches(2 * accumulation)
    steps = [parts[:accumulation], parts[accumulation:]]
    losses = trained(ours, steps, ASAM(ours, rho=rho, adaptive=adaptive), accumulation, clip=clip)
    expected = asam_by_hand(theirs, steps, rho, 0.01, adaptive, accumulation, clip=clip)
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(
            ours.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    plain = norms()
    trained(plain, steps, lambda once: once(), accumulation, clip=clip)
    assert not torch.allclose(plain[0].weight, ours[0].weight, atol=1e-5)
    assert torch.allclose(plain[1].num_batches_tracked, ours[1].num_batches_tracked)


def test_a_large_weight_takes_the_same_way():
    """Past the size from which kernels are fused; and a layout that has no flat view."""
    torch.manual_seed(0)
    big, odd = torch.randn(700, 300), torch.randn(5, 4, 3).permute(2, 0, 1)
    for value in (big, odd):
        model = nn.ParameterDict({"weight": nn.Parameter(value.clone(memory_format=torch.preserve_format))})
        slope = torch.randn(value.shape)
        seen = []

        def once(model=model, seen=seen, slope=slope):
            seen.append(model["weight"].detach().clone())
            loss = (model["weight"] * slope).sum()
            loss.backward()
            return loss.detach()

        ASAM(model, rho=1.0)(once)
        t = value.abs() + 0.01
        torch.testing.assert_close(seen[1], value + t * t * slope / (t * slope).norm(), rtol=1e-4, atol=1e-6)
        assert torch.equal(model["weight"], value) and torch.equal(model["weight"].grad, slope)


def test_penalties_act_in_both_passes_and_noise_is_the_same_in_both():
    model, batch = resnet(), images()
    config = {"regularizers": {"kure": {"strength": 0.5}}, "weights": {"method": "noise", "bits": 3, "c": 0.5}}
    plugin = RobustQ(model, config)
    plugin.calibrate([batch], run)
    asam = ASAM(model, rho=0.5, exclude=plugin.own_parameters())
    reads, passes, noisy = [], [], []
    model.train()
    site = plugin.sites[2]
    fixed = site.parameter.detach().clone()

    def once():
        loss = run(model, batch).loss
        loss.backward()
        passes.append({name: p.detach().clone() for name, p in model.named_parameters()})
        reads.append(site.weight_stages.kure.active)
        noisy.append(site.weight_stages.quantizer.quantize(fixed).detach())
        return loss.detach()

    plugin.step(0.0, first=True, index=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    asam(once)
    assert reads == [True, True] and torch.equal(*noisy)
    own = plugin.own_parameters()
    assert own and all(torch.equal(passes[1][name], before[name]) for name in own)
    assert not torch.equal(passes[1][site.name], before[site.name])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.zero_grad()
    plugin.step(0.0, first=True, index=1)
    asam(once)
    assert torch.equal(noisy[2], noisy[3]) and not torch.equal(noisy[0], noisy[2])


def test_a_pass_that_overflows_skips_the_step_as_a_whole():
    """torch's own scaler of fp16, as accelerate uses it: once the first pass overflows, once the second."""
    for where in (0, 1):
        model, parts = norms(), batches(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        asam = ASAM(model, rho=0.5)
        for i, batch in enumerate(parts):
            calls = []

            def once(batch=batch, i=i, calls=calls, scaler=scaler, model=model, where=where):
                loss = loss_of(model, batch)
                if i == 1 and len(calls) == where:
                    loss = loss * 1e38 * 1e38
                calls.append(1)
                scaler.scale(loss).backward()
                return loss.detach()

            before = copy.deepcopy(dict(model.named_parameters()))
            asam(once)
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
            assert moved is (i != 1) and len(calls) == 2
        assert scaler.get_scale() == 4.0
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_scale_of_the_loss_does_not_change_the_way_up():
    ends = []
    for scale in (1.0, 1024.0):
        model, (batch,) = norms(), batches(1)

        def once(model=model, batch=batch, scale=scale):
            loss = loss_of(model, batch) * scale
            loss.backward()
            return loss.detach()

        ASAM(model, rho=0.5)(once)
        ends.append([p.grad / scale for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_plain_accelerate_loop():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain, parts = norms(), norms(), batches(4)
    asam = ASAM(model, rho=0.5)
    samples = torch.utils.data.TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    loader = torch.utils.data.DataLoader(samples, batch_size=6)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    for batch in loader:
        with accelerator.accumulate(prepared):

            def once(batch=batch):
                loss = loss_of(prepared, batch)
                accelerator.backward(loss)
                return loss.detach()

            asam(once, prepared)
            optimizer.step()
            optimizer.zero_grad()
    asam_by_hand(plain, [parts[:2], parts[2:]], 0.5, 0.01, True, 2)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": -1.0}, {"rho": float("nan")}, {"eta": -0.1}])
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=r"asam\.(rho must be a number above 0|eta must be a number from 0)"):
        ASAM(norms(), **options)


def test_optimizers_that_step_elsewhere_are_refused():
    model = norms()
    check_optimizer(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="asam: LBFGS calls the model itself"):
        check_optimizer(torch.optim.LBFGS(model.parameters()))

    class AdaLomo:
        def step(self):
            pass

    with pytest.raises(ValueError, match="asam: AdaLomo steps inside the backward"):
        check_optimizer(AdaLomo())
    with pytest.raises(RuntimeError, match="asam: the first pass left no gradient"):
        ASAM(model)(lambda: torch.zeros(()))


def test_deepspeeds_engine_is_refused_at_every_stage():
    class Engine(nn.Module):
        def zero_optimization_stage(self):
            return 0

    with pytest.raises(ValueError, match="asam: DeepSpeed takes the optimizer step inside the backward"):
        ASAM(norms())(lambda: pytest.fail("must not run"), Engine())


def test_a_piece_that_several_ranks_hold_counts_once():
    """Four ranks, two replicas of two shards; in a process of its own, whose other three ranks are not there."""
    code = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from hf_robustq.sharded import share_held
assert share_held(torch.zeros(4)) == 1
dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
both, flat = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,))
for mesh, how, share in ((both, (Replicate(), Shard(0)), 0.5), (both, (Shard(0), Shard(0)), 1.0),
                         (flat, (Shard(0),), 1.0), (flat, (Replicate(),), 0.25)):
    tensor = distribute_tensor(torch.ones(8), mesh, how, src_data_rank=None)
    assert share_held(tensor) == share, (how, share_held(tensor))
    assert tensor.to_local().numel() * 4 * share == 8
assert share_held(torch.zeros(4)) == 0.25
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def wander(model, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator).to(p)


def test_averages_are_torchs_and_timms():
    model = norms()
    ema = EMA(model, decay=0.9)
    ema.start()

    def warm_up(average, current, count):
        decay = min(0.9, (1 + int(count)) / (10 + int(count)))
        return decay * average + (1 - decay) * current

    averaged = AveragedModel(model, avg_fn=warm_up)
    averaged.n_averaged.fill_(0)
    averaged.update_parameters(model)  # the first call copies
    averaged.n_averaged.fill_(0)
    steady, fixed = ModelEmaV3(model, decay=0.9), EMA(model, decay=0.9)
    fixed.start()
    fixed.updates = 10**6  # past the warm-up
    for step in range(30):
        wander(model, step)
        ema.update()
        count = averaged.n_averaged.clone()
        with torch.no_grad():
            for a, p in zip(averaged.module.parameters(), model.parameters(), strict=True):
                a.copy_(warm_up(a, p, count))
        averaged.n_averaged += 1
        fixed.update()
        steady.update(model)
    for (name, one), other in zip(ema.averages.items(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, n=name: f"{n}: {m}")
    for one, other in zip(fixed.averages.values(), steady.module.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_averages_are_in_place_meanwhile_and_the_weights_afterwards():
    model = norms()
    model[0].weight.requires_grad_(False)
    ema, start = EMA(model, decay=0.5), copy.deepcopy(model.state_dict())
    with ema.applied():  # nothing yet
        assert torch.equal(model[4].weight, start["4.weight"])
    ema.start()
    wander(model, 0)
    model[1].running_mean += 1
    ema.update()
    own = copy.deepcopy(model.state_dict())
    with ema.applied(), ema.applied():
        torch.testing.assert_close(model[4].weight, 0.1 * start["4.weight"] + 0.9 * own["4.weight"])
        assert torch.equal(model[0].weight, own["0.weight"]) and torch.equal(
            model[1].running_mean, own["1.running_mean"]
        )
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    other = EMA(model, decay=0.5)
    other.load_state_dict(ema.state_dict())
    wander(model, 1)
    ema.update()
    other.update()
    assert all(torch.equal(value, other.averages[name]) for name, value in ema.averages.items())
    model[4].weight.requires_grad_(False)  # frozen since: it keeps its average
    ema.update()
    with ema.applied():
        assert torch.equal(model[4].weight, ema.averages["4.weight"])
    with pytest.raises(ValueError, match=r"ema\.decay must be a number of at least 0 and below 1"):
        EMA(model, decay=1.0)


def test_averages_of_bfloat16_weights_are_kept_in_float32():
    model = bert().to(torch.bfloat16)
    ema = EMA(model, decay=0.999)
    ema.start()
    name, p = next((n, p) for n, p in model.named_parameters() if p.dim() > 1)
    start = p.detach().float().clone()
    ema.updates = 10**6
    with torch.no_grad():
        p += 1
    for _ in range(10):
        ema.update()
    assert ema.averages[name].dtype == torch.float32
    torch.testing.assert_close(ema.averages[name], start + (1 - 0.999**10) * (p.float() - start), rtol=1e-3, atol=1e-4)


def test_the_plugin_publishes_averages(tmp_path):
    """Its folder, loaded by a stock class, is the averaged network: SatNL folded, the steps averaged too."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model, batch = bert(), tokens(labels=3)
    plugin = RobustQ(model, {"satnl": {}, "weights": {"method": "lsq", "bits": 4}})
    plugin.calibrate([batch], run)
    ema = plugin.average(0.5)
    optimizer = torch.optim.SGD(plugin.parameter_groups(0.0), lr=0.5)
    model.train()
    for i in range(3):
        plugin.step(i / 3, first=True)
        run(model, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plugin.after_optimizer_step()
        ema.update()
    model.eval()
    raw = run(model, batch).logits
    with plugin.averaged():
        expected = run(model, batch).logits
    with plugin.published():
        torch.testing.assert_close(run(model, batch).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(model, batch).logits, raw) and not torch.allclose(raw, expected, atol=1e-4)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(loaded, batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lsq", "fixed", "noise"])
def test_quantizers_see_the_weights_of_the_second_pass_under_accumulation(method):
    """What they keep for all micro-batches of a step is that of the first pass: against quantizing at every read."""
    ends = []
    for accumulating in (True, False):
        torch.manual_seed(0)
        model, parts = resnet(), [images(batch=4), images(batch=3)]
        plugin = RobustQ(model, {"weights": {"method": method, "bits": 4}})
        plugin.calibrate(parts, run)
        asam = ASAM(model, rho=2.0, exclude=plugin.own_parameters())
        model.train()
        for i, batch in enumerate(parts):
            plugin.step(0.0, first=i == 0, index=0, accumulating=accumulating)

            def once(batch=batch, model=model):
                loss = run(model, batch).loss
                loss.backward()
                return loss.detach()

            asam(once)
        ends.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in ends[0].items():
        torch.testing.assert_close(grad, ends[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("last", ["detach", "bake", "bake with inputs", "change_bits"])
def test_what_ends_an_average_takes_it_for_the_weights(tmp_path, last):
    torch.manual_seed(0)
    model, batch = bert(), tokens(labels=3)
    plugin = RobustQ(model, {"satnl": {}, "weights": {"method": "lsq", "bits": 4}})
    plugin.calibrate([batch], run)
    ema = plugin.average(0.5)
    ema.start()
    wander(model, 0)
    plugin.after_optimizer_step()
    ema.update()
    model.eval()
    with plugin.averaged():
        plugin.enable(last != "detach")
        for site in plugin.sites:
            site.weight_stages.satnl.enabled = True
        expected = run(model, batch).logits
        plugin.enable(True)
    if last == "change_bits":
        plugin.change_bits(4, None)
    elif last == "detach":
        plugin.detach()
    else:
        plugin.bake(activations=last.endswith("inputs"))
    torch.testing.assert_close(run(model, batch).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if last.startswith("bake"):
        assert all(stored[site.name].unique().numel() <= 16 for site in plugin.sites)


def test_a_failure_while_publishing_leaves_the_way_to_save_as_it_was(monkeypatch):
    model = bert()
    plugin = RobustQ(model, {"satnl": {}})
    with pytest.raises(MemoryError), plugin.published():
        raise MemoryError
    monkeypatch.setattr("hf_robustq.plugin.publish.values_kept", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), plugin.published():
        pass
    assert model.hf_quantizer is not None and plugin.sites[0].weight_stages.satnl.enabled
