"""Adapters of PEFT: the base is quantized, the adapter is trained, saved, merged."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from hf_robustq import RobustQ, RobustQCallback, RobustTrainer, sweep
from hf_robustq.sweep import load_sweeps
from tests.test_trainer import Rows, arguments
from tests.zoo import bert, llama, tokens

peft = pytest.importorskip("peft", reason="pip install peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # read by PEFT 0.21

W4 = {"weights": {"bits": 4}, "calibration_samples": 8}
W4A8 = {**W4, "activations": {"bits": 8}}
LAYERS = ["q_proj", "v_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]
BATCH = tokens(batch=4)


def run(model, batch):
    return model(**batch)


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **options})


def wrap(model, config=None):
    """With an adapter that does something."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, copy.deepcopy(config or lora()))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped.eval()


def both(order, config=W4, adapter=None, build=llama):
    """(wrapped, plugin, its float twin), calibrated; RobustQ first, or the adapter first."""
    torch.manual_seed(0)
    model = build()
    twin = wrap(copy.deepcopy(model), adapter)
    if order == "adapter first":
        wrapped = wrap(model, adapter)
        plugin = RobustQ(wrapped, config)
        plugin.calibrate([BATCH], run)
    else:
        plugin = RobustQ(model, config)
        plugin.calibrate([BATCH], run)
        wrapped = wrap(model, adapter)
    return wrapped, plugin, twin


def parameters(model):
    return dict(model.named_parameters())


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


ORDERS = ["adapter first", "RobustQ first"]
TUNERS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True, lora_bias=False),
    "dora": lora(use_dora=True, lora_dropout=0.2),
    "pissa": lora(init_lora_weights="pissa"),
    "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=4, target_modules=LAYERS),
    "hra": peft.HRAConfig(r=4, target_modules=LAYERS),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=SQUARE),
    "adalora": peft.AdaLoraConfig(total_step=10, target_modules=LAYERS),
    "vera": peft.VeraConfig(r=4, target_modules=SQUARE),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adapter", TUNERS.values(), ids=TUNERS)
def test_adapters_compute_with_the_quantized_weight_and_merge_into_the_stored_one(adapter, order):
    """As a float twin does whose base weights are quantized by hand; and merged, as one that is left alone."""
    wrapped, plugin, twin = both(order, adapter=adapter)
    names = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    by_hand = copy.deepcopy(twin)
    for site in plugin.sites:
        assert torch.equal(site.parameter, twin.get_parameter(names[id(site.parameter)]))
        by_hand.get_parameter(names[id(site.parameter)]).data = site.weight_stages(site.parameter).detach()
    assert torch.equal(logits(wrapped), logits(by_hand))
    merged, expected = wrapped.merge_and_unload(), dict(twin.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert any(not torch.equal(p, by_hand.get_parameter(names[id(p)])) for p in merged.parameters() if id(p) in names)
    assert RobustQ.of(merged) is plugin and plugin.model is merged
    for site in plugin.sites:  # which are read through their stages again
        assert torch.equal(getattr(site.module, site.tensor), site.weight_stages(site.parameter))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_merging_adds_b_times_a_and_unmerging_takes_it_away(order, safe):
    wrapped, plugin, _ = both(order)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    stored = layer.base_layer._parameters["weight"]
    before = stored.detach().clone()
    delta = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach() * layer.scaling["default"]
    assert float(delta.abs().max()) > 0.01
    wrapped.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(stored, before + delta, rtol=0, atol=1e-6)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(stored, before, rtol=0, atol=1e-6)
    plugin.enable(False)
    quantized = logits(wrapped)
    merged = wrapped.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits(merged), quantized, rtol=1e-4, atol=1e-4)


def test_merging_with_satnl_is_refused():
    model = llama()
    RobustQ(model, {"satnl": {}}).calibrate([BATCH], run)
    wrapped = wrap(model)
    with pytest.raises(RuntimeError, match=r"satnl.*plugin.detach\(\)"):
        wrapped.merge_and_unload()
    with pytest.raises(ValueError, match="satnl: adapters leave the weights"):
        RobustQ.of(wrapped)
    with pytest.raises(ValueError, match="satnl: adapters leave the weights"):
        RobustQ(wrap(llama()), {"satnl": {}})


