"""Which stages a site gets, as a config says, and who has which."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase

import torch
from torch import nn

from hf_robustq.calibrate import stages
from hf_robustq.config import QuantizerConfig, RobustQConfig
from hf_robustq.functional import Axis, channels_along
from hf_robustq.grid import Grid
from hf_robustq.options import under
from hf_robustq.quantizers import QUANTIZERS, CallProbe, InputProbe, Oscillation, Quantizer, Role, WeightProbe
from hf_robustq.regularizers import REGULARIZERS, Regularizer
from hf_robustq.reparam import SatNL
from hf_robustq.sites import RECURRENT, Site


def float_input(config: RobustQConfig, site: Site) -> str:
    """Why the input of a site's layer cannot be quantized; empty where it can."""
    if not site.float_input and any(fnmatchcase(site.name, pattern) for pattern in config.weights_only):
        return "in weights_only"
    return site.float_input


def weight_stages(config: RobustQConfig, site: Site, edges: Collection[str]) -> dict[str, nn.Module]:
    """SatNL, regularizers and quantizer, of which the edges have only the last, at 8 bits; then the probe."""
    own: dict[str, nn.Module] = {}
    if site.name not in edges:
        if config.satnl is not None:
            own["satnl"] = SatNL(**asdict(config.satnl))
        for regularizer in config.regularizers:
            stage = REGULARIZERS[regularizer.method](**regularizer.options)
            stage.stacked = site.stacked
            if not stage.refuses(site.module):
                own[regularizer.method] = stage
    if config.weights is not None:
        axis = site.steps_axis(config.weights.per_channel)
        own["quantizer"] = _quantizer(config.weights, site, edges, axis, "weight")
        for stage in own.values():
            if isinstance(stage, Regularizer) and stage.works_with:
                with under("regularizers"):
                    stage.bind(own["quantizer"])
        if config.oscillations != "ignore":
            freeze = config.freeze_above if config.oscillations == "freeze" else None
            own["oscillation"] = Oscillation(site.shape, freeze)
    own["probe"] = WeightProbe(site.channels, channels_along(site.shape, site.channels))
    return _beside(site, own)


def activation_stages(config: RobustQConfig, site: Site, edges: Collection[str]) -> dict[str, nn.Module]:
    """Quantizer and probe of the layer's input; where it stays float, a probe that counts calls."""
    if float_input(config, site):
        return _beside(site, {"probe": CallProbe()})
    own: dict[str, nn.Module] = {}
    if config.activations is not None:
        own["quantizer"] = _quantizer(config.activations, site, edges, None, "input")
        own["quantizer"].register_forward_pre_hook(_refuse_nested)
    own["probe"] = InputProbe(site.name)
    return _beside(site, own)


def _refuse_nested(quantizer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001
    """Being there, this hook keeps `nn.TransformerEncoderLayer` from its fused kernel, which would pass the input by.

    `nn.TransformerEncoder` does not look for hooks before it packs a padded batch for that kernel.
    """
    if inputs[0].is_nested:
        raise RuntimeError(
            "the inputs of layers in a nested tensor cannot be quantized: "
            "create nn.TransformerEncoder with enable_nested_tensor=False"
        )


def mean_bits(config: QuantizerConfig | None, sites: Sequence[Site]) -> float | None:
    """Storage bits of a quantizer's config, in the mean over these weights; None for no quantizer."""
    if config is None or not config.mixed:
        return config and config.bits
    bits = [config.bits_of(site.name) for site in sites]
    return sum(bits) / len(bits) if bits else config.bits


def _quantizer(config: QuantizerConfig, site: Site, edges: Collection[str], axis: Axis, role: Role) -> Quantizer:
    bits = 8 if site.name in edges else config.bits_of(site.name)
    method = QUANTIZERS[config.method]
    narrow = role == "weight" and method.narrow if config.narrow is None else config.narrow
    grid = Grid(bits=bits, narrow=narrow, axis=axis)
    channels = channels_along(site.shape, axis)
    quantizer = method(grid, channels, role, **config.options)
    quantizer.product = not isinstance(site.module, nn.Embedding | RECURRENT)
    quantizer.site = site.name
    return quantizer


def _beside(site: Site, stages: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """On the weight's device; weights that are still on the meta device get theirs later."""
    device = site.parameter.device
    return {name: stage.to(torch.device("cpu") if device.type == "meta" else device) for name, stage in stages.items()}


def quantizers(sites: Sequence[Site]) -> Iterator[Quantizer]:
    return (stage for stage in stages(sites) if isinstance(stage, Quantizer))


def carriers(sites: Sequence[Site], method: str) -> list[tuple[Site, Regularizer]]:
    """The regularizer of each trainable weight, once where a weight is shared."""
    found: dict[int, tuple[Site, Regularizer]] = {}
    for site in sites:
        stage = site.weight_stages._modules.get(method)
        if isinstance(stage, Regularizer) and site.parameter.requires_grad:
            found.setdefault(id(stage), (site, stage))
    return list(found.values())


def own_parameters(model: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Parameter]:
    """What the stages learn, by name in the model."""
    own = {id(p) for stage in stages(sites) for p in stage.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}
