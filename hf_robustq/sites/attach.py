"""How stages get between the parameter and its reader. The only file that touches module classes.

`attach` gives a module a cached subclass of its own class whose tensor is a property: it runs the stored
parameter through `<tensor>_stages`, an ordinary `nn.Sequential`, on every read. Readers of the attribute
(`F.linear`, `addmm`, a fused attention kernel) see the staged weight; readers of `_parameters` (optimizer,
`state_dict`, FSDP2, ZeRO-3, safetensors, weight tying) see the user's own parameter under its own name.
The same subclass passes the module's input through `activation_stages`. A module may have several staged tensors
(experts, recurrent layers); its forward then reads each of them once. What is written to the attribute goes to the
stored parameter (`written`); an adapter around the module merges into that one too (`adapters`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_robustq.sharded import assign, is_sharded, whole
from hf_robustq.sites.adapters import enter, inside, is_adapted, watch_adapters
from hf_robustq.sites.site import Site
from hf_robustq.sites.written import check_new, is_reparametrized, refuse, writable

INPUTS = "activation_stages"


def _property(tensor: str) -> property:
    """The attribute whose read goes through the stages."""
    stages_name = f"{tensor}_stages"

    def read(self: nn.Module) -> Any:
        try:
            return getattr(self, stages_name)(self._parameters[tensor])
        except AttributeError as error:  # nn.Module.__getattr__ would go on and return the raw parameter
            raise RuntimeError(f"a stage of {tensor} failed: {error}") from error

    def get(self: nn.Module) -> Any:
        stored = self._parameters.get(tensor)
        if stored is None or isinstance(stored, DTensor) or stored.is_meta:  # storage, not compute
            return stored
        if not inside(self):
            if is_adapted(self) and not is_reparametrized(self, tensor):  # merging, not compute
                return stored
            value = read(self)
            return value if value is stored else writable(value, self, tensor)
        known: dict[str, Tensor] | None = self.__dict__.get("_known")
        if known is not None and tensor in known:
            return known[tensor]
        value = read(self)
        if known is not None:
            known[tensor] = value
        reads: list[Rebuilt] | None = self.__dict__.get("_reads")
        if reads is not None:
            source = None if is_sharded(stored) else stored  # gathered anew, by then
            reads.append(Rebuilt(stored.detach(), lambda: cast(Tensor, self._parameters[tensor]).detach(), source))
            if value is not stored:
                reads.append(Rebuilt(value, lambda: read(self), source))
        return value

    def set_(self: nn.Module, value: Any) -> None:  # noqa: ARG001
        refuse(tensor)

    return property(get, set_)


@functools.cache
def staged_class(cls: type[nn.Module], *tensors: str) -> type[nn.Module]:
    """The subclass of `cls` whose `tensors` are staged on read; one per class, so that compiled code is reused."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        first = "" if args else next(iter(kwargs))
        x = staged = args[0] if args else kwargs[first]
        for name in self.__dict__["_input_stages"]:
            passed = cast(nn.Module, self._modules[name])(x)
            staged = passed if name == INPUTS else staged  # the others count calls
        if args:
            args = (staged, *args[1:])
        else:
            kwargs = {**kwargs, first: staged}
        if torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        once = len(tensors) > 1 and "_known" not in self.__dict__
        if once:
            object.__setattr__(self, "_known", {})
        enter(self)
        try:
            if not self.__dict__.get("_recompute") or not torch.is_grad_enabled():
                return cls.forward(self, *args, **kwargs)
            reads = [] if staged is x else [Rebuilt(staged, lambda: cast(nn.Module, self._modules[INPUTS])(x), x)]
            object.__setattr__(self, "_reads", reads)
            with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, reads), _unpack):
                return cls.forward(self, *args, **kwargs)
        finally:
            enter(self, by=-1)
            if once:
                object.__delattr__(self, "_known")
            self.__dict__.pop("_reads", None)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        _, _, *state = object.__reduce_ex__(self, protocol)
        return _rebuild, (cls, *tensors), *state

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if not self.__dict__.get("_loading"):
            for tensor in tensors:
                check_new(self, tensor, name, param)
        cls.register_parameter(self, name, param)

    def load(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "_loading", True)  # a state dict has what is stored
        try:
            cls._load_from_state_dict(self, *args, **kwargs)
        finally:
            object.__delattr__(self, "_loading")

    def delete(self: nn.Module, name: str) -> None:
        if name in tensors:
            refuse(name)
        cls.__delattr__(self, name)

    body: dict[str, Any] = {tensor: _property(tensor) for tensor in tensors}
    if issubclass(cls, nn.RNNBase):
        body |= _recurrent()
    body |= {"forward": forward, "__reduce_ex__": reduce, "_unstaged": cls, "_tensors": tensors}
    body |= {"register_parameter": register_parameter, "_load_from_state_dict": load, "__delattr__": delete}
    return cast(type[nn.Module], type(cls.__name__, (cls,), {**body, "__module__": cls.__module__}))