def test_names_are_those_of_the_model_without_adapters_and_adapters_are_left_out_unless_asked():
    plain = RobustQ(llama(), W4)
    wrapped = wrap(llama(), lora(target_modules=[*LAYERS, "embed_tokens"], use_dora=True))
    plugin = RobustQ(wrapped, W4)
    assert [site.name for site in plugin.sites] == [site.name for site in plain.sites]
    text = repr(plugin)
    for part in ("q_proj.lora_A.default.weight", "q_proj.lora_B.default.weight", "lora_embedding_A.default"):
        assert f"{part}: an adapter" in text
    assert "layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight: an adapter" in text
    plugin.calibrate([BATCH], run)
    assert repr(plugin).count("q_proj.lora_A.default.weight: an adapter") == 2  # one in each block
    assert "no known layer" not in repr(plugin)
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in plugin.products.unstaged
    with pytest.raises(ValueError, match=r"'\*lora_A\*' matches weights of adapters only: adapters=True"):
        RobustQ(wrap(llama()), {**W4, "include": ["*lora_A*"]})
    asked = RobustQ(wrap(llama()), {**W4, "adapters": True, "include": ["*lora_A*"]})
    assert len(asked.sites) == 6 and all("lora_A" in site.name for site in asked.sites)


def test_prompts_and_their_encoders_are_adapters_too():
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)
    wrapped = peft.get_peft_model(llama(), config)
    plugin = RobustQ(wrapped, W4)
    plugin.calibrate([BATCH], run)
    assert "left out: prompt_encoder.default.mlp_head.0.weight: an adapter" in repr(plugin)
    assert [site.name for site in plugin.sites] == [site.name for site in RobustQ(llama(), W4).sites]


def test_what_kure_acts_on():
    kure = {"regularizers": {"kure": {"strength": 1.0}}}
    with pytest.raises(ValueError, match="kure: every weight it would act on is frozen, as adapters train instead"):
        RobustQ(wrap(llama()), kure)
    model = llama()
    plugin = RobustQ(model, kure)
    plugin.calibrate([BATCH], run)
    wrapped = wrap(model)
    for use in (lambda: plugin.step(0.0), lambda: RobustQ.of(wrapped)):
        with pytest.raises(ValueError, match="kure: every weight it would act on is frozen, as adapters train instead"):
            use()
    partly = wrap(llama())
    for name, parameter in partly.named_parameters():
        parameter.requires_grad_("lora" in name or "gate_proj" in name)
    text = repr(RobustQ(partly, kure))
    assert "not regularized: model.layers.0.self_attn.q_proj.weight: frozen, as adapters train instead" in text
    assert "not regularized: model.layers.0.mlp.up_proj.weight: frozen, as" in text
    acted = [line.split()[0] for line in text.splitlines() if line.endswith("float") and "kure" in line]
    assert acted == [f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)]


def args(folder, **options):
    defaults = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5}
    return arguments(folder, **{**defaults, **options})


def trainer(model, folder, robustq, **options):
    data = Rows(tokens(batch=16))
    given = {"train_dataset": data, "eval_dataset": data, "sweep": ["trained", "w3", "w4a8"]}
    return RobustTrainer(model=model, args=args(folder, **options), robustq=robustq, **given)


@pytest.mark.parametrize("order", ORDERS)
def test_train_sweep_save_and_load(order, tmp_path):
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    plugin = RobustQ(model, W4A8) if order == "RobustQ first" else None
    wrapped = peft.get_peft_model(model, lora())
    one = trainer(wrapped, tmp_path / "run", plugin or W4A8)
    frozen = {name: p.detach().clone() for name, p in wrapped.named_parameters() if not p.requires_grad}
    one.train()
    assert all(torch.equal(parameters(wrapped)[name], value) for name, value in frozen.items())
    assert one.robustq.model is wrapped and len(load_sweeps(tmp_path / "run" / "robustq_sweep.json")[-1].rows) == 3
    one.save_model(str(tmp_path / "adapter"))
    expected = logits(wrapped.eval())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 12 and not any("stages" in name for name in tensors)
    assert all(float(value.abs().max()) > 0 for value in tensors.values())
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    again = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    other = RobustQ(again, W4A8)
    other.load(tmp_path / "adapter")
    assert other.calibrated and torch.equal(logits(again.eval()), expected)
    with pytest.raises(ValueError, match="is of another config: weights.bits is 4 there and 5 here"):
        RobustQ(peft.get_peft_model(llama(), lora()), {**W4A8, "weights": {"bits": 5}}).load(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has no robustq_stages.safetensors: plugin.save"):
        other.load(tmp_path / "base")


def test_the_whole_way_of_a_quantized_base(tmp_path):
    """Quantize and save the base, train LoRA on it, save the adapter; load both, merge, sweep, save what was merged."""
    torch.manual_seed(0)
    base = llama()
    RobustQ(base, W4).calibrate([BATCH], run)
    base.save_pretrained(tmp_path / "base")
    kind = type(base)
    wrapped = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), lora())
    assert RobustQ.of(wrapped).calibrated
    one = trainer(wrapped, tmp_path / "run", None)
    one.train()
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = logits(wrapped.eval())

    again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)

    def score(plugin):
        found = sweep(plugin, [BATCH], lambda m, b: m(**b).loss, lambda x: {"loss": float(x[0])}, ["fp", "w8"])
        return {name: values["loss"] for name, values in found.items()}

    with_adapter = score(RobustQ.of(again))
    merged = again.merge_and_unload()
    plugin = RobustQ.of(merged)
    after = score(plugin)
    assert after["fp"] == pytest.approx(with_adapter["fp"], rel=1e-5)
    assert after["w8"] == pytest.approx(after["fp"], rel=0.05)
    plugin = plugin.requantized(plugin.config.weights, None)  # steps of the merged weights
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "merged")), logits(merged))
    floats = nn.Module.state_dict(plugin.detach())
    assert not any("lora" in name or "base_layer" in name or "stages" in name for name in floats)
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert floats.keys() <= names


