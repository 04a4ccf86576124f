"""The callback that sweeps the bit-widths at every evaluation."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from hf_robustq.calibrate import undisturbed
from hf_robustq.plugin import RobustQ
from hf_robustq.products import Products, ProductWatch
from hf_robustq.report import SWEEP_FILE
from hf_robustq.report.chart import less_is_better
from hf_robustq.sweep import (
    DEFAULT_SETTINGS,
    Calibration,
    Row,
    Setting,
    Sweep,
    load_sweeps,
    parse_settings,
    robustness,
    save_sweeps,
    sweep,
)
from hf_robustq.trainer.batches import (
    calibration_batches,
    counted_batches,
    forward,
    some_of,
    with_real_samples,
)
from hf_robustq.trainer.figures import send_figures
from hf_robustq.trainer.predictions import predicted, scores

logger = logging.getLogger(__name__)

SAMPLES = "number of samples"  # the key under which `score` in `run` hands it on


class BitWidthSweepCallback(TrainerCallback):
    """Runs a sweep after every evaluation and adds its rows to the evaluation's metrics.

    With prefix `eval`: `eval_w4_accuracy` for each setting and metric, `eval_robustness` (area under the
    weight-only curve) and `eval_worst` (the worst setting), all usable as `metric_for_best_model` and
    logged to whatever `report_to` names. Several evaluation sets each get their own.

    trainer       any Trainer; its dataloaders, `prediction_step` and `compute_metrics` are used
    settings      what to measure (see `Setting`)
    every         sweep at every n-th evaluation of a set
    max_samples   on a fixed random subset of that many samples (said in each row)
    metric        what robustness and worst are of; default: see `main_metric`
    greater_is_better   default: yes, unless the metric is a loss, a perplexity or an error rate (wer, cer)
    calibration_dataset   training samples, with the evaluation transform, for activation steps and "lapq"; default:
                  the Trainer's training set (which "/bn" reads, augmentation included, where there is one)
    limit         bytes of batches kept at a time
    lapq_iterations   rounds of LAPQ's search, at every sweep anew
    ignore_keys   outputs of the model that are no predictions; `RobustTrainer` knows those of `evaluate` and `train`

    It goes first among the Trainer's callbacks, so that each of them finds its figures. The predictions of every
    setting are kept until the end of a set: give the Trainer a `preprocess_logits_for_metrics` that keeps only what
    `compute_metrics` needs.
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
        lapq_iterations: int = 2,
        ignore_keys: Sequence[str] | None = None,
    ) -> None:
        self.trainer = trainer
        plugin = plugin if plugin is not None else getattr(trainer, "robustq", None)
        if not isinstance(plugin, RobustQ):
            raise ValueError("BitWidthSweepCallback needs a RobustQ: pass plugin=")
        self.plugin = plugin
        self.settings = parse_settings(settings)
        self.every, self.max_samples = every, max_samples
        self.metric, self.greater_is_better = metric, greater_is_better
        self.calibration_dataset = calibration_dataset
        self.limit, self.lapq_iterations = limit, lapq_iterations
        self.ignore_keys = None if ignore_keys is None else list(ignore_keys)
        self.added: set[str] = set()
        self.file = Path(str(trainer.args.output_dir)) / SWEEP_FILE
        self.sweeps: list[Sweep] = []
        self._told = False
        self._check_arguments()

    def _check_arguments(self) -> None:
        args = self.trainer.args
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every!r}")
        for name in ("batch_eval_metrics", "include_for_metrics"):
            if getattr(args, name):
                raise ValueError(f"the sweep gathers predictions by setting: it cannot be used with {name}")
        best = args.metric_for_best_model or ""
        keys = "|".join(re.escape(setting.key) for setting in self.settings)
        if self.every > 1 and re.fullmatch(rf".*_(worst|robustness|({keys})_.+)", best):
            raise ValueError(
                f"metric_for_best_model={best!r} comes from the sweep: it needs every=1, got every={self.every}"
            )
        if self.trainer.compute_metrics is None:
            self._check_direction("loss", self.greater_is_better or False)

    def _check_direction(self, metric: str, greater: bool) -> None:
        args = self.trainer.args
        best = args.metric_for_best_model or ""
        if best.endswith(("_worst", "_robustness")) and args.greater_is_better is not greater:
            raise ValueError(
                f"{best} is in units of {metric}: set greater_is_better={greater} in the training arguments"
            )

    def come_first(self) -> None:
        """Be the first of the Trainer's callbacks."""
        handler = self.trainer.callback_handler
        if self in handler.callbacks and handler.callbacks[0] is not self:
            handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.come_first()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """A fresh run starts its own history; a resumed one keeps what was measured up to here."""
        self.come_first()
        known = load_sweeps(self.file) if state.global_step and self.file.exists() else []
        self.sweeps = [sweep for sweep in known if (sweep.step or 0) <= state.global_step]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        metrics: dict[str, float] = kwargs["metrics"]
        prefix = next((key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")), "eval")
        earlier = sum(f"{prefix}_runtime" in log for log in state.log_history) - 1  # this one is logged already
        if self.trainer.is_in_train and earlier % self.every:
            return
        if not self.sweeps and not self.trainer.is_in_train and self.file.exists():
            self.sweeps = load_sweeps(self.file)
        with self.plugin.averaged():
            result = replace(self.run(kwargs["eval_dataloader"], prefix), layers=self.plugin.telemetry())
        self.sweeps.append(result)
        if self.trainer.is_world_process_zero():
            save_sweeps(self.sweeps, self.file)
        extra = {f"{prefix}_{Setting.parse(r.setting).key}_{k}": v for r in result.rows for k, v in r.metrics.items()}
        extra |= self.summary(result, prefix)
        self.added |= extra.keys()
        self.trainer.log(dict(extra))
        metrics.update(extra)
        if self.trainer.is_world_process_zero():
            send_figures(self.trainer, result, self.main_metric(result.rows)[0])

    def run(self, dataloader: DataLoader, prefix: str = "eval") -> Sweep:
        """Sweep over a prepared dataloader; returns the rows."""
        trainer, plugin = self.trainer, self.plugin
        context: dict[str, Any] = {"seed": trainer.args.seed}
        calibration = None
        if any(setting.activations or setting.needs_calibration for setting in self.settings):
            dataset = self.calibration_dataset if self.calibration_dataset is not None else trainer.train_dataset
            samples = plugin.config.calibration_samples
            counted = list(counted_batches(trainer, dataset, samples, plugin.config.seed))
            batches = [batch for batch, _ in counted]
            if any(setting.activations for setting in self.settings):
                plugin.observe(batches, forward(trainer), activations=True)
            if any(setting.needs_calibration for setting in self.settings):
                run, augmented = forward(trainer), []
                if any(setting.reestimate for setting in self.settings):
                    dataset = dataset if trainer.train_dataset is None else trainer.train_dataset
                    with undisturbed(plugin.model):  # augmentation may draw from the global RNGs
                        found = calibration_batches(trainer, dataset, samples, plugin.config.seed, augmented=True)
                        augmented = list(found)
                calibration = Calibration(
                    batches, lambda model, batch: run(model, batch)[0], self.lapq_iterations, augmented
                )
            context["calibration_samples"] = sum(count for _, count in counted)
        dataloader, batches, subset = self._subset(dataloader)
        try:
            total = len(dataloader) * len(self.settings)
        except TypeError:  # an iterable dataset
            total = None
        quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        with tqdm(total=total, desc="sweep", leave=False, disable=quiet) as bar:

            def predict(model: Any, batch: tuple[Any, int, int]) -> Any:
                bar.update()
                with self._seeing_products():
                    return predicted(trainer, model, *batch, self.ignore_keys), batch[1]

            def score(parts: list[Any]) -> dict[str, float]:
                found, real = zip(*parts, strict=True)
                return {**scores(trainer, found), SAMPLES: float(sum(real))}

            measured = sweep(
                plugin,
                batches,
                predict,
                score,
                self.settings,
                model=trainer.model,
                limit=self.limit,
                calibration=calibration,
                seed=plugin.config.seed,
            )
        products = plugin.products
        assert products is not None
        if products.sentence:
            context["products"] = products.sentence
        rows = []
        for s in self.settings:
            values = measured[s.name]
            samples = int(values.pop(SAMPLES))
            bits: dict[str, Any] = {"weights": s.weights, "activations": s.activations}
            if s.trained:
                bits = plugin.trained_bits()
            where = {"samples": samples, "dataset": prefix, "subset": subset, "staged": products.share}
            rows.append(Row(setting=s.name, **bits, metrics=values, **where))
        return Sweep(rows=rows, epoch=trainer.state.epoch, step=trainer.state.global_step, context=context)

    def _subset(self, dataloader: DataLoader) -> tuple[DataLoader, Iterator[tuple[Any, int, int]], str]:
        """(dataloader, its batches, words for the card) of at most `max_samples` samples."""
        seed, limit = self.plugin.config.seed, self.max_samples
        if limit is not None and isinstance(dataloader.dataset, IterableDataset):
            batches = with_real_samples(self.trainer, dataloader)
            args = self.trainer.args
            count = math.ceil(limit / (args.per_device_eval_batch_size * args.world_size))
            return dataloader, itertools.islice(batches, count), f"the first {count} batches"
        if limit is not None and limit < (size := len(dataloader.dataset)):  # type: ignore[arg-type]
            dataloader = self.trainer.get_test_dataloader(some_of(dataloader.dataset, limit, seed))
            return dataloader, with_real_samples(self.trainer, dataloader), f"{limit} of {size}, seed {seed}"
        return dataloader, with_real_samples(self.trainer, dataloader), "all"

    @contextmanager
    def _seeing_products(self) -> Iterator[None]:
        """The plugin learns which weights are multiplied by, where no calibration has told it."""
        if self.plugin.products is not None:
            yield
            return
        with ProductWatch(self.plugin.model) as watch:
            yield
        self.plugin.know(Products.of(self.plugin.model, self.plugin.sites, watch.names))

    def main_metric(self, rows: Sequence[Row]) -> tuple[str, bool]:
        """The metric robustness and worst are of, and whether more of it is better.

        `metric`, else the one `metric_for_best_model` names, else accuracy, else the first that is no loss.
        """
        names = list(rows[0].metrics)
        best = (self.trainer.args.metric_for_best_model or "").removeprefix(f"{rows[0].dataset}_")
        others = [name for name in names if name != "loss"] or names
        metric = self.metric or next((name for name in (best, "accuracy") if name in others), others[0])
        if metric not in names:
            raise ValueError(f"metric {metric!r} is not among those computed: {', '.join(names)}")
        if self.metric is None and metric not in (best, "accuracy") and len(others) > 1 and not self._told:
            self._told = True
            logger.warning("eval_robustness and eval_worst are of %r; choose with metric=, one of %s", metric, others)
        greater = self.greater_is_better if self.greater_is_better is not None else not less_is_better(metric)
        return metric, greater

    def summary(self, result: Sweep, prefix: str) -> dict[str, float]:
        metric, greater = self.main_metric(result.rows)
        self._check_direction(metric, greater)
        area = robustness(result.rows, metric)
        worst = (min if greater else max)(row.metrics[metric] for row in result.rows)
        return {f"{prefix}_worst": worst, **({} if area is None else {f"{prefix}_robustness": area})}
