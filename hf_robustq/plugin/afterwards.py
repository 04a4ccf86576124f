"""What becomes of a trained model: baked, at other bits, with other quantizers, or without stages.

Documented at `RobustQ`, which passes its calls on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hf_robustq import sites
from hf_robustq.calibrate import input_probe, weight_probe
from hf_robustq.config import QuantizerConfig
from hf_robustq.plugin.mark import mark, unmark
from hf_robustq.plugin.publish import saturated
from hf_robustq.plugin.stages import quantizers
from hf_robustq.quantizers import InputProbe
from hf_robustq.reparam import network_weight
from hf_robustq.sharded import assign, settle

if TYPE_CHECKING:
    from hf_robustq.plugin.robustq import RobustQ


def adopt_averages(plugin: RobustQ) -> None:
    """The averages become the weights, for good."""
    if plugin.ema is not None:
        parameters = dict(plugin.model.named_parameters())
        for name, average in plugin.ema.state_dict()["averages"].items():
            assign(parameters[name], average)
        plugin.ema = None


def take_off(plugin: RobustQ) -> None:
    """Every stage off, the stored weights as they are."""
    for site in plugin.sites:
        sites.detach(site)
    unmark(plugin)


def detach(plugin: RobustQ) -> None:
    settle(plugin.model)
    adopt_averages(plugin)
    for site, _ in saturated(plugin):
        with network_weight(site) as weight:
            values = weight.detach().clone()
        assign(site.parameter, values)
    take_off(plugin)


def bake(plugin: RobustQ, activations: bool) -> None:
    plugin.check_initialized()
    left = {"satnl": None, "weights": None, "regularizers": (), "budget": None, "oscillations": "ignore"}
    config = replace(plugin.config, **left)
    adopt_averages(plugin)
    baked: set[int] = set()
    for site in plugin.sites:
        inputs, probe = dict(site.activation_stages.named_children()), weight_probe(site)
        if id(site.parameter) in baked:
            sites.detach(site)
        else:
            baked.add(id(site.parameter))
            sites.bake(site)
        if activations:
            sites.attach(site, {"probe": probe}, inputs)
    sites.follow_adapters(plugin.model)
    plugin.config = config
    (mark if activations else unmark)(plugin)


def requantized(plugin: RobustQ, weights: QuantizerConfig | None, activations: QuantizerConfig | None) -> RobustQ:
    wanted = plugin.config.requantized(weights, activations)
    observed = {site.name: (weight_probe(site), input_probe(site)) for site in plugin.sites}
    for _, inputs in observed.values():
        if activations is not None and isinstance(inputs, InputProbe):
            inputs.sample()  # raises where nothing is known of it, before anything is changed
    adopt_averages(plugin)
    bounds = {site.name: stage.d for site, stage in saturated(plugin)}
    take_off(plugin)
    as_stored = plugin.config.satnl and replace(plugin.config.satnl, invert=False)
    new = type(plugin)(plugin.model, replace(wanted, satnl=as_stored))
    new.config = wanted
    if plugin.products is not None:
        new.know(plugin.products)
    mark(new)
    for site, stage in saturated(new):
        stage.d.copy_(bounds[site.name])
    for site in new.sites:
        for mine, theirs in zip((weight_probe(site), input_probe(site)), observed[site.name], strict=True):
            mine.load_state_dict(theirs.state_dict())
    new.initialize()
    new.restored()
    return new


def change_bits(plugin: RobustQ, weights: int | None, activations: int | None) -> None:
    plugin.check_initialized()
    wanted = {"weight": weights, "input": activations}
    changes = {}
    for name, bits in (("weights", weights), ("activations", activations)):
        if bits is not None:
            own: QuantizerConfig | None = getattr(plugin.config, name)
            if own is None:
                raise ValueError(f"the model has no quantizers of its {name}: there is no clip range to keep")
            changes[name] = replace(own, bits=bits, mixed={})
    config = replace(plugin.config, **changes, budget=None)
    adopt_averages(plugin)
    for quantizer in quantizers(plugin.sites):
        bits = wanted[quantizer.role]
        if bits is not None and quantizer.site not in plugin.edges:
            quantizer.change_bits(bits)
    for stage in plugin.bits.stages().values() if weights is not None else ():
        stage.fix(weights - stage.quantizer.sign_bits)
    plugin.config = config
    mark(plugin)
