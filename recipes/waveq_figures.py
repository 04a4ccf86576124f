"""Figure 7 of the supplement of arXiv 2003.00146: accuracy, task loss and the sine's loss over the epochs of runs.

accelerate launch recipes/waveq_vision.py --preset scratch_vgg11 --dataset_name <cifar10 folder>
python recipes/waveq_figures.py outputs/waveq_scratch_vgg11/without outputs/waveq_scratch_vgg11/with --out docs/figures
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers.trainer_utils import get_last_checkpoint

SHOWN = {"eval_accuracy": "accuracy (%)", "loss": "task loss", "waveq": "WaveQ loss", "bits": "bits, in the mean"}


def history(folder: Path) -> list[dict[str, Any]]:
    """What the Trainer logged, from a run's last checkpoint."""
    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint: train with --save_strategy epoch")
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of trained networks")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logs = {run.name: history(run) for run in args.runs}
    shown = [key for key in SHOWN if any(key in entry for log in logs.values() for entry in log)]
    figure = Figure(figsize=(4.2 * len(shown), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name, log in logs.items():
            points = [
                (entry["epoch"], entry[key] * (100 if key == "eval_accuracy" else 1)) for entry in log if key in entry
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.set(xlabel="epoch", ylabel=SHOWN[key])
        axes.legend()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "waveq_convergence.png"
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
