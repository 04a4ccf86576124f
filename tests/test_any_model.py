"""Models of each kind, the whole way: trained with sweeps, saved, restored, resumed, loaded by stock and at 4 bits."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainerCallback,
)

from hf_robustq import RobustQ, RobustQCallback, RobustTrainer, from_pretrained
from tests.architectures import result, small_batch, small_model
from tests.test_trainer import Rows, arguments, same, weights
from tests.zoo import images, run, timm_wrapped

CONFIG = {
    "weights": {"method": "lsq", "bits": 4},
    "activations": {"bits": 8},
    "regularizers": {"kure": {"strength": 1.0}},
    "calibration_samples": 4,
}


def roberta():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=99, num_labels=3, pad_token_id=0, **sizes))


def swin():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(num_labels=3, **sizes))


class Boxes(torch.utils.data.Dataset):
    """Pictures with one box each."""

    def __init__(self, batch):
        self.pixels = batch["pixel_values"]

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        label = {"class_labels": torch.tensor([index % 3]), "boxes": torch.tensor([[0.5, 0.5, 0.2 + 0.1 * index, 0.4]])}
        return {"pixel_values": self.pixels[index], "labels": label}


def collate(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


def doubled(batch):
    return {name: torch.cat([value, value.flip(0)]) for name, value in batch.items()}


def case(name):
    """(model, batch of four without labels, options of the trainer)."""
    torch.manual_seed(0)
    if name == "timm wrapper":
        model, batch = timm_wrapped("test_vit", img_size=32, depth=2), {"pixel_values": images()["pixel_values"][:2]}
    else:
        model = {"RoBERTa": roberta, "Swin": swin}[name]() if name in ("RoBERTa", "Swin") else small_model(name)
        batch = small_batch(model.eval())
    batch = doubled(batch)
    options = {"train_dataset": Rows({**batch, "labels": torch.tensor([0, 1, 1, 0])})}
    if name == "DetrForObjectDetection":
        options = {"train_dataset": Boxes(batch), "data_collator": collate}
    elif name in ("BartForConditionalGeneration", "MixtralForCausalLM"):
        options = {"train_dataset": Rows({**batch, "labels": batch.get("decoder_input_ids", batch["input_ids"])})}
    return model, batch, options


@pytest.mark.filterwarnings("ignore:the input of model.decoder.layers.0.self_attn..+ is zero everywhere")  # DETR's
@pytest.mark.parametrize(
    "name",
    [
        *("ViTForImageClassification", "Swin", "DetrForObjectDetection", "RoBERTa"),
        *("BartForConditionalGeneration", "MixtralForCausalLM", "timm wrapper"),
    ],
)
def test_the_whole_way(tmp_path, name):
    def trainer(folder):
        model, _, options = case(name)
        args = arguments(
            folder,
            max_steps=3,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=3,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            optim="adamw_torch",
            learning_rate=1e-3,
        )
        options["eval_dataset"] = options["train_dataset"]
        return RobustTrainer(model=model, args=args, robustq=CONFIG, sweep=["fp", "w4", "trained"], **options)

    whole = trainer(tmp_path / "whole")
    before = weights(whole.model)
    whole.train()
    assert not same(before, weights(whole.model))
    sweep = json.loads((tmp_path / "whole" / "robustq_sweep.json").read_text())["sweeps"][-1]
    assert [row["setting"] for row in sweep["rows"]] == ["fp", "w4", "trained"]
    assert all(row["staged"] == whole.robustq.products.share for row in sweep["rows"])

    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(resumed.model), weights(whole.model))
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in resumed.model.state_dict().items())

    folder = tmp_path / "saved"
    whole.save_model(str(folder))
    batch, model = case(name)[1], whole.model.eval()
    trained = result(model, batch)
    cls = type(model)
    loaded = cls.from_pretrained(folder).eval()
    assert torch.equal(result(loaded, batch), trained)
    again = RobustTrainer(model=loaded, args=arguments(tmp_path / "again"), sweep=())
    own = dict(whole.robustq.own_parameters())
    assert own and all(torch.equal(own[key], value) for key, value in again.robustq.own_parameters().items())

    whole.robustq.enable(False)
    plain = result(model, batch)
    whole.robustq.enable(True)
    assert not torch.equal(trained, plain)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    stock = cls.from_pretrained(folder, config=config).eval()
    assert not any(hasattr(module, "weight_stages") for module in stock.modules())
    torch.testing.assert_close(result(stock, batch), plain, rtol=1e-5, atol=1e-6)  # products round by where tensors lie
    four = from_pretrained(cls, folder, bits=4, activation_bits=8).eval()
    assert not torch.equal(result(four, batch), plain)

    whole.create_model_card()
    card = (tmp_path / "whole" / "README.md").read_text()
    for one in whole.robustq.products.unstaged:
        assert one.replace("_", "\\_") in card or one in card


class Gated(nn.Module):
    """A recurrent layer, and a matrix that its module holds itself."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.first, self.core, self.last = (
            nn.Linear(6, 6),
            kind(6, 5, 2, bidirectional=True, batch_first=True),
            nn.Linear(5, 3),
        )
        self.mixing = nn.Parameter(torch.randn(5, 10) / 3)

    def forward(self, x):
        return self.last(self.core(self.first(x))[0] @ self.mixing.T)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_quantized_as_by_hand(kind):
    torch.manual_seed(0)
    model, x = Gated(kind).eval(), torch.randn(4, 7, 6)
    plain = model(x)
    plugin = RobustQ(model, {"weights": {"bits": 3}, "first_last": "same"})
    plugin.calibrate([x], lambda model, batch: model(batch))
    names = [name for name, _ in model.named_parameters() if "weight" in name and "stages" not in name]
    assert [site.name for site in plugin.sites] == names and len(names) == 10
    assert [one.name for one in plugin.left_out] == ["mixing"] and "parameters=" in plugin.left_out[0].reason
    assert plugin.products.unstaged == {"mixing": 50}
    quantized = model(x)
    values = {site.name: site.weight_stages(site.parameter).detach() for site in plugin.sites}
    plugin.detach()
    assert torch.equal(model(x), plain)
    for name, value in values.items():
        assert value.unique().numel() <= 8
        model.get_parameter(name).data.copy_(value)
    assert torch.equal(model(x), quantized) and not torch.equal(quantized, plain)


