"""The callback that sweeps the bit-widths at every evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_concat, nested_numpify
from transformers.trainer_utils import EvalPrediction

from hf_robustq.plugin import RobustQ
from hf_robustq.sweep import DEFAULT_SETTINGS, Row, Setting, Sweep, load_sweeps, robustness, save_sweeps, sweep
from hf_robustq.trainer.batches import calibration_batches, count_rows, forward, some_of, with_real_samples

SWEEP_FILE = "robustq_sweep.json"


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
        added = ("worst", "robustness", *(setting.key for setting in self.settings))
        if every > 1 and any(f"_{name}" in best for name in added):
            raise ValueError(
                f"metric_for_best_model={best!r} comes from the sweep: it needs every=1, got every={every}"
            )
        if trainer.args.batch_eval_metrics:
            raise ValueError("the sweep gathers predictions by setting: it cannot be used with batch_eval_metrics=True")
        self.every, self.max_samples = every, max_samples
        self.metric, self.greater_is_better = metric, greater_is_better
        self.calibration_dataset = calibration_dataset
        self.limit = limit
        self.file = Path(str(trainer.args.output_dir)) / SWEEP_FILE
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
                logits = trainer.preprocess_logits_for_metrics(logits, labels)  # pyright: ignore[reportArgumentType]

        def gathered(tensors: Any) -> Any:
            if tensors is None:
                return None
            return _map(lambda tensor: accelerator.gather(tensor)[:real].cpu(), tensors)

        own = count_rows(inputs)
        return gathered(loss.repeat(own) if loss is not None else None), gathered(logits), gathered(labels), real

    def _score(self, predicted: list[tuple[Any, Any, Any, int]]) -> dict[str, float]:
        losses, logits, labels = (_join([one[column] for one in predicted]) for column in range(3))
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


def _join(parts: list[Any]) -> Any:
    """Batches of predictions as one NumPy array (or tuple of them), padded with -100 where lengths differ."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor) and len({part.shape[1:] for part in parts}) == 1:
        return nested_numpify(torch.cat(parts))
    return nested_numpify(functools.reduce(functools.partial(nested_concat, padding_index=-100), parts))


def _map(function: Callable[[torch.Tensor], torch.Tensor], tensors: Any) -> Any:
    if isinstance(tensors, torch.Tensor):
        return function(tensors)
    if isinstance(tensors, Mapping):
        return {key: _map(function, value) for key, value in tensors.items()}
    return type(tensors)(_map(function, value) for value in tensors)
