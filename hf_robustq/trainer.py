"""The Trainer's side: callbacks for a stock Trainer, and a mixin for any of its subclasses. Public hooks only."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_concat, nested_numpify
from transformers.trainer_utils import EvalPrediction, RemoveColumnsCollator

from hf_robustq.card import write_card
from hf_robustq.config import RobustQConfig, check_known
from hf_robustq.plugin import RobustQ
from hf_robustq.schedules import LR_SCHEDULES
from hf_robustq.sweep import DEFAULT_SETTINGS, Row, Setting, Sweep, load_sweeps, robustness, save_sweeps, sweep

logger = logging.getLogger(__name__)

SWEEP_FILE = "robustq_sweep.json"


class RobustQCallback(TrainerCallback):
    """Drives a `RobustQ` on any Trainer: strengths at every step, a stop before anything non-finite is saved.

    On a stock Trainer, calibrate first and build the optimizer from `plugin.parameter_groups` where steps
    are learned. `RobustTrainer` does both by itself.
    """

    def __init__(self, plugin: RobustQ) -> None:
        self.plugin = plugin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if isinstance(kwargs.get("model"), torch.nn.DataParallel) or args.n_gpu > 1:
            raise ValueError(several_gpus(args.n_gpu))
        if not self.plugin.calibrated:
            raise RuntimeError("call plugin.calibrate(batches, forward) before trainer.train(), or use RobustTrainer")
        own = {id(p) for p in self.plugin.own_parameters().values()}
        optimizer = kwargs.get("optimizer")
        for group in getattr(optimizer, "param_groups", ()):
            if group.get("weight_decay") and any(id(p) in own for p in group["params"]):
                warnings.warn(
                    "weight decay acts on learned quantizer parameters and pulls them to zero: use RobustTrainer, "
                    "or pass optimizers=(an optimizer of plugin.parameter_groups(weight_decay), None)",
                    stacklevel=2,
                )
                break

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(round(state.epoch or 0, 6).__floor__())  # type: ignore[union-attr]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        self.plugin.step(state.global_step / max(state.max_steps, 1), first=True, scaler=scaler)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.plugin.end_micro_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.plugin.watch.look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if control.should_log or control.should_save or control.should_evaluate:
            self.plugin.watch.check(state.global_step)

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.plugin.end_micro_batch()
        self.plugin.watch.check(state.global_step)


class BitWidthSweepCallback(TrainerCallback):
    """Runs a sweep after every evaluation and adds its rows to the evaluation's metrics.

    With prefix `eval`: `eval_w4_accuracy` for each setting and metric, `eval_robustness` (area under the
    weight-only curve) and `eval_worst` (the worst setting), all usable as `metric_for_best_model` and
    logged to whatever `report_to` names. Several evaluation sets each get their own.

    trainer       any Trainer; its dataloaders, `prediction_step` and `compute_metrics` are used
    settings      what to measure (see `Setting`)
    every         sweep at every n-th evaluation of a set
    max_samples   on a fixed random subset of that many samples (said in each row)
    metric        what robustness and worst are of; default: accuracy, else the only metric there is
    greater_is_better   default: yes, unless the metric is a loss
    calibration_dataset   training samples, with the evaluation transform, for activation steps;
                  default: the Trainer's training set
    limit         bytes of batches kept at a time
    """

    def __init__(
        self,
        trainer: Trainer,
        plugin: RobustQ | None = None,
        settings: Sequence[Setting | str] = DEFAULT_SETTINGS,
        every: int = 1,
        max_samples: int | None = None,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        calibration_dataset: Any = None,
        limit: int = 1 << 30,
    ) -> None:
        self.trainer = trainer
        plugin = plugin if plugin is not None else getattr(trainer, "robustq", None)
        if not isinstance(plugin, RobustQ):
            raise ValueError("BitWidthSweepCallback needs a RobustQ: pass plugin=")
        self.plugin = plugin
        self.settings = [Setting.parse(s) if isinstance(s, str) else s for s in settings]
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}")
        best = trainer.args.metric_for_best_model or ""
        if every > 1 and any(best.endswith(f"_{s.key}_{m}") for s in self.settings for m in (best.split("_")[-1],)):
            raise ValueError(f"metric_for_best_model={best!r} comes from the sweep: it needs every=1, got every={every}")
        if trainer.args.batch_eval_metrics:
            raise ValueError("the sweep gathers predictions by setting: it cannot be used with batch_eval_metrics=True")
        self.every, self.max_samples, self.metric, self.greater_is_better = every, max_samples, metric, greater_is_better
        self.calibration_dataset = calibration_dataset
        self.limit = limit
        self.file = Path(trainer.args.output_dir) / SWEEP_FILE
        self.sweeps: list[Sweep] = []
        self.evaluations: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step and self.file.exists():  # resumed: keep what was measured up to here
            self.sweeps = [s for s in load_sweeps(self.file) if (s.step or 0) <= state.global_step]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        metrics: dict[str, float] = kwargs["metrics"]
        prefix = next((key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")), "eval")
        seen = self.evaluations.get(prefix, 0)
        self.evaluations[prefix] = seen + 1
        if seen % self.every:
            return
        result = self.run(kwargs["eval_dataloader"], prefix)
        self.sweeps.append(result)
        if self.trainer.is_world_process_zero():
            save_sweeps(self.sweeps, self.file)
        extra = {f"{prefix}_{Setting.parse(r.setting).key}_{k}": v for r in result.rows for k, v in r.metrics.items()}
        extra |= self.summary(result, prefix)
        self.trainer.log(dict(extra))
        metrics.update(extra)

    def run(self, dataloader: DataLoader, prefix: str = "eval") -> Sweep:
        """Sweep over a prepared dataloader; returns the rows."""
        trainer, plugin = self.trainer, self.plugin
        if not plugin.calibrated or any(setting.activations for setting in self.settings):
            dataset = self.calibration_dataset if self.calibration_dataset is not None else trainer.train_dataset
            batches = calibration_batches(trainer, dataset, plugin.config.calibration_samples, plugin.config.seed)
            with_activations = any(setting.activations for setting in self.settings)
            plugin.observe(batches, forward(trainer), activations=with_activations)
        subset = "all"
        if self.max_samples is not None and not isinstance(dataloader.dataset, IterableDataset):
            size = len(dataloader.dataset)  # type: ignore[arg-type]
            if self.max_samples < size:
                subset = f"{self.max_samples} of {size}, seed {plugin.config.seed}"
                dataset = some_of(dataloader.dataset, self.max_samples, plugin.config.seed)
                dataloader = trainer.get_test_dataloader(dataset)
        bar = tqdm(
            total=len(dataloader) * len(self.settings),
            desc="sweep",
            leave=False,
            disable=trainer.args.disable_tqdm or not trainer.is_local_process_zero(),
        )
        batches = with_real_samples(trainer, dataloader)
        with bar:
            measured = sweep(
                plugin,
                batches,
                lambda model, batch: self._predict(model, batch, bar),
                self._score,
                self.settings,
                model=trainer.model,
                limit=self.limit,
            )
        rows = [
            Row(
                setting=s.name,
                weights=s.weights,
                activations=s.activations,
                metrics={k: v for k, v in measured[s.name].items() if k != "samples"},
                samples=int(measured[s.name]["samples"]),
                dataset=prefix,
                subset=subset,
            )
            for s in self.settings
        ]
        context = {"seed": trainer.args.seed, "calibration_samples": plugin.config.calibration_samples}
        return Sweep(rows=rows, epoch=trainer.state.epoch, step=trainer.state.global_step, context=context)

    def _predict(self, model: Any, batch: tuple[Any, int], bar: Any) -> tuple[Any, Any, Any, int]:
        inputs, real = batch
        trainer = self.trainer
        loss, logits, labels = trainer.prediction_step(model, dict(inputs), prediction_loss_only=False)
        bar.update()
        accelerator = trainer.accelerator
        if labels is not None:
            labels = accelerator.pad_across_processes(labels, dim=1, pad_index=-100)
        if logits is not None:
            logits = accelerator.pad_across_processes(logits, dim=1, pad_index=-100)
            if trainer.preprocess_logits_for_metrics is not None:
                logits = trainer.preprocess_logits_for_metrics(logits, labels)

        def gathered(tensors: Any) -> Any:
            if tensors is None:
                return None
            return _map(lambda tensor: accelerator.gather(tensor)[:real].cpu(), tensors)

        own = _rows(inputs)
        return gathered(loss.repeat(own) if loss is not None else None), gathered(logits), gathered(labels), real

    def _score(self, predicted: list[tuple[Any, Any, Any, int]]) -> dict[str, float]:
        columns = []
        for column in range(3):
            parts = [one[column] for one in predicted]
            if parts[0] is None:
                columns.append(None)
                continue
            joined = parts[0]
            if isinstance(joined, torch.Tensor) and len({part.shape[1:] for part in parts}) == 1:
                joined = torch.cat(parts)
            else:
                for part in parts[1:]:
                    joined = nested_concat(joined, part, padding_index=-100)
            columns.append(nested_numpify(joined))
        losses, logits, labels = columns
        metrics: dict[str, float] = {}
        if self.trainer.compute_metrics is not None and logits is not None and labels is not None:
            metrics = dict(self.trainer.compute_metrics(EvalPrediction(predictions=logits, label_ids=labels)))
        if losses is not None:
            metrics["loss"] = float(losses.mean())
        return {**{k: float(v) for k, v in metrics.items()}, "samples": float(sum(one[3] for one in predicted))}

    def main_metric(self, rows: Sequence[Row]) -> tuple[str, bool]:
        """The metric robustness and worst are of, and whether more of it is better."""
        names = list(rows[0].metrics)
        metric = self.metric or ("accuracy" if "accuracy" in names else None)
        if metric is None:
            others = [name for name in names if name != "loss"] or names
            if len(others) > 1:
                raise ValueError(f"which metric is the sweep about? pass metric= one of {', '.join(others)}")
            metric = others[0]
        if metric not in names:
            raise ValueError(f"metric {metric!r} is not among those computed: {', '.join(names)}")
        greater = self.greater_is_better if self.greater_is_better is not None else not metric.endswith("loss")
        return metric, greater

    def summary(self, result: Sweep, prefix: str) -> dict[str, float]:
        metric, greater = self.main_metric(result.rows)
        area = robustness(result.rows, metric)
        worst = (min if greater else max)(row.metrics[metric] for row in result.rows)
        return {f"{prefix}_worst": worst, **({} if area is None else {f"{prefix}_robustness": area})}


class RobustQMixin:
    """Put before any Trainer class: `class RobustSeq2SeqTrainer(RobustQMixin, Seq2SeqTrainer): ...`

    robustq              a `RobustQ`, or its config (then, and with `model_init`, it is created here)
    sweep                settings to measure after every evaluation; None: the default ones; (): no sweep
    sweep_options        what else `BitWidthSweepCallback` takes
    calibration_dataset  training samples with the evaluation transform; default: `train_dataset`
    lr_schedule          {"name": one of `LR_SCHEDULES`, and its options}; default: the Trainer's own
    """

    def __init__(
        self,
        *args: Any,
        robustq: RobustQ | RobustQConfig | Mapping[str, Any],
        sweep: Sequence[Setting | str] | None = None,
        sweep_options: Mapping[str, Any] | None = None,
        calibration_dataset: Any = None,
        lr_schedule: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._robustq_config = robustq.config if isinstance(robustq, RobustQ) else robustq
        self.robustq = robustq if isinstance(robustq, RobustQ) else None
        self.lr_schedule = dict(lr_schedule) if lr_schedule else None
        if self.lr_schedule:
            check_known([self.lr_schedule.get("name")], LR_SCHEDULES, "learning-rate schedule")  # type: ignore[list-item]
            known = list(inspect.signature(LR_SCHEDULES[self.lr_schedule["name"]]).parameters)[2:]
            check_known(self.lr_schedule.keys() - {"name"}, known, f"option of {self.lr_schedule['name']}")
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(several_gpus(self.args.n_gpu))
        if self.robustq is None:
            self.robustq = RobustQ(self.model, self._robustq_config)
        elif self.robustq.model is not self.model:
            raise ValueError("robustq belongs to another model: pass the model it was created with")
        self.calibration_dataset = calibration_dataset
        self.robustq_callback = RobustQCallback(self.robustq)
        self.add_callback(self.robustq_callback)
        self.sweep_callback = None
        if sweep is None or len(sweep) > 0:
            options = {"calibration_dataset": calibration_dataset, **(sweep_options or {})}
            settings = DEFAULT_SETTINGS if sweep is None else sweep
            self.sweep_callback = BitWidthSweepCallback(self, self.robustq, settings, **options)
            self.add_callback(self.sweep_callback)

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        self.robustq = RobustQ(model, self._robustq_config)
        for callback in (getattr(self, "robustq_callback", None), getattr(self, "sweep_callback", None)):
            if callback is not None:
                callback.plugin = self.robustq
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Calibrate, so that steps are set before the optimizer and the wrapping; then as ever."""
        if not self.robustq.calibrated:
            config = self.robustq.config
            dataset = self.calibration_dataset if self.calibration_dataset is not None else self.train_dataset
            batches = calibration_batches(self, dataset, config.calibration_samples, config.seed)
            self.robustq.calibrate(batches, forward(self))
        return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The Trainer's own choice, less everything the stages learn."""
        own = set(self.robustq.own_parameters())
        return [name for name in super().get_decay_parameter_names(model) if name not in own]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own scheduler, or `lr_schedule` by the epoch, after a linear warm-up if there is one."""
        if self.lr_schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            options = {key: value for key, value in self.lr_schedule.items() if key != "name"}
            schedule, epochs = LR_SCHEDULES[self.lr_schedule["name"]], self.args.num_train_epochs
            warmup = self.args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                ramp = min(1.0, step / warmup) if warmup else 1.0
                return ramp * schedule(step * epochs / num_training_steps, epochs, **options)

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Training logs also carry the mean kurtosis and each penalty; the loss stays the task's."""
        if "loss" in logs:
            logs.update(self.robustq.metrics())
        super().log(logs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.robustq.watch.check(self.state.global_step)
        super().save_model(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A card that says how the model does at each bit-width; the Trainer's own where nothing was swept.

        Of the arguments, `license`, `finetuned_from` and `dataset` are used.
        """
        if self.sweep_callback is None or not self.sweep_callback.sweeps:
            return super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            sweeps = self.sweep_callback.sweeps
            write_card(
                self.args.output_dir,
                self.robustq.config.to_dict(),
                sweeps,
                self.sweep_callback.main_metric(sweeps[-1].rows)[0],
                seed=self.args.seed,
                base_model=kwargs.get("finetuned_from"),
                dataset=kwargs.get("dataset"),
                license=kwargs.get("license"),
                settings=training_settings(self.args, self.lr_schedule),
            )


class RobustTrainer(RobustQMixin, Trainer):
    """`Trainer` with a `RobustQ`: calibrates by itself, sweeps after every evaluation, writes the card."""


def training_settings(args: Any, lr_schedule: Mapping[str, Any] | None) -> dict[str, Any]:
    """The training arguments that a reader needs to repeat the run."""
    names = ("learning_rate", "weight_decay", "num_train_epochs", "per_device_train_batch_size",
             "gradient_accumulation_steps", "world_size", "max_grad_norm", "bf16", "fp16")  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    schedule = dict(lr_schedule) if lr_schedule else args.lr_scheduler_type
    return {"optimizer": f"{args.optim} {args.optim_args or ''}".strip(), **settings, "lr_schedule": str(schedule)}


def several_gpus(count: int) -> str:
    return (
        f"{count} GPUs and one process would use nn.DataParallel, which cannot work with staged weights: "
        "start one process per GPU with `accelerate launch <script>`, or show one GPU with CUDA_VISIBLE_DEVICES=0"
    )


def forward(trainer: Trainer) -> Callable[[Any, Any], Any]:
    """How a Trainer runs a batch: its own `prediction_step`, so its autocast and its placement."""
    return lambda model, batch: trainer.prediction_step(model, dict(batch), prediction_loss_only=True)


def calibration_batches(trainer: Trainer, dataset: Any, samples: int, seed: int) -> Iterator[Any]:
    """`samples` random training samples in batches, the same on every rank."""
    if dataset is None:
        raise ValueError("calibration needs training data: pass train_dataset or calibration_dataset")
    if not isinstance(dataset, IterableDataset):
        dataset = some_of(dataset, samples, seed)
    collator = trainer.data_collator
    if trainer.args.remove_unused_columns:
        accepted = [*inspect.signature(trainer.model.forward).parameters, *trainer.label_names, "label", "label_ids"]
        collator = RemoveColumnsCollator(collator, accepted, logger=None, model_name=None, description=None)
    loader = DataLoader(dataset, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=collator)
    seen = 0
    for batch in loader:
        yield batch
        seen += _rows(batch)
        if seen >= samples:
            return


def some_of(dataset: Any, samples: int, seed: int) -> Any:
    """A fixed random subset, in the order of the dataset."""
    samples = min(samples, len(dataset))
    generator = torch.Generator().manual_seed(seed)
    indices = sorted(torch.randperm(len(dataset), generator=generator)[:samples].tolist())
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)


def with_real_samples(trainer: Trainer, dataloader: DataLoader) -> Iterator[tuple[Any, int]]:
    """Batches, each with how many of its samples over all ranks are real: the last may be padded with repeats."""
    state, ranks = trainer.accelerator.gradient_state, trainer.args.world_size
    for batch in dataloader:
        real = _rows(batch) * ranks
        if ranks > 1 and state.end_of_dataloader and state.remainder > 0:
            real = state.remainder
        yield batch, real


def _rows(batch: Any) -> int:
    tensors = batch.values() if isinstance(batch, Mapping) else batch
    return next(t.size(0) for t in tensors if isinstance(t, torch.Tensor) and t.dim())


def _map(function: Callable[[torch.Tensor], torch.Tensor], tensors: Any) -> Any:
    if isinstance(tensors, torch.Tensor):
        return function(tensors)
    if isinstance(tensors, Mapping):
        return {key: _map(function, value) for key, value in tensors.items()}
    return type(tensors)(_map(function, value) for value in tensors)
