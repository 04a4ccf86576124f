import copy
import json

import pytest
import torch
from torch import nn

from hf_robustq import RobustQ, Row, Setting, Sweep, robustness, sweep
from hf_robustq.plugin.stages import quantizers
from hf_robustq.scales import Sample, absmax, mse
from hf_robustq.sweep import chunked, curves, load_sweeps, save_sweeps
from tests.zoo import images, resnet, run


def model_and_batches(count=4):
    return resnet().eval(), [images(batch=5) for _ in range(count)]


def predict(model, batch):
    return model(**batch).logits


def mean_logit(outputs):
    joined = torch.cat(outputs)
    return {"mean": float(joined.double().mean()), "rows": float(len(joined))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp", Setting()),
        ("trained", Setting(trained=True)),
        ("w4", Setting(weights=4)),
        ("a8", Setting(activations=8)),
        ("w4a8", Setting(weights=4, activations=8)),
        ("w3@absmax", Setting(weights=3, scale="absmax")),
        ("w3@mse/channel", Setting(weights=3, per_channel=True)),
        ("fp/bn", Setting(reestimate=True)),
        ("w4a4@mse/weights/x0.9", Setting(weights=4, activations=4, perturb_inputs=False, ratio=0.9)),
        ("trained/x0.9", Setting(trained=True, ratio=0.9)),
        ("w4a8@learned/pow2", Setting(weights=4, activations=8, scale="learned", power_of_two="log")),
        ("w4@kmeans/channel/bc", Setting(weights=4, scale="kmeans", per_channel=True, correction="mean")),
        (
            "w4a4@lapq/asym/fold/bcv/pow2v/floor/wrap/x1.25",
            Setting(
                weights=4,
                activations=4,
                scale="lapq",
                asymmetric=True,
                fold=True,
                correction="variance",
                power_of_two="value",
                rounding="floor",
                overflow="wrap",
                ratio=1.25,
            ),
        ),
    ],
)
def test_settings_are_read_and_written(text, expected):
    assert Setting.parse(text) == expected and Setting.parse(text).name == text


