"""The report's figures for the trackers that the Trainer reports to: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import logging
from typing import Any

from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from hf_robustq.report import Chart, figure
from hf_robustq.report.charts import by_bits, kurtosis
from hf_robustq.sweep import Sweep

logger = logging.getLogger(__name__)


def send_figures(trainer: Any, sweep: Sweep, metric: str) -> None:
    """Draw a sweep for every tracker that the Trainer has, at its step; nothing without matplotlib."""
    trackers = (TensorBoardCallback, WandbCallback, TrackioCallback)
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, trackers)]
    if not found:
        return
    dataset = sweep.rows[0].dataset
    drawn: dict[str, Chart | None] = {"bits": by_bits({dataset: sweep}, metric), "kurtosis": kurtosis(sweep)}
    for name, chart in drawn.items():
        if chart is None:
            continue
        try:
            picture = figure(chart)
        except ImportError:
            logger.warning("No figures for the trackers, for want of matplotlib: pip install 'hf_robustq[report]'")
            return
        for tracker in found:
            _send(tracker, f"{dataset}/figures/{name}", picture, trainer.state.global_step)


def _send(tracker: Any, name: str, picture: Any, step: int) -> None:
    if isinstance(tracker, TensorBoardCallback):
        if tracker.tb_writer is not None:
            tracker.tb_writer.add_figure(name, picture, step)
    elif isinstance(tracker, WandbCallback):
        import wandb

        if wandb.run is not None:
            wandb.run.log({name: wandb.Image(picture), "train/global_step": step})
    else:
        import numpy as np
        import trackio

        picture.canvas.draw()
        trackio.log({name: trackio.Image(np.asarray(picture.canvas.buffer_rgba())[..., :3])}, step=step)
