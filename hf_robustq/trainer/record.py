"""What a run leaves behind besides its model, for the card and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.modelcard import TASK_MAPPING

from hf_robustq.card import command_line, training_settings
from hf_robustq.plugin import RobustQ
from hf_robustq.report import WEIGHTS_FILE
from hf_robustq.sweep import read_json, write_json


class Histograms:
    """Those of the weights before the training and after it, into `WEIGHTS_FILE`.

    Gathered on every process, written by one (`write`). A resumed run keeps those of its beginning.
    """

    def __init__(self, plugin: RobustQ, folder: str | Path, resumed: bool, write: bool) -> None:
        self.plugin, self.file, self.write = plugin, Path(folder) / WEIGHTS_FILE, write
        if resumed:
            self.before = read_json(self.file).get("before", {}) if self.file.is_file() else {}
        else:
            self.before = plugin.histograms()
            self._save()

    def add_end(self) -> None:
        """What the weights are like now."""
        self._save(after=self.plugin.histograms())

    def _save(self, **more: Any) -> None:
        if self.write:
            write_json({"before": self.before, **more}, self.file, indent=None)


def card_facts(trainer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `write_card` but for the sweeps; `given`: those of `Trainer.create_model_card`."""
    args, plugin, callback = trainer.args, trainer.robustq, trainer.sweep_callback
    base = given.get("finetuned_from")
    if base is None:
        base = getattr(getattr(trainer.model, "config", None), "_name_or_path", "") or ""
        base = base if "/" in base and not Path(base).exists() else None
    tags, tasks = given.get("tags") or [], given.get("tasks")
    return {
        "name": given.get("model_name"),
        "base_model": base,
        "datasets": given.get("dataset_tags"),
        "dataset": given.get("dataset"),
        "license": given.get("license"),
        "tags": [tags] if isinstance(tags, str) else list(tags),
        "language": given.get("language"),
        "task": task_of(plugin.base_model) if tasks is None else tasks if isinstance(tasks, str) else tasks[0],
        "metric": callback.main_metric(callback.sweeps[-1].rows)[0],
        "seed": args.seed,
        "settings": training_settings(
            args,
            trainer.lr_schedule,
            steps=trainer.scale_lr,
            bits=trainer.bits_lr if plugin.bits.stages() else None,
            asam=trainer.asam_options,
            ema=trainer.ema_options,
        ),
        "command": command_line(),
        "config": plugin.config.to_dict(),
        "step": trainer.state.best_global_step if args.load_best_model_at_end else None,
        "size": plugin.size(),
    }


def task_of(model: Any) -> str | None:
    """What the Hub calls what the model does, by its class."""
    name = type(model).__name__
    return next((task for task, classes in TASK_MAPPING.items() if name in classes.values()), None)
