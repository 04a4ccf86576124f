import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_robustq import (
    BitWidthSweepCallback,
    RobustQ,
    RobustQCallback,
    RobustQConfig,
    RobustQMixin,
    RobustTrainer,
    regularizers,
)
from hf_robustq.data import ImageDataset
from hf_robustq.metrics import compute_accuracy
from hf_robustq.sweep import load_sweeps
from hf_robustq.sweep.batch_norm import batch_norms
from hf_robustq.trainer.batches import some_of
from hf_robustq.trainer.optimizer import check_section
from tests.zoo import bert, gpt2, resnet, tokens

KURE = RobustQConfig.from_dict({"regularizers": {"kure": {"strength": 2.0}}, "calibration_samples": 8})


class Rows(torch.utils.data.Dataset):
    """A batch, row by row."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.batch.items()}


def text(rows=24, labels=3):
    return Rows(tokens(labels=labels, batch=rows))


def pictures(rows=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (rows,), generator=generator)
    return ImageDataset(pixels, labels, num_labels=10, mean=(0.5,) * 3, std=(0.25,) * 3, padding=4, flip=True)


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0,
        "num_train_epochs": 1, "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_checkpointing_do_not_change_the_weights(tmp_path, checkpointing):
    """Five steps of eight samples, as 1x8, 4x2 and 2x4, end at the same weights to 1e-5."""
    results = []
    for micro, batch in ((1, 8), (4, 2), (2, 4)):
        torch.manual_seed(0)
        model = gpt2()
        options = {"activation_checkpointing": True} if checkpointing else {}
        args = arguments(
            tmp_path, max_steps=5, learning_rate=0.01, per_device_train_batch_size=batch,
            gradient_accumulation_steps=micro, **options,
        )  # fmt: skip
        RobustTrainer(model=model, args=args, train_dataset=Rows(tokens(batch=40)), robustq=KURE, sweep=()).train()
        results.append(weights(model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)


def test_the_penalty_matters_in_that_test(tmp_path):
    ends = []
    for config in (KURE, RobustQConfig()):
        torch.manual_seed(0)
        model = gpt2()
        args = arguments(tmp_path, max_steps=5, learning_rate=0.01)
        RobustTrainer(model=model, args=args, train_dataset=Rows(tokens(batch=40)), robustq=config, sweep=()).train()
        ends.append(weights(model))
    assert max(float((ends[0][n] - ends[1][n]).abs().max()) for n in ends[0]) > 1e-3


def test_loss_stays_the_task_loss_and_penalties_have_their_own_names(tmp_path):
    trainer = RobustTrainer(model=bert(), args=arguments(tmp_path), train_dataset=text(), robustq=KURE, sweep=())
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(np.log(3), abs=0.1)
    assert first["kurtosis"] > 1 and first["kure"] > 0


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


SECOND_PAPER = {
    "satnl": {},
    "regularizers": {"sym1": {"strength": 1.0, "every": 2}, "kure": {"strength": 0.1}},
    "weights": {"method": "noise", "bits": 4},
    "calibration_samples": 8,
}


@pytest.mark.parametrize(
    ("stop", "config", "options"),
    [
        (4, {}, {}),
        (6, {}, {}),
        (4, SECOND_PAPER, {"asam": {"rho": 0.5}, "ema": {"decay": 0.9}}),
        (6, {"satnl": {"function": "softsign"}}, {"ema": {}}),
    ],
)
def test_an_interrupted_run_resumed_ends_with_exactly_the_same_weights(tmp_path, stop, config, options):
    """Augmentation, dropout, batch norm, sweeps and a mid-epoch checkpoint included: 9 steps in 3 epochs."""

    def trainer(folder, *callbacks):
        torch.manual_seed(0)
        default = {
            "regularizers": {"kure": {"strength": 2.0, "schedule": "linear"}},
            "weights": {"bits": 4},
            "calibration_samples": 8,
        }
        args = arguments(
            folder,
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="epoch",
            optim_args="momentum=0.9",
        )
        return RobustTrainer(
            model=resnet(), args=args, train_dataset=pictures(), eval_dataset=pictures(8).evaluation(),
            robustq={**default, **config}, sweep=["fp", "w3", "w4a4", "trained"], compute_metrics=compute_accuracy,
            callbacks=list(callbacks), **options,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts", StopAt(stop + 1)).train()
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert same(weights(resumed.model), weights(whole.model))
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    sweeps = [json.loads((tmp_path / run / "robustq_sweep.json").read_text()) for run in ("whole", "parts")]
    assert sweeps[0] == sweeps[1] and len(sweeps[0]["sweeps"]) == 3
    histograms = [json.loads((tmp_path / run / "robustq_weights.json").read_text()) for run in ("whole", "parts")]
    assert histograms[0] == histograms[1] and histograms[0].keys() == {"before", "after"}
    final = [load_file(tmp_path / run / "checkpoint-8" / "model.safetensors") for run in ("whole", "parts")]
    assert same(*final)
    state = tmp_path / "whole" / "checkpoint-8" / "robustq_state.safetensors"
    assert state.exists() is bool(config)


LEARNED = {
    "weights": {"method": "noise", "bits": 3, "per_channel": True, "schedule": "cosine", "noise_lr_scale": True},
    "activations": {"method": "lsq_plus", "bits": 4},
    "regularizers": {"damping": {"strength": 0.1, "schedule": "linear"}},
    "oscillations": "freeze",
    "freeze_above": 0.01,
    "calibration_samples": 8,
}


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_twenty_learned_steps_are_ten_and_ten(tmp_path, optim):
    """Weights, steps, offsets, what is known of oscillations, and the optimizer's state, to the bit."""

    def trainer(folder, *callbacks):
        torch.manual_seed(0)
        options = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20, "gradient_accumulation_steps": 2}
        options |= {"optim": optim, "learning_rate": 0.01, "weight_decay": 0.01}
        if optim == "sgd":
            options["optim_args"] = "momentum=0.9"
        return RobustTrainer(
            model=resnet(), args=arguments(folder, **options), train_dataset=pictures(), robustq=LEARNED, sweep=(),
            scale_lr=0.001, callbacks=list(callbacks),
        )  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts", StopAt(13)).train()
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-10"))
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    assert any(name.endswith("quantizer.offset") for name in theirs)
    states = [torch.load(tmp_path / run / "checkpoint-20" / "optimizer.pt") for run in ("whole", "parts")]
    assert str(states[0]) == str(states[1]) and all(
        torch.equal(value, states[1]["state"][index][key])
        for index, state in states[0]["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    )
    own = {id(p) for p in resumed.robustq.own_parameters().values()}
    *_, group = resumed.optimizer.param_groups
    assert {id(p) for p in group["params"]} == own and group["weight_decay"] == 0
    assert group["initial_lr"] == 0.001 != resumed.optimizer.param_groups[0]["initial_lr"]


@pytest.mark.parametrize(("section", "scale_lr", "refused"), [
    ({"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.01}}, None, True),
    ({"type": "AdamW", "params": {"lr": 0.1, "weight_decay": "auto"}}, None, True),
    ({"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0}}, 0.01, True),
    ({"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0}}, None, False),
    (None, 0.01, False),
])  # fmt: skip
def test_an_optimizer_of_deepspeeds_config_that_would_decay_steps_is_refused(section, scale_lr, refused):
    with pytest.raises(ValueError, match="take its `optimizer` section out") if refused else nullcontext():
        check_section(section, scale_lr)


@pytest.mark.parametrize("reentrant", [True, False])
def test_noise_is_the_same_where_the_forward_is_run_again(tmp_path, reentrant):
    """Gradient checkpointing runs each block twice: the same noise must come, or gradients belong to other weights."""
    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        kwargs = {"use_reentrant": reentrant}
        args = arguments(
            tmp_path, max_steps=4, activation_checkpointing=checkpointing, activation_checkpointing_kwargs=kwargs
        )
        config = {"weights": {"method": "noise", "bits": 2, "c": 0.4}, "calibration_samples": 8}
        trainer = RobustTrainer(model=bert(), args=args, train_dataset=text(), robustq=config, sweep=())
        trainer.train()
        ends.append(weights(trainer.model))
    assert same(*ends)


def test_a_sweep_does_not_change_the_training(tmp_path):
    """With dropout, whose next draw depends on the global RNG."""
    ends = []
    for sweep in (["fp", "w2", "w8a8", "trained"], ()):
        torch.manual_seed(0)
        model = bert(dropout=0.1)
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
        config = RobustQConfig.from_dict({**KURE.to_dict(), "weights": {"bits": 4}, "activations": {"bits": 8}})
        RobustTrainer(
            model=model, args=args, train_dataset=text(), eval_dataset=text(6), robustq=config, sweep=sweep,
            compute_metrics=compute_accuracy,
        ).train()  # fmt: skip
        ends.append(weights(model))
    assert same(*ends)


def test_sweep_rows_are_logged_saved_and_usable_to_choose_the_best(tmp_path):
    args = arguments(
        tmp_path,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="best",
        metric_for_best_model="eval_robustness",
    )
    trainer = RobustTrainer(
        model=bert(), args=args, train_dataset=text(), eval_dataset=text(10), robustq=KURE,
        sweep=["fp", "w4", "w2", "w4a4"], compute_metrics=compute_accuracy,
    )  # fmt: skip
    trainer.train()
    logs = {key: value for log in trainer.state.log_history for key, value in log.items()}
    for key in ("eval_fp_accuracy", "eval_w4_accuracy", "eval_w2_loss", "eval_w4a4_accuracy", "eval_worst"):
        assert key in logs
    assert logs["eval_robustness"] == pytest.approx((logs["eval_w4_accuracy"] + logs["eval_w2_accuracy"]) / 2)
    assert logs["eval_worst"] == min(logs[f"eval_{s}_accuracy"] for s in ("fp", "w4", "w2", "w4a4"))
    assert trainer.state.best_metric == max(
        log["eval_robustness"] for log in trainer.state.log_history if "eval_robustness" in log
    )
    assert logs["eval_fp_accuracy"] == logs["eval_accuracy"]
    assert logs["eval_fp_loss"] == pytest.approx(logs["eval_loss"], rel=1e-5)
    sweeps = load_sweeps(tmp_path / "robustq_sweep.json")
    assert len(sweeps) == 2 and sweeps[1].step == 6 and sweeps[1].rows[0].samples == 10


def test_several_evaluation_sets_and_a_fixed_subset(tmp_path):
    args = arguments(tmp_path, eval_strategy="epoch")
    trainer = RobustTrainer(
        model=bert(), args=args, train_dataset=text(), eval_dataset={"a": text(10), "b": text(7)}, robustq=KURE,
        sweep=["fp", "w3"], sweep_options={"max_samples": 8}, compute_metrics=compute_accuracy,
    )  # fmt: skip
    trainer.train()
    logs = {key for log in trainer.state.log_history for key in log}
    assert {"eval_a_w3_accuracy", "eval_b_w3_accuracy", "eval_b_worst"} <= logs
    rows = [row for sweep in trainer.sweep_callback.sweeps for row in sweep.rows]
    assert {(r.dataset, r.samples, r.subset) for r in rows} == {
        ("eval_a", 8, "8 of 10, seed 0"),
        ("eval_b", 7, "all"),
    }


def test_every_second_evaluation(tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer = RobustTrainer(
        model=bert(), args=args, train_dataset=text(), eval_dataset=text(6), robustq=KURE, sweep=["w4"],
        sweep_options={"every": 2}, compute_metrics=compute_accuracy,
    )  # fmt: skip
    trainer.train()
    assert [sweep.step for sweep in trainer.sweep_callback.sweeps] == [1, 3]


def test_a_callback_on_a_stock_trainer_does_the_same(tmp_path):
    """RobustQCallback + BitWidthSweepCallback on `Trainer` end where `RobustTrainer` ends."""
    torch.manual_seed(0)
    model = bert()
    args = arguments(tmp_path / "a", eval_strategy="epoch")
    robust = RobustTrainer(
        model=model, args=args, train_dataset=text(), eval_dataset=text(6), robustq=KURE, sweep=["w4"],
        compute_metrics=compute_accuracy,
    )  # fmt: skip
    robust.train()
    torch.manual_seed(0)
    stock_model = bert()
    plugin = RobustQ(stock_model, KURE)
    plugin.calibrate([tokens(labels=3)], lambda model, batch: model(**batch))
    stock = Trainer(
        model=stock_model, args=arguments(tmp_path / "b", eval_strategy="epoch"), train_dataset=text(),
        eval_dataset=text(6), compute_metrics=compute_accuracy, callbacks=[RobustQCallback(plugin)],
    )  # fmt: skip
    stock.add_callback(BitWidthSweepCallback(stock, plugin, ["w4"]))
    stock.train()
    assert same(weights(model), weights(stock_model))
    last = [log for log in stock.state.log_history if "eval_w4_accuracy" in log]
    assert last and last[0]["eval_w4_accuracy"] == robust.sweep_callback.sweeps[0].value("w4")


def test_stock_trainer_without_calibration_is_refused(tmp_path):
    model = bert()
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=text(), callbacks=[RobustQCallback(RobustQ(model, KURE))]
    )
    with pytest.raises(RuntimeError, match="calibrate"):
        trainer.train()


class Learned(regularizers.Regularizer):
    """A regularizer with a parameter of its own: (mean w^2 - theta)^2."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1))

    def penalty(self, w, *theta):
        return ((w**2).mean() - theta[0].squeeze()) ** 2


@pytest.fixture
def learned(monkeypatch):
    monkeypatch.setitem(regularizers.REGULARIZERS, "learned", Learned)
    return RobustQConfig.from_dict({"regularizers": {"learned": {}}, "calibration_samples": 8})


def test_learned_parameters_are_not_decayed_by_the_mixin_and_are_warned_of_on_a_stock_trainer(tmp_path, learned):
    args = arguments(tmp_path, weight_decay=0.5)
    trainer = RobustTrainer(model=bert(), args=args, train_dataset=text(), robustq=learned, sweep=())
    trainer.create_optimizer()
    own = {id(p) for p in trainer.robustq.own_parameters().values()}
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    listed = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert own and own <= listed and not own & decayed

    model = bert()
    plugin = RobustQ(model, learned)
    plugin.calibrate([tokens(labels=3)], lambda model, batch: model(**batch))
    stock = Trainer(model=model, args=args, train_dataset=text(), callbacks=[RobustQCallback(plugin)])
    with pytest.warns(UserWarning, match="weight decay acts on learned quantizer parameters"):
        stock.train()


def test_learned_parameters_get_the_gradient_of_their_penalty(tmp_path, learned):
    model = bert()
    trainer = RobustTrainer(model=model, args=arguments(tmp_path), train_dataset=text(), robustq=learned, sweep=())
    trainer.train()
    theta = [p.item() for p in trainer.robustq.own_parameters().values()]
    assert all(value < 1.0 for value in theta)


def test_mixin_on_seq2seq_trainer(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    class RobustSeq2SeqTrainer(RobustQMixin, Seq2SeqTrainer):
        pass

    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, predict_with_generate=True,
        eval_strategy="epoch", num_train_epochs=1, save_strategy="no", generation_max_length=6,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = Rows(tokens(batch=8))

    def exact(prediction):
        return {"exact": float((prediction.predictions[:, 1:2] == prediction.label_ids[:, :1]).mean())}

    trainer = RobustSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        robustq=KURE,
        sweep=["fp", "w4"],
        compute_metrics=exact,
    )
    trainer.train()
    assert "eval_w4_exact" in {key for log in trainer.state.log_history for key in log}


@pytest.mark.parametrize("options", [{}, {"asam": {"rho": 0.5}, "ema": {"decay": 0.5}}])
def test_model_init_and_a_config(tmp_path, options):
    args = arguments(tmp_path)
    trainer = RobustTrainer(
        model_init=lambda: bert(), args=args, train_dataset=text(), robustq=KURE, sweep=(), **options
    )
    trainer.train()
    set_seed(args.seed)
    given = RobustTrainer(model=bert(), args=args, train_dataset=text(), robustq=KURE, sweep=(), **options)
    given.train()
    with trainer.robustq.averaged(), given.robustq.averaged():
        for name, value in weights(given.model).items():
            assert torch.equal(weights(trainer.model)[name], value), name
    assert trainer.robustq.model is trainer.model and trainer.robustq.calibrated
    assert trainer.robustq_callback.plugin is trainer.robustq


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "step", "every": 2}, [1, 1, 0.1, 0.1, 0.01]),
        ({"name": "exponential"}, [1, 0.98, 0.98**2, 0.98**3, 0.98**4]),
        (
            {"name": "cosine_steps", "every": 3},
            [(1 + np.cos(np.pi * e / 5)) / 2 * (1 if e < 3 else 0.1) for e in range(5)],
        ),
    ],
)
def test_learning_rate_schedules_by_epoch(tmp_path, schedule, expected):
    args = arguments(tmp_path, num_train_epochs=5, learning_rate=1.0)
    trainer = RobustTrainer(
        model=bert(),
        args=args,
        train_dataset=text(),
        robustq=RobustQConfig(calibration_samples=8),
        sweep=(),
        lr_schedule=schedule,
    )
    rates = []

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    trainer.add_callback(Look())
    trainer.train()
    assert rates == pytest.approx(expected)


def test_unknown_schedules_and_options_are_refused(tmp_path):
    for schedule, message in (
        ({"name": "stpe"}, "did you mean 'step'"),
        ({"name": "step", "evry": 3}, "did you mean 'every'"),
    ):
        with pytest.raises(ValueError, match=message):
            RobustTrainer(model=bert(), args=arguments(tmp_path), robustq=KURE, lr_schedule=schedule)


class Poison(TrainerCallback):
    """Puts a NaN into one weight before a step."""

    def __init__(self, site, step):
        self.site, self.step = site, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.site.parameter.data.view(-1)[3] = float("nan")


@pytest.mark.parametrize(("logging", "saving", "stopped", "kept"), [(5, 3, 5, 3), (100, 2, 4, 2)])
def test_a_non_finite_weight_stops_at_the_next_log_or_save_and_names_the_layer(
    tmp_path, logging, saving, stopped, kept
):
    model = bert()
    plugin = RobustQ(model, KURE)
    site = plugin.sites[4]
    args = arguments(tmp_path, max_steps=9, logging_steps=logging, save_strategy="steps", save_steps=saving)
    trainer = RobustTrainer(
        model=model, args=args, train_dataset=text(), robustq=plugin, sweep=(), callbacks=[Poison(site, 3)]
    )
    with pytest.raises(FloatingPointError, match=f"non-finite values in {site.name} since step 3"):
        trainer.train()
    assert trainer.state.global_step == stopped
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{kept}"]
    saved = load_file(tmp_path / f"checkpoint-{kept}" / "model.safetensors")
    assert all(bool(t.isfinite().all()) for t in saved.values())
    with pytest.raises(FloatingPointError):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_data_parallel_is_refused_with_the_launch_command(tmp_path):
    args = arguments(tmp_path)
    model = bert()
    trainer = RobustTrainer(model=model, args=args, train_dataset=text(), robustq=KURE, sweep=())
    args._n_gpu = 2
    with pytest.raises(ValueError, match="accelerate launch"):
        trainer.train()
    with pytest.raises(ValueError, match="accelerate launch"):
        RobustTrainer(model=bert(), args=args, train_dataset=text(), robustq=KURE, sweep=())


def test_sweep_misuse_is_refused_in_a_line(tmp_path):
    def build(model=None, args=None, **options):
        model = model or bert()
        return RobustTrainer(
            model=model,
            args=args or arguments(tmp_path),
            train_dataset=text(),
            eval_dataset=text(6),
            robustq=KURE,
            **options,
        )

    with pytest.raises(ValueError, match="every must be at least 1"):
        build(sweep_options={"every": 0})
    with pytest.raises(ValueError, match="batch_eval_metrics"):
        build(args=arguments(tmp_path, batch_eval_metrics=True))
    with pytest.raises(ValueError, match="cannot read setting 'x4'"):
        build(sweep=["x4"])
    with pytest.raises(ValueError, match="another model"):
        RobustTrainer(model=bert(), args=arguments(tmp_path), robustq=RobustQ(bert(), KURE))


def evaluator(folder, model=None, compute_metrics=compute_accuracy, eval_dataset=None, sweep=("fp", "w4"), **options):
    return RobustTrainer(
        model=model or bert(), args=arguments(folder, eval_strategy="epoch", **options),
        train_dataset=eval_dataset if model else text(),
        eval_dataset=eval_dataset if eval_dataset is not None else text(6), robustq=KURE, sweep=list(sweep),
        compute_metrics=compute_metrics,
    )  # fmt: skip


def test_evaluate_before_train_calibrates_and_adds_to_the_history_of_the_folder(tmp_path):
    config = RobustQConfig.from_dict({**KURE.to_dict(), "weights": {"bits": 8}, "activations": {"bits": 8}})

    def build():
        return RobustTrainer(
            model=bert(), args=arguments(tmp_path), train_dataset=text(), eval_dataset=text(6), robustq=config,
            sweep=["fp", "trained", "w4a4"], compute_metrics=compute_accuracy,
        )  # fmt: skip

    metrics = build().evaluate()
    assert metrics["eval_trained_loss"] == pytest.approx(metrics["eval_fp_loss"], rel=0.05)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_trained_loss"], rel=1e-5)
    build().evaluate()
    assert len(load_sweeps(tmp_path / "robustq_sweep.json")) == 2


def test_a_language_model_is_swept_by_its_loss_without_keeping_logits(tmp_path, monkeypatch):
    asked = []
    original = RobustTrainer.prediction_step
    monkeypatch.setattr(
        RobustTrainer,
        "prediction_step",
        lambda self, model, inputs, prediction_loss_only, **k: (
            asked.append(prediction_loss_only) or original(self, model, inputs, prediction_loss_only, **k)
        ),
    )
    data = Rows(tokens(batch=8))
    options = {"metric_for_best_model": "eval_worst", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="set greater_is_better=False"):
        evaluator(tmp_path, gpt2(), None, data, **options)
    trainer = evaluator(tmp_path, gpt2(), None, data, greater_is_better=False, **options)
    trainer.train()
    logs = {key: value for log in trainer.state.log_history for key, value in log.items()}
    assert logs["eval_worst"] == max(logs["eval_fp_loss"], logs["eval_w4_loss"]) and all(asked)


def test_batch_norms_are_estimated_on_augmented_training_samples(tmp_path):
    """Against statistics taken by hand, in the network's own training mode, of the same samples, augmented or not."""
    model, train, held_out = resnet().eval(), pictures(32), pictures(12, seed=1).evaluation()
    plain = copy.deepcopy(model)

    def mean_logit(prediction):
        return {"accuracy": float(np.mean(prediction.predictions, dtype=np.float64))}

    trainer = RobustTrainer(
        model=model, args=arguments(tmp_path), train_dataset=train, eval_dataset=held_out, robustq=KURE,
        sweep=["fp/bn"], compute_metrics=mean_logit,
    )  # fmt: skip
    trainer.evaluate()

    def by_hand(dataset):
        twin = copy.deepcopy(plain).train()
        for norm in batch_norms(twin).values():
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            twin(torch.stack([item["pixel_values"] for item in some_of(dataset, 8, seed=0)]))
            logits = twin.eval()(torch.stack([item["pixel_values"] for item in held_out])).logits
        return float(logits.double().mean())

    measured = trainer.sweep_callback.sweeps[0].value("fp/bn")
    assert measured == pytest.approx(by_hand(train), rel=1e-5)
    assert measured != pytest.approx(by_hand(train.evaluation()), rel=1e-2)


def published(folder, batch):
    """The logits of a folder as transformers alone would load it: nothing of ours among its tensors."""
    tensors = {name: v for name, v in load_file(folder / "model.safetensors").items() if "stages" not in name}
    model = bert().eval()
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    with torch.no_grad():
        return model(**batch).logits


def test_averages_are_evaluated_swept_saved_and_kept_through_the_best_model(tmp_path):
    """Every folder gives the averaged network of its step; the trainer ends with that of the best one."""
    torch.manual_seed(0)
    batch, seen = tokens(labels=3, batch=4), {}

    class Averaged(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            plugin = trainer.robustq
            with torch.no_grad(), plugin.averaged():
                plugin.model.eval()
                seen[state.global_step] = plugin.model(**batch).logits
            plugin.model.train()

    def first_is_best(prediction):  # the accuracy falls from step to step
        return {"accuracy": 1.0 / (1 + trainer.state.global_step)}

    args = arguments(
        tmp_path, max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy", greater_is_better=True, learning_rate=0.5,
    )  # fmt: skip
    trainer = RobustTrainer(
        model=bert(), args=args, train_dataset=text(), eval_dataset=text(6), sweep=["fp"], ema={"decay": 0.5},
        robustq={"satnl": {}, "calibration_samples": 8}, compute_metrics=first_is_best, callbacks=[Averaged()],
    )  # fmt: skip
    trainer.train()
    for step, logits in seen.items():
        torch.testing.assert_close(published(tmp_path / f"checkpoint-{step}", batch), logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[1], seen[3], atol=1e-3)
    trainer.save_model(str(tmp_path / "final"))
    torch.testing.assert_close(published(tmp_path / "final", batch), seen[1], rtol=1e-4, atol=1e-5)
    rows = [sweep.rows[0].metrics["loss"] for sweep in trainer.sweep_callback.sweeps]
    logged = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert rows == pytest.approx(logged, rel=1e-5)
    own = trainer.evaluate()["eval_loss"]
    assert own == pytest.approx(logged[0], rel=1e-5)
    with torch.no_grad():
        raw = trainer.model.eval()(**batch).logits
    assert not torch.allclose(raw, seen[1], atol=1e-3)


def test_two_passes_of_the_trainer_are_those_of_a_loop(tmp_path):
    """Accumulation over an uneven epoch, and clipping; the logged loss is that at the weights themselves."""
    from hf_robustq import ASAM

    data, model = Rows(tokens(batch=24)), gpt2()
    plain = copy.deepcopy(model)
    args = arguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_grad_norm=0.5,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = RobustTrainer(
        model=model, args=args, train_dataset=data, robustq={"calibration_samples": 4}, sweep=(), asam={"rho": 0.5}
    )
    trainer.train()
    optimizer, asam = torch.optim.SGD(plain.parameters(), lr=0.05), ASAM(plain, rho=0.5)
    plain.train()
    losses = []
    for start, count in ((0, 4), (16, 2)):
        total = 0.0
        for i in range(count):
            rows = [data[j] for j in range(start + 4 * i, start + 4 * i + 4)]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

            def once(batch=batch, count=count):
                loss = plain(**batch).loss / count
                loss.backward()
                return loss.detach()

            total += float(asam(once))
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group, rate in zip(optimizer.param_groups, [0.05 * (1 - len(losses) / 2)], strict=True):
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(losses, rel=1e-3)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(weights(model)[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_two_passes_under_bfloat16(tmp_path):
    data, model = text(24), bert()
    args = arguments(tmp_path, bf16=True, learning_rate=0.1, num_train_epochs=4)
    trainer = RobustTrainer(
        model=model,
        args=args,
        train_dataset=data,
        robustq=SECOND_PAPER,
        sweep=(),
        asam={"rho": 0.2},
        ema={"decay": 0.5},
    )
    start = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < start
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_options_of_two_passes_and_averages_are_checked(tmp_path):
    def build(**options):
        return RobustTrainer(model=bert(), args=arguments(tmp_path), train_dataset=text(), robustq=KURE, **options)

    with pytest.raises(ValueError, match="unknown option of asam 'roh': did you mean 'rho'"):
        build(asam={"roh": 1.0})
    with pytest.raises(ValueError, match="asam.rho must be a number above 0"):
        build(asam={"rho": 0})
    with pytest.raises(ValueError, match="decay must be"):
        build(ema={"decay": 2})
    model = bert()
    closing = RobustTrainer(
        model=model, args=arguments(tmp_path), train_dataset=text(), robustq=KURE, asam={"rho": 1.0},
        optimizers=(torch.optim.LBFGS(model.parameters()), None),
    )  # fmt: skip
    with pytest.raises(ValueError, match="asam: LBFGS calls the model itself"):
        closing.train()
    model = bert()
    for rho in (0, 1.0):  # corrected on the same model
        with pytest.raises(ValueError, match="rho must be") if not rho else nullcontext():
            RobustTrainer(model=model, args=arguments(tmp_path), train_dataset=text(), robustq=KURE, asam={"rho": rho})


def test_a_stock_trainer_that_cannot_keep_the_stored_weights_is_refused(tmp_path):
    model = bert()
    plugin = RobustQ(model, {"satnl": {}, "calibration_samples": 8})
    plugin.calibrate([tokens(labels=3)], lambda model, batch: model(**batch))
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    for resume in (None, str(tmp_path / "checkpoint-1")):
        trainer = Trainer(model=model, args=args, train_dataset=text(), callbacks=[RobustQCallback(plugin)])
        with pytest.raises(ValueError, match="use RobustTrainer") if resume else nullcontext():
            trainer.train(resume_from_checkpoint=resume)


def test_a_checkpoint_of_an_older_config_goes_on(tmp_path):
    """A key that came later is at its default there."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    RobustTrainer(model=bert(), args=args, train_dataset=text(), robustq=KURE, sweep=()).train()
    file = tmp_path / "checkpoint-1" / "config.json"
    saved = json.loads(file.read_text())
    del saved["quantization_config"]["satnl"], saved["quantization_config"]["regularizers"][0]["every"]
    file.write_text(json.dumps(saved))
    again = RobustTrainer(model=bert(), args=args, train_dataset=text(), robustq=KURE, sweep=())
    assert again.train(resume_from_checkpoint=str(file.parent)).global_step == 2


def test_several_metrics_without_accuracy_are_all_logged(tmp_path, caplog):
    def metrics(prediction):
        return {"f1": 0.5, "em": 0.2, "confusion": np.eye(3), "note": np.float32(1)}

    trainer = evaluator(tmp_path, compute_metrics=metrics, sweep=["fp", "w4", "w2"])
    trainer.train()
    logs = {key: value for log in trainer.state.log_history for key, value in log.items()}
    assert logs["eval_w4_em"] == 0.2 and logs["eval_robustness"] == 0.5 and "eval_w4_confusion" not in logs
    assert "eval_robustness and eval_worst are of 'f1'" in caplog.text
    chosen = evaluator(tmp_path / "em", compute_metrics=metrics, metric_for_best_model="eval_em", sweep=["w4", "w2"])
    chosen.train()
    assert chosen.sweep_callback.summary(chosen.sweep_callback.sweeps[-1], "eval")["eval_robustness"] == 0.2


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from (text(10)[i] for i in range(10))


def test_an_iterable_evaluation_set(tmp_path):
    trainer = evaluator(tmp_path, eval_dataset=Stream())
    trainer.train()
    assert trainer.sweep_callback.sweeps[0].rows[0].samples == 10
    some = RobustTrainer(
        model=bert(), args=arguments(tmp_path / "b", per_device_eval_batch_size=4), train_dataset=text(),
        eval_dataset=Stream(), robustq=KURE, sweep=["w4"], sweep_options={"max_samples": 6},
    )  # fmt: skip
    some.evaluate()
    row = some.sweep_callback.sweeps[0].rows[0]
    assert row.samples == 8 and row.subset == "the first 2 batches"


def test_every_second_evaluation_is_the_same_after_a_resume(tmp_path):
    def build(folder, *callbacks):
        torch.manual_seed(0)
        args = arguments(
            folder, num_train_epochs=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=3
        )
        return RobustTrainer(
            model=bert(), args=args, train_dataset=text(), eval_dataset=text(6), robustq=KURE, sweep=["w4"],
            sweep_options={"every": 2}, compute_metrics=compute_accuracy, callbacks=list(callbacks),
        )  # fmt: skip

    whole = build(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "parts", StopAt(4)).train()
    resumed = build(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert [s.step for s in resumed.sweep_callback.sweeps] == [s.step for s in whole.sweep_callback.sweeps] == [1, 3, 5]


def test_learning_rate_schedule_counts_real_epochs_under_max_steps(tmp_path):
    args = arguments(tmp_path, max_steps=12, learning_rate=1.0)  # 3 steps an epoch
    schedule = {"name": "step", "every": 2}
    config = RobustQConfig(calibration_samples=8)
    trainer = RobustTrainer(
        model=bert(), args=args, train_dataset=text(), robustq=config, sweep=(), lr_schedule=schedule
    )
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([1.0] * 6 + [0.1] * 6)


def test_the_card_of_a_run_is_about_the_best_checkpoint(tmp_path):
    trainer = evaluator(
        tmp_path,
        num_train_epochs=3,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="apache-2.0")
    best = next(s for s in trainer.sweep_callback.sweeps if s.step == trainer.state.best_global_step)
    card = (tmp_path / "README.md").read_text().split("## During")[0]
    assert f"| eval | {100 * best.value('fp'):.2f} | {100 * best.value('w4'):.2f} |" in card and "apache-2.0" in card


def test_nan_in_a_weight_that_is_no_site_is_found_too(tmp_path):
    model = bert()
    args = arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=3, logging_steps=100)
    trainer = RobustTrainer(model=model, args=args, train_dataset=text(), robustq=KURE, sweep=())

    class PoisonHead(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                model.classifier.weight.data[0, 0] = float("inf")

    trainer.add_callback(PoisonHead())
    with pytest.raises(FloatingPointError, match=r"classifier\.weight since step 4"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_refused_construction_can_be_corrected_on_the_same_model(tmp_path):
    model = bert()
    for wrong in ({"sweep": ["x4"]}, {"sweep": ["w4"], "sweep_options": {"every": 0}}):
        with pytest.raises(ValueError, match="cannot read|at least 1"):
            RobustTrainer(model=model, args=arguments(tmp_path), train_dataset=text(), robustq=KURE, **wrong)
    RobustTrainer(model=model, args=arguments(tmp_path), train_dataset=text(), robustq=KURE, sweep=["w4"])
