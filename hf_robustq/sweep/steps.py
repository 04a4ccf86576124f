"""What every tensor gets in each setting of a sweep."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hf_robustq import distributed
from hf_robustq.calibrate import activation_grid, input_probe, weight_probe, weight_sample
from hf_robustq.functional import Axis
from hf_robustq.grid import Grid
from hf_robustq.plugin import RobustQ
from hf_robustq.quantizers import InputProbe, Role, WeightProbe
from hf_robustq.scales import CODEBOOK_RULES, SCALE_RULES, Codebook, Sample, mse
from hf_robustq.sharded import is_sharded
from hf_robustq.sites import Site
from hf_robustq.sweep.batch_norm import Statistics, followers, gain, reestimated
from hf_robustq.sweep.lapq import lapq
from hf_robustq.sweep.mapping import Mapping, asymmetric, by_codebook, corrected, folded, uniform
from hf_robustq.sweep.settings import LAPQ, Setting

Target = tuple[Site, Role]


@dataclass(frozen=True)
class Calibration:
    """Training samples that some settings read: "lapq", and the re-estimation of batch norms.

    batches   with the evaluation transform, read again and again
    augmented   for batch norms: as in training, augmentation included, or the statistics are of other images than those
              the network was trained on (a CIFAR network trained on padded crops loses 3 points); default: `batches`
    loss      `loss(model, batch) -> the task's loss`, a mean over the batch; run without gradients in evaluation mode
    iterations   rounds of LAPQ's search over all tensors
    """

    batches: Sequence[Any]
    loss: Callable[[Any, Any], Any]
    iterations: int = 2
    augmented: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if not self.batches:
            raise ValueError("the calibration set is empty: give at least one batch of training data")

    def run(self, model: Any) -> None:
        """A pass over what batch norms are to see."""
        for batch in self.augmented or self.batches:
            self.loss(model, batch)

    def mean_loss(self, model: Any) -> float:
        losses = [torch.as_tensor(self.loss(model, batch)).detach().float() for batch in self.batches]
        mean = torch.stack(losses).mean()
        distributed.broadcast([mean])  # so that all ranks search alike
        return float(mean)


def perturbed(scale: Tensor, setting: Setting) -> Tensor:
    """The steps as the setting changes them: to a power of two, then by the ratio.

    Nearest in the log domain, the power turns at sqrt(2) * 2^n; in the value domain at 1.5 * 2^n.
    """
    if setting.power_of_two == "log":
        scale = torch.exp2(torch.round(torch.log2(scale)))
    elif setting.power_of_two == "value":
        below = torch.exp2(torch.floor(torch.log2(scale)))
        scale = torch.where(scale < 1.5 * below, below, 2 * below)
    return scale * setting.ratio


class Steps:
    """Searches steps and codebooks, each once per sweep: of the stored weights, and of the inputs calibration saw.

    model         what to call, where it is not the plugin's own (a wrapping of it)
    calibration   for the settings that read training samples
    seed          of stochastic rounding
    forward       runs the model on some batch, for settings that fold batch norms
    """

    def __init__(
        self,
        plugin: RobustQ,
        model: Any = None,
        calibration: Calibration | None = None,
        seed: int = 0,
        forward: Callable[[], Any] | None = None,
    ) -> None:
        self.plugin = plugin
        self.model = plugin.model if model is None else model
        self.calibration, self.seed, self.forward = calibration, seed, forward
        self._samples: dict[tuple[str, Role, Axis, bool], Sample] = {}
        self._chosen: dict[tuple[str, Role, Grid, str, bool], Tensor | Codebook] = {}
        self._searched: dict[Setting, list[Tensor]] = {}
        self._mappings: dict[tuple[str, Role, Setting], Mapping] = {}
        self._norms: dict[str, _BatchNorm] | None = None
        self._statistics: dict[Setting, Statistics] = {}

    def check(self, setting: Setting) -> None:
        """Raise `ValueError` for a setting that reads training samples where there are none."""
        if setting.needs_calibration and self.calibration is None:
            raise ValueError(f"{setting.name}: it reads training samples: pass calibration=")

    def statistics(self, setting: Setting) -> Statistics:
        """The batch-norm statistics of a setting that re-estimates them; call it with the model as the setting says."""
        self.check(setting)
        if setting not in self._statistics:
            assert self.calibration is not None
            self._statistics[setting] = reestimated(self.plugin.model, partial(self.calibration.run, self.model))
        return self._statistics[setting]

    def targets(self, setting: Setting) -> list[Target]:
        """What a setting quantizes; a weight that several layers share once."""
        weights: dict[int, Target] = {}
        for site in self.plugin.sites if setting.weights else ():
            weights.setdefault(id(weight_probe(site)), (site, "weight"))
        inputs: list[Target] = [(s, "input") for s in self.plugin.sites if isinstance(input_probe(s), InputProbe)]
        return list(weights.values()) + (inputs if setting.activations else [])

    def apply(self, setting: Setting, only: Collection[str] | None = None) -> None:
        """Set every probe as the setting says; or those of some weights, by name, the others off."""
        self.check(setting)
        searched = self._lapq(setting.steps) if setting.scale == LAPQ else None
        for i, target in enumerate(self.targets(setting)):
            if only is None or target[0].name in only:
                self._apply(target, setting, self._choose(target, setting) if searched is None else searched[i])
            else:
                (weight_probe(target[0]) if target[1] == "weight" else input_probe(target[0])).off()

    def _apply(self, target: Target, setting: Setting, chosen: Tensor | Codebook) -> None:
        site, role = target
        if role == "input" and not setting.perturb_inputs:
            setting = setting.unperturbed
        grid = self._grid(target, setting)
        probe = weight_probe(site) if role == "weight" else input_probe(site)
        if setting.plain and isinstance(chosen, Tensor):
            probe.quantize(grid, perturbed(chosen, setting))
        else:
            key = (site.name, role, setting)
            if setting.scale == LAPQ or key not in self._mappings:  # LAPQ tries one after the other
                self._mappings[key] = self._mapping(target, setting, grid, chosen)
            probe.map(self._mappings[key])
        if isinstance(probe, WeightProbe):
            probe.keep = not is_sharded(site.parameter)

    def _mapping(self, target: Target, setting: Setting, grid: Grid, chosen: Tensor | Codebook) -> Mapping:
        site, role = target
        if isinstance(chosen, Codebook):
            mapping = by_codebook(chosen.scaled(setting.ratio), grid.axis)
        else:
            low, high = (torch.tensor([float(end)], device=chosen.device) for end in (grid.low, grid.high))
            if setting.asymmetric:
                chosen, low, high = asymmetric(self._sample(target, setting, grid.axis), grid, chosen)
            steps = perturbed(chosen, setting)
            seed = self.seed ^ zlib.crc32(f"{role} {site.name}".encode())
            mapping = uniform(steps, low, high, grid.axis, setting.rounding, setting.overflow, seed, role == "weight")
        if role == "input":
            return mapping
        if (factor := self._gain(site, setting)) is not None:
            mapping = folded(mapping, factor, site.channels)
        if setting.correction != "none":
            mapping = corrected(mapping, site.channels, variance=setting.correction == "variance")
        return mapping

    def _grid(self, target: Target, setting: Setting) -> Grid:
        site, role = target
        bits = 8 if site.name in self.plugin.edges else setting.weights if role == "weight" else setting.activations
        assert bits is not None
        if role == "input":
            return activation_grid(bits, self._sample(target, setting, None))
        return Grid(bits=bits, narrow=not setting.full, axis=site.steps_axis(setting.per_channel))

    def _choose(self, target: Target, setting: Setting) -> Tensor | Codebook:
        site, role = target
        grid = self._grid(target, setting)
        key = (site.name, role, grid, setting.scale, setting.fold)
        if key not in self._chosen:
            rule = {**SCALE_RULES, **CODEBOOK_RULES}[setting.scale]
            self._chosen[key] = rule(self._sample(target, setting, grid.axis), grid)
        return self._chosen[key]

    def _sample(self, target: Target, setting: Setting, axis: Axis) -> Sample:
        site, role = target
        key = (site.name, role, axis, setting.fold)
        if key in self._samples:
            return self._samples[key]
        if role == "weight":
            sample = weight_sample(site, axis, self._gain(site, setting))
        else:
            probe = input_probe(site)
            assert isinstance(probe, InputProbe)
            sample = probe.sample()
        if sample.width:  # a histogram is small enough to keep
            self._samples[key] = sample
        return sample

    def _gain(self, site: Site, setting: Setting) -> Tensor | None:
        """What the batch norm after a layer multiplies its channels by, where it is folded."""
        if not setting.fold:
            return None
        if self._norms is None:
            if self.forward is None:
                raise ValueError(f"{setting.name}: a forward pass shows which batch norms fold: pass forward=")
            self._norms = followers(self.plugin.model, self.plugin.sites, self.forward)
        if not self._norms:
            raise ValueError("no quantized layer of the model is followed by a batch norm: drop /fold")
        norm = self._norms.get(site.name)
        return None if norm is None else gain(norm)

    def _lapq(self, setting: Setting) -> list[Tensor]:
        """The steps of all targets, searched together."""
        if setting in self._searched:
            return self._searched[setting]
        calibration, targets = self.calibration, self.targets(setting)
        assert calibration is not None
        grids = [self._grid(target, setting) for target in targets]
        now: list[Tensor | None] = [None] * len(targets)

        def start(p: float) -> list[Tensor]:
            known = [self._sample(t, setting, grid.axis) for t, grid in zip(targets, grids, strict=True)]
            return [mse(sample, grid, p) for sample, grid in zip(known, grids, strict=True)]

        def loss(steps: Sequence[Tensor]) -> float:
            for i, step in enumerate(steps):
                before = now[i]
                if before is None or not torch.equal(before, step):  # the others' weights need no quantizing anew
                    self._apply(targets[i], setting, step)
                    now[i] = step
            return calibration.mean_loss(self.model)

        self._searched[setting] = lapq(start, loss, calibration.iterations)
        return self._searched[setting]
