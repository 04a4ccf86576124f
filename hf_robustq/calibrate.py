"""Calibration: what a forward pass on training data tells about every site."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from hf_robustq.functional import Axis, along
from hf_robustq.grid import Grid
from hf_robustq.macs import counting_products
from hf_robustq.products import ProductWatch
from hf_robustq.quantizers import CallProbe, InputProbe, Probe, Quantizer, WeightProbe
from hf_robustq.reparam import network_weight
from hf_robustq.scales import Sample
from hf_robustq.sharded import whole_shape
from hf_robustq.sites import Site
from hf_robustq.stage import Stage

logger = logging.getLogger(__name__)

Forward = Callable[[nn.Module, Any], Any]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and every global RNG are as before.

    torch's fused attention path, which reads weights past their modules, is off meanwhile.
    """
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def switches_kept(quantizers: Sequence[Quantizer]) -> Iterator[None]:
    """Afterwards the quantizers are on and off as before."""
    enabled = [quantizer.enabled for quantizer in quantizers]
    try:
        yield
    finally:
        for quantizer, was in zip(quantizers, enabled, strict=True):
            quantizer.enabled = was


@contextmanager
def float_model(sites: Sequence[Site]) -> Iterator[None]:
    """All quantizers off, all probes off; afterwards the quantizers are as before and the probes off."""
    quantizers = [stage for stage in stages(sites) if isinstance(stage, Quantizer)]
    try:
        with switches_kept(quantizers):
            for quantizer in quantizers:
                quantizer.enabled = False
            yield
    finally:
        for stage in stages(sites):
            if isinstance(stage, Probe):
                stage.off()


def stages(sites: Sequence[Site]) -> Iterator[Stage]:
    """Every stage of every site, each once."""
    seen: set[int] = set()
    for site in sites:
        for stage in (*site.weight_stages, *site.activation_stages):
            if id(stage) not in seen:
                seen.add(id(stage))
                yield cast(Stage, stage)


