"""How stages get between the parameter and its reader. The only file that touches module classes.

`attach` gives a module a cached subclass of its own class whose tensor is a property: it runs the stored
parameter through `<tensor>_stages`, an ordinary `nn.Sequential`, on every read. Readers of the attribute
(`F.linear`, `addmm`, a fused attention kernel) see the staged weight; readers of `_parameters` (optimizer,
`state_dict`, FSDP2, ZeRO-3, safetensors, weight tying) see the user's own parameter under its own name.
The same subclass passes the module's input through `activation_stages`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_robustq.sharded import assign, whole
from hf_robustq.sites.site import Site


@functools.cache
def staged_class(cls: type[nn.Module], tensor: str) -> type[nn.Module]:
    """The subclass of `cls` whose `tensor` is staged on read; one per class, so that compiled code is reused."""
    stages_name = f"{tensor}_stages"

    def get(self: nn.Module) -> Any:
        stored = self._parameters[tensor]
        if stored is None or isinstance(stored, DTensor) or stored.is_meta:  # storage, not compute
            return stored
        try:
            return getattr(self, stages_name)(stored)
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


def attach(
    site: Site, weight_stages: dict[str, nn.Module] | nn.Sequential, activation_stages: dict[str, nn.Module]
) -> None:
    """Put stages between the parameter and its reader, and between the module and its first input.

    `weight_stages` is the sequence of another site where the two share their parameter: it stays that site's
    submodule, so that no tensor is saved twice.

    Raises `ValueError` for a sharded parameter (attach before wrapping), for a site that is staged already,
    and for a module whose `forward` was replaced on the instance, which would bypass the stages.
    """
    module = site.module
    if isinstance(site.parameter, DTensor):
        raise ValueError(f"{site.name} is sharded already: create RobustQ before wrapping or sharding the model")
    if hasattr(type(module), "_unstaged"):
        raise ValueError(f"{site.name} is staged already: use RobustQ.of(model), or detach() it first")
    if "forward" in vars(module):
        raise ValueError(
            f"the forward of {site.name} was replaced (device_map and other hooks do that), so its input cannot "
            "be staged: load the model on one device, and attach before anything else hooks into it"
        )
    if isinstance(weight_stages, nn.Sequential):
        object.__setattr__(module, f"{site.tensor}_stages", weight_stages)
    else:
        module.add_module(f"{site.tensor}_stages", _sequence(weight_stages, module.training))
    module.add_module("activation_stages", _sequence(activation_stages, module.training))
    module.__class__ = staged_class(type(module), site.tensor)


def _sequence(stages: dict[str, nn.Module], training: bool) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, stage in stages.items():
        sequence.add_module(name, stage)
    return sequence.train(training)


def detach(site: Site) -> None:
    """Undo `attach`: the module gets its own class back; the Parameter object never moved."""
    module = site.module
    module.__class__ = type(module)._unstaged  # type: ignore[attr-defined]
    delattr(module, f"{site.tensor}_stages")
    delattr(module, "activation_stages")


@torch.no_grad()
def bake(site: Site) -> None:
    """Write the staged value into the parameter, also where it is sharded (a collective then); then detach."""
    with whole(site.parameter) as weight:
        value = site.weight_stages.eval()(weight).clone()
    assign(site.parameter, value)
    detach(site)
