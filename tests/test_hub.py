import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification, Trainer

from hf_robustq import RobustQ, RobustQCallback, RobustTrainer, from_pretrained
from hf_robustq.quantizers import Fixed
from hf_robustq.sites import staged_class
from hf_robustq.sweep import Setting, Steps, quantized
from tests.test_trainer import arguments, text
from tests.zoo import bert, gpt2, images, run, tokens

CONFIG = {"regularizers": {"kure": {}}, "weights": {"bits": 4}, "activations": {"bits": 8}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A calibrated BERT with 4-bit weights and 8-bit inputs."""
    torch.manual_seed(0)
    model = bert()
    RobustQ(model, CONFIG).calibrate([tokens(labels=3)], run)
    path = tmp_path_factory.mktemp("bert")
    model.save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(path, **options):
    return from_pretrained(AutoModelForSequenceClassification, path, **options)


@torch.no_grad()
def logits(model):
    return run(model.eval(), tokens(labels=3)).logits


def test_transformers_restores_the_quantizers_and_a_model_that_is_not_quantized_to_it(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    plugin, stored = RobustQ.of(model), load_file(folder / "model.safetensors")
    assert plugin.calibrated and plugin.config.to_dict()["weights"]["bits"] == 4
    state = model.state_dict()
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    assert not model.is_quantized and not hasattr(model, "hf_quantizer")
    model.half()
    scales = [stage.scale for stage in model.modules() if isinstance(stage, Fixed)]
    assert scales and all(scale.dtype == torch.float32 for scale in scales)


def test_another_class_of_model_takes_the_stages_it_has_weights_for(folder):
    whole, backbone = AutoModelForSequenceClassification.from_pretrained(folder), AutoModel.from_pretrained(folder)
    sites = {f"bert.{site.name}" for site in RobustQ.of(backbone).sites}
    assert sites == {site.name for site in RobustQ.of(whole).sites}
    batch = tokens()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(backbone.eval()(**inputs)[0], whole.bert.eval()(**inputs)[0])


def test_loading_in_bfloat16_keeps_the_steps_in_float32(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert state["bert.encoder.layer.0.output.dense.weight"].dtype == torch.bfloat16
    for name, value in stored.items():
        assert "_stages." not in name or (state[name].dtype == value.dtype and torch.equal(state[name], value)), name


@pytest.mark.parametrize("setting", ["w8", "w6", "w4", "w3", "w8a8", "w4a4", "w3@absmax", "w4@mse/channel", "fp"])
@pytest.mark.parametrize("trainable", [False, True])
def test_every_setting_is_the_sweeps_to_the_bit(folder, setting, trainable):
    trained = AutoModelForSequenceClassification.from_pretrained(folder)
    plugin, parsed = RobustQ.of(trained), Setting.parse(setting)
    with quantized(plugin, parsed, Steps(plugin)):
        expected = logits(trained)
    options = {"scale": parsed.scale, "per_channel": parsed.per_channel, "trainable": trainable}
    model = load(folder, bits=parsed.weights, activation_bits=parsed.activations, **options)
    assert torch.equal(logits(model), expected)
    assert setting == "fp" or not torch.equal(logits(load(folder, bits=None)), expected)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("activation_bits", [None, 3])
def test_learned_steps_at_other_bits_are_the_sweeps_to_the_bit(tmp_path, trainable, activation_bits):
    model, batch = bert(), tokens(labels=3)
    plugin = RobustQ(model, {"weights": {"bits": 4, "method": "lsq"}, "activations": {"bits": 8, "method": "lsq"}})
    plugin.calibrate([batch], run)
    model.save_pretrained(tmp_path)
    options = {"bits": 3, "activation_bits": activation_bits, "scale": "learned", "trainable": trainable}
    if trainable and activation_bits is None:
        with pytest.raises(ValueError, match="pass activation_bits too"):
            load(tmp_path, **options)
        return
    setting = Setting.parse("w3@learned" if activation_bits is None else "w3a3@learned")
    model.eval()
    with quantized(plugin, setting, Steps(plugin)):
        expected = logits(model)
    loaded = load(tmp_path, **options)
    assert torch.equal(logits(loaded), expected)
    if activation_bits:
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again", trainable=True)), expected)


def test_trained_is_the_default(folder):
    assert torch.equal(logits(load(folder)), logits(AutoModelForSequenceClassification.from_pretrained(folder)))


def test_a_weight_only_model_is_plain_and_its_weights_lie_on_the_grid(folder, tmp_path):
    model = load(folder, bits=3)
    assert not any(hasattr(type(module), "_unstaged") for module in model.modules())
    assert model.bert.encoder.layer[0].output.dense.weight.unique().numel() <= 7
    model.save_pretrained(tmp_path / "baked")
    assert "quantization_config" not in json.loads((tmp_path / "baked" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "baked")), logits(model))


def test_baked_weights_with_activation_quantizers_save_and_load_again(folder, tmp_path):
    model = load(folder, bits=3, activation_bits=4)
    assert isinstance(model.bert.encoder.layer[0].output.dense, nn.Linear)
    model.save_pretrained(tmp_path / "baked")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "baked")
    assert torch.equal(logits(again), logits(model)) and RobustQ.of(again).config.weights is None


def test_any_float_folder_takes_bits(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "plain")
    loaded = from_pretrained(type(model), tmp_path / "plain", bits=4)
    assert loaded.transformer.h[0].mlp.c_fc.weight.unique().numel() <= 15
    with pytest.raises(ValueError, match="no quantizers and no statistics of activations: pass bits= alone"):
        from_pretrained(type(model), tmp_path / "plain", bits=4, activation_bits=8)
    with pytest.raises(ValueError, match="no quantizers"):
        from_pretrained(type(model), tmp_path / "plain")


@pytest.mark.parametrize("stock", [True, False])
def test_a_loaded_model_trains_on(folder, tmp_path, stock):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"model": model, "args": arguments(tmp_path, max_steps=2), "train_dataset": text()}
    if stock:
        trainer = Trainer(**options, callbacks=[RobustQCallback(RobustQ.of(model))])
    else:
        trainer = RobustTrainer(**options, sweep=())
    trainer.train()
    after = model.state_dict()
    assert not torch.equal(after["bert.encoder.layer.0.output.dense.weight"],
                           before["bert.encoder.layer.0.output.dense.weight"])  # fmt: skip
    steps = [name for name in before if name.endswith("scale")]
    assert steps and all(torch.equal(after[name], before[name]) for name in steps)  # nothing is calibrated again


def test_a_requantized_model_trains_on(folder, tmp_path):
    model = load(folder, bits=2, activation_bits=4, trainable=True)
    config = RobustQ.of(model).config
    assert (config.weights.bits, config.activations.bits) == (2, 4)
    RobustTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=text(), sweep=()).train()


def test_a_checkpoint_of_another_config_is_not_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    args = arguments(tmp_path, **options)
    RobustTrainer(model=bert(), args=args, train_dataset=text(), robustq=CONFIG, sweep=()).train()
    other = {**CONFIG, "weights": {"bits": 6}, "seed": 1}
    trainer = RobustTrainer(model=bert(), args=args, train_dataset=text(), robustq=other, sweep=())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    message = r"checkpoint-1 is of another config: seed is 0 there and 1 here; weights\.bits is 4 there and 6 here"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="is no folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nothing"))
    bert().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no trainer_state\.json, .* or load it as the model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain"))
    for file in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copy(tmp_path / "checkpoint-1" / file, tmp_path / "plain")
    with pytest.raises(ValueError, match="was written without RobustQ"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain"))


def change_config(path, **values):
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= values
    file.write_text(json.dumps(config))


def change_tensor(path, name, function):
    file = path / "model.safetensors"
    state = load_file(file)
    state[name] = function(state[name])
    save_file(state, file, {"format": "pt"})


QUANTIZER = "bert.encoder.layer.0.output.dense.weight_stages.quantizer"
PROBE = "bert.encoder.layer.0.output.dense.activation_stages.probe"
BAD = {
    "no config": (lambda p: (p / "config.json").unlink(), "is no checkpoint: it has no config.json"),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), "is damaged, or no JSON"),
    "no mapping": (lambda p: (p / "config.json").write_text("[]"), "is no mapping"),
    "config is a list": (
        lambda p: (p / "config.json").write_text('{"model_type": "bert", "quantization_config": [1]}'),
        "quantization_config is no mapping",
    ),
    "huge bits": (lambda p: change_config(p, weights={"bits": 10**9}), "bits must be a whole number from 2 to 16"),
    "unknown method": (lambda p: change_config(p, weights={"bits": 4, "method": "os.system"}), "unknown quantizer"),
    "path as method": (lambda p: change_config(p, weights={"bits": 4, "method": "../../x"}), "unknown quantizer"),
    "path as pattern": (lambda p: change_config(p, include=["../../etc/*"]), "matches no weight"),
    "unknown key": (lambda p: change_config(p, state_file="../../x"), "unknown config key 'state_file'"),
    "wrong type": (lambda p: change_config(p, calibration_samples="many"), "must be a whole number"),
    "nested type": (lambda p: change_config(p, regularizers=5), "quantization_config"),
    "infinite": (lambda p: change_config(p, regularizers=[{"method": "kure", "strength": 1e999}]), "strength must be"),
    "cut short": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-100]),
        "is cut short or damaged",
    ),
    "no stages": (
        lambda p: save_file({k: v for k, v in load_file(p / "model.safetensors").items() if "_stages." not in k},
                            p / "model.safetensors", {"format": "pt"}),
        "quantizer tensors are missing",
    ),
    "negative step": (lambda p: change_tensor(p, f"{QUANTIZER}.scale", lambda t: -t), "step is not a positive number"),
    "step is NaN": (lambda p: change_tensor(p, f"{QUANTIZER}.scale", lambda t: t * float("nan")), "not a positive"),
    "other bits": (lambda p: change_config(p, weights={"bits": 6}), "are not those of 6 bits"),
    "no histogram": (lambda p: change_tensor(p, f"{PROBE}.counts", lambda t: t - 1), "no histogram"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_one_clear_line_and_nothing_is_written(copied, case):
    damage, message = BAD[case]
    damage(copied)
    files = {path: path.stat().st_mtime_ns for path in copied.iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        load(copied, bits=4)
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in copied.iterdir()} == files


def test_pickled_weights_are_refused(copied):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError), match="safetensors"):
        load(copied)
    with pytest.raises(ValueError, match="only safetensors are read"):
        AutoModelForSequenceClassification.from_pretrained(copied)


def test_options_that_do_not_go_together(folder):
    with pytest.raises(ValueError, match='activation_bits needs bits: "trained" restores both'):
        load(folder, activation_bits=8)
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 16, got 1"):
        load(folder, bits=1)
    with pytest.raises(ValueError, match="unknown scale rule 'mse2': did you mean 'mse'"):
        load(folder, bits=4, scale="mse2")


def test_statistics_that_were_never_taken_are_missed(tmp_path):
    model = bert()
    RobustQ(model, {"regularizers": {"kure": {}}})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing is known of the input of"):
        load(tmp_path, bits=4, activation_bits=8)
    assert load(tmp_path, bits=4) is not None


def test_a_head_for_other_labels_begins_anew(tmp_path, caplog):
    """Fine-tuning on other labels: the new head has no trained quantizer, everything else keeps its own."""
    model = bert()
    config = {"weights": {"bits": 4, "per_channel": True}, "first_last": 8}
    RobustQ(model, config).calibrate([tokens(labels=3)], run)
    model.save_pretrained(tmp_path)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    plugin, stored = RobustQ.of(loaded), load_file(tmp_path / "model.safetensors")
    assert not plugin.calibrated
    assert (
        "the folder has no such weights; their quantizers are not calibrated yet: classifier.weight" in caplog.messages
    )
    for site in plugin.sites:
        quantizer = site.weight_stages.get_submodule("quantizer")
        new = site.name == "classifier.weight"
        assert bool(quantizer.initialized) != new
        assert new or torch.equal(quantizer.scale, stored[f"{site.name}_stages.quantizer.scale"])
    with torch.no_grad():  # as if trained, to steps that no rule would find
        for site in plugin.sites:
            site.weight_stages.get_submodule("quantizer").scale.mul_(1.5)
    plugin.calibrate([tokens(labels=3)], run)
    assert plugin.calibrated and loaded.classifier.weight.shape == (7, 32)
    for site in plugin.sites:  # what had steps keeps them
        quantizer = site.weight_stages.get_submodule("quantizer")
        kept = site.name != "classifier.weight" and torch.equal(
            quantizer.scale, 1.5 * stored[f"{site.name}_stages.quantizer.scale"]
        )
        assert kept or site.name == "classifier.weight", site.name


def small_vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))


def small_swin():
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(**sizes, image_size=32, patch_size=4, num_labels=10))


@pytest.mark.parametrize("build", [small_vit, small_swin])
def test_quantizers_come_back_where_transformers_renames_keys(build, tmp_path, caplog):
    """The file has other names than the model: `attention.attention.query` for `attention.q_proj`, say."""
    batch = images()
    model = build()
    RobustQ(model, {**CONFIG, "weights": {"method": "lsq", "bits": 4}}).calibrate([batch], run)
    with torch.no_grad():
        expected = run(model.eval(), batch).logits
    model.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors").keys() <= model.state_dict().keys()
    for loaded in (
        AutoModelForImageClassification.from_pretrained(tmp_path),
        from_pretrained(AutoModelForImageClassification, tmp_path, trainable=True),
        from_pretrained(AutoModelForImageClassification, tmp_path),
    ):
        with torch.no_grad():
            assert torch.equal(run(loaded.eval(), batch).logits, expected)
    state = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    plugin = RobustQ.of(model)
    for bits, inputs in ((4, 8), (3, None)):
        loaded = from_pretrained(AutoModelForImageClassification, tmp_path, bits=bits, activation_bits=inputs)
        setting = Setting(weights=bits, activations=inputs)
        with quantized(plugin, setting, Steps(plugin)), torch.no_grad():
            assert torch.equal(run(loaded.eval(), batch).logits, run(model.eval(), batch).logits)
    assert "the folder has no such weights" not in caplog.text


def test_what_is_missing_is_named_as_the_model_names_it(tmp_path):
    model = small_vit()
    RobustQ(model, CONFIG).calibrate([images()], run)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("vit.encoder.layer.1.attention.attention.key.weight_stages.quantizer.scale")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"1 quantizer tensors are missing in .*, vit\.layers\.1\.attention\.k_proj\.weight_stages"
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_missing_weight_whose_stages_are_there_is_no_new_head(copied):
    tensors = load_file(copied / "model.safetensors")
    del tensors["bert.encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing in .*, bert\.encoder\.layer\.0\.attention\.self\.query\.weight among"
    ):
        load(copied)


def test_stages_of_other_weights_are_no_substitute_for_missing_ones(copied):
    """As many tensors as expected, of another layer."""
    tensors = load_file(copied / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight_stages.quantizer.scale"
    tensors["some.other.weight_stages.quantizer.scale"] = tensors.pop(name)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 quantizer tensors are missing in .*, {name} among them"):
        load(copied)


def test_a_folder_saved_before_calibration_is_calibrated_before_it_trains(tmp_path):
    model = bert()
    RobustQ(model, {"regularizers": {"kure": {}}})
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, bits=4, trainable=True)
    assert not RobustQ.of(loaded).calibrated
    with pytest.raises(RuntimeError, match="call plugin.calibrate"):
        RobustQ.of(loaded).step(0.0)


def test_a_model_built_from_the_same_config_object_is_saved_as_a_float_one(tmp_path):
    model, batch = bert(), tokens(labels=3)
    twin = type(model)(model.config)
    RobustQ(model, CONFIG).calibrate([batch], run)
    assert model.config is model.bert.config
    twin.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(twin))


def test_ordinary_arguments_of_transformers_go_through(copied, tmp_path):
    shutil.copytree(copied, tmp_path / "parent" / "sub")
    model = load(tmp_path / "parent", subfolder="sub", use_safetensors=True, bits=4)
    assert torch.equal(logits(model), logits(load(copied, bits=4)))
    with pytest.raises(ValueError, match="output_loading_info is not supported"):
        load(copied, output_loading_info=True)


def test_every_checkpoint_has_the_statistics_of_its_own_weights(tmp_path):
    """Against the statistics of the checkpoint's own weights, observed anew on the same samples."""
    data = text()
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.5)
    trainer = RobustTrainer(model=bert(), args=args, train_dataset=data, robustq={"weights": {"bits": 8}}, sweep=())
    trainer.train()
    seen = []
    for step in (2, 4):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        plugin = RobustQ.of(loaded)
        names = [name for name in loaded.state_dict() if name.endswith("activation_stages.probe.range")]
        stored = {name: loaded.get_buffer(name).clone() for name in names}
        again = RobustTrainer(model=loaded, args=args, train_dataset=data, sweep=())
        again.observe()
        assert RobustQ.of(loaded) is plugin and names
        assert all(torch.equal(stored[name], loaded.get_buffer(name)) for name in names)
        seen.append(stored)
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