def test_gradients_of_recurrent_weights_are_those_of_the_quantized_ones():
    torch.manual_seed(0)
    model, x = Gated().train(), torch.randn(4, 7, 6)
    plugin = RobustQ(model, {"weights": {"bits": 8}, "first_last": "same"})
    plugin.calibrate([x], lambda model, batch: model(batch))
    model(x).square().sum().backward()
    names = [site.name for site in plugin.sites if site.name.startswith("core.")]
    found = {site.name: site.parameter.grad.clone() for site in plugin.sites}
    values = {site.name: site.weight_stages(site.parameter).detach() for site in plugin.sites}
    inside = {s.name: (s.parameter.abs() < s.weight_stages.quantizer.scale * 127).detach() for s in plugin.sites}
    plugin.detach()
    for name, value in values.items():
        model.get_parameter(name).data.copy_(value)
    model.zero_grad()
    model(x).square().sum().backward()
    for name in names:
        torch.testing.assert_close(found[name], model.get_parameter(name).grad * inside[name])


def test_a_matrix_of_a_module_is_staged_where_it_is_asked_for():
    model, x = Gated().eval(), torch.randn(4, 7, 6)
    plugin = RobustQ(model, {"weights": {"bits": 3}, "first_last": "same", "parameters": ["mixing"]})
    plugin.calibrate([x], lambda model, batch: model(batch))
    assert plugin.products.share == 1 and not plugin.left_out
    assert model.mixing.unique().numel() <= 8
    with pytest.raises(ValueError, match="parameters: pattern 'nothing' matches no weight"):
        RobustQ(Gated(), {"weights": {"bits": 3}, "parameters": ["nothing"]})


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_each_expert_has_steps_of_its_own(name, per_channel):
    model = small_model(name)
    batch = small_batch(model)
    plugin = RobustQ(model, {"weights": {"bits": 4, "per_channel": per_channel}})
    plugin.calibrate([batch], run)
    sites = {site.name: site for site in plugin.sites if site.stacked}
    assert len(sites) == 4
    for site in sites.values():
        quantizer, weight = site.weight_stages.quantizer, site.parameter.detach()
        out = site.shape[1 if name.startswith("Mixtral") else 2]
        assert quantizer.scale.numel() == 4 * (out if per_channel else 1)
        value, steps = site.weight_stages(weight).detach(), quantizer.scale.view(4, -1)
        for expert in range(4):  # as a linear layer of its own would be
            rows = weight[expert] if name.startswith("Mixtral") else weight[expert].T
            step = steps[expert][:, None]
            wanted = (rows / step).round().clamp(quantizer.low, quantizer.high) * step
            torch.testing.assert_close(value[expert] if name.startswith("Mixtral") else value[expert].T, wanted)