@pytest.mark.parametrize("order", ORDERS)
def test_learned_steps_are_in_the_checkpoint_of_an_adapter(order, tmp_path):
    """Four steps are two and two; steps that PEFT has frozen are named in a warning instead."""
    config = {**W4A8, "weights": {"method": "lsq", "bits": 4}, "activations": {"method": "lsq", "bits": 8}}

    def made():
        torch.manual_seed(0)
        model = llama()
        plugin = RobustQ(model, config) if order == "RobustQ first" else None
        torch.manual_seed(1)
        return peft.get_peft_model(model, lora()), plugin or config

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "learning_rate": 0.05}
    wrapped, plugin = made()
    whole = trainer(wrapped, tmp_path, plugin, **options)
    whole.train()
    after = {name: p.detach().clone() for name, p in whole.robustq.own_parameters().items()}
    again, plugin = made()
    part = trainer(again, tmp_path / "again", plugin, **options)
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, p in part.robustq.own_parameters().items():
        assert torch.equal(p, after[name]), name
    assert all(torch.equal(p, parameters(again)[name]) for name, p in wrapped.named_parameters())
    moved = load_file(tmp_path / "checkpoint-2" / "robustq_stages.safetensors")
    scale = "model.layers.0.mlp.up_proj.weight_stages.quantizer.scale"
    end = load_file(tmp_path / "checkpoint-4" / "robustq_stages.safetensors")
    assert torch.equal(moved[scale], end[scale]) == (order == "RobustQ first")


def test_a_stock_trainer_saves_the_steps_beside_the_adapter(tmp_path, caplog):
    model, data = llama(), Rows(tokens(batch=16))
    plugin = RobustQ(model, W4A8)
    plugin.calibrate([BATCH], run)
    options = {"eval_strategy": "no", "save_strategy": "steps", "save_steps": 1}
    wrapped = peft.get_peft_model(model, lora())
    for resume in (None, str(tmp_path / "checkpoint-1")):
        one = Trainer(wrapped, args(tmp_path, **options), train_dataset=data, callbacks=[RobustQCallback(plugin)])
        one.train(resume_from_checkpoint=resume)
    assert plugin.model is wrapped and "plugin.load(checkpoint) takes them over" in caplog.text
    plugin.load(tmp_path / "checkpoint-2")


def test_frozen_steps_are_said(caplog):
    model = llama()
    plugin = RobustQ(model, {"weights": {"method": "lsq", "bits": 4}})
    plugin.follow(peft.get_peft_model(model, lora()))
    assert "PEFT has frozen what the quantizers learn: create RobustQ after get_peft_model" in caplog.text


def test_a_head_that_is_trained_beside_the_adapter(tmp_path):
    """PEFT trains a copy of a classifier: it is the output layer, and the original is not."""
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 2}
    batch = tokens(labels=3, batch=8)
    wrapped = peft.get_peft_model(bert(), peft.LoraConfig(**options))
    plugin = RobustQ(wrapped, W4)
    plugin.calibrate([batch], run)
    text = repr(plugin)
    assert "classifier.modules_to_save.default.weight: output layer" in text
    assert "classifier.original_module.weight: an adapter trains a copy of it (modules_to_save)" in text
    staged = peft.get_peft_model(bert(), peft.LoraConfig(**options))
    plugin = RobustQ(staged, {**W4, "first_last": 8})
    plugin.calibrate([batch], run)
    same_after_loading(staged, bert(), tmp_path)
    early = bert()
    plugin = RobustQ(early, {**W4, "first_last": 8})
    with pytest.raises(ValueError, match="copy that PEFT made of a staged layer .*create RobustQ after get_peft_model"):
        plugin.follow(peft.get_peft_model(early, peft.LoraConfig(**options)))


