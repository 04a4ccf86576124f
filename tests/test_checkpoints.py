"""Checkpoints that are not whole: named, passed over, or refused; nothing begins anew without a word."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_robustq import RobustQ, RobustTrainer
from tests.test_trainer import arguments, same, text, weights
from tests.zoo import bert, run, tokens

CONFIG = {"weights": {"method": "lsq", "bits": 4}, "activations": {"bits": 8}, "calibration_samples": 8}


def trainer(folder, config=CONFIG, steps=6, callbacks=(), **options):
    torch.manual_seed(0)
    args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, optim="adamw_torch")
    return RobustTrainer(
        model=bert(), args=args, train_dataset=text(), robustq=config, sweep=(), callbacks=list(callbacks), **options
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with three checkpoints, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    finished = trainer(folder)
    finished.train()
    return folder, weights(finished.model)


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run"), whole[1]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN = {
    "no trainer state": lambda c: (c / "trainer_state.json").unlink(),
    "half a trainer state": lambda c: cut(c / "trainer_state.json"),
    "half the weights": lambda c: cut(c / "model.safetensors"),
    "no weights": lambda c: (c / "model.safetensors").unlink(),
    "half an optimizer": lambda c: cut(c / "optimizer.pt"),
    "half a schedule": lambda c: cut(c / "scheduler.pt"),
    "half of the random numbers": lambda c: cut(c / "rng_state.pth"),
    "half a config": lambda c: cut(c / "config.json"),
    "empty weights": lambda c: (c / "model.safetensors").write_bytes(b""),
}
LACKING = {
    "no optimizer": ("optimizer.pt", "optimizer"),
    "no schedule": ("scheduler.pt", "learning-rate schedule"),
    "no random numbers": ("rng_state.pth", "random numbers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(copied, caplog, name):
    folder, expected = copied
    shutil.rmtree(folder / "checkpoint-6")
    BROKEN[name](folder / "checkpoint-4")
    again = trainer(folder)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), expected)
    assert "checkpoint-4 is not whole and passed over" in caplog.text


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_that_is_named_is_refused_in_a_line(copied, name):
    folder, _ = copied
    BROKEN[name](folder / "checkpoint-4")
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed from, ") as error:
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["LayerNorm.bias", "quantizer.scale"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(copied, name):
    folder, _ = copied
    file = folder / "checkpoint-4" / "model.safetensors"
    state = load_file(file)
    key = next(key for key in sorted(state) if key.endswith(name))
    del state[key]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of the model are missing") as error:
        trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert key in str(error.value)


def test_averages_beside_no_weights_are_no_checkpoint(tmp_path, caplog):
    trainer(tmp_path, ema={"decay": 0.5}).train()
    (tmp_path / "checkpoint-6" / "model.safetensors").unlink()
    again = trainer(tmp_path, ema={"decay": 0.5})
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is not whole and passed over: it has no weights" in caplog.text


@pytest.mark.parametrize("name", LACKING)
def test_what_begins_anew_is_said(copied, caplog, name):
    folder, _ = copied
    file, what = LACKING[name]
    (folder / "checkpoint-4" / file).unlink()
    trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert f"lacks {what}: they begin anew" in caplog.text


def test_without_a_whole_checkpoint_the_reasons_are_given(copied):
    folder, _ = copied
    for number in (2, 4, 6):
        (folder / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*checkpoint-6: it has no trainer_state\.json"):
        trainer(folder).train(resume_from_checkpoint=True)


def test_averages_go_with_their_checkpoint(tmp_path, copied):
    with_ema = trainer(tmp_path / "ema", ema={"decay": 0.5})
    with_ema.train()
    checkpoint = tmp_path / "ema" / "checkpoint-4"
    with pytest.raises(ValueError, match="has averages and this run none: resume with the ema"):
        trainer(tmp_path / "ema").train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "robustq_state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no robustq_state\.safetensors, which a run with ema writes"):
        trainer(tmp_path / "ema", ema={"decay": 0.5}).train(resume_from_checkpoint=str(checkpoint))
    folder, _ = copied
    with pytest.raises(ValueError, match="a run with ema writes"):
        trainer(folder, ema={"decay": 0.5}).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_a_run_that_had_ended_stays_as_it_was(tmp_path):
    """In the middle of an epoch: two steps of three."""
    ended = trainer(tmp_path, steps=2)
    ended.train()
    again = trainer(tmp_path, steps=2)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), weights(ended.model)) and again.state.global_step == 2


class Killed(TrainerCallback):
    """Dies in the middle of a save: what comes after the weights is not written."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def damage(folder, name, change):
    state = load_file(folder / "model.safetensors")
    key = next(key for key in state if key.endswith(name))
    state[key] = change(state[key].clone())
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return key


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_stages.quantizer.scale", "activation_stages.quantizer.scale"])
def test_a_step_that_is_none_is_refused_on_load(copied, name, value):
    folder = copied[0] / "checkpoint-6"
    key = damage(folder, name, lambda tensor: tensor.fill_(value))
    with pytest.raises(ValueError, match=r"a step is not a positive number|not finite") as error:
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert key.partition(name)[0] in str(error.value)


@pytest.mark.parametrize("name", ["probe.range", "probe.macs", "probe.uses", "query.weight", "LayerNorm.bias"])
def test_a_tensor_that_is_not_finite_is_refused_on_load(copied, name):
    folder = copied[0] / "checkpoint-6"
    damage(folder, name, lambda tensor: tensor.index_fill_(0, torch.tensor([0]), float("nan")))
    with pytest.raises(ValueError, match="not finite|no histogram") as error:
        AutoModelForSequenceClassification.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_run_that_dies_while_it_saves_goes_on(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[Killed()]).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), whole[1])
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    plugin = RobustQ.of(again.model)
    with torch.no_grad():
        run(again.model.eval(), tokens(labels=3))
    assert plugin.calibrated