@pytest.mark.parametrize("text", ["", "w", "x4", "w1", "w17", "a99", "w4@nothing", "W4"])
def test_settings_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="cannot read|from 2 to 16|unknown scale"):
        Setting.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("w4@mse/chanel", "unknown modifier /chanel in .*: known: x0.9, channel"),
        ("w4@mse/floor/stochastic", "says /stochastic besides another of its kind"),
        ("w4@mse/x0", "ratio must be positive"),
        ("w9@kmeans", "kmeans takes at most 8 bits"),
        ("w4@log2/floor", "/floor is for evenly spaced levels"),
        ("w4a4@dorefa", "dorefa is for weights"),
        ("w4@aciq_levels", "add /channel"),
        ("a4@mse/bc", "/bc is for weights"),
        ("w4@learned/floor", "/floor does not go with the model's own quantizers"),
        ("trained/fold", "/fold does not go with"),
        ("fp/x0.9", "/x0.9 needs bits"),
        ("w4@mse/fold/bn", "drop /fold or /bn"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Setting.parse(text)


LEARNED = [
    {"weights": {"method": "lsq", "bits": 4}, "activations": {"method": "lsq_plus", "bits": 4}},
    {"weights": {"method": "lsq", "bits": 3, "per_channel": True}, "activations": {"method": "lsq", "bits": 3}},
    {"weights": {"method": "dorefa", "bits": 4}, "activations": {"method": "dorefa", "bits": 4}},
]


@pytest.mark.filterwarnings("ignore:.*has negative values")
@pytest.mark.parametrize("config", LEARNED, ids=["lsq", "lsq per channel", "dorefa"])
@pytest.mark.parametrize("first_last", [8, "same"])
def test_learned_steps_at_other_bits_keep_their_clip_range(config, first_last):
    """Against a copy whose quantizers were built anew at those bits, with steps by the formula."""
    model, batches = model_and_batches()
    config = {**config, "first_last": first_last}
    plugin = RobustQ(model, config)
    plugin.calibrate(batches, run)
    with torch.no_grad():
        for parameter in plugin.own_parameters().values():
            parameter.mul_(1.3)
    rows = sweep(plugin, batches, predict, mean_logit, ["trained", "w6a2@learned", "w6@learned", "w3a8@learned"])
    assert len({row["mean"] for row in rows.values()}) == 4
    own = config["weights"]["bits"]
    kept = sweep(plugin, batches, predict, mean_logit, [f"w{own}a{own}@learned", "trained"])
    assert kept[f"w{own}a{own}@learned"] == kept["trained"] == rows["trained"]

    for name, weights, activations in (("w6a2@learned", 6, 2), ("w3a8@learned", 3, 8)):
        other = {"weights": {**config["weights"], "bits": weights}}
        other["activations"] = {**config["activations"], "bits": activations}
        twin = RobustQ(copy.deepcopy(plugin).detach(), {**config, **other})
        twin.calibrate(batches, run)
        with torch.no_grad():
            for mine, theirs in zip(quantizers(twin.sites), quantizers(plugin.sites), strict=True):
                end = "low" if float(theirs.low) else "high"
                mine.scale.copy_(theirs.scale * (float(getattr(theirs, end)) / float(getattr(mine, end))))
                if hasattr(theirs, "offset"):
                    mine.offset.copy_(theirs.offset)
        expected = sweep(twin, batches, predict, mean_logit, ["trained"])["trained"]
        assert rows[name]["mean"] == pytest.approx(expected["mean"], rel=1e-5)


def test_settings_that_mean_nothing_are_refused():
    for values in ({"rounding": "nearest"}, {"overflow": "clip"}, {"power_of_two": "yes"}, {"scale": "absmax"}):
        with pytest.raises(ValueError, match="cannot be|needs weight or activation bits"):
            Setting(**({"weights": 4} if "scale" not in values else {}), **values)
    model, batches = model_and_batches(1)
    with pytest.raises(ValueError, match="listed twice"):
        sweep(RobustQ(model, {}), batches, predict, mean_logit, ["w4@mse/x0.8", "w4@mse/x0.80000000000001"])


@pytest.mark.parametrize("config", LEARNED[:2], ids=["lsq", "lsq per channel"])
def test_the_models_own_steps_times_a_ratio(config):
    """Against a copy whose learned steps were multiplied."""
    model, batches = model_and_batches()
    plugin = RobustQ(model, {**config, "first_last": 8})
    plugin.calibrate(batches, run)
    state = copy.deepcopy(model.state_dict())
    settings = ["trained", "trained/x0.8", "w6a2@learned/x0.8", "trained/pow2"]
    rows = sweep(plugin, batches, predict, mean_logit, settings)
    assert len({row["mean"] for row in rows.values()}) == 4
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert sweep(plugin, batches, predict, mean_logit, ["trained"])["trained"] == rows["trained"]
    with torch.no_grad():
        for quantizer in quantizers(plugin.sites):
            quantizer.scale.mul_(0.8)
    other = sweep(plugin, batches, predict, mean_logit, ["trained", "w6a2@learned"])
    assert rows["trained/x0.8"]["mean"] == pytest.approx(other["trained"]["mean"], rel=1e-5)
    assert rows["w6a2@learned/x0.8"]["mean"] == pytest.approx(other["w6a2@learned"]["mean"], rel=1e-5)
    with torch.no_grad():
        for quantizer in quantizers(plugin.sites):
            quantizer.scale.div_(0.8).log2_().round_().exp2_()
    powers = sweep(plugin, batches, predict, mean_logit, ["trained"])["trained"]
    assert rows["trained/pow2"]["mean"] == pytest.approx(powers["mean"], rel=1e-5)


def test_reshaped_weights_have_no_steps_to_perturb():
    model, batches = model_and_batches()
    plugin = RobustQ(model, {"weights": {"method": "dorefa", "bits": 4}})
    plugin.calibrate(batches, run)
    with pytest.raises(ValueError, match="trained/x0.9: the model's quantizers do more than round"):
        sweep(plugin, batches, predict, mean_logit, ["trained/x0.9"])


def test_perturbed_settings_are_what_perturbing_by_hand_gives():
    """Weights overwritten by the formula, integers kept, one setting at a time."""
    from hf_robustq import Grid

    model, batches = model_and_batches()
    plain = copy.deepcopy(model)
    plugin = RobustQ(model, {})
    names = [site.name for site in plugin.sites]

    def by_hand(change, round_=torch.round, low=-7, high=7):
        twin = copy.deepcopy(plain)
        with torch.no_grad():
            for name in names:
                w = twin.get_parameter(name)
                scale = change(mse(Sample.of(w), Grid(bits=4, narrow=low == -7))).float()
                w.copy_(round_(w / scale).clamp(low, high) * scale)
            return mean_logit([predict(twin, batch) for batch in batches])["mean"]

    expected = {
        "w4@mse/x0.8": by_hand(lambda s: s * 0.8),
        "w4@mse/pow2": by_hand(lambda s: 2.0 ** s.log2().round()),
        "w4@mse/floor": by_hand(lambda s: s, torch.floor),
        "w4@mse/full": by_hand(lambda s: s, low=-8),
    }
    rows = sweep(plugin, batches, predict, mean_logit, [*expected, "w4@mse/unclipped", "w4@mse/stochastic"])
    for name, value in expected.items():
        assert rows[name]["mean"] == pytest.approx(value, rel=1e-4), name
    assert len({row["mean"] for row in rows.values()}) == 6
    again = sweep(plugin, batches, predict, mean_logit, ["w4@mse/stochastic"])
    assert again["w4@mse/stochastic"] == rows["w4@mse/stochastic"]
    other = sweep(plugin, batches, predict, mean_logit, ["w4@mse/stochastic"], seed=1)
    assert other["w4@mse/stochastic"] != rows["w4@mse/stochastic"]


def test_every_codebook_and_modifier_runs_on_inputs_too():
    model, batches = model_and_batches(2)
    plugin = RobustQ(model, {})
    plugin.observe(batches, run, activations=True)
    settings = ["w4a4", *(f"w4a4@{rule}" for rule in ("kmeans", "log2", "aciq_laplace", "percentile"))]
    perturbed = ("asym", "pow2", "x0.9", "floor", "stochastic", "wrap", "unclipped", "weights/x0.9")
    settings += [f"w4a4@mse/{m}" for m in perturbed]
    rows = sweep(plugin, batches, predict, mean_logit, settings)
    assert len({row["mean"] for row in rows.values()}) == len(settings)
    again = sweep(plugin, batches, predict, mean_logit, ["w4a4@mse/stochastic"], limit=1)  # a chunk for each batch
    assert again["w4a4@mse/stochastic"] == rows["w4a4@mse/stochastic"]


def test_inputs_are_what_the_formulas_say():
    """Layers hooked, one setting at a time: the float weights, and inputs by each method's slow definition."""
    import math

    import numpy as np

    from hf_robustq import Grid
    from hf_robustq.calibrate import input_probe
    from hf_robustq.scales import CODEBOOK_RULES

    model, batches = model_and_batches(2)
    plain = copy.deepcopy(model)
    plugin = RobustQ(model, {})
    plugin.observe(batches, run, activations=True)
    samples = {site.name.removesuffix(".weight"): input_probe(site).sample() for site in plugin.sites}
    assert all(float(sample.minimum) >= 0 for sample in samples.values())  # after ReLUs: 0 .. 15

    def step(sample):
        return np.float32(float(mse(sample, Grid(bits=4, signed=False))))

    def wrap(x, sample):
        return np.remainder(np.round(x / step(sample)), 16) * step(sample)

    def asym(x, sample):
        top = min(float(sample.maximum), 15 * float(mse(sample, Grid(bits=4, signed=False))))
        return np.clip(np.round(x / (top / 15)), 0, 15) * (top / 15)

    def log2(x, sample):
        top = round(math.log2(float(sample.maximum)))
        exponent = np.round(np.log2(np.maximum(x, 1e-30)))
        return np.where(exponent < top - 14, 0, 2.0 ** np.minimum(exponent, top))

    def scaled(x, sample):
        return np.clip(np.round(x / (0.8 * step(sample))), 0, 15) * (0.8 * step(sample))

    def floor(x, sample):
        return np.clip(np.floor(x / step(sample)), 0, 15) * step(sample)

    def kmeans(x, sample):
        centres = CODEBOOK_RULES["kmeans"](sample, Grid(bits=4, signed=False)).levels[0].numpy()
        return centres[np.abs(x[..., None] - centres).argmin(-1)]

    def by_hand(formula):
        twin = copy.deepcopy(plain)
        for name, module in twin.named_modules():
            if name in samples:
                hook = lambda _, args, s=samples[name]: (torch.from_numpy(formula(args[0].numpy(), s)).float(),)  # noqa: E731
                module.register_forward_pre_hook(hook)
        with torch.no_grad():
            return mean_logit([predict(twin, batch) for batch in batches])["mean"]

    expected = {"a4@mse/wrap": wrap, "a4@mse/asym": asym, "a4@log2": log2, "a4@mse/x0.8": scaled}
    expected |= {"a4@mse/floor": floor, "a4@kmeans": kmeans}
    rows = sweep(plugin, batches, predict, mean_logit, list(expected))
    for name, formula in expected.items():
        assert rows[name]["mean"] == pytest.approx(by_hand(formula), rel=1e-3), name


def test_folded_and_corrected_settings_are_what_doing_so_by_hand_gives():
    """Batch norms fused by torch, weights overwritten."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    from hf_robustq import Grid

    model, batches = model_and_batches(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 2.0)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
    plain = copy.deepcopy(model)
    plugin = RobustQ(model, {})
    rows = sweep(plugin, batches, predict, mean_logit, ["w4", "w4@mse/fold", "w4@mse/bcv"])
    names = [site.name.removesuffix(".weight") for site in plugin.sites]

    def quantized(w):
        scale = mse(Sample.of(w), Grid(bits=4, narrow=True)).float()
        return (w / scale).round().clamp(-7, 7) * scale

    fused, corrected = copy.deepcopy(plain), copy.deepcopy(plain)
    modules = dict(fused.named_modules())
    with torch.no_grad():
        for name in names:
            parent, _, own = name.rpartition(".")
            norm = f"{parent}.{own.replace('conv', 'bn') if 'conv' in own else int(own) + 1}"
            norm = norm if norm in modules else "timm_model.bn1"  # after the last convolution of the stem
            conv = fuse_conv_bn_eval(modules[name], modules[norm])
            conv.weight.copy_(quantized(conv.weight))
            setattr(modules[parent], own, conv)
            setattr(modules[norm.rpartition(".")[0]], norm.rpartition(".")[2], nn.Identity())
            w = corrected.get_parameter(f"{name}.weight")
            q = quantized(w)
            spread = w.std((1, 2, 3), correction=0, keepdim=True) / q.std((1, 2, 3), correction=0, keepdim=True)
            w.copy_((q - q.mean((1, 2, 3), keepdim=True)) * spread + w.mean((1, 2, 3), keepdim=True))
        for setting, twin in (("w4@mse/fold", fused), ("w4@mse/bcv", corrected)):
            expected = mean_logit([predict(twin, batch) for batch in batches])["mean"]
            assert rows[setting]["mean"] == pytest.approx(expected, rel=1e-3) != rows["w4"]["mean"]


def test_a_reshaped_weight_read_without_its_quantizer_is_warned_of(caplog):
    model, batches = model_and_batches()
    plugin = RobustQ(model, {"weights": {"method": "dorefa", "bits": 4}})
    plugin.calibrate(batches, run)
    sweep(plugin, batches, predict, mean_logit, ["trained", "w3@learned"])
    assert not caplog.records
    sweep(plugin, batches, predict, mean_logit, ["fp", "trained", "w3"])
    assert "fp, w3: the network was trained on weights that its quantizers reshape" in caplog.text


def test_learned_needs_learned_steps():
    model, batches = model_and_batches()
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}})
    plugin.calibrate(batches, run)
    with pytest.raises(ValueError, match="w4a4@learned: the model has no input quantizers"):
        sweep(plugin, batches, predict, mean_logit, ["w4a4@learned"])
    with pytest.raises(ValueError, match="drop /channel"):
        Setting.parse("w4@learned/channel")


def test_each_row_is_what_a_model_quantized_by_hand_gives():
    """Weights overwritten and inputs hooked with the plain formula, one configuration at a time."""
    model, batches = model_and_batches()
    plain = copy.deepcopy(model)
    plugin = RobustQ(model, {"regularizers": {"kure": {}}})
    plugin.observe(batches, run)
    got = sweep(plugin, batches, predict, mean_logit, ["fp", "w4", "w3@absmax", "w3@mse/channel", "w4a4"])

    names = {site.name.removesuffix(".weight"): site for site in plugin.sites}

    def by_hand(bits=None, rule=mse, axis=None, activation_bits=None):
        twin = copy.deepcopy(plain)
        handles = []
        for name, module in twin.named_modules():
            if name not in names:
                continue
            if bits:
                w, high = module.weight.data, 2 ** (bits - 1) - 1
                scale = rule(Sample.of(w, axis), plugin_grid(bits, axis)).float().reshape(-1, 1, 1, 1)
                module.weight.data = (w / scale).round().clamp(-high, high) * scale
            if activation_bits:
                sample = names[name].activation_stages.get_submodule("probe").sample()
                signed = float(sample.minimum) < 0
                low, high = (
                    (-(2 ** (activation_bits - 1)), 2 ** (activation_bits - 1) - 1)
                    if signed
                    else (0, 2**activation_bits - 1)
                )
                from hf_robustq import Grid

                step = float(mse(sample, Grid(bits=activation_bits, signed=signed)))

                def hook(_, args, step=step, low=low, high=high):
                    return ((args[0] / step).round().clamp(low, high) * step,)

                handles.append(module.register_forward_pre_hook(hook))
        with torch.no_grad():
            return mean_logit([predict(twin, batch) for batch in batches])["mean"]

    def plugin_grid(bits, axis):
        from hf_robustq import Grid

        return Grid(bits=bits, narrow=True, axis=axis)

    assert got["fp"]["mean"] == by_hand()
    assert got["w4"]["mean"] == by_hand(4)
    assert got["w3@absmax"]["mean"] == by_hand(3, absmax)
    assert got["w3@mse/channel"]["mean"] == by_hand(3, mse, 0)
    assert got["w4a4"]["mean"] == pytest.approx(by_hand(4, activation_bits=4), rel=1e-5)
    assert len({values["mean"] for values in got.values()}) == 5


def test_data_is_read_once_and_in_chunks():
    model, batches = model_and_batches(6)
    plugin = RobustQ(model, {})
    read = []

    def once():
        for i, batch in enumerate(batches):
            read.append(i)
            yield batch

    whole = sweep(plugin, once(), predict, mean_logit, ["fp", "w4", "w2"])
    assert read == list(range(6)) and whole["w4"]["rows"] == 30
    size = sum(t.nbytes for t in batches[0].values())
    assert [len(chunk) for chunk in chunked(batches, 2 * size)] == [2, 2, 2]
    assert sweep(plugin, batches, predict, mean_logit, ["fp", "w4", "w2"], limit=2 * size) == whole


def test_a_weight_is_quantized_once_for_each_setting(monkeypatch):
    from hf_robustq.quantizers import probe

    model, batches = model_and_batches(5)
    plugin = RobustQ(model, {})
    calls = []
    original = probe.fake_quantize
    monkeypatch.setattr(probe, "fake_quantize", lambda *args, **options: calls.append(1) or original(*args, **options))
    sweep(plugin, batches, predict, mean_logit, ["fp", "w4", "w2"])
    assert len(calls) == 2 * len(plugin.sites)


def test_the_model_is_restored_to_the_bit():
    model, batches = model_and_batches()
    model.train()
    plugin = RobustQ(model, {"weights": {"bits": 4}, "activations": {"bits": 4}})
    plugin.calibrate(batches, run)
    state = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    model.eval()
    before = predict(model, batches[0])
    model.train()
    sweep(plugin, batches, predict, mean_logit, ["fp", "w2", "trained", "w4a4"])
    assert model.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    model.eval()
    assert torch.equal(predict(model, batches[0]), before)


def test_a_failing_prediction_leaves_the_model_in_float():
    model, batches = model_and_batches(1)
    plugin = RobustQ(model, {})
    before = predict(model, batches[0])

    def fail(model, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(plugin, batches, fail, mean_logit, ["w2"])
    assert torch.equal(predict(model, batches[0]), before)


def test_trained_row_uses_the_models_own_quantizers():
    model, batches = model_and_batches()
    plugin = RobustQ(model, {"weights": {"bits": 3}})
    plugin.calibrate(batches, run)
    got = sweep(plugin, batches, predict, mean_logit, ["trained", "w3", "fp"])
    assert got["trained"] == got["w3"] != got["fp"]


def test_trained_row_before_calibration_is_an_error():
    model, batches = model_and_batches(1)
    with pytest.raises(RuntimeError, match="call plugin.calibrate"):
        sweep(RobustQ(model, {"weights": {"bits": 3}}), batches, predict, mean_logit, ["trained"])


def test_first_last_8_keeps_the_edges_at_8_bits():
    class Record(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return torch.tensor([[len(m.weight.unique()) for m in (self.a, self.b, self.c)]])

    model = Record()
    plugin = RobustQ(model, {"first_last": 8})
    (levels,) = sweep(plugin, [torch.ones(1, 64)], lambda m, x: m(x), lambda o: {"n": o[0]}, ["w2"]).values()
    first, middle, last = levels["n"][0].tolist()
    assert middle == 3 and 100 < first <= 255 and 100 < last <= 255


def test_empty_sets_and_repeated_settings_are_refused():
    model, batches = model_and_batches(1)
    plugin = RobustQ(model, {})
    with pytest.raises(ValueError, match="evaluation set is empty"):
        sweep(plugin, [], predict, mean_logit, ["fp"])
    with pytest.raises(ValueError, match="listed twice"):
        sweep(plugin, batches, predict, mean_logit, ["w4", "w4"])
    with pytest.raises(ValueError, match="observe"):
        sweep(plugin, batches, predict, mean_logit, ["w4a4"])


def rows(**accuracies):
    parsed = {name: Setting.parse(name) for name in accuracies}
    return [
        Row(setting=n, weights=s.weights, activations=s.activations, metrics={"accuracy": accuracies[n]}, samples=1)
        for n, s in parsed.items()
    ]


def test_curves_are_by_what_the_settings_say_besides_the_weights_bits():
    """A star (`trained`), the float row and a point alone are on none."""
    measured = {"fp": 0.9, "w4": 0.7, "w8": 0.8, "w4a4@learned": 0.5, "w3a4@learned": 0.4, "w4@mse/channel": 0.6}
    trained = Row(setting="trained", weights=4, activations=4, metrics={"accuracy": 0.55}, samples=1)
    found = curves([*rows(**measured), trained], "accuracy")
    assert found == {"": [(4, 0.7), (8, 0.8)], "a4@learned": [(3, 0.4), (4, 0.5)]}
    assert robustness([*rows(**measured), trained], "accuracy") == robustness(rows(w4=0.7, w8=0.8), "accuracy")


def test_robustness_is_the_mean_height_of_the_curve():
    assert robustness(rows(w8=0.9, w2=0.9, fp=0.1, w4a4=0.0), "accuracy") == pytest.approx(0.9)
    curve = rows(w8=1.0, w4=0.8, w2=0.0)
    assert robustness(curve, "accuracy") == pytest.approx(((0 + 0.8) / 2 * 2 + (0.8 + 1.0) / 2 * 4) / 6)
    assert robustness(rows(fp=0.9, w4=0.8), "accuracy") is None
    other_rule = {"w4@absmax": 0.0}
    assert robustness(rows(w8=0.9, w4=0.9, **other_rule), "accuracy") == pytest.approx(0.9)


def test_sweeps_are_saved_and_loaded(tmp_path):
    sweeps = [Sweep(rows=rows(fp=0.9, w4=0.8), epoch=1.0, step=10, context={"seed": 3})]
    path = tmp_path / "deep" / "sweep.json"
    save_sweeps(sweeps, path)
    assert load_sweeps(path) == sweeps and sweeps[0].value("w4") == 0.8
    assert not list(path.parent.glob("*.tmp")) and json.loads(path.read_text())["version"] == 1
