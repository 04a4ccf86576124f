"""RobustQ: the one stateful object a user holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Self, cast

from accelerate.state import GradientState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_robustq import calibrate as calibration
from hf_robustq import distributed
from hf_robustq.calibrate import Forward, input_probe, weight_probe
from hf_robustq.config import QuantizerConfig, RobustQConfig
from hf_robustq.plugin.mark import PLUGIN, mark, refuse_quantized, unmark
from hf_robustq.plugin.stages import activation_stages, float_input, weight_stages
from hf_robustq.plugin.table import table
from hf_robustq.quantizers import InputProbe, Moment, Oscillation, Quantizer
from hf_robustq.regularizers import Regularizer
from hf_robustq.schedules import SCHEDULES
from hf_robustq.sharded import is_sharded, settle, whole_shape
from hf_robustq.sites import LeftOut, Site, attach, bake, detach, find_sites, refuse_wrapped
from hf_robustq.telemetry import FiniteWatch, mean_penalties, site_kurtosis, site_quantization

NOT_LEARNING = (
    "the optimizer does not train {}: build it after RobustQ, from plugin.parameter_groups(weight_decay), "
    "or leave that to RobustTrainer"
)


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
        refuse_quantized(model)
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
        self._moment: Moment | None = None
        self._stepping = False
        self._versions: dict[str, int] | None = None
        self._unsaved: list[tuple[nn.Module, str]] = []
        mark(self)
        self.before_wrapping()

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The plugin of a staged model: one that was loaded, say, or is wrapped by now. Else a `ValueError`."""
        for module in (model, *model.modules()):
            if isinstance(plugin := vars(module).get(PLUGIN), cls):
                return plugin
        raise ValueError("this model has no stages: create RobustQ(model, config), or load a folder that has them")

    def _attach(self) -> None:
        shared: dict[int, dict[str, nn.Module] | nn.Sequential] = {}
        attached: list[Site] = []
        try:
            for site in self.sites:
                stages = shared.get(id(site.parameter))
                if stages is None:
                    stages = weight_stages(self.config, site, self.edges)
                recompute = self.config.memory == "recompute"
                attach(site, stages, activation_stages(self.config, site, self.edges), recompute)
                shared[id(site.parameter)] = site.weight_stages  # both ends of a tie get the same stages
                attached.append(site)
        except Exception:
            for site in attached:
                detach(site)
            raise

    def _carriers(self, method: str) -> list[tuple[Site, Regularizer]]:
        """The regularizer of each trainable weight, once where a weight is shared."""
        found: dict[int, tuple[Site, Regularizer]] = {}
        for site in self.sites:
            stage = site.weight_stages._modules.get(method)
            if isinstance(stage, Regularizer) and site.parameter.requires_grad:
                found.setdefault(id(stage), (site, stage))
        return list(found.values())

    # ---- before training -------------------------------------------------------------------------

    def calibrate(self, batches: Iterable[Any], forward: Forward) -> None:
        """Run `forward(model, batch)` on training batches: count calls, set steps that are not set yet.

        The model runs in evaluation mode, in float and without gradients, and is left as it was, global
        RNGs included. Call it before wrapping; where no rank holds the whole model before (`zero.Init`, FSDP's
        `cpu_ram_efficient_loading`), after it. Every rank runs the same batches; then all have rank 0's
        figures. Raises `ValueError` for an empty set, for a layer that is never used, where inputs are to be
        quantized for layers whose input is never seen, and where ranks have different configs.
        """
        self.agree()
        if distributed.weights_on_rank_0(self.model):
            raise RuntimeError(
                "with cpu_ram_efficient_loading other ranks have no weights yet: calibrate after accelerator.prepare"
            )
        self._observe(batches, forward, need_inputs=self.config.activations is not None)
        self._initialize()
        self._share()
        self.calibrated = True

    def observe(self, batches: Iterable[Any], forward: Forward, activations: bool = False) -> None:
        """Count calls and collect the distribution of every input anew. `activations`: a missing one is an error."""
        self._observe(batches, forward, need_inputs=activations or self.config.activations is not None)
        self._share()

    def _observe(self, batches: Iterable[Any], forward: Forward, need_inputs: bool) -> None:
        count = calibration.observe(self.model, self.sites, batches, forward)
        settle(self.model)
        calibration.count_uses(self.sites, count, need_inputs)

    def _initialize(self) -> None:
        """Set the steps that are not set yet, each by the rule of its config."""
        weights, activations = self.config.weights, self.config.activations
        rules = {"weights": weights and weights.scale, "activations": activations and activations.scale}
        calibration.initialize(self.sites, rules)

    def _share(self) -> None:
        """Rank 0's steps and statistics on every rank."""
        stages = list(calibration.stages(self.sites))
        tensors = (tensor for stage in stages for tensor in (*stage.buffers(), *stage.parameters()))
        distributed.broadcast(tensor for tensor in tensors if not is_sharded(tensor))
        for quantizer in self._quantizers():
            quantizer.restored()

    def before_wrapping(self) -> None:
        """What backends need to know of the stages' tensors; called where the plugin is created and calibrates.

        DDP need not send them from rank 0 at every forward: they are equal already. FSDP2 with
        `cpu_ram_efficient_loading` takes every saved tensor for a sharded parameter (accelerate 1.15): they
        stay out of the state dict until `after_wrapping`.
        """
        names = {*getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())}
        names.update(calibration.own_buffers(self.model, self.sites))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)
        if distributed.weights_on_rank_0(self.model):
            self._unsaved += calibration.keep_from_saving(self.sites)

    def after_wrapping(self) -> None:
        """The stages' tensors are saved again; called by the first `step`."""
        while self._unsaved:
            stage, name = self._unsaved.pop()
            stage.register_buffer(name, stage._buffers[name], persistent=True)

    def agree(self) -> None:
        """Raise `ValueError`, naming the differences, where ranks have different configs or weights to work on."""
        distributed.agree(self.description(), "what to do to the model")

    def description(self) -> dict[str, Any]:
        """What ranks, and a checkpoint and who resumes it, must agree on."""
        return {**self.config.to_dict(), "weights of the model": {site.name: list(site.shape) for site in self.sites}}

    # ---- training --------------------------------------------------------------------------------

    def step(
        self,
        progress: float,
        first: bool | None = None,
        scaler: Any = None,
        index: int | None = None,
        learning_rate: float = 1.0,
    ) -> None:
        """Call before the forward of every micro-batch, outside `accelerator.accumulate`.

        progress       share of training done, in [0, 1]
        first          whether this micro-batch is the first of its optimizer step (it carries the penalties);
                       default: what Accelerate says
        scaler         the fp16 gradient scaler, where there is one (`accelerator.scaler`)
        index          optimizer steps done, which noise is drawn by; default: counted from 0, so say it on resuming
        learning_rate  now, divided by its value at the start; for `noise_lr_scale`
        """
        if not self.calibrated:
            raise RuntimeError("call plugin.calibrate(batches, forward) before the first step")
        self.after_wrapping()
        if first is None:
            first = bool(GradientState().sync_gradients)
        if first:
            index = (self._moment.step + 1 if self._moment else 0) if index is None else index
            self._check_learning()
            self.after_optimizer_step()
            self._stepping = True
            self._moment = Moment(
                progress=progress, step=index, learning_rate=learning_rate, seed=self.config.seed
            )  # fmt: skip
            self._at()
        else:
            self._next_micro_batch()
        for regularizer in self.config.regularizers:
            carriers = self._carriers(regularizer.method)
            factor = regularizer.strength * SCHEDULES[regularizer.schedule](progress) / len(carriers)
            for site, stage in carriers:
                stage.active = first and factor > 0
                if stage.active:
                    strength = factor / weight_probe(site).uses[0]
                    stage.strength.copy_(strength if scaler is None else scaler.scale(strength))

    def end_micro_batch(self) -> None:
        """The following micro-batches of this optimizer step carry no penalty."""
        for stage in calibration.stages(self.sites):
            if isinstance(stage, Regularizer):
                stage.active = False
        self._next_micro_batch()

    def _next_micro_batch(self) -> None:
        if self._moment is not None:
            self._moment = replace(self._moment, micro_batch=self._moment.micro_batch + 1)
            self._at()

    def _check_learning(self) -> None:
        """At the second step: raise `RuntimeError` where the optimizer has changed a weight and not its steps."""
        if self._versions is None:
            self._versions = {name: p._version for name, p in self.model.named_parameters()}
            return
        if self._stepping and self._versions:
            moved = {name for name, p in self.model.named_parameters() if p._version != self._versions.get(name)}
            own = self.own_parameters()
            still = [name for name in own if name not in moved]
            if own and len(still) == len(own) and moved:
                raise RuntimeError(NOT_LEARNING.format(still[0]))
            self._versions = {}

    def check_optimizer(self, optimizer: Any) -> None:
        """Raise `RuntimeError` for an optimizer that trains weights of the model and not what the stages learn."""
        known = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        missing = [name for name, p in self.own_parameters().items() if id(p) not in known]
        if missing and any(id(p) in known for p in self.model.parameters()):  # else it holds flat copies of them
            raise RuntimeError(NOT_LEARNING.format(missing[0]))

    def after_optimizer_step(self) -> None:
        """Put what was learned back where it makes sense, and frozen weights on their levels.

        `step` calls it before the next optimizer step; the last one of a plain loop has to be followed by it.
        """
        self._forget()
        if not self._stepping:
            return
        self._stepping = False
        for quantizer in self._quantizers():
            quantizer.project()
        for site in self.sites:
            watcher = site.weight_stages._modules.get("oscillation")
            if isinstance(watcher, Oscillation):
                if is_sharded(site.parameter):
                    raise ValueError("oscillations are watched in one process and under DDP only: set it to ignore")
                watcher.update(site.parameter.data, cast(Quantizer, site.weight_stages._modules["quantizer"]))

    def _forget(self) -> None:
        """Weights have changed: nothing that was quantized holds. Under accumulation the next result is kept."""
        keep = GradientState().num_steps > 1 and self.config.memory == "keep"
        for site in self.sites:
            quantizer = site.weight_stages._modules.get("quantizer")
            if isinstance(quantizer, Quantizer):
                quantizer.forget()
                quantizer.keep = keep and not is_sharded(site.parameter)

    def _at(self) -> None:
        assert self._moment is not None
        for quantizer in self._quantizers():
            quantizer.at(self._moment)

    def _quantizers(self) -> Iterator[Quantizer]:
        return (stage for stage in calibration.stages(self.sites) if isinstance(stage, Quantizer))

    def metrics(self) -> dict[str, float]:
        """Means over the weights: kurtosis, each penalty by its name, unscaled, and how they are quantized.

        quantization_error   mean |Q(w) - w|
        step, clipped        the mean step, and the share of weights beyond the outer levels
        oscillating          the share of weights that go back and forth between two levels, where that is watched
        largest_weight       max |w| of any
        """
        kurtosis = [value for value in site_kurtosis(self.regularized).values() if not math.isnan(value)]
        mean = {"kurtosis": sum(kurtosis) / len(kurtosis)} if kurtosis else {}
        sites = self.telemetry().values()
        if sites:
            for name, key in (("quantization_error", "error"), ("step", "step"), ("clipped", "clipped")):
                mean[name] = sum(site[key] for site in sites) / len(sites)
            if all("oscillating" in site for site in sites):
                mean["oscillating"] = sum(site["oscillating"] for site in sites) / len(sites)
            mean["largest_weight"] = max(site["largest"] for site in sites)
        return {**mean, **mean_penalties(self.regularized)}

    def telemetry(self) -> dict[str, dict[str, float]]:
        """By weight, where it has a quantizer: {"error", "step", "clipped", "largest"} (see `metrics`)."""
        return site_quantization(self.sites)

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
            {"params": [p for p in rest if len(whole_shape(p)) > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if len(whole_shape(p)) <= 1], "weight_decay": 0.0},
        ]
        if own:
            rate = {} if scale_lr is None else {"lr": scale_lr}
            groups.append({"params": list(own.values()), "weight_decay": 0.0, **rate})
        return groups

    # ---- afterwards ------------------------------------------------------------------------------

    def bake(self, activations: bool = False) -> nn.Module:
        """Put the weights on their grids for good; returns the model.

        Without `activations` all stages come off, activation quantizers among them: the model is the user's
        own, with quantized weights. With `activations` these stay. Raises `RuntimeError` before calibration.
        """
        self.check_initialized()
        baked: set[int] = set()
        for site in self.sites:
            inputs, probe = dict(site.activation_stages.named_children()), weight_probe(site)
            if id(site.parameter) in baked:
                detach(site)
            else:
                baked.add(id(site.parameter))
                bake(site)
            if activations:
                attach(site, {"probe": probe}, inputs)
        self.config = replace(self.config, weights=None, regularizers=())
        (mark if activations else unmark)(self)
        return self.model

    def requantized(self, weights: QuantizerConfig | None, activations: QuantizerConfig | None) -> RobustQ:
        """The same model with other quantizers, from its stored weights and what was observed of its inputs.

        Takes the place of this plugin, which is detached.
        """
        observed = {site.name: (weight_probe(site), input_probe(site)) for site in self.sites}
        self.detach()
        plugin = RobustQ(self.model, replace(self.config, weights=weights, activations=activations))
        for site in plugin.sites:
            for mine, theirs in zip((weight_probe(site), input_probe(site)), observed[site.name], strict=True):
                mine.load_state_dict(theirs.state_dict())
        plugin._initialize()
        plugin.restored()
        return plugin

    def change_bits(self, weights: int | None, activations: int | None) -> None:
        """The quantizers it has, at other bits within their clip ranges; the edges' stay at 8, None changes nothing."""
        self.check_initialized()
        wanted = {"weight": weights, "input": activations}
        for quantizer in self._quantizers():
            bits = wanted[quantizer.role]
            if bits is not None and quantizer.site not in self.edges:
                quantizer.change_bits(bits)
        changes = {}
        for name, bits in (("weights", weights), ("activations", activations)):
            if bits is not None:
                own: QuantizerConfig | None = getattr(self.config, name)
                if own is None:
                    raise ValueError(f"the model has no quantizers of its {name}: there is no clip range to keep")
                changes[name] = replace(own, bits=bits)
        self.config = replace(self.config, **changes)
        mark(self)

    def enable(self, on: bool) -> None:
        """Switch all quantizers on or off; off, a weight reads as the stored parameter."""
        for quantizer in self._quantizers():
            quantizer.enabled = on

    def restored(self) -> None:
        """Take over what was loaded into the stages. Raises `ValueError`, with the weight's name, for nonsense."""
        for site in self.sites:
            for stage in (*site.weight_stages, *site.activation_stages):
                try:
                    if isinstance(stage, Quantizer):
                        stage.restored()
                    if isinstance(stage, InputProbe):
                        stage.restored()
                except ValueError as error:
                    raise ValueError(f"{site.name}: {error}") from None
        used = all(bool(weight_probe(site).uses > 0) for site in self.sites)
        self.calibrated = used and all(bool(quantizer.initialized) for quantizer in self._quantizers())

    def check_initialized(self) -> None:
        """Raise `RuntimeError` where a quantizer has no steps yet."""
        for quantizer in self._quantizers():
            if not bool(quantizer.initialized):
                raise RuntimeError("the quantizers have no steps yet: call plugin.calibrate(batches, forward) first")

    def detach(self) -> nn.Module:
        """Take every stage off; the identical parameters and classes are left. Returns the model."""
        for site in self.sites:
            detach(site)
        unmark(self)
        return self.model

    @property
    def float_inputs(self) -> list[LeftOut]:
        """The staged weights whose layer's input is never quantized, with the reason."""
        reasons = ((site.name, float_input(self.config, site)) for site in self.sites)
        return [LeftOut(name, reason) for name, reason in reasons if reason]

    def __repr__(self) -> str:
        """A table: weight, shape, stages, bits; then what was left out, what stays float, and why."""
        return table(self.sites, self.left_out, self.float_inputs)
