"""The training of a staged model: what happens before, between and after micro-batches and optimizer steps."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from accelerate.state import GradientState
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_robustq.calibrate import stages, weight_probe
from hf_robustq.plugin.bits import LearnedBits
from hf_robustq.plugin.stages import carriers
from hf_robustq.quantizers import Oscillation, Quantizer
from hf_robustq.regularizers import Regularizer
from hf_robustq.reparam import network_weight, satnl
from hf_robustq.schedules import SCHEDULES
from hf_robustq.sharded import is_sharded, uses_deepspeed
from hf_robustq.stage import Moment

if TYPE_CHECKING:
    from hf_robustq.plugin.robustq import RobustQ

NOT_LEARNING = (
    "the optimizer does not train {}: build it after RobustQ, from plugin.parameter_groups(weight_decay), "
    "or leave that to RobustTrainer"
)


class Training:
    """Where a run is, told to every stage. The methods are documented at `RobustQ`, which passes its calls on."""

    def __init__(self, plugin: RobustQ) -> None:
        self.plugin = plugin
        self._moment: Moment | None = None
        self._stepping = False
        self._optimized: set[int] = set()
        self._watching: Any = None
        self._checked = False
        self.bits = LearnedBits(plugin)

    def step(
        self,
        progress: float,
        first: bool | None,
        scaler: Any,
        index: int | None,
        learning_rate: float,
        accumulating: bool | None,
    ) -> None:
        if first is None:
            first = bool(GradientState().sync_gradients)
        said = index is not None
        if self._moment is None:
            self.plugin.check_in_place()
        if first:
            index = (self._moment.step + 1 if self._moment else 0) if index is None else index
            self.after_optimizer_step()
            self._watch_optimizers()
            self._stepping = True
            self._keep(GradientState().num_steps > 1 if accumulating is None else accumulating)
            seed = self.plugin.config.seed
            self._moment = Moment(progress=progress, step=index, learning_rate=learning_rate, seed=seed)
            self._at()
            self.bits.step(self._moment, check=said)
        else:
            self._next_micro_batch()
        for regularizer in self.plugin.config.regularizers:
            acting = carriers(self.plugin.sites, regularizer.method)
            if not acting:
                self.plugin.check_regularizers()
            factor = regularizer.strength * SCHEDULES[regularizer.schedule](progress) / len(acting) * regularizer.every
            due = first and self._moment is not None and self._moment.step % regularizer.every == 0
            for site, stage in acting:
                stage.active = due and factor * stage.share > 0
                if stage.active:
                    strength = factor * stage.share / weight_probe(site).uses[0]
                    stage.carry(strength if scaler is None else scaler.scale(strength), factor)

    def end_micro_batch(self) -> None:
        for stage in stages(self.plugin.sites):
            if isinstance(stage, Regularizer):
                stage.active = False
        self._next_micro_batch()

    def after_optimizer_step(self) -> None:
        self._keep(False)
        if not self._stepping:
            return
        self._stepping = False
        self._check_learning()
        for stage in stages(self.plugin.sites):
            stage.project()
        for site in self.plugin.sites:
            watcher = site.weight_stages._modules.get("oscillation")
            if isinstance(watcher, Oscillation):
                if is_sharded(site.parameter) or uses_deepspeed(site.parameter):
                    raise ValueError("oscillations are watched in one process and under DDP only: set it to ignore")
                with network_weight(site) as weight:
                    watcher.update(weight, cast(Quantizer, site.weight_stages._modules["quantizer"]))

    def check_optimizer(self, optimizer: Any) -> None:
        known = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        missing = [name for name, p in self._learned().items() if id(p) not in known]
        if missing and any(id(p) in known for p in self.plugin.model.parameters()):  # else it holds flat copies of them
            raise RuntimeError(NOT_LEARNING.format(missing[0]))

    def _watch_optimizers(self) -> None:
        """Until one has trained the model, see which parameters the optimizers that step hold."""
        if self._checked or self._watching is not None:
            return
        training = weakref.ref(self)

        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001
            if (own := training()) is not None:
                own._optimized.update(id(p) for group in optimizer.param_groups for p in group["params"])

        self._watching = register_optimizer_step_pre_hook(hook)
        weakref.finalize(self, self._watching.remove)

    def _check_learning(self) -> None:
        """Raise `RuntimeError` where the optimizers of the first step that trains weights leave out what is learned."""
        if self._watching is None or not any(id(p) in self._optimized for p in self.plugin.model.parameters()):
            return  # none has stepped (a scaler skips steps), or they hold flat copies of the weights
        missing = [name for name, p in self._learned().items() if id(p) not in self._optimized]
        self._optimized.clear()
        if missing:
            raise RuntimeError(NOT_LEARNING.format(missing[0]))
        self._watching.remove()
        self._watching, self._checked = None, True

    def _learned(self) -> dict[str, nn.Parameter]:
        """What the stages learn, less what the user has frozen."""
        return {name: p for name, p in self.plugin.own_parameters().items() if p.requires_grad}

    def _next_micro_batch(self) -> None:
        if self._moment is not None:
            self._moment = replace(self._moment, micro_batch=self._moment.micro_batch + 1)
            self._at()

    def _at(self) -> None:
        assert self._moment is not None
        for stage in stages(self.plugin.sites):
            stage.at(self._moment)

    def _keep(self, on: bool) -> None:
        """Forget what was quantized; `on`: keep what comes, for the micro-batches up to the optimizer step."""
        keep = on and self.plugin.config.memory == "keep"
        for site in self.plugin.sites:
            quantizer = site.weight_stages._modules.get("quantizer")
            if isinstance(quantizer, Quantizer):
                quantizer.kept = None
                # What SatNL makes is another tensor at every read, not told from an older one in the same place.
                quantizer.keep = keep and not is_sharded(site.parameter) and satnl(site) is None