def own_buffers(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """The names in the model of all buffers of all stages."""
    own = {id(buffer) for stage in stages(sites) for buffer in stage.buffers()}
    return [name for name, buffer in model.named_buffers() if id(buffer) in own]


def keep_from_saving(sites: Sequence[Site]) -> list[tuple[nn.Module, str]]:
    """Take the stages' buffers out of the state dict; returns (stage, name) of each."""
    taken = []
    for stage in stages(sites):
        for name, buffer in list(stage.named_buffers(recurse=False)):
            if name not in stage._non_persistent_buffers_set:
                stage.register_buffer(name, buffer, persistent=False)
                taken.append((stage, name))
    return taken


def weight_probe(site: Site) -> WeightProbe:
    return site.weight_stages.get_submodule("probe")  # type: ignore[return-value]


def input_probe(site: Site) -> InputProbe | CallProbe:
    return site.activation_stages.get_submodule("probe")  # type: ignore[return-value]


def rows(batch: Any) -> int:
    """The samples in a batch: the leading dimension that most of its tensors have; 1 where it has none."""
    sizes = Counter(_leading(batch))
    return sizes.most_common(1)[0][0] if sizes else 1


def _leading(batch: Any) -> Iterator[int]:
    if isinstance(batch, torch.Tensor):
        yield from batch.shape[:1]
    else:
        values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
        for value in values:
            yield from _leading(value)


def observe(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    forward: Forward,
    watch: ProductWatch | None = None,
) -> int:
    """Run the float model on `batches`; every probe counts its calls, input probes collect their input.

    Writes each weight's multiply-accumulates for one sample into its probe; `watch` sees which parameters reach a
    product. Returns the number of batches. Raises `ValueError` for no batch and for a non-finite input (with the
    site's name).
    """
    probes = [stage for stage in stages(sites) if isinstance(stage, Probe)]
    count, samples, products = 0, 0, {}
    with undisturbed(model), float_model(sites), counting_products(sites, products):
        for probe in probes:
            probe.forget()
            probe.mode = "observe"
        for batch in batches:
            try:
                with watch if watch is not None else nullcontext():
                    forward(model, batch)
            except RuntimeError as error:
                if any(whole_shape(site.parameter) != site.parameter.shape for site in sites):
                    error.add_note(
                        "the weights are in pieces: if this came before accelerator.prepare, calibrate after it"
                    )
                raise
            if watch is not None:
                watch.forget()
            count += 1
            samples += rows(batch)
    if count == 0:
        raise ValueError("the calibration set is empty: give at least one batch of training data")
    for site in sites:
        weight_probe(site).macs.fill_(products.get(id(site.weight_stages), 0.0) / max(samples, 1))
    return count


def count_uses(sites: Sequence[Site], count: int, need_inputs: bool, idle: Sequence[str] = ()) -> None:
    """Write each weight's reads per forward, of `count` observed, into its probe.

    Raises `ValueError` for weights that were never read, for the `idle` ones, which reach no matrix product, and, with
    `need_inputs`, for inputs never seen: of all of them at once, with the lines of the config that would help. Experts
    in a list that nothing was routed to count as read once, where their inputs are not needed.
    """
    unread = [site.name for site in sites if weight_probe(site).calls == 0]
    unrouted = [name for name in unread if "experts" in name.split(".")]
    unused = [name for name in unread if name not in unrouted]
    probes = {site.name: probe for site in sites if isinstance(probe := input_probe(site), InputProbe)}
    unseen = [name for name, probe in probes.items() if name not in unused and not bool(probe.counts.any())]
    unseen = unseen if need_inputs else []
    problems = []
    if unused:
        problems.append(f"these weights are never used in forward, exclude: {json.dumps(unused)}")
    if idle := [name for name in idle if name not in unread]:
        problems.append(f"these parameters reach no matrix product, exclude: {json.dumps(idle)}")
    if apart := [name for name in unseen if name in unrouted or probes[name].calls]:
        problems.append(
            "no calibration sample reaches these layers: raise calibration_samples, or leave their inputs in float, "
            f"weights_only: {json.dumps(apart)}"
        )
    if direct := [name for name in unseen if name not in apart]:
        problems.append(
            "these weights are read without calling their modules, so the inputs cannot be quantized, "
            f"weights_only: {json.dumps(direct)}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    if unrouted:
        logger.warning("no calibration sample reaches %d weights of experts, %s the first", len(unrouted), unrouted[0])
    uses: dict[int, float] = {}
    for site in sites:
        # A reader may also ask for `weight.dtype`, so calls of the modules count where there are any.
        key = id(weight_probe(site))
        uses[key] = uses.get(key, 0.0) + input_probe(site).calls / count
    for site in sites:
        weight = weight_probe(site)
        weight.uses.fill_(uses[id(weight)] or weight.calls / count or 1.0)


@torch.no_grad()
def initialize(sites: Sequence[Site], rules: Mapping[str, Any]) -> None:
    """Set the steps of every quantizer that has none yet, from the stored weights and the observed inputs.

    `rules`: the scale rule of "weights" and of "activations".
    """
    for site in sites:
        for quantizer in site.weight_stages:
            if isinstance(quantizer, Quantizer) and not bool(quantizer.initialized):
                quantizer.init_from(weight_sample(site, quantizer.grid.axis), rules["weights"])
        for quantizer in site.activation_stages:
            if isinstance(quantizer, Quantizer) and not bool(quantizer.initialized):
                probe = input_probe(site)
                assert isinstance(probe, InputProbe)
                sample = probe.sample()
                quantizer.grid = activation_grid(quantizer.grid.bits, sample, quantizer.grid.narrow)
                quantizer.init_from(sample, rules["activations"])


def activation_grid(bits: int, sample: Sample, narrow: bool = False) -> Grid:
    """Unsigned for what never went below zero in calibration, signed for the rest."""
    signed = bool((sample.minimum < 0).any())
    return Grid(bits=bits, signed=signed, narrow=narrow and signed)


def weight_sample(site: Site, axis: Axis, factor: torch.Tensor | None = None) -> Sample:
    """The distribution of a weight of the float network, gathered if sharded, its channels times `factor` ([C]).

    Raises `ValueError` where it is not finite.
    """
    with network_weight(site) as weight:
        try:
            if factor is not None:
                weight = weight * along(factor.to(weight), weight, site.channels)
            return Sample.of(weight, axis)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
