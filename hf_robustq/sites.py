"""Sites: where a weight is read, and how stages get between the parameter and its reader.

`attach` gives a module a cached subclass of its own class whose tensor is a property: it runs the stored
parameter through `<tensor>_stages`, an ordinary `nn.Sequential`, on every read. Readers of the attribute
(`F.linear`, `addmm`, a fused attention kernel) see the staged weight; readers of `_parameters` (optimizer,
`state_dict`, FSDP2, ZeRO-3, safetensors, weight tying) see the user's own parameter under its own name.
The same subclass passes the module's input through `activation_stages`.

This is the only file that touches module classes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

OUTPUT_AXIS: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
    Conv1D: 1,
}
"""Modules whose `weight` can be staged, and the axis of its output channels."""


@dataclass(frozen=True, eq=False)
class Site:
    """Where: a module and one of its tensors; `name` is the parameter's in the model, `axis` its output channels."""

    name: str
    module: nn.Module
    tensor: str
    axis: int

    @property
    def parameter(self) -> Tensor:
        """The stored parameter, looked up anew: FSDP2 replaces parameters, so never keep hold of one."""
        parameter = self.module._parameters[self.tensor]
        assert parameter is not None
        return parameter

    @property
    def weight_stages(self) -> nn.Sequential:
        return getattr(self.module, f"{self.tensor}_stages")

    @property
    def activation_stages(self) -> nn.Sequential:
        return self.module.activation_stages  # type: ignore[return-value]


@dataclass(frozen=True)
class LeftOut:
    """A weight that could have been a site and is not, and why."""

    name: str
    reason: str


@functools.cache
def staged_class(cls: type[nn.Module], tensor: str) -> type[nn.Module]:
    """The subclass of `cls` whose `tensor` is staged on read; one per class, so that compiled code is reused."""
    stages_name = f"{tensor}_stages"

    def get(self: nn.Module) -> Any:
        stored = self._parameters[tensor]
        if stored is None or isinstance(stored, DTensor):  # a DTensor is storage, not compute
            return stored
        try:
            return self._modules[stages_name](stored)  # type: ignore[misc]
        except AttributeError as error:  # nn.Module.__getattr__ would go on and return the raw parameter
            raise RuntimeError(f"a stage of {tensor} failed: {error}") from error

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        stages = self._modules["activation_stages"]
        if args:
            args = (stages(args[0]), *args[1:])  # type: ignore[misc]
        else:
            first = next(iter(kwargs))
            kwargs = {**kwargs, first: stages(kwargs[first])}  # type: ignore[misc]
        return cls.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        _, _, *state = object.__reduce_ex__(self, protocol)
        return _rebuild, (cls, tensor), *state

    body = {tensor: property(get), "forward": forward, "__reduce_ex__": reduce, "_unstaged": cls}
    return type(cls.__name__, (cls,), {**body, "__module__": cls.__module__})


def _rebuild(cls: type[nn.Module], tensor: str) -> nn.Module:
    """What pickle calls: the staged class is made anew, not looked up by its name."""
    staged = staged_class(cls, tensor)
    return staged.__new__(staged)


def attach(site: Site, weight_stages: dict[str, nn.Module], activation_stages: dict[str, nn.Module]) -> None:
    """Put stages between the parameter and its reader, and between the module and its first input.

    Raises `ValueError` for a sharded parameter (attach before wrapping) and for a site that is staged already.
    """
    module = site.module
    if isinstance(site.parameter, DTensor):
        raise ValueError(f"{site.name} is sharded already: create RobustQ before wrapping or sharding the model")
    if hasattr(type(module), "_unstaged"):
        raise ValueError(f"{site.name} is staged already: call detach() on the first RobustQ of this model")
    for name, stages in ((f"{site.tensor}_stages", weight_stages), ("activation_stages", activation_stages)):
        sequence = nn.Sequential()
        for stage_name, stage in stages.items():
            sequence.add_module(stage_name, stage)
        module.add_module(name, sequence.train(module.training))
    module.__class__ = staged_class(type(module), site.tensor)


def detach(site: Site) -> None:
    """Undo `attach`: the module gets its own class back; the Parameter object never moved."""
    module = site.module
    module.__class__ = type(module)._unstaged  # type: ignore[attr-defined]
    delattr(module, f"{site.tensor}_stages")
    delattr(module, "activation_stages")


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is stored in pieces over the ranks (FSDP2, ZeRO-3)."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


