"""What WaveQ's stages of a model do together: quantizers follow beta, a budget steers it, phase 3 fixes it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_robustq.plugin.stages import carriers
from hf_robustq.quantizers.variable_bits import follow
from hf_robustq.regularizers import WaveQ
from hf_robustq.sharded import single_values
from hf_robustq.size import Size, size
from hf_robustq.stage import Moment

if TYPE_CHECKING:
    from hf_robustq.plugin.robustq import RobustQ

logger = logging.getLogger(__name__)

RAMP = 0.5
"""Share of phase 2 in which a budget comes down from the first bits to its own."""


@dataclass(frozen=True)
class Budget:
    """A limit of what is linear in the storage bits b of the layers that learn: fixed + sum_i cost_i * b_i <= limit."""

    measure: str
    limit: float
    fixed: float
    costs: tuple[float, ...]

    @classmethod
    def of(cls, measure: str, limit: float, found: Size, learning: Sequence[str], fixed: Sequence[str] = ()) -> Budget:
        """For the layers `learning`, by name; of those that were learned, `fixed` count at their bits.

        "bits" is the mean of both; the other two are of the whole model.
        """
        layers = {layer.name: layer for layer in found.layers}
        if measure == "bits":
            count = len(learning) + len(fixed)
            rest = sum(layers[name].bits for name in fixed) / count
            return cls(measure, limit, rest, (1 / count,) * len(learning))
        if measure == "megabytes":
            costs = tuple(layers[name].weights / 8e6 for name in learning)
        else:
            for name in learning:
                if not layers[name].macs:
                    raise ValueError(f"budget: the products with {name} are not counted, as its module is not called")
            costs = tuple(layers[name].macs * layers[name].activation_bits for name in learning)
        rest = getattr(found, measure) - sum(c * layers[name].bits for c, name in zip(costs, learning, strict=True))
        return cls(measure, limit, rest, costs)

    def at(self, bits: Sequence[float]) -> float:
        """The measure at these bits."""
        return self.fixed + sum(c * b for c, b in zip(self.costs, bits, strict=True))

    def holds(self, bits: Sequence[float]) -> bool:
        """Whether the limit is kept, but for rounding."""
        return self.at(bits) <= self.limit * (1 + 1e-6)

    def excess(self, bits: Tensor, costs: Tensor) -> Tensor:
        """How many bits a layer are too many, in the mean over what they cost; 0-dim, from [n] each."""
        return (bits @ costs + (self.fixed - self.limit)) / sum(self.costs)

    def within(self, betas: Sequence[float], sign_bits: int, lowest: int) -> list[int]:
        """ceil(beta) + sign_bits, and of those that exceed the limit fewer: first where beta is lost the least of.

        That is where beta lies closest above the next whole number, for what a bit of this layer costs.
        """
        bits = [math.ceil(beta) + sign_bits for beta in betas]
        while not self.holds(bits):
            lost = [
                ((beta + sign_bits - (b - 1)) / cost, i)
                for i, (beta, b, cost) in enumerate(zip(betas, bits, self.costs, strict=True))
                if b > lowest and cost > 0
            ]
            bits[min(lost)[1]] -= 1
        return bits


class LearnedBits:
    """The bit-widths of a model that are learned. Nothing where there is no WaveQ that learns."""

    def __init__(self, plugin: RobustQ) -> None:
        self.plugin = plugin
        self.news = ""
        """What is to be said of the bits that have just been fixed."""
        self._budget: tuple[tuple[str, ...], Budget, Tensor] | None = None

    def stages(self) -> dict[str, WaveQ]:
        """By the name of the weight."""
        found = carriers(self.plugin.sites, "waveq")
        return {site.name: stage for site, stage in found if isinstance(stage, WaveQ) and stage.learn}

    def learning(self) -> dict[str, WaveQ]:
        """Those whose bits are not fixed yet."""
        return {name: stage for name, stage in self.stages().items() if stage.fixed is None}

    def budget(self) -> Budget | None:
        """Raises `ValueError` for one that cannot be met; call it after calibration, which counts products."""
        stages, learning = self.stages(), self.learning()
        if not self.plugin.config.budget or not learning:
            return None
        if self._budget is None or self._budget[0] != tuple(learning):
            ((measure, limit),) = self.plugin.config.budget.items()
            found, fixed = size(self.plugin.model, self.plugin.sites), [name for name in stages if name not in learning]
            budget = Budget.of(measure, limit, found, list(learning), fixed)
            fewest = [stage.lowest + stage.quantizer.sign_bits for stage in learning.values()]
            if not budget.holds(fewest):
                raise ValueError(
                    f"budget: {measure} of {limit:g} cannot be met, even with the fewest bits everywhere: "
                    f"the nearest that can is {budget.at(fewest):.6g}"
                )
            like = next(iter(learning.values())).quantizer.beta
            self._budget = tuple(learning), budget, like.new_tensor(budget.costs)
        return self._budget[1]

    def check(self) -> None:
        """After calibration: raise `ValueError` for a budget that cannot be met, and warn of bits nobody learns."""
        self.budget()
        held = [site.name for site in self.plugin.sites if not site.parameter.requires_grad]
        held = [name for name in held if name not in self.plugin.edges] if self.stages() else []
        if held:
            logger.warning("weights that do not train learn no bits, and keep those of the config: %s", ", ".join(held))

    def check_phases(self, steps: int) -> None:
        """Raise `ValueError` where phases do not fit a run of so many optimizer steps."""
        for stage in list(self.learning().values())[:1]:
            stage.check_phases(steps)

    @torch.no_grad()
    def step(self, moment: Moment, check: bool) -> None:
        """Before the first micro-batch of an optimizer step; `check`: the moment tells how many there will be."""
        learning = self.learning()
        first = next(iter(learning.values()), None)
        if first is None or not first.share:  # before phase 2 nothing moves
            return
        if check and moment.progress > 0 and moment.step > 0:
            first.check_phases(round(moment.step / moment.progress))
        betas = single_values([stage.beta for stage in learning.values()])
        if first.time(moment) >= first.fall:
            self._fix(learning, betas.tolist())
            return
        follow([stage.quantizer for stage in learning.values()], betas)
        for stage, pull in zip(learning.values(), self._pulls(first, betas, moment).unbind(), strict=True):
            stage.pull.copy_(pull)

    def _pulls(self, stage: WaveQ, betas: Tensor, moment: Moment) -> Tensor:
        """lambda_beta of each weight: the config's; under a budget excess - allowed, shared out as the costs are.

        Allowed is what there was at the beginning, less and less of it, and none from the middle of phase 2. A step of
        gradient descent with rate r takes the share r off the excess, however unequal the costs.
        """
        budget = self.budget()
        if budget is None or self._budget is None:
            return torch.full_like(betas, stage.beta_strength * stage.pulse)
        assert self.plugin.config.weights is not None
        costs = self._budget[2]
        done = (stage.time(moment) - stage.rise) / (RAMP * (stage.fall - stage.rise))
        first = [self.plugin.config.weights.bits_of(name) for name in self._budget[0]]
        start = (budget.at(first) - budget.limit) / sum(budget.costs)
        allowed = max(start, 0.0) * min(max(1 - done, 0.0), 1.0)
        excess = budget.excess(betas + stage.quantizer.sign_bits, costs)
        return (excess - allowed) * stage.pulse * costs * (costs.sum() / costs.square().sum())

    def _fix(self, learning: Mapping[str, WaveQ], betas: list[float]) -> None:
        """Phase 3 begins: ceil(beta) from now on, or less where the budget wants it."""
        for name, beta in zip(learning, betas, strict=True):
            if not math.isfinite(beta):
                raise FloatingPointError(f"the bits of {name} are {beta}: lower bits_lr, or the learning rate")
        first = next(iter(learning.values()))
        sign, budget = first.quantizer.sign_bits, self.budget()
        bits = [math.ceil(beta) + sign for beta in betas]
        if budget is not None:
            bits = budget.within(betas, sign, first.lowest + sign)
            if min(b - sign - beta for b, beta in zip(bits, betas, strict=True)) <= -1:
                logger.warning(
                    "bits came down by more than one where they were fixed: what was learned did not meet the budget "
                    "(raise bits_lr, or give phase 2 more steps)"
                )
        for stage, b in zip(learning.values(), bits, strict=True):
            stage.fix(b - sign)
        names = ", ".join(f"{name} {b}" for name, b in zip(learning, bits, strict=True))
        self.news = f"bit-widths are fixed, {sum(bits) / len(bits):.2f} in the mean: {names}"
        logger.info(self.news)

    def metrics(self) -> dict[str, float]:
        """{"bits", "beta"}: means over the layers that learn; {"megabytes", "bit_operations"} of the whole model."""
        stages = self.stages().values()
        if not stages:
            return {}
        bits, betas = [stage.quantizer.bits for stage in stages], [float(stage.quantizer.beta) for stage in stages]
        whole = size(self.plugin.model, self.plugin.sites)
        means = {"bits": sum(bits) / len(bits), "beta": sum(betas) / len(betas)}
        return {**means, "megabytes": whole.megabytes, "bit_operations": whole.bit_operations}

    def by_layer(self) -> dict[str, float]:
        """Storage bits now, by the name of the weight."""
        return {name: float(stage.quantizer.bits) for name, stage in self.stages().items()}