def test_experts_are_read_once_in_a_forward_and_kure_acts_on_each():
    model = small_model("MixtralForCausalLM").train()
    model.set_experts_implementation("eager")
    batch = small_batch(model)
    plugin = RobustQ(model, {"regularizers": {"kure": {"strength": 3.0}}})
    plugin.calibrate([batch], run)
    sites = [site for site in plugin.sites if site.stacked]
    assert all(float(site.weight_stages.probe.uses) == 1 for site in sites)

    def gradients(first):
        model.zero_grad()
        plugin.step(0.0, first=first)
        torch.manual_seed(0)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {site.name: site.parameter.grad.clone() for site in sites}

    with_penalty, without = gradients(True), gradients(False)
    for site in sites:
        w = site.parameter.detach().clone().requires_grad_()
        d = w - w.mean((1, 2), keepdim=True)
        kurtosis = (d**4).mean((1, 2)) / (d**2).mean((1, 2)) ** 2
        (3.0 / len(plugin.regularized) * ((kurtosis - 1.8) ** 2).mean()).backward()
        torch.testing.assert_close(with_penalty[site.name] - without[site.name], w.grad, rtol=1e-4, atol=1e-7)
    assert plugin.metrics()["kure"] == pytest.approx(plugin_penalty(plugin), rel=1e-5)


def plugin_penalty(plugin):
    values = []
    for site in plugin.regularized:
        stack = site.parameter.detach() if site.stacked else site.parameter.detach()[None]
        d = stack - stack.flatten(1).mean(1).view([-1] + [1] * (stack.dim() - 1))
        d = d.flatten(1)
        values.append(((((d**4).mean(1) / (d**2).mean(1) ** 2) - 1.8) ** 2).mean())
    return float(torch.stack(values).mean())


