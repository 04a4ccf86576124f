"""What README promises, for every config in it: trained, saved, loaded in each way, baked, and nothing half done."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer

from hf_robustq import BitWidthSweepCallback, RobustQ, RobustQCallback, RobustTrainer, from_pretrained
from tests.test_trainer import arguments, same, text
from tests.zoo import bert, run, tokens

README = (Path(__file__).parents[1] / "README.md").read_text()


def configs():
    """The mappings that README gives to `RobustQConfig.from_dict`, and those it writes in a line."""
    found = []
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_dict":
                found.append(ast.literal_eval(node.args[0]))
    for line in re.findall(r"`(\{\"\w+\": .*?\})`", README):
        value = ast.literal_eval(line)
        if value.keys() <= {"weights", "activations", "regularizers"}:
            found.append(value)
    return found


CONFIGS = configs()
OTHERS = {
    "watched": {"weights": {"method": "lsq", "bits": 4}, "oscillations": "watch"},
    "frozen": {"weights": {"method": "lsq", "bits": 3}, "oscillations": "freeze", "first_last": 8},
    "dorefa": {"weights": {"method": "dorefa", "bits": 4}, "activations": {"method": "lsq_plus", "bits": 4}},
    "dorefa, learned": {
        "weights": {"method": "dorefa", "bits": 8},
        "regularizers": {"waveq": {"strength": 1.0}},
        "budget": {"megabytes": 0.05},
    },
}
ALL = {**{f"README {i}": config for i, config in enumerate(CONFIGS)}, **OTHERS}


def adapted(config):
    """For a BERT with one sequence classifier: patterns of other models' names match its own."""
    config = {**config, "calibration_samples": 8}
    for name in ("weights", "activations"):
        if config.get(name, {}).get("mixed"):
            config[name] = {**config[name], "mixed": {"*.attention.*": 5}}
    return config


def test_the_configs_are_found():
    assert len(CONFIGS) >= 5
    assert any("budget" in config for config in CONFIGS) and any("oscillations" in config for config in CONFIGS)


@pytest.mark.parametrize("name", ALL)
def test_a_config_keeps_every_promise(tmp_path, name):
    config = adapted(ALL[name])
    torch.manual_seed(0)
    trainer = RobustTrainer(
        model=bert(), args=arguments(tmp_path / "run", max_steps=8, learning_rate=0.01), train_dataset=text(),
        eval_dataset=text(8), robustq=config, sweep=["fp", "w4", "w4a8"],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    trainer.create_model_card()
    batch, plugin = tokens(labels=3), trainer.robustq
    quantized = config.get("weights") is not None

    def logits(model):
        with torch.no_grad():
            return run(model.eval(), batch).logits

    expected = logits(trainer.model)
    loaded = from_pretrained(AutoModelForSequenceClassification, folder)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    kept = from_pretrained(AutoModelForSequenceClassification, folder, trainable=True)
    torch.testing.assert_close(logits(kept), expected, rtol=1e-5, atol=1e-6)
    RobustTrainer(
        model=kept.train(), args=arguments(tmp_path / "on", max_steps=3), train_dataset=text(), sweep=()
    ).train()
    for options in ({"bits": 4}, {"bits": 4, "activation_bits": 8}, {"bits": 3, "per_channel": True}, {"bits": None}):
        other = from_pretrained(AutoModelForSequenceClassification, folder, **options)
        assert logits(other).isfinite().all()
        again = from_pretrained(AutoModelForSequenceClassification, folder, **options, trainable=True)
        torch.testing.assert_close(logits(again), logits(other), rtol=1e-5, atol=1e-6)
    if quantized:
        learned = from_pretrained(AutoModelForSequenceClassification, folder, bits=4, scale="learned")
        assert logits(learned).isfinite().all()
    if config.get("activations"):
        plugin.bake(activations=True)
        torch.testing.assert_close(logits(trainer.model), expected, rtol=1e-5, atol=1e-6)
        trainer.model.save_pretrained(tmp_path / "baked")
        baked = AutoModelForSequenceClassification.from_pretrained(tmp_path / "baked")
    else:
        baked = plugin.bake()
    torch.testing.assert_close(logits(baked), expected, rtol=1e-5, atol=1e-6)


def failing():
    """Calls that are refused, by what they would do."""
    observed = {"weights": {"bits": 4}, "calibration_samples": 8}
    return {
        "bits of inputs that have no quantizer": (
            observed,
            lambda p: p.change_bits(3, 3),
            "no quantizers of its activations",
        ),
        "bits that are none": (observed, lambda p: p.change_bits(99, None), "bits"),
        "inputs nobody has seen": (observed, lambda p: forgotten(p).requantized(*eight(p)), "nothing is known"),
    }


def forgotten(plugin):
    for site in plugin.sites:
        site.activation_stages.probe.forget()
    return plugin


def eight(plugin):
    from hf_robustq.config import QuantizerConfig

    return QuantizerConfig(bits=8), QuantizerConfig(bits=8)


@pytest.mark.parametrize("name", failing())
def test_a_method_that_fails_leaves_the_model_as_it_was(name):
    config, call, message = failing()[name]
    model, batch = bert().eval(), tokens(labels=3)
    plugin = RobustQ(model, config)
    plugin.calibrate([batch], run)
    plugin.average(0.5)
    with torch.no_grad():
        before = run(model, batch).logits
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        call(plugin)
    assert same(weights, dict(model.named_parameters())) and RobustQ.of(model) is plugin and plugin.ema is not None
    with torch.no_grad():
        assert torch.equal(run(model, batch).logits, before)


def robust(folder, *callbacks, cls=RobustTrainer, **options):
    torch.manual_seed(0)
    defaults = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "learning_rate": 0.0}
    own = {key: options.pop(key) for key in ("compute_metrics", "robustq", "sweep") if key in options}
    own = {"robustq": {"weights": {"bits": 4}, "calibration_samples": 8}, "sweep": ["fp", "w4", "w2"], **own}
    return cls(
        model=bert(), args=arguments(folder, **{**defaults, **options}), train_dataset=text(), eval_dataset=text(8),
        callbacks=list(callbacks), **own,
    )  # fmt: skip