def same_after_loading(wrapped, base, folder):
    """An adapter folder gives a float base the adapter, whatever else is in it."""
    wrapped.save_pretrained(folder)
    again = parameters(peft.PeftModel.from_pretrained(base, folder))
    trained = {name for name, p in wrapped.named_parameters() if "lora_" in name or "modules_to_save" in name}
    trained = {name for name in trained if "stages" not in name}
    assert len(trained) > 8 and all(torch.equal(again[name], parameters(wrapped)[name]) for name in trained)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor:UserWarning")  # PEFT takes the stages' tensors for cut ones
def test_quantized_adapters(tmp_path):
    wrapped = wrap(llama(), lora(use_dora=True))
    before = logits(wrapped)
    RobustQ(wrapped, {**W4, "adapters": True}).calibrate([BATCH], run)
    assert len(wrapped.base_model.model.model.layers[0].mlp.down_proj.lora_B["default"].weight.unique()) <= 16
    assert not torch.equal(before, logits(wrapped))
    same_after_loading(wrapped, llama(), tmp_path)


def test_adapters_without_a_wrapping():
    """As `model.add_adapter` of transformers puts them into the model itself."""
    model = llama()
    plugin = RobustQ(model, W4)
    plugin.calibrate([BATCH], run)
    names = [site.name for site in plugin.sites]
    peft.inject_adapter_in_model(lora(init_lora_weights=False), model)
    site = next(site for site in plugin.sites if "q_proj" in site.name)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight is site.parameter and len(layer.base_layer(torch.eye(32)).unique()) > 1
    plugin.detach()
    plugin = RobustQ(model, W4)
    assert [site.name for site in plugin.sites] == names and "lora_A.default.weight: an adapter" in repr(plugin)


def test_averages_of_an_adapter_are_what_is_saved(tmp_path):
    wrapped = peft.get_peft_model(llama(), lora())
    data = Rows(tokens(batch=16))
    one = RobustTrainer(
        model=wrapped, args=args(tmp_path, eval_strategy="no"), train_dataset=data, robustq=W4, sweep=(),
        ema={"decay": 0.5},
    )  # fmt: skip
    one.train()
    one.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    averages = one.robustq.ema.averages
    assert len(saved) == len(averages)
    for name, average in averages.items():
        torch.testing.assert_close(saved[name.replace(".default", "")], average, rtol=0, atol=0)
    assert any(not torch.equal(parameters(wrapped)[name], average) for name, average in averages.items())


def test_compiles_without_a_graph_break():
    wrapped = wrap(llama(), lora(use_dora=True))
    RobustQ(wrapped, W4A8).calibrate([BATCH], run)
    block, x = wrapped.train().base_model.model.model.layers[0].mlp, torch.randn(2, 3, 32)
    expected = block(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), expected)


def test_another_model_is_refused():
    plugin = RobustQ(llama(), W4)
    with pytest.raises(ValueError, match="robustq belongs to another model"):
        plugin.follow(wrap(llama()))


def test_recomputed_weights_are_the_staged_ones():
    """`memory="recompute"` makes the weight anew in the backward, outside the forward of layer and adapter."""
    grads = []
    for memory in ("keep", "recompute"):
        torch.manual_seed(0)
        wrapped = wrap(llama(), lora(use_dora=True))
        plugin = RobustQ(wrapped, {**W4, "memory": memory})
        plugin.calibrate([BATCH], run)
        wrapped.train()
        wrapped(**BATCH).loss.backward()
        grads.append({name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_a_merged_model_pickles(tmp_path):
    wrapped, _, _ = both("adapter first")
    torch.save(wrapped, tmp_path / "wrapped.pt")
    assert torch.equal(logits(torch.load(tmp_path / "wrapped.pt", weights_only=False)), logits(wrapped))
    merged = wrapped.merge_and_unload()
    torch.save(merged, tmp_path / "merged.pt")
    again = torch.load(tmp_path / "merged.pt", weights_only=False)
    assert torch.equal(logits(again), logits(merged))
    copied = copy.deepcopy(wrap(copy.deepcopy(merged)))
    assert torch.equal(logits(copied), logits(copy.deepcopy(copied)))