def test_routers_stay_float_unless_asked_for():
    model = small_model("MixtralForCausalLM")
    plugin = RobustQ(model, {"weights": {"bits": 4}})
    routers = [name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert [one.name for one in plugin.left_out if "router" in one.reason] == routers and len(routers) == 2
    plugin.detach()
    sites = RobustQ(model, {"weights": {"bits": 4}, "routers": True}).sites
    assert set(routers) <= {site.name for site in sites}


def test_what_stays_float_is_said_at_every_place(caplog):
    model = small_model("RecurrentGemmaForCausalLM")
    plugin = RobustQ(model, {"weights": {"bits": 4}, "exclude": ["*gate_weight"]})
    plugin.calibrate([small_batch(model)], run)
    products = plugin.products
    excluded = [name for name in products.unstaged if name.endswith("gate_weight")]
    assert len(excluded) == 4 and products.share < 0.9
    assert f"{products.share:.0%} of the elements" in caplog.text and "print(plugin)" in caplog.text
    assert all(f"left out: {name}: in exclude" in repr(plugin) for name in excluded)
    size = plugin.size()
    assert f"4.00 of {products.share:.0%}" in str(size)
    assert all(f"| {name} |" in str(size) for name in products.unstaged)
    total = sum(p.numel() for n, p in model.named_parameters() if n in products.unstaged or n.endswith("proj.weight"))
    assert products.staged + sum(products.unstaged.values()) >= total
    assert type(size).from_dict(json.loads(json.dumps(size.to_dict()))) == size


def test_layers_that_are_never_used_are_named_at_once_as_a_line_of_the_config():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.unused = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])
            self.bare = nn.Linear(4, 4)

        def forward(self, x):
            return self.last(nn.functional.linear(self.first(x), self.bare.weight))

    config = {"weights": {"bits": 4}, "activations": {"bits": 4}, "first_last": "same"}
    with pytest.raises(ValueError) as error:
        RobustQ(Odd(), config).calibrate([torch.randn(2, 4)], lambda model, batch: model(batch))
    lines = dict(line.split(": ", 1) for line in re.findall(r"(?:exclude|weights_only): \[.*?\]", str(error.value)))
    config |= {name: json.loads(names) for name, names in lines.items()}
    assert len(config["exclude"]) == 5 and config["weights_only"] == ["bare.weight"]
    RobustQ(Odd(), config).calibrate([torch.randn(2, 4)], lambda model, batch: model(batch))


def test_experts_that_nothing_is_routed_to_get_other_advice():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x):
            return self.last(self.experts[1](self.first(x)))

    forward, batch = (lambda model, batch: model(batch)), torch.randn(2, 4)
    with pytest.raises(ValueError, match="no calibration sample reaches these layers: raise calibration_samples"):
        RobustQ(Mixture(), {"weights": {"bits": 4}, "activations": {"bits": 4}}).calibrate([batch], forward)
    model = Mixture()
    plugin = RobustQ(model, {"weights": {"bits": 4}})
    plugin.calibrate([batch], forward)
    assert plugin.calibrated and model.experts[0].weight.unique().numel() <= 16


