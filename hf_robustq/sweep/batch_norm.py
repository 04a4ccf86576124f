"""Batch norms of a model under evaluation: which weight each follows, and statistics estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_robustq.sharded import whole
from hf_robustq.sites import Site

Statistics = dict[str, tuple[Tensor, Tensor]]


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms with statistics of their own, by name."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None}


def followers(model: nn.Module, sites: Sequence[Site], run: Callable[[], Any]) -> dict[str, _BatchNorm]:
    """The batch norm that takes the output of a layer as it is, by the name of the layer's weight.

    Found by what passes through in one forward pass, `run()`; a layer or norm that is called more than once has none.
    """
    outputs: dict[int, tuple[Tensor, int, Site]] = {}  # the tensor is kept: its id must stay its own
    pairs: dict[str, _BatchNorm] = {}
    calls: dict[nn.Module, int] = {}

    def made(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            calls[module] = calls.get(module, 0) + 1
            if isinstance(output, Tensor):
                outputs[id(output)] = output, output._version, site

        return hook

    def taken(module: nn.Module, args: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if not args or id(args[0]) not in outputs:
            return
        output, version, site = outputs[id(args[0])]
        if output._version != version or site.shape[site.axis] != module.num_features:
            return  # written to in between, as by an in-place ReLU
        if not (isinstance(site.module, nn.Linear) and args[0].dim() > 2):  # there dimension 1 is no channel
            pairs[site.name] = module  # type: ignore[assignment]

    weights = [site for site in sites if site.tensor == "weight"]
    hooks = [site.module.register_forward_hook(made(site)) for site in weights]
    hooks += [norm.register_forward_pre_hook(taken) for norm in batch_norms(model).values()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    once = {site.name for site in weights if calls.get(site.module) == 1}
    return {name: norm for name, norm in pairs.items() if name in once and calls[norm] == 1}


def gain(norm: _BatchNorm) -> Tensor:
    """[C] what a batch norm multiplies by in evaluation: gamma / sqrt(var + eps)."""
    assert norm.running_var is not None
    inverse = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is None:
        return inverse.float()
    with whole(norm.weight) as gamma:
        return (gamma.double() * inverse).float()


def statistics(model: nn.Module) -> Statistics:
    """A copy of every batch norm's mean and variance."""
    return {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in batch_norms(model).items()}  # type: ignore[union-attr]


@contextmanager
def with_statistics(model: nn.Module, values: Statistics) -> Iterator[None]:
    """The model with other batch-norm statistics; afterwards with its own, to the bit."""
    own = statistics(model)
    try:
        _assign(model, values)
        yield
    finally:
        _assign(model, own)


@torch.no_grad()
def _assign(model: nn.Module, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, norm in batch_norms(model).items():
        mean, variance = values[name]
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]


@torch.no_grad()
def reestimated(model: nn.Module, run: Callable[[], Any]) -> Statistics:
    """The statistics every batch norm sees in `run()`, averaged over its batches; the model's own are left as they are.

    Only the batch norms are in training mode meanwhile. Raises `ValueError` where there are none.
    """
    norms = batch_norms(model)
    if not norms:
        raise ValueError("the model has no batch norm with running statistics: drop /bn")
    own = statistics(model)
    kept = {name: (norm.momentum, norm.num_batches_tracked) for name, norm in norms.items()}
    try:
        for norm in norms.values():
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)  # type: ignore[arg-type]
            norm.momentum = None  # type: ignore[assignment]  # the plain average
            norm.training = True  # and not what is inside it
        run()
        return statistics(model)
    finally:
        for name, norm in norms.items():
            norm.momentum, norm.num_batches_tracked = kept[name]  # type: ignore[assignment]
            norm.training = False
        _assign(model, own)
