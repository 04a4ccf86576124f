"""The callback that drives a `RobustQ` on any Trainer."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_robustq.plugin import RobustQ
from hf_robustq.plugin.adapters import inner
from hf_robustq.plugin.publish import differs, load_state
from hf_robustq.renaming import saves_other_names
from hf_robustq.sharded import is_sharded, uses_deepspeed
from hf_robustq.trainer.resume import by_own_names

logger = logging.getLogger(__name__)


class RobustQCallback(TrainerCallback):
    """Drives a `RobustQ` on any Trainer: strengths at every step, a stop before anything non-finite is saved.

    On a stock Trainer, calibrate first and build the optimizer from `plugin.parameter_groups` where steps
    are learned. `RobustTrainer` does both by itself.
    """

    def __init__(
        self,
        plugin: RobustQ,
        calibrate: Callable[[], None] | None = None,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self.plugin = plugin
        self.calibrate = calibrate
        self.begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if isinstance(kwargs.get("model"), torch.nn.DataParallel) or args.n_gpu > 1:
            raise ValueError(several_gpus(args.n_gpu))
        model = kwargs.get("model")
        if isinstance(model, torch.nn.Module) and inner(model) is self.plugin.base_model:
            self.plugin.follow(model)
        if not self.plugin.calibrated and self.calibrate is not None:
            self.calibrate()
        if not self.plugin.calibrated:
            raise RuntimeError("call plugin.calibrate(batches, forward) before trainer.train(), or use RobustTrainer")
        if self.begin is not None:
            self.begin()
        elif differs(self.plugin) and (self.plugin.ema or state.global_step or args.load_best_model_at_end):
            raise ValueError(
                "with SatNL or averages a checkpoint holds other weights than the run goes on with, which a stock "
                "Trainer does not know: use RobustTrainer, or RobustQMixin before your Trainer class"
            )
        stock = self.begin is None and state.global_step > 0
        if (
            stock
            and not self.plugin.adapted
            and not in_pieces(self.plugin.model)
            and saves_other_names(self.plugin.model)
        ):
            raise ValueError(
                "a stock Trainer does not find the weights of this architecture in a checkpoint, where transformers "
                "gives them other names: resume with RobustTrainer, or RobustQMixin before your Trainer class"
            )
        if stock and self.plugin.adapted:
            logger.warning("a checkpoint of an adapter has the steps apart: plugin.load(checkpoint) takes them over")
        self.plugin.bits.check_phases(state.max_steps)
        if args.load_best_model_at_end and self.plugin.bits.learning():
            raise ValueError(
                "load_best_model_at_end may bring back a model whose bits are not fixed yet: leave it out while waveq "
                "learns bits"
            )
        self.plugin.agree()
        self.plugin.check_optimizer(kwargs.get("optimizer"))
        self.plugin.watch.reset()
        own = {id(p) for p in self.plugin.own_parameters().values()}
        optimizer = kwargs.get("optimizer")
        bits = {id(stage.beta) for stage in self.plugin.bits.stages().values()}
        for group in getattr(optimizer, "param_groups", ()):
            if bits & {id(p) for p in group["params"]} and any(id(p) not in own for p in group["params"]):
                warnings.warn(
                    "bit-widths, numbers up to 8, have the learning rate of the weights and hardly move: use "
                    "RobustTrainer, or pass optimizers=(an optimizer of plugin.parameter_groups(weight_decay), None)",
                    stacklevel=2,
                )
                break
        for group in getattr(optimizer, "param_groups", ()):
            if group.get("weight_decay") and any(id(p) in own for p in group["params"]):
                warnings.warn(
                    "weight decay acts on learned quantizer parameters and pulls them to zero: use RobustTrainer, "
                    "or pass optimizers=(an optimizer of plugin.parameter_groups(weight_decay), None)",
                    stacklevel=2,
                )
                break

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(math.floor((state.epoch or 0) + 1e-6))  # type: ignore[union-attr]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        groups = getattr(kwargs.get("optimizer"), "param_groups", None) or [{}]
        now, start = groups[0].get("lr", 1.0), groups[0].get("initial_lr", 0.0)
        self.plugin.step(
            state.global_step / max(state.max_steps, 1),
            first=True,
            scaler=scaler,
            index=state.global_step,
            learning_rate=now / start if start else 1.0,
            accumulating=args.gradient_accumulation_steps > 1,
        )
        if self.plugin.bits.news and state.is_world_process_zero:
            print(self.plugin.bits.news)
        self.plugin.bits.news = ""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.plugin.end_micro_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.plugin.watch.look(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.plugin.after_optimizer_step()
        if self.plugin.ema is not None and not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.plugin.ema.update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if control.should_log or control.should_save or control.should_evaluate:
            self.plugin.watch.check(state.global_step)

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.begin is None and self.plugin.adapted:  # a stock Trainer saves the adapter only
            self.plugin.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.plugin.end_micro_batch()
        if self.plugin.bits.learning():
            logger.warning("training ended before bits were fixed: a budget is not met, nor do weights lie on levels")
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best(Path(state.best_model_checkpoint))
        self.plugin.watch.check(state.global_step)

    def _load_best(self, checkpoint: Path) -> None:
        """What the Trainer leaves out when it loads the best checkpoint: renamed weights, and those of a state file."""
        if self.plugin.adapted:
            self.plugin.load(checkpoint)
        elif not in_pieces(self.plugin.model) and (state := by_own_names(checkpoint, self.plugin.model)) is not None:
            self.plugin.model.load_state_dict(state)
        if differs(self.plugin):
            load_state(self.plugin, checkpoint)


def in_pieces(model: torch.nn.Module) -> bool:
    """Whether FSDP or DeepSpeed has the weights, and loads them from files of its own."""
    return any(is_sharded(p) or uses_deepspeed(p) for p in model.parameters())


def several_gpus(count: int) -> str:
    return (
        f"{count} GPUs and one process would use nn.DataParallel, which cannot work with staged weights: "
        "start one process per GPU with `accelerate launch <script>`, or show one GPU with CUDA_VISIBLE_DEVICES=0"
    )
