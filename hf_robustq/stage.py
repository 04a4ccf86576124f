"""Stage: a module that a weight or an activation passes through where it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When in training it is: what a stage may make its schedule, and its random draws, a function of.

    progress       share of training done, in [0, 1]
    step           optimizer steps done
    micro_batch    index of the micro-batch within the step
    learning_rate  now, divided by its value at the start
    seed           of the run
    """

    progress: float = 0.0
    step: int = 0
    micro_batch: int = 0
    learning_rate: float = 1.0
    seed: int = 0


class Stage(nn.Module):
    """Same shape and dtype out as in. Its own tensors keep their dtype under `model.to(torch.bfloat16)`."""

    def at(self, moment: Moment) -> None:
        """Called before each micro-batch of training."""

    def project(self) -> None:
        """Keep what is learned where it makes sense; called after each optimizer step."""

    def restored(self) -> None:
        """Take over what was loaded, or received from rank 0. Raises `ValueError` for nonsense."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)