def test_a_dispatch_mode_sees_eager_kernels(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setenv("HF_ROBUSTQ_FUSED", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
    x, config = torch.randn(128, 256), {"weights": {"method": "lsq", "bits": 4}, "activations": {"bits": 8}}
    config |= {"regularizers": {"kure": {}}, "first_last": "same", "satnl": {}}
    plugin = RobustQ(model, config)
    plugin.calibrate([x], lambda model, batch: model(batch))
    plugin.step(0.0, first=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert counter.get_total_flops() == 2 * 128 * 2 * 256 * 512 * 2 + 2 * 128 * 256 * 512


def vit_trainer(folder, cls=RobustTrainer, model=None, **options):
    own, _, data = case("ViTForImageClassification")
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=1, per_device_train_batch_size=2, **options)
    return cls(model=own if model is None else model, args=args, eval_dataset=data["train_dataset"], **data)


class WorseAndWorse(TrainerCallback):
    """The first evaluation is the best; keeps the weights of that moment."""

    def __init__(self, model):
        self.model, self.state = model, None

    def on_evaluate(self, args, state, control, **kwargs):
        kwargs["metrics"]["eval_loss"] = float(state.global_step)
        if state.global_step == 1:
            self.state = {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.mark.parametrize("stock", [False, True])
def test_the_best_model_is_loaded_where_its_weights_have_other_names_in_the_file(tmp_path, stock):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    options = {"eval_strategy": "steps", "eval_steps": 1, **best}
    if stock:
        model, batch, _ = case("ViTForImageClassification")
        plugin = RobustQ(model, CONFIG)
        plugin.calibrate([batch], run)
        trainer = vit_trainer(tmp_path, Trainer, model, **options)
        trainer.add_callback(RobustQCallback(plugin))
    else:
        trainer = vit_trainer(tmp_path, lambda **own: RobustTrainer(robustq=CONFIG, sweep=(), **own), **options)
    watch = WorseAndWorse(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.global_step == 4
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, watch.state[name])}
    assert not {name for name in moved if "probe" not in name}


def test_a_stock_trainer_that_would_resume_without_the_weights_is_refused(tmp_path):
    def trainer():
        model, batch, _ = case("ViTForImageClassification")
        plugin = RobustQ(model, CONFIG)
        plugin.calibrate([batch], run)
        found = vit_trainer(tmp_path, Trainer, model)
        found.add_callback(RobustQCallback(plugin))
        return found

    trainer().train()
    with pytest.raises(ValueError, match="does not find the weights of this architecture in a checkpoint"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    trainer = vit_trainer(tmp_path, lambda **own: RobustTrainer(robustq=CONFIG, sweep=(), **own))
    trainer.train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    state = load_file(file)
    del state["vit.layernorm.weight"]
    save_file(state, file, {"format": "pt"})
    again = vit_trainer(tmp_path, lambda **own: RobustTrainer(robustq=CONFIG, sweep=(), **own))
    with pytest.raises(ValueError, match=r"1 weights of the model are missing, vit\.layernorm\.weight among them"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_weights_that_are_standardised_are_named_and_counted(caplog):
    model = timm_wrapped("test_nfnet")
    plugin = RobustQ(model, {"weights": {"bits": 4}})
    plugin.calibrate([images()], run)
    convolutions = [
        name for name, module in model.named_modules() if type(module).__name__.startswith("ScaledStdConv2d")
    ]
    names = [f"{name}.weight" for name in convolutions]
    assert names and set(names) <= plugin.products.unstaged.keys() and plugin.products.share < 0.9
    assert "staged; in float" in caplog.text
    assert all(f"left out: {name}: it standardises its weight after reading it" in repr(plugin) for name in names)


def test_relative_positions_that_are_multiplied_by_are_named():
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = DebertaV2Config(
        **sizes, intermediate_size=48, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    )
    model = DebertaV2ForSequenceClassification(config).eval()
    plugin = RobustQ(model, {"weights": {"bits": 4}})
    plugin.calibrate([small_batch(model)], run)
    assert "deberta.encoder.rel_embeddings.weight" in plugin.products.unstaged
    assert "rel_embeddings.weight: an embedding that is multiplied by" in repr(plugin)
    assert not any("word_embeddings" in name or "position_embeddings" in name for name in plugin.products.unstaged)


def test_a_linear_layer_of_somebody_elses_own_is_staged():
    class Own(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(shape[0]))

        def forward(self, x):
            return x @ self.weight.T + self.bias

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), Own(7, 6), nn.Linear(7, 3)), torch.randn(5, 6)
    plugin = RobustQ(model, {"weights": {"bits": 3, "per_channel": True}, "activations": {"bits": 8}})
    plugin.calibrate([x], lambda model, batch: model(batch))
    assert [site.name for site in plugin.sites] == ["1.weight"]
    assert [(one.name, one.reason) for one in plugin.float_inputs] == [("1.weight", "its module is no known layer")]
    assert all(row.unique().numel() <= 7 for row in model[1].weight)


def test_a_table_or_norm_that_only_is_called_a_weight_is_refused_with_the_line_that_helps():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(2, 3) + 0.5)

        def forward(self, x):
            return (x.view(-1, 2, 3) * self.weight).flatten(1)

    config, x = {"weights": {"bits": 4}, "first_last": "same"}, torch.randn(5, 6)
    with pytest.raises(ValueError, match=r'reach no matrix product, exclude: \["1\.weight"\]$'):
        RobustQ(nn.Sequential(nn.Linear(6, 6), Heads()), config).calibrate([x], lambda model, batch: model(batch))
    for more in ({"exclude": ["1.weight"]}, {"parameters": ["1.weight"]}):  # or asked for by name
        plugin = RobustQ(nn.Sequential(nn.Linear(6, 6), Heads()), {**config, **more})
        plugin.calibrate([x], lambda model, batch: model(batch))
        assert len(plugin.sites) == 1 + ("parameters" in more)
