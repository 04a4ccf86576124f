"""What is shown of a run: a bar, or a line for each log, and a table for each sweep, in place of dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_robustq.card import sweep_table

SHOWN = ("loss", "learning_rate", "kurtosis", "bits")
"""Of a log, what has a place on a bar or a line."""


def show_progress(trainer: Any, name: str, metrics: Sequence[str]) -> None:
    """Replace what the Trainer shows of a run by what is here; `metrics` are those of its tables."""
    bars = not trainer.args.disable_tqdm
    trainer.remove_callback(ProgressCallback if bars else PrinterCallback)
    trainer.add_callback(Bar(name) if bars else Lines(name))
    trainer.add_callback(Tables(trainer, name, metrics))


def brief(logs: dict[str, Any]) -> dict[str, str]:
    """The figures of a log that are shown."""
    return {key: f"{logs[key]:.4g}" for key in SHOWN if key in logs}


class Bar(ProgressCallback):
    """The Trainer's bar, named after the run, with the last figures at its end."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(brief(logs))


class Lines(TrainerCallback):
    """A line for each training log: for a file, which has no bars."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero and "loss" in logs:
            figures = ", ".join(f"{key} {value}" for key, value in brief(logs).items())
            print(f"{self.name}, epoch {state.epoch:.2f}: {figures}", flush=True)


class Tables(TrainerCallback):
    """A table for each sweep; where there is none, a line for each evaluation. Added after the callback that sweeps."""

    def __init__(self, trainer: Any, name: str, metrics: Sequence[str]) -> None:
        self.trainer, self.name, self.metrics = trainer, name, metrics
        self.shown = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if not state.is_world_process_zero:
            return
        metrics, head = kwargs["metrics"], f"{self.name}, epoch {state.epoch or 0:.2f}"
        sweeps = self.trainer.sweep_callback.sweeps if self.trainer.sweep_callback is not None else []
        if len(sweeps) == self.shown or sweeps[-1].step != state.global_step:
            names = [key for key in metrics if key.endswith(("loss", *self.metrics))]
            tqdm.write(f"{head}: " + ", ".join(f"{key} {metrics[key]:.4g}" for key in names))
            return
        self.shown = len(sweeps)
        names = [key for key in metrics if key.endswith(("_robustness", "_worst"))]
        summary = ", ".join([head, *(f"{key} {metrics[key]:.4g}" for key in names)])
        tqdm.write(f"\n{summary}\n{sweep_table(sweeps[-1], self.metrics)}")
