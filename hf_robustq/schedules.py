"""Schedules: pure functions, so there is nothing to resume.

Strengths and temperatures follow `progress`, the share of training done, in [0, 1]. Learning rates
follow the epoch, as the papers state them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from hf_robustq.options import Range

Schedule = Callable[[float], float]


def constant(progress: float) -> float:  # noqa: ARG001 (every schedule has this signature)
    """1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """0 at the start, 1 at the end."""
    return progress


def cosine(progress: float) -> float:
    """0 at the start, 1 at the end, flat at both: (1 - cos(pi * progress)) / 2."""
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def linear_decay(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return 1.0 - linear(progress)


def cosine_decay(progress: float) -> float:
    """1 at the start, 0 at the end, flat at both."""
    return 1.0 - cosine(progress)


def rise(time: float, at: float, smoothness: float) -> float:
    """From 0 to 1 about `at`: (1 + tanh((time - at) / smoothness)) / 2 (WaveQ, Fig. 8)."""
    return (1.0 + math.tanh((time - at) / smoothness)) / 2.0


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "linear_decay": linear_decay,
    "cosine_decay": cosine_decay,
}


Every = Annotated[float, Range(0.001, 1e9)]
Factor = Annotated[float, Range(0, 1)]
LearningRate = Annotated[float, Range(0, 1000)]


def step_decay(epoch: float, epochs: float, every: Every = 30, factor: Factor = 0.1) -> float:  # noqa: ARG001
    """Learning-rate multiplier: times `factor` every `every` epochs."""
    return factor ** math.floor(epoch / every + 1e-9)


def exponential_decay(epoch: float, epochs: float, rate: Factor = 0.98) -> float:  # noqa: ARG001
    """Learning-rate multiplier: times `rate` after each epoch."""
    return rate ** math.floor(epoch + 1e-9)


def cosine_steps(epoch: float, epochs: float, every: Every = 50, factor: Factor = 0.1) -> float:
    """Learning-rate multiplier: one half-cosine to 0 over the run, times a step decay."""
    half_cosine = (1.0 + math.cos(math.pi * min(epoch / epochs, 1.0))) / 2.0
    return half_cosine * step_decay(epoch, epochs, every, factor)


LR_SCHEDULES: dict[str, Callable[..., float]] = {
    "step": step_decay,
    "exponential": exponential_decay,
    "cosine_steps": cosine_steps,
}