def share(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("stock", [False, True])
def test_early_stopping_sees_the_figures_of_the_sweep(tmp_path, stock):
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    best = {"metric_for_best_model": "eval_robustness", "greater_is_better": True}
    best |= {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    if stock:
        model = bert()
        plugin = RobustQ(model, {"weights": {"bits": 4}})
        plugin.calibrate([tokens(labels=3)], run)
        args = arguments(tmp_path, max_steps=6, eval_strategy="steps", eval_steps=1, learning_rate=0.0, **best)
        trainer = Trainer(
            model=model, args=args, train_dataset=text(), eval_dataset=text(8), compute_metrics=share,
            callbacks=[stopping, RobustQCallback(plugin)],
        )  # fmt: skip
        trainer.add_callback(BitWidthSweepCallback(trainer, plugin, ["w4", "w2"]))
    else:
        trainer = robust(tmp_path, stopping, compute_metrics=share, sweep=["w4", "w2"], **best)
    trainer.train()
    assert trainer.state.global_step == 3  # the best is the first, and no other is better


def test_the_best_checkpoint_has_the_statistics_of_its_own_weights(tmp_path):
    options = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_steps": 2, "learning_rate": 0.05}
    config = {"weights": {"bits": 4}, "activations": {"bits": 8}, "calibration_samples": 8}
    trainer = robust(tmp_path, robustq=config, sweep=(), **options)
    trainer.train()
    folder = Path(trainer.state.best_model_checkpoint)
    plugin = RobustQ.of(AutoModelForSequenceClassification.from_pretrained(folder))
    stored = {site.name: site.activation_stages.probe.range.clone() for site in plugin.sites}
    trainer.model.load_state_dict(load_file(folder / "model.safetensors"))
    trainer._observed = None
    trainer.observe()
    for site in trainer.robustq.sites:
        torch.testing.assert_close(site.activation_stages.probe.range, stored[site.name])


def test_the_default_objective_of_a_search_is_of_the_trainers_own_metrics(tmp_path, monkeypatch):
    trainer = robust(tmp_path, compute_metrics=share)
    metrics = {key: value for key, value in trainer.evaluate().items() if not key.endswith("_time")}
    assert "eval_w4_loss" in metrics and "eval_worst" in metrics
    assert trainer._objective(metrics) == metrics["eval_accuracy"]
    seen = {}

    def search(self, hp_space=None, compute_objective=None, **kwargs):
        seen["objective"] = compute_objective(metrics)

    monkeypatch.setattr(Trainer, "hyperparameter_search", search)
    trainer.hyperparameter_search(direction="maximize")
    assert seen["objective"] == metrics["eval_accuracy"]


def test_outputs_that_are_to_be_ignored_are_ignored_in_the_sweep_too(tmp_path):
    class More(type(bert())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output["hidden"] = torch.zeros(output.logits.shape[0], 7, 2)
            return output

    seen = []

    def metrics(prediction):
        seen.append(type(prediction.predictions))
        return {"n": 1.0}

    model = More(bert().config)
    options = {"robustq": {"weights": {"bits": 4}, "calibration_samples": 8}, "sweep": ["fp", "w4"]}
    args = arguments(
        tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, remove_unused_columns=False, label_names=["labels"]
    )
    trainer = RobustTrainer(
        model=model, args=args, train_dataset=text(), eval_dataset=text(8), compute_metrics=metrics, **options
    )
    trainer.evaluate(ignore_keys=["hidden"])
    trainer.train(ignore_keys_for_eval=["hidden"])
    assert len(seen) == 6 and set(seen) == {np.ndarray}
    trainer.evaluate()
    assert seen[-1] is tuple


@pytest.mark.parametrize("more", [{"text": "abc"}, {"none": None}, {"nested": {"a": 1}}, {"list": [1, 2]}])
def test_metrics_that_are_no_numbers_do_not_stop_a_sweep(tmp_path, more):
    def metrics(prediction):
        return {**share(prediction), **more}

    trainer = robust(tmp_path, compute_metrics=metrics, sweep=["w4"])
    found = trainer.evaluate()
    assert "eval_w4_loss" in found and "eval_w4_accuracy" in found
    assert not any(f"eval_w4_{name}" in found for name in more)