def test_models_that_something_else_distributes_or_quantizes_are_refused():
    model = bert()
    model.config.distributed_config = {"tp_size": 2}
    with pytest.raises(ValueError, match="tensor-parallel models cannot be staged: load the model without tp_plan"):
        RobustQ(model, CONFIG)
    model = bert()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="the model is quantized with gptq: load the float model"):
        RobustQ(model, CONFIG)
    hooked = bert()
    linear = hooked.bert.encoder.layer[1].output.dense
    linear.forward = linear.forward
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.weight was replaced"):
        RobustQ(hooked, CONFIG)
    assert not any(hasattr(type(module), "_unstaged") for module in hooked.modules())


def test_the_plugin_of_a_model_is_found_through_wrappers_and_gone_after_detach():
    model = bert()
    with pytest.raises(ValueError, match="this model has no stages"):
        RobustQ.of(model)
    plugin = RobustQ(model, CONFIG)
    assert RobustQ.of(nn.Sequential(model)) is plugin
    assert model.config.quantization_config["weights"]["bits"] == 4
    plugin.detach()
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match="no stages"):
        RobustQ.of(model)


@pytest.mark.parametrize("bits", ["trained", 4, None])
def test_what_needs_a_quantizer_goes_with_it(tmp_path, bits):
    batch = tokens(labels=3)
    config = {"regularizers": {"damping": {}, "kure": {}}, "oscillations": "watch"}
    plugin = RobustQ(bert(), {**config, "weights": {"method": "lsq", "bits": 4}})
    plugin.calibrate([batch], run)
    plugin.model.save_pretrained(tmp_path)
    model = from_pretrained(AutoModelForSequenceClassification, tmp_path, bits=bits, trainable=True)
    left = RobustQ.of(model).config
    assert [one.method for one in left.regularizers] == (["kure"] if bits is None else ["damping", "kure"])
    assert left.oscillations == ("ignore" if bits is None else "watch")
    plugin.enable(bits is not None)
    assert bits == 4 or torch.equal(logits(model), logits(plugin.model))


def test_requantized_takes_the_place_of_the_plugin():
    model = bert()
    plugin = RobustQ(model, CONFIG)
    plugin.calibrate([tokens(labels=3)], run)
    other = plugin.requantized(replace(plugin.config.weights, bits=2), None)
    assert RobustQ.of(model) is other and other.calibrated
    layer = model.bert.encoder.layer[0].output.dense
    assert type(layer) is staged_class(nn.Linear, "weight") and layer.weight.unique().numel() <= 3
