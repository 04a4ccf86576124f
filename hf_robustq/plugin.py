"""RobustQ: the one stateful object a user holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate.state import GradientState
from torch import nn

from hf_robustq import calibrate as calibration
from hf_robustq.calibrate import Forward, activation_probe, weight_probe
from hf_robustq.config import QuantizerConfig, RobustQConfig
from hf_robustq.grid import Grid
from hf_robustq.quantizers import QUANTIZERS, Probe, Quantizer
from hf_robustq.regularizers import REGULARIZERS, Regularizer
from hf_robustq.schedules import SCHEDULES
from hf_robustq.sites import Site, attach, bake, detach, find_sites, refuse_wrapped
from hf_robustq.telemetry import FiniteWatch, mean_penalties, site_kurtosis


class RobustQ:
    """Stages on the weights and activations of a model, as a config says.

    The model stays the user's: same classes for `isinstance`, same parameter names, same `state_dict` plus
    the steps of its quantizers. Create it before wrapping, sharding or compiling the model and before the
    optimizer; `calibrate` before the first step.

        plugin = RobustQ(model, config)
        plugin.calibrate(batches, forward=lambda model, batch: model(**batch))
        model, optimizer, loader = accelerator.prepare(model, AdamW(plugin.parameter_groups(0.01)), loader)
        for i, batch in enumerate(loader):
            plugin.step(i / total)
            with accelerator.accumulate(model): ...
    """

    def __init__(self, model: nn.Module, config: RobustQConfig | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, RobustQConfig) else RobustQConfig.from_dict(config)
        config = self.config
        refuse_wrapped(model)
        self.model = model
        touch_edges = config.first_last != "float"
        self.sites, self.left_out, edges = find_sites(
            model, config.include, config.exclude, touch_edges, config.embeddings
        )
        if not self.sites:
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in self.left_out)
            raise ValueError(f"no weight to work on in this model ({reasons or 'no Linear or convolution in it'})")
        for pattern in config.weights_only:
            if not any(fnmatchcase(site.name, pattern) for site in self.sites):
                raise ValueError(f"weights_only: pattern {pattern!r} matches no staged weight")
        self.edges = edges if config.first_last == 8 else {}
        if config.regularizers and not any(s.parameter.requires_grad for s in self.sites if s.name not in self.edges):
            names = ", ".join(regularizer.method for regularizer in config.regularizers)
            raise ValueError(f"{names}: every weight it would act on is frozen; unfreeze some, or drop the regularizer")
        self._attach()
        self.watch = FiniteWatch(model)
        self.calibrated = False

    def _attach(self) -> None:
        shared: dict[int, dict[str, nn.Module]] = {}
        attached: list[Site] = []
        try:
            for site in self.sites:
                if id(site.parameter) not in shared:  # both ends of a tie get the same stages
                    shared[id(site.parameter)] = self._weight_stages(site)
                attach(site, shared[id(site.parameter)], self._activation_stages(site))
                attached.append(site)
        except Exception:
            for site in attached:
                detach(site)
            raise

    # ---- stages ----------------------------------------------------------------------------------

    def _quantizer(self, site: Site, config: QuantizerConfig, axis: int | None, narrow: bool) -> Quantizer:
        bits = 8 if site.name in self.edges else config.bits
        grid = Grid(bits=bits, narrow=narrow if config.narrow is None else config.narrow, axis=axis)
        channels = site.parameter.size(axis) if axis is not None else 1
        return QUANTIZERS[config.method](grid, channels, **config.options).to(site.parameter.device)

    def _weight_stages(self, site: Site) -> dict[str, nn.Module]:
        device = site.parameter.device
        stages: dict[str, nn.Module] = {}
        if site.name not in self.edges:
            for regularizer in self.config.regularizers:
                stages[regularizer.method] = REGULARIZERS[regularizer.method](**regularizer.options).to(device)
        weights = self.config.weights
        if weights is not None:
            axis = site.axis if weights.per_channel else None
            stages["quantizer"] = self._quantizer(site, weights, axis, narrow=True)
        stages["probe"] = Probe(site.name, site.axis, site.parameter.size(site.axis)).to(device)
        return stages

    def _activation_stages(self, site: Site) -> dict[str, nn.Module]:
        """The probe counts calls in any case; where it collects no histogram, the input stays float."""
        quantizable = not isinstance(site.module, (nn.MultiheadAttention, nn.Embedding)) and not any(
            fnmatchcase(site.name, pattern) for pattern in self.config.weights_only
        )
        stages: dict[str, nn.Module] = {}
        if self.config.activations is not None and quantizable:
            stages["quantizer"] = self._quantizer(site, self.config.activations, None, narrow=False)
        stages["probe"] = Probe(f"the input of {site.name}", histogram=quantizable).to(site.parameter.device)
        return stages

    def _carriers(self, method: str) -> list[tuple[Site, Regularizer]]:
        """The regularizer of each trainable weight, once where a weight is shared."""
        found: dict[int, tuple[Site, Regularizer]] = {}
        for site in self.sites:
            stage = site.weight_stages._modules.get(method)
            if isinstance(stage, Regularizer) and site.parameter.requires_grad:
                found.setdefault(id(stage), (site, stage))
        return list(found.values())

    # ---- before training -------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Any], forward: Forward) -> None:
        """Run `forward(model, batch)` on training batches: count calls, set steps that are not set yet.

        The model runs in evaluation mode, in float and without gradients, and is left as it was, global
        RNGs included. Raises `ValueError` for an empty set, for a layer that is never used, and, where
        inputs are to be quantized, for a layer whose input is never seen.
        """
        self.observe(batches, forward)
        weights, activations = self.config.weights, self.config.activations
        rules = {
            "weights": weights.scale if weights else "mse",
            "activations": activations.scale if activations else "mse",
        }
        calibration.initialize(self.sites, rules)
        self.calibrated = True

    def observe(self, batches: Iterable[Any], forward: Forward, activations: bool = False) -> None:
        """Count calls and collect the distribution of every input anew. `activations`: a missing one is an error."""
        count = calibration.observe(self.model, self.sites, batches, forward)
        uses: dict[int, float] = {}
        for site in self.sites:
            weight, probe = weight_probe(site), activation_probe(site)
            if weight.calls == 0:
                raise ValueError(f"{site.name} is never used in forward: add it to exclude")
            if probe.histogram and probe.calls == 0 and (activations or self.config.activations is not None):
                raise ValueError(
                    f"{site.name} is read without calling its module, so its input cannot be quantized: "
                    f"add {site.name!r} to weights_only"
                )
            # A reader may also ask for `weight.dtype`, so calls of the modules count where there are any.
            uses[id(weight)] = uses.get(id(weight), 0.0) + probe.calls / count
        for site in self.sites:
            weight = weight_probe(site)
            weight.uses = uses[id(weight)] or weight.calls / count

    # ---- training --------------------------------------------------------------------------------

    def step(self, progress: float, first: bool | None = None, scaler: Any = None) -> None:
        """Call before the forward of every micro-batch, outside `accelerator.accumulate`.

        progress   share of training done, in [0, 1]
        first      whether this micro-batch is the first of its optimizer step (it carries the penalties);
                   default: what Accelerate says
        scaler     the fp16 gradient scaler, where there is one (`accelerator.scaler`)
        """
        if not self.calibrated:
            raise RuntimeError("call plugin.calibrate(batches, forward) before the first step")
        if first is None:
            first = bool(GradientState().sync_gradients)
        for regularizer in self.config.regularizers:
            carriers = self._carriers(regularizer.method)
            factor = regularizer.strength * SCHEDULES[regularizer.schedule](progress) / len(carriers)
            for site, stage in carriers:
                stage.active = first and factor > 0
                if stage.active:
                    strength = torch.full_like(stage.strength, factor / weight_probe(site).uses)
                    stage.strength.copy_(strength if scaler is None else scaler.scale(strength))

    def end_micro_batch(self) -> None:
        """The following micro-batches of this optimizer step carry no penalty."""
        for stage in calibration.stages(self.sites):
            if isinstance(stage, Regularizer):
                stage.active = False

    def metrics(self) -> dict[str, float]:
        """Mean kurtosis of the weights and each penalty by its name, unscaled, averaged over its weights."""
        kurtosis = [value for value in site_kurtosis(self.regularized).values() if not math.isnan(value)]
        mean = {"kurtosis": sum(kurtosis) / len(kurtosis)} if kurtosis else {}
        return {**mean, **mean_penalties(self.regularized)}

    @property
    def regularized(self) -> list[Site]:
        """The sites a regularizer acts on; all sites where there is no regularizer."""
        names = {site.name for r in self.config.regularizers for site, _ in self._carriers(r.method)}
        return [site for site in self.sites if not names or site.name in names]

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What the stages learn (steps, offsets, bit-widths), by name in the model."""
        own = {id(p) for stage in calibration.stages(self.sites) for p in stage.parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    def parameter_groups(self, weight_decay: float, scale_lr: float | None = None) -> list[dict[str, Any]]:
        """Groups for an optimizer: matrices and kernels decayed, vectors (biases, norms) not, learned steps not.

        `scale_lr`: a learning rate of its own for what the stages learn.
        """
        own = self.own_parameters()
        rest = [p for name, p in self.model.named_parameters() if p.requires_grad and name not in own]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if own:
            rate = {} if scale_lr is None else {"lr": scale_lr}
            groups.append({"params": list(own.values()), "weight_decay": 0.0, **rate})
        return groups

    # ---- afterwards ------------------------------------------------------------------------------

    def bake(self) -> nn.Module:
        """Put the weights on their grids for good and detach; returns the model.

        Activation quantizers are dropped: a baked model is the user's own, with quantized weights. Raises
        `RuntimeError` before calibration.
        """
        self.check_initialized()
        baked: set[int] = set()
        for site in self.sites:
            if id(site.parameter) in baked:
                detach(site)
            else:
                baked.add(id(site.parameter))
                bake(site)
        return self.model

    def check_initialized(self) -> None:
        """Raise `RuntimeError` where a quantizer has no steps yet."""
        for stage in calibration.stages(self.sites):
            if isinstance(stage, Quantizer) and not bool(stage.initialized):
                raise RuntimeError("the quantizers have no steps yet: call plugin.calibrate(batches, forward) first")

    def detach(self) -> nn.Module:
        """Take every stage off; the identical parameters and classes are left. Returns the model."""
        for site in self.sites:
            detach(site)
        return self.model

    def __repr__(self) -> str:
        """A table: weight, shape, stages, bits; then what was left out and why."""
        rows = [("weight", "shape", "stages", "bits")]
        for site in self.sites:
            stages = [name for name, _ in site.weight_stages.named_children() if name != "probe"]
            bits = []
            for letter, sequence in (("w", site.weight_stages), ("a", site.activation_stages)):
                quantizer = next((stage for stage in sequence if isinstance(stage, Quantizer)), None)
                bits.append(f"{letter}{quantizer.grid.bits}" if quantizer else "")
            if not activation_probe(site).histogram:
                stages.append("(input stays float)")
            shape = "x".join(str(size) for size in site.parameter.shape)
            rows.append((site.name, shape, " ".join(stages) or "-", "".join(bits) or "float"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"left out: {one.name}: {one.reason}" for one in self.left_out]
        return "\n".join(lines)
