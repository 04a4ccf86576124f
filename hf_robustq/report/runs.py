"""What there is to report: folders of training, of `robustq sweep`, and files of `robustq analyze`, read alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robustq.sweep import Sweep, load_measured, load_sweeps, read_json

SWEEP_FILE = "robustq_sweep.json"
RUN_FILE = "robustq_run.json"
WEIGHTS_FILE = "robustq_weights.json"
STATE_FILE = "trainer_state.json"
ROWS_FILE = "rows.json"


@dataclass(kw_only=True)
class Run:
    """One model, as far as it is known.

    sweeps    in order of time; the last of each dataset is of the model in the folder
    facts     how it was made: `write_card`'s arguments
    log       the Trainer's `log_history`
    weights   {"before" | "after": {weight: its histogram and moments}}, of the training
    analysis  what `robustq analyze` wrote
    """

    name: str
    source: Path
    sweeps: list[Sweep] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> list[Sweep]:
        """The sweeps of the model in the folder, one of each dataset."""
        step = self.facts.get("step")
        step = self.sweeps[-1].step if step is None and self.sweeps else step
        return list({one.rows[0].dataset: one for one in self.sweeps if one.step == step}.values())

    @property
    def metric(self) -> str:
        """What its curves are of: as the run says, else accuracy, else the first that is no loss."""
        names = list(self.sweeps[-1].rows[0].metrics) if self.sweeps else []
        others = [name for name in names if name != "loss"] or names
        return next((name for name in (self.facts.get("metric"), "accuracy") if name in names), (others or ["loss"])[0])


def read(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in `paths`, each under a name of its own.

    A path is a folder of a training, of several (a recipe's), or of `robustq sweep`, or a file of `robustq analyze`; an
    analysis of one of the folders joins its run. Raises `ValueError`, in one line, for anything else.
    """
    found = [run for path in paths for run in _read(Path(path))]
    trained = {run.source.resolve(): run for run in found if run.source.is_dir()}
    for run in [run for run in found if run.analysis]:
        own = trained.get(Path(str(run.analysis.get("model", ""))).resolve())
        if own is not None and not own.analysis:
            own.analysis = run.analysis
            found.remove(run)
    names = [run.name for run in found]
    for run in found:
        if names.count(run.name) > 1:
            run.name = f"{(run.source if run.source.name != run.name else run.source.resolve().parent).name}/{run.name}"
    seen: dict[str, int] = {}
    for run in found:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
    return found


def _read(path: Path) -> list[Run]:
    if path.is_file():
        return [_analysis(path)]
    if not path.is_dir():
        raise ValueError(f"{path} is not there: name the folder of a run")
    if (path / SWEEP_FILE).is_file():
        return [_training(path)]
    if (path / ROWS_FILE).is_file():
        measured = load_measured(path / ROWS_FILE)
        return [
            Run(name=Path(model).name, source=path, sweeps=[sweep], facts={"metric": next(iter(sweep.rows[0].metrics))})
            for model, sweep in measured.items()
        ]
    inner = [one for one in sorted(path.iterdir()) if (one / SWEEP_FILE).is_file()]
    if inner:
        return sorted(map(_training, inner), key=lambda run: (run.source / SWEEP_FILE).stat().st_mtime)
    raise ValueError(
        f"{path} is no run: it has neither a {SWEEP_FILE} (RobustTrainer with a sweep writes it) nor a {ROWS_FILE} "
        "(robustq sweep)"
    )


def _training(folder: Path) -> Run:
    facts = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    weights = read_json(folder / WEIGHTS_FILE) if (folder / WEIGHTS_FILE).is_file() else {}
    state = folder / STATE_FILE
    from transformers.trainer_utils import get_last_checkpoint  # which imports PEFT where that is installed

    if not state.is_file() and (checkpoint := get_last_checkpoint(str(folder))):
        state = Path(checkpoint) / STATE_FILE
    log = read_json(state).get("log_history", []) if state.is_file() else []
    sweeps = load_sweeps(folder / SWEEP_FILE)
    if not sweeps:
        raise ValueError(f"{folder / SWEEP_FILE} is empty: evaluate the model once")
    return Run(name=folder.name, source=folder, sweeps=sweeps, facts=facts, log=log, weights=weights)


def _analysis(path: Path) -> Run:
    values = read_json(path)
    if not isinstance(values, dict) or not {"settings", "statistics", "quantizers", "sharpness"} & values.keys():
        raise ValueError(f"{path} is no analysis: name a file that robustq analyze wrote, or a folder of a run")
    return Run(name=Path(str(values.get("model", path.stem))).name, source=path, analysis=values)
