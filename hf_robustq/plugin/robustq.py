"""RobustQ: the one stateful object a user holds."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, cast

from torch import nn

from hf_robustq import distributed
from hf_robustq.calibrate import Forward, weight_probe
from hf_robustq.config import QuantizerConfig, RobustQConfig
from hf_robustq.optim import EMA
from hf_robustq.options import OptionError, check, shown
from hf_robustq.plugin import adapters, afterwards
from hf_robustq.plugin.bits import LearnedBits
from hf_robustq.plugin.calibration import Calibration
from hf_robustq.plugin.mark import PLUGIN, mark, refuse_quantized
from hf_robustq.plugin.publish import published, saturated, wrap
from hf_robustq.plugin.stages import (
    activation_stages,
    carriers,
    float_input,
    mean_bits,
    own_parameters,
    quantizers,
    weight_stages,
)
from hf_robustq.plugin.table import table
from hf_robustq.plugin.training import Training
from hf_robustq.products import Products, reasons
from hf_robustq.quantizers import Quantizer
from hf_robustq.regularizers import REGULARIZERS
from hf_robustq.schedules import LearningRate
from hf_robustq.sharded import check_finite, whole_shape
from hf_robustq.sites import (
    LeftOut,
    Site,
    attach,
    detach,
    find_sites,
    follow_adapters,
    inner,
    refuse_wrapped,
)
from hf_robustq.size import Size, size
from hf_robustq.stage import Stage
from hf_robustq.telemetry import FiniteWatch, by_layer, means, site_histograms

logger = logging.getLogger(__name__)

BITS_LR = 0.05
"""Learning rate of bit-widths where none is given: bits an optimizer step under Adam."""


def check_rates(scale_lr: Any, bits_lr: Any) -> None:
    """Raise `ValueError` for learning rates of what stages learn that are none."""
    check("scale_lr", scale_lr, LearningRate | None)
    check("bits_lr", bits_lr, LearningRate)


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
            model,
            config.include,
            config.exclude,
            touch_edges,
            config.embeddings,
            config.routers,
            config.parameters,
            config.adapters,
        )
        if not self.sites:
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in self.left_out)
            raise ValueError(f"no weight to work on in this model ({reasons or 'no Linear or convolution in it'})")
        self.edges = edges if config.first_last == 8 else {}
        self._check_patterns()
        self._attach()
        self.ema: EMA | None = None
        self.watch = FiniteWatch(model)
        self.products: Products | None = None
        self.calibrated = False
        self._training, self._calibration = Training(self), Calibration(self)
        mark(self)
        self.before_wrapping()

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The plugin of a staged model: one that was loaded, say, or is wrapped by now. Else a `ValueError`."""
        for module in (model, *model.modules()):
            if isinstance(plugin := vars(module).get(PLUGIN), cls):
                if inner(model) is inner(plugin.model):
                    plugin.follow(model)
                return plugin
        raise ValueError("this model has no stages: create RobustQ(model, config), or load a folder that has them")

    def _check_patterns(self) -> None:
        config = self.config
        own = {site.name: site for site in self.sites if site.name not in self.edges}
        with_inputs = [name for name, site in own.items() if not float_input(config, site)]
        for what, patterns, names in (
            ("weights_only", config.weights_only, [site.name for site in self.sites]),
            ("weights.mixed", config.weights.mixed if config.weights else (), own),
            ("activations.mixed", config.activations.mixed if config.activations else (), with_inputs),
        ):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(f"{what}: pattern {shown(pattern)} matches no staged weight")

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
            follow_adapters(self.model)
            adapters.check(self)
            wrap(self)
        except Exception:
            for site in attached:
                detach(site)
            raise

    def check_regularizers(self) -> None:
        """Raise `ValueError` for a regularizer that acts on no weight."""
        for regularizer in self.config.regularizers:
            if not carriers(self.sites, regularizer.method):
                stage = REGULARIZERS[regularizer.method](**regularizer.options)
                acting = [site for site in self.sites if site.name not in self.edges]
                reasons = {stage.refuses(site.module) or adapters.frozen(self) for site in acting}
                reasons = reasons or {"a first or last layer"}
                raise OptionError(
                    f"regularizers.{regularizer.method}",
                    f"every weight it would act on is {' or '.join(sorted(reasons))}: let it act on some, or drop it",
                )

    # ---- before training -------------------------------------------------------------------------

    def calibrate(self, batches: Iterable[Any], forward: Forward) -> None:
        """Run `forward(model, batch)` on training batches: count calls, set steps that are not set yet.

        The model runs in evaluation mode, in float and without gradients, and is left as it was, global
        RNGs included. Call it before wrapping; where no rank holds the whole model before (`zero.Init`, FSDP's
        `cpu_ram_efficient_loading`), after it. Every rank runs the same batches; then all have rank 0's
        figures. Raises `ValueError` for an empty set, for a layer that is never used, where inputs are to be
        quantized for layers whose input is never seen, where ranks have different configs, and for a budget that
        cannot be met.
        """
        self._calibration.calibrate(batches, forward)
        self.calibrated = True

    def observe(self, batches: Iterable[Any], forward: Forward, activations: bool = False) -> None:
        """Count calls and collect the distribution of every input anew. `activations`: a missing one is an error."""
        self._calibration.observe(batches, forward, activations)

    def initialize(self) -> None:
        """Set the steps that are not set yet from what was observed, each by the rule of its config."""
        self._calibration.initialize()

    def check_in_place(self) -> None:
        """Raise `ValueError` for a staged layer that the model has no more, as a head that was exchanged or resized."""
        layers = {id(module) for module in self.model.modules()}
        if gone := next((site.name for site in self.sites if id(site.module) not in layers), ""):
            raise ValueError(
                f"the layer of {gone} has been replaced since it was staged: change the model, then create RobustQ"
            )

    def before_wrapping(self) -> None:
        """What backends need to know of the stages' tensors; called where the plugin is created and calibrates.

        DDP need not send them from rank 0 at every forward: they are equal already. FSDP2 with
        `cpu_ram_efficient_loading` takes every saved tensor for a sharded parameter (accelerate 1.15): they
        stay out of the state dict until `after_wrapping`.
        """
        self._calibration.before_wrapping()

    def after_wrapping(self) -> None:
        """The stages' tensors are saved again; called by the first `step`."""
        self._calibration.after_wrapping()

    def know(self, products: Products) -> None:
        """Take over which weights are multiplied by, as a calibration saw it; those that stay float are `left_out`."""
        self.products = products
        self.left_out = [*self.left_out, *reasons(self.model, self.left_out, products.unstaged)]
        mark(self)

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
        accumulating: bool | None = None,
    ) -> None:
        """Call before the forward of every micro-batch, outside `accelerator.accumulate`.

        progress       share of training done, in [0, 1]
        first          whether this micro-batch is the first of its optimizer step (it carries the penalties);
                       default: what Accelerate says
        scaler         the fp16 gradient scaler, where there is one (`accelerator.scaler`)
        index          optimizer steps done, which noise is drawn by; default: counted from 0, so say it on resuming
        learning_rate  now, divided by its value at the start; for `noise_lr_scale`
        accumulating   whether an optimizer step has several micro-batches: then weights are quantized once for all
                       (without noise, and where no rank holds a part only); default: what Accelerate says
        """
        if not self.calibrated:
            raise RuntimeError("call plugin.calibrate(batches, forward) before the first step")
        self.after_wrapping()
        self._training.step(progress, first, scaler, index, learning_rate, accumulating)

    def end_micro_batch(self) -> None:
        """The following micro-batches of this optimizer step carry no penalty."""
        self._training.end_micro_batch()

    def after_optimizer_step(self) -> None:
        """Put what was learned back where it makes sense, and frozen weights on their levels.

        `step` calls it before the next optimizer step; the last one of a plain loop has to be followed by it.
        """
        self._training.after_optimizer_step()

    def check_optimizer(self, optimizer: Any) -> None:
        """Raise `RuntimeError` for an optimizer that trains weights of the model and not what the stages learn."""
        self._training.check_optimizer(optimizer)

    @property
    def bits(self) -> LearnedBits:
        """The bit-widths that are learned."""
        return self._training.bits

    def size(self) -> Size:
        """Bits, megabytes and bit-operations, by layer and in all; `print` it. Bits are those of now."""
        return replace(size(self.model, self.sites), products=self.products)

    def trained_bits(self) -> dict[str, float | None]:
        """{"weights", "activations"}: storage bits the model is trained with, in the mean where layers differ."""
        own = {"weights": self.config.weights, "activations": self.config.activations}
        sites = [site for site in self.sites if site.name not in self.edges]
        quantized = {"weights": sites, "activations": [s for s in sites if not float_input(self.config, s)]}
        means = {name: mean_bits(config, quantized[name]) for name, config in own.items()}
        return {**means, "weights": self.bits.metrics().get("bits", means["weights"])}

    def metrics(self) -> dict[str, float]:
        """Means over the weights: kurtosis, each penalty by its name, unscaled, and how they are quantized.

        quantization_error   mean |Q(w) - w|
        step, clipped        the mean step, and the share of weights beyond the outer levels
        distance             mean |Q(w) - w| in steps; with dorefa of tanh(w) / max|tanh(w)|, and the only one of these
        oscillating          the share of weights that go back and forth between two levels, where that is watched
        largest_weight       max |w| of any
        bits, beta           of the layers whose bits are learned, each layer counting once
        megabytes            of the whole model, and its bit_operations for one sample; where bits are learned
        """
        return {**means(self.sites, self.regularized), **self.bits.metrics()}

    def telemetry(self) -> dict[str, dict[str, float]]:
        """By weight {"kurtosis"}, and with a quantizer {"bits", "error", "step", "clipped", "largest", "distance"} too.

        See `metrics`. Of a quantizer that reshapes weights, DoReFa's, "bits" and "distance" only.
        """
        return by_layer(self.sites)

    def histograms(self, bins: int = 101) -> dict[str, dict[str, Any]]:
        """By weight {"kurtosis", "largest", "counts"}: of `bins` equal bins from -largest to largest."""
        return site_histograms(self.sites, bins)

    @property
    def regularized(self) -> list[Site]:
        """The sites a regularizer acts on, or where there is none would act on."""
        names = {site.name for r in self.config.regularizers for site, _ in carriers(self.sites, r.method)}
        return [site for site in self.sites if (site.name in names if names else site.name not in self.edges)]

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What the stages learn (steps, offsets, bit-widths), by name in the model."""
        return own_parameters(self.model, self.sites)

    def parameter_groups(
        self, weight_decay: float, scale_lr: float | None = None, bits_lr: float = BITS_LR
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer: matrices and kernels decayed, vectors (biases, norms) not, what is learned not.

        `scale_lr`: a learning rate of its own for steps and offsets; `bits_lr`: for bit-widths, numbers up to 8.
        """
        own = self.own_parameters()
        rest = [p for name, p in self.model.named_parameters() if p.requires_grad and name not in own]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if len(whole_shape(p)) > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if len(whole_shape(p)) <= 1], "weight_decay": 0.0},
        ]
        return groups + self.own_groups(scale_lr, bits_lr)

    def own_groups(self, scale_lr: float | None = None, bits_lr: float = BITS_LR) -> list[dict[str, Any]]:
        """Groups of what the stages learn."""
        bits = {id(stage.beta) for stage in self.bits.stages().values()}
        own = self.own_parameters().values()
        check_rates(scale_lr, bits_lr)
        rate = {} if scale_lr is None else {"lr": scale_lr}
        groups = [
            {"params": [p for p in own if id(p) not in bits], "weight_decay": 0.0, **rate},
            {"params": [p for p in own if id(p) in bits], "weight_decay": 0.0, "lr": bits_lr, "momentum": 0.0},
        ]
        return [group for group in groups if group["params"]]

    # ---- averages, and what is published ----------------------------------------------------------

    def average(self, decay: float = 0.9999) -> EMA:
        """Average the weights from now on (`EMA`); `ema.update()` follows every optimizer step.

        The averages are what `published` shows and `save_pretrained` saves.
        """
        self.ema = EMA(self.model, decay)
        mark(self)
        return self.ema

    def averaged(self) -> AbstractContextManager[None]:
        """The model with the averages of its weights, where there are some; afterwards as before, to the bit."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def published(self) -> AbstractContextManager[None]:
        """The model as a saved folder has it: averages in place of the weights, and SatNL's weights the stored ones.

        It computes the same. Afterwards it is as before, to the bit. Gather and save the tensors of a sharded
        model, or of one without `save_pretrained`, in here.
        """
        return published(self)

    # ---- adapters --------------------------------------------------------------------------------

    @property
    def base_model(self) -> nn.Module:
        """The model without PEFT's wrapping: what merging the adapters leaves."""
        return inner(self.model)

    @property
    def adapted(self) -> bool:
        """Whether PEFT's adapters are what is trained: then a saved folder holds them only."""
        return self.base_model is not self.model or getattr(self.model, "_hf_peft_config_loaded", False)

    def follow(self, model: nn.Module) -> None:
        """Go on with what PEFT made of the model, `get_peft_model(model, ...)` or `merge_and_unload()`.

        `RobustTrainer` and `RobustQ.of` call it. Raises `ValueError` for another model, for copies of staged layers
        (`modules_to_save`), and for a regularizer left with nothing to act on.
        """
        adapters.follow(self, model)

    def save(self, folder: str | Path) -> None:
        """Write what the stages hold (steps, statistics) to `robustq_stages.safetensors`: an adapter's folder lacks it.

        A folder of the whole model has it already.
        """
        adapters.save(self, folder, write=distributed.rank() == 0)

    def load(self, folder: str | Path) -> None:
        """Take over what `save` wrote: calibrated, and trained. Raises `ValueError` for another config."""
        adapters.load(self, folder)

    # ---- afterwards ------------------------------------------------------------------------------

    def bake(self, activations: bool = False) -> nn.Module:
        """Put the weights on their grids for good; returns the model.

        Without `activations` all stages come off, activation quantizers among them: the model is the user's
        own, with quantized weights. With `activations` these stay. Raises `RuntimeError` before calibration.
        """
        afterwards.bake(self, activations)
        return self.model

    def requantized(self, weights: QuantizerConfig | None, activations: QuantizerConfig | None) -> RobustQ:
        """The same model with other quantizers, from its stored weights and what was observed of its inputs.

        Takes the place of this plugin, which is detached.
        """
        return afterwards.requantized(self, weights, activations)

    def change_bits(self, weights: int | None, activations: int | None) -> None:
        """The quantizers it has, at other bits within their clip ranges; the edges' stay at 8, None changes nothing."""
        afterwards.change_bits(self, weights, activations)

    @property
    def reshaped(self) -> bool:
        """Whether a weight quantizer does more than round (DoReFa's): then the stored weights are not the network's."""
        weights = (site.weight_stages._modules.get("quantizer") for site in self.sites)
        return any(isinstance(quantizer, Quantizer) and not quantizer.uniform for quantizer in weights)

    def warn_reshaped(self, readings: Sequence[str]) -> None:
        """Warn where stored weights are about to be read without the quantizers that reshape them."""
        if readings and self.reshaped:
            logger.warning(
                "%s: the network was trained on weights that its quantizers reshape (DoReFa's tanh); the stored ones, "
                "read without them, are expected to fail: w4@learned, say, keeps the quantizers",
                ", ".join(readings),
            )

    def enable(self, on: bool) -> None:
        """Switch quantizers and SatNL on or off; off, a weight reads as the stored parameter."""
        for stage in (*quantizers(self.sites), *(stage for _, stage in saturated(self))):
            stage.enabled = on

    def restored(self) -> None:
        """Take over what was loaded into the stages. Raises `ValueError`, with the weight's name, for nonsense."""
        self.check_stages()
        used = all(bool(weight_probe(site).uses > 0) for site in self.sites)
        self.calibrated = used and all(bool(quantizer.initialized) for quantizer in quantizers(self.sites))

    def check_stages(self) -> None:
        """Have every stage take over its tensors as they are. Raises `ValueError`, with the weight's name."""
        for site in self.sites:
            for stage in (*site.weight_stages, *site.activation_stages):
                try:
                    cast(Stage, stage).restored()
                except ValueError as error:
                    raise ValueError(f"{site.name}: {error}") from None

    def check_finite(self) -> None:
        """Raise `ValueError`, with the weight's name, for a tensor of a stage that is not finite."""
        for site in self.sites:
            for stage in (*site.weight_stages, *site.activation_stages):
                for name, tensor in stage.state_dict(keep_vars=True).items():
                    check_finite(f"{site.name}: {name}", tensor)

    def check_initialized(self) -> None:
        """Raise `RuntimeError` where a quantizer has no steps yet."""
        for quantizer in quantizers(self.sites):
            if not bool(quantizer.initialized):
                raise RuntimeError("the quantizers have no steps yet: call plugin.calibrate(batches, forward) first")

    def detach(self) -> nn.Module:
        """Take every stage off; the identical parameters and classes are left. Returns the model.

        The weights are the float network's: the averages, where there are some, and SatNL folded into them.
        """
        afterwards.detach(self)
        return self.model

    @property
    def float_inputs(self) -> list[LeftOut]:
        """The staged weights whose layer's input is never quantized, with the reason."""
        reasons = ((site.name, float_input(self.config, site)) for site in self.sites)
        return [LeftOut(name, reason) for name, reason in reasons if reason]

    def __repr__(self) -> str:
        """A table: weight, shape, stages, bits; then what was left out, what stays float, and why."""
        return table(self.sites, self.left_out, self.float_inputs, adapters.unregularized(self))