def _recurrent() -> dict[str, Any]:
    """torch's recurrent layers read a list of their weights, which they keep, and which is made anew here."""

    def get(self: nn.RNNBase) -> list[Any]:
        return [getattr(self, name) for name in self._flat_weights_names]

    return {
        "_flat_weights": property(get, lambda self, value: None),  # noqa: ARG005
        "_update_flat_weights": lambda self: None,  # noqa: ARG005
        "flatten_parameters": lambda self: None,  # noqa: ARG005 (of the staged weights, which are new tensors)
    }


class Rebuilt(NamedTuple):
    """A staged tensor that the backward makes anew, from a source that must not change, instead of keeping it."""

    value: Tensor
    make: Callable[[], Tensor]
    source: Tensor | None


class Packed(NamedTuple):
    """What autograd keeps of it."""

    make: Callable[[], Tensor]
    source: Tensor | None
    version: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


def _pack(reads: list[Rebuilt], saved: Tensor) -> Any:
    """What autograd keeps of a tensor: for a staged one, or a view of it, how to make it."""
    for value, make, source in reads:
        if saved.data_ptr() == value.data_ptr() and saved.numel() == value.numel() and saved.dtype == value.dtype:
            version = 0 if source is None else source._version
            return Packed(make, source, version, saved.dtype, saved.size(), saved.stride())
    return saved


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    if packed.source is not None and packed.source._version != packed.version:
        raise RuntimeError(
            'memory="recompute": a weight or the input of a layer was changed in place between forward and backward, '
            'which would make another gradient: leave it as it is, or use memory="keep"'
        )
    with torch.no_grad():  # outside the forward's autocast, which had chosen the dtype
        return packed.make().to(packed.dtype).as_strided(packed.size, packed.stride)


def _rebuild(cls: type[nn.Module], *tensors: str) -> nn.Module:
    """What pickle calls: the staged class is made anew, not looked up by its name."""
    staged = staged_class(cls, *tensors)
    return staged.__new__(staged)


def _staged(module: nn.Module) -> tuple[str, ...]:
    """The tensors of a module that are staged."""
    return getattr(type(module), "_tensors", ())


def _restage(module: nn.Module, tensors: tuple[str, ...]) -> None:
    """Give a module the class that stages these of its tensors; its own where there are none."""
    own = getattr(type(module), "_unstaged", type(module))
    module.__class__ = staged_class(own, *tensors) if tensors else own
    if isinstance(module, nn.RNNBase) and not tensors:
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def attach(
    site: Site,
    weight_stages: dict[str, nn.Module] | nn.Sequential,
    activation_stages: dict[str, nn.Module],
    recompute: bool = False,
) -> None:
    """Put stages between the parameter and its reader, and between the module and its first input.

    `weight_stages` is the sequence of another site where the two share their parameter: it stays that site's
    submodule, so that no tensor is saved twice. `recompute`: the staged weight and input are not kept for the
    backward, which makes them anew (a compiler decides that by itself).

    Raises `ValueError` for a sharded parameter (attach before wrapping), for a site that is staged already,
    and for a module whose `forward` was replaced on the instance, which would bypass the stages.
    """
    module = site.module
    if isinstance(site.parameter, DTensor):
        raise ValueError(f"{site.name} is sharded already: create RobustQ before wrapping or sharding the model")
    if site.tensor in _staged(module):
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
    module.add_module(site.inputs, _sequence(activation_stages, module.training))
    object.__setattr__(module, "_recompute", recompute)
    object.__setattr__(module, "_input_stages", (*vars(module).get("_input_stages", ()), site.inputs))
    watch_adapters()
    _restage(module, (*_staged(module), site.tensor))


def _sequence(stages: dict[str, nn.Module], training: bool) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, stage in stages.items():
        sequence.add_module(name, stage)
    return sequence.train(training)


def detach(site: Site) -> None:
    """Undo `attach`: the module gets its own class back, when no tensor is left; the Parameter object never moved."""
    module = site.module
    left = tuple(name for name in vars(module)["_input_stages"] if name != site.inputs)
    object.__setattr__(module, "_input_stages", left)
    _restage(module, tuple(name for name in _staged(module) if name != site.tensor))
    delattr(module, f"{site.tensor}_stages")
    delattr(module, site.inputs)
    if not left:
        for name in ("_input_stages", "_recompute", "_readers", "_adapter"):
            vars(module).pop(name, None)


@torch.no_grad()
def bake(site: Site) -> None:
    """Write the staged value into the parameter, also where it is sharded (a collective then); then detach."""
    with whole(site.parameter) as weight:
        value = site.weight_stages.eval()(weight).clone()
    assign(site.parameter, value)
    detach(site)
