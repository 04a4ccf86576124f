"""Calibration: what a forward pass on training data tells about every site."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_robustq.grid import Grid
from hf_robustq.quantizers import Probe, Quantizer
from hf_robustq.scales import Sample
from hf_robustq.sites import Site, whole

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
def float_model(sites: Sequence[Site]) -> Iterator[None]:
    """All quantizers off, all probes off; afterwards the quantizers are as before and the probes off."""
    quantizers = [stage for stage in stages(sites) if isinstance(stage, Quantizer)]
    enabled = [quantizer.enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, was in zip(quantizers, enabled, strict=True):
            quantizer.enabled = was
        for stage in stages(sites):
            if isinstance(stage, Probe):
                stage.off()


def stages(sites: Sequence[Site]) -> Iterator[nn.Module]:
    """Every stage of every site, each once."""
    seen: set[int] = set()
    for site in sites:
        for stage in (*site.weight_stages, *site.activation_stages):
            if id(stage) not in seen:
                seen.add(id(stage))
                yield stage


def weight_probe(site: Site) -> Probe:
    return site.weight_stages.get_submodule("probe")  # type: ignore[return-value]


def activation_probe(site: Site) -> Probe:
    return site.activation_stages.get_submodule("probe")  # type: ignore[return-value]


def observe(model: nn.Module, sites: Sequence[Site], batches: Iterable[Any], forward: Forward) -> int:
    """Run the float model on `batches`; every probe counts its calls, activation probes collect their input.

    Returns the number of batches. Raises `ValueError` for no batch and for a non-finite input (with the
    site's name).
    """
    probes = [stage for stage in stages(sites) if isinstance(stage, Probe)]
    count = 0
    with undisturbed(model), float_model(sites):
        for probe in probes:
            probe.forget()
            probe.mode = "observe"
        for batch in batches:
            forward(model, batch)
            count += 1
    if count == 0:
        raise ValueError("the calibration set is empty: give at least one batch of training data")
    return count


@torch.no_grad()
def initialize(sites: Sequence[Site], rules: dict[str, str]) -> None:
    """Set the steps of every quantizer that has none yet, from the stored weights and the observed inputs.

    `rules`: the scale rule of "weights" and of "activations". Rank 0's steps are broadcast.
    """
    for site in sites:
        for quantizer in site.weight_stages:
            if isinstance(quantizer, Quantizer) and not bool(quantizer.initialized):
                quantizer.init_from(weight_sample(site, quantizer.grid.axis), rules["weights"])
        for quantizer in site.activation_stages:
            if isinstance(quantizer, Quantizer) and not bool(quantizer.initialized):
                sample = activation_probe(site).sample()
                quantizer.grid = activation_grid(quantizer.grid.bits, sample, quantizer.grid.narrow)
                quantizer.init_from(sample, rules["activations"])
    if torch.distributed.is_initialized():
        for stage in stages(sites):
            if isinstance(stage, Quantizer):
                for tensor in (stage.scale, stage.low, stage.high):
                    torch.distributed.broadcast(tensor.data, src=0)


def activation_grid(bits: int, sample: Sample, narrow: bool = False) -> Grid:
    """Unsigned for what never went below zero in calibration, signed for the rest."""
    signed = bool((sample.minimum < 0).any())
    return Grid(bits=bits, signed=signed, narrow=narrow and signed)


def weight_sample(site: Site, axis: int | None) -> Sample:
    """The distribution of a stored weight, gathered where it is sharded. Raises `ValueError` where it is not finite."""
    with whole(site.parameter) as weight:
        try:
            return Sample.of(weight, axis)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
