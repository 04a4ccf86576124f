"""What there is to report: folders of training, of `robustq sweep`, and files of `robustq analyze`, read alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robustq.files import read_json, read_model
from hf_robustq.shapes import check
from hf_robustq.size import SIZE
from hf_robustq.sweep import Sweep, load_measured, load_sweeps

SWEEP_FILE = "robustq_sweep.json"
RUN_FILE = "robustq_run.json"
WEIGHTS_FILE = "robustq_weights.json"
STATE_FILE = "trainer_state.json"
ROWS_FILE = "rows.json"

TEXT = (str, None)
FACTS = {
    "name?": TEXT, "base_model?": TEXT, "datasets?": (str, [str], None), "dataset?": TEXT, "license?": TEXT,
    "tags?": [str], "language?": (str, [str], None), "task?": TEXT, "seed?": int, "command?": TEXT,
    "settings?": dict, "versions?": {str: str}, "metric?": str, "step?": (int, None), "config?": dict,
    "size?": (SIZE, None),
}  # fmt: skip
HISTOGRAMS = {
    str: (
        {"kurtosis": float, "counts": [float, ...], "largest": float},
        {"kurtosis": float, "counts": [float, ...], "edges": [float, ...]},
    )
}
WEIGHTS = {"before?": HISTOGRAMS, "after?": HISTOGRAMS}
STATE = {"log_history?": [{"epoch?": (float, None), "step?": float}]}
RESUMED = {**STATE, "global_step": int, "max_steps?": int, "epoch?": (float, None)}
METRICS = {str: float}
ANALYSIS = {
    "model?": TEXT, "statistics?": HISTOGRAMS, "size?": (SIZE, None),
    "settings?": {str: {"sensitivity?": {str: {"only": METRICS, "without": METRICS}}}},
}  # fmt: skip
"""What the files of a run hold: see `hf_robustq.shapes`."""


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
    if (path / SWEEP_FILE).exists():
        return [_training(path)]
    if (path / ROWS_FILE).exists():
        measured = load_measured(path / ROWS_FILE)
        metrics = {model: next(iter(sweep.rows[0].metrics), "loss") for model, sweep in measured.items()}
        return [
            Run(name=Path(model).name, source=path, sweeps=[sweep], facts={"metric": metrics[model]})
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
    facts = read_facts(folder / RUN_FILE) if (folder / RUN_FILE).exists() else {}
    weights = _checked(folder / WEIGHTS_FILE, WEIGHTS) if (folder / WEIGHTS_FILE).exists() else {}
    state = folder / STATE_FILE
    from transformers.trainer_utils import get_last_checkpoint  # which imports PEFT where that is installed

    if not state.exists() and (checkpoint := get_last_checkpoint(str(folder))):
        state = Path(checkpoint) / STATE_FILE
    log = _checked(state, STATE).get("log_history", []) if state.exists() else []
    sweeps = load_sweeps(folder / SWEEP_FILE)
    if not sweeps:
        raise ValueError(f"{folder / SWEEP_FILE} is empty: evaluate the model once")
    return Run(name=folder.name, source=folder, sweeps=sweeps, facts=facts, log=log, weights=weights)


def read_facts(path: Path) -> dict[str, Any]:
    """A `RUN_FILE`. Raises `ValueError`, in one line, for anything else."""
    return _checked(path, FACTS)


def check_resumable(folder: Path, checkpoint: Path | None) -> None:
    """Raise `ValueError`, in one line, where a file that a resumed run reads is damaged."""
    if checkpoint is not None and (checkpoint / "config.json").exists():
        read_model(checkpoint)
    for file, shape in ((folder / WEIGHTS_FILE, WEIGHTS), (checkpoint and checkpoint / STATE_FILE, RESUMED)):
        if file is not None and file.exists():
            _checked(file, shape)
    if (folder / SWEEP_FILE).exists():
        load_sweeps(folder / SWEEP_FILE)


def _checked(path: Path, shape: Any) -> Any:
    values = read_json(path)
    try:
        check(values, shape)
    except ValueError as error:
        raise ValueError(f"{path} is not as this version writes it ({error}): make it again, or remove it") from None
    return values


def _analysis(path: Path) -> Run:
    values = read_json(path)
    if not isinstance(values, dict) or not {"settings", "statistics", "quantizers", "sharpness"} & values.keys():
        raise ValueError(f"{path} is no analysis: name a file that robustq analyze wrote, or a folder of a run")
    _checked(path, ANALYSIS)
    return Run(name=Path(str(values.get("model", path.stem))).name, source=path, analysis=values)