@contextmanager
def whole(parameter: Tensor) -> Iterator[Tensor]:
    """The unsharded values of a parameter: gathered from FSDP2 or ZeRO-3 where it is sharded (a collective then)."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield parameter.data


def find_sites(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    first_last: bool = False,
    embeddings: bool = False,
) -> tuple[list[Site], list[LeftOut], dict[str, str]]:
    """The weights of a model that can be staged, in registration order; those left out with the reason; the edges.

    The edges are the names of the first and last layers' weights, with the word for each (`edge_names`).

    `include`, `exclude`: fnmatch patterns of parameter names; one that matches nothing raises `ValueError`.
    `first_last=False` leaves out the first layer (where no embedding comes before it) and the output layer.
    A tensor shared with a module that is no site is left out: both ends of a tie are staged, or neither.
    """
    candidates: list[Site] = []
    left: list[LeftOut] = []
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{tensor}" if name else tensor)
        site, reason = _candidate(name, module, embeddings)
        if site is not None and not reason:
            candidates.append(site)
        elif site is not None:
            left.append(LeftOut(site.name, reason))

    for pattern in (*include, *exclude):
        if candidates and not any(fnmatchcase(site.name, pattern) for site in candidates):
            examples = ", ".join(site.name for site in candidates[:3])
            raise ValueError(f"pattern {pattern!r} matches no weight; weights are named like {examples}")

    edges = edge_names(model, candidates)
    kept: list[Site] = []
    for site in candidates:
        if not any(fnmatchcase(site.name, pattern) for pattern in include):
            left.append(LeftOut(site.name, "not in include"))
        elif any(fnmatchcase(site.name, pattern) for pattern in exclude):
            left.append(LeftOut(site.name, "in exclude"))
        elif site.name in edges and not first_last:
            left.append(LeftOut(site.name, f"{edges[site.name]} (first_last='float')"))
        else:
            kept.append(site)

    names = {site.name for site in kept}
    sites: list[Site] = []
    for site in kept:
        strangers = [name for name in owners[id(site.parameter)] if name not in names]
        if strangers:
            left.append(LeftOut(site.name, f"tied to {strangers[0]}, which is not staged"))
        else:
            sites.append(site)
    return sites, left, edges


def _candidate(name: str, module: nn.Module, embeddings: bool) -> tuple[Site | None, str]:
    def site(tensor: str, axis: int) -> Site:
        return Site(f"{name}.{tensor}" if name else tensor, module, tensor, axis)

    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return None, ""
        return site("in_proj_weight", 0), ""
    if isinstance(module, nn.Embedding):
        return (site("weight", 0), "") if embeddings else (None, "")
    axis = next((axis for kind, axis in OUTPUT_AXIS.items() if isinstance(module, kind)), None)
    if axis is None:
        return None, ""
    stored = module._parameters.get("weight")
    if not isinstance(stored, nn.Parameter):
        return site("weight", axis), "its weight is computed from other tensors (weight norm, parametrization)"
    if not stored.is_floating_point():
        return site("weight", axis), f"its weight is stored as {stored.dtype}"
    if type(module).__name__.startswith(("StdConv2d", "ScaledStdConv2d")):
        return site("weight", axis), "it standardises its weight after reading it"
    return site("weight", axis), ""


def edge_names(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """Names of the first and last layers' weights, with the word for each.

    Last: the module the model itself calls its output (`get_output_embeddings`, timm's `get_classifier`),
    else the last site; poolers belong to the head. First: the first site, unless an embedding or the
    output comes before it (then the embedding is the first layer, and it stays float anyway).
    """
    if not sites:
        return {}
    modules = dict(model.named_modules())
    outputs = [
        getter()
        for module in modules.values()
        for getter in (getattr(module, "get_output_embeddings", None), getattr(module, "get_classifier", None))
        if callable(getter)
    ]
    edges = {site.name: "output layer" for site in sites if any(site.module is output for output in outputs)}
    if not edges and getattr(model, "base_model", None) is not model:  # a bare transformers backbone has no output
        edges = {sites[-1].name: "output layer"}
    edges |= {site.name: "pooler" for site in sites if "pooler" in site.name.split(".")}
    before = next((m for m in modules.values() if isinstance(m, nn.Embedding) or m is sites[0].module), None)
    if before is sites[0].module:
        edges.setdefault(sites[0].name, "first layer")
    return edges


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `ValueError` for a model that is wrapped, compiled or sharded already."""
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "nn.DataParallel cannot work with staged weights: "
            "start one process per GPU with `accelerate launch <script>`"
        )
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or kind in (
        "FullyShardedDataParallel",
        "DeepSpeedEngine",
        "OptimizedModule",
    )
    if wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        what = kind if wrapped else "sharded (DTensor parameters)"
        raise ValueError(f"the model is {what} already: create RobustQ(model, config) before wrapping or sharding it")


@torch.no_grad()
def bake(site: Site) -> None:
    """Write the staged value into the parameter, then detach."""
    value = site.weight_stages.eval()(site.parameter)
    site.parameter.copy_(value)
    detach(site)
