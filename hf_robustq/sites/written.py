"""What is written in place to a staged weight: it goes to the stored parameter.

A staged weight is a temporary tensor, so `module.weight.data += delta`, `nn.init.normal_(module.weight)` and the like
would be lost with it. Read outside its layer's forward, it is therefore a `StagedWeight`.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
IN_PLACE = (
    *(name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")),
    *(f"__i{name}__" for name in OPERATORS),
    "__setitem__",
)
VIEWS = (
    *("__getitem__", "view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "detach"),
    *("t", "transpose", "permute", "movedim", "swapaxes", "select", "narrow", "diagonal", "unfold", "expand"),
)
PIECES = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
TURNED = ("T", "mT", "H", "mH")


class StagedWeight(Tensor):
    """A tensor of staged values. In place, and by `data`, `grad` and `requires_grad`, it is the stored parameter.

    So are its views. `data` reads the stored values too: what adds to them is to add to these.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    module: nn.Module
    tensor: str
    part: Callable[[Tensor], Tensor]
    """What this is of the whole weight."""

    def stored(self) -> Tensor:
        """What to write to. Raises `RuntimeError` where a stage reparametrizes the weight, as SatNL does."""
        refuse_reparametrized(self.module, self.tensor)
        return self.parameter()

    def parameter(self) -> Tensor:
        return self.part(cast(Tensor, self.module._parameters[self.tensor]))

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:  # type: ignore[override]
        return self.parameter().requires_grad_(requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(_plain(self), memo)


def writable(value: Tensor, module: nn.Module, tensor: str) -> Tensor:
    """The staged values, with in-place writes going to the module's stored parameter."""
    return _writable(value, module, tensor, lambda parameter: parameter) if type(value) is Tensor else value


def _writable(value: Tensor, module: nn.Module, tensor: str, part: Callable[[Tensor], Tensor]) -> StagedWeight:
    weight = value.as_subclass(StagedWeight)
    weight.module, weight.tensor, weight.part = module, tensor, part
    if not value.is_inference():
        weakref.finalize(weight, _check_lost, value, value._version, tensor).atexit = False
    return weight


def _check_lost(value: Tensor, version: int, tensor: str) -> None:
    """Say so where something wrote past the methods below, with `out=`, say."""
    if value._version != version:
        logger.warning(
            "what a function of torch (out=, torch.split) wrote to a staged %s is lost: write to its .data", tensor
        )


def _plain(weight: StagedWeight) -> Tensor:
    return weight.as_subclass(Tensor)  # type: ignore[arg-type]


def _part(weight: StagedWeight, of: Callable[[Tensor], Tensor]) -> Tensor:
    """A view of a staged weight, or a copy."""
    value = of(_plain(weight))
    if value.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return value
    return _writable(value, weight.module, weight.tensor, lambda parameter: of(weight.part(parameter)))


def _in_place(name: str) -> Any:
    def method(self: StagedWeight, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.stored(), name)(*args, **kwargs)

    return method


def _view(name: str) -> Any:
    def method(self: StagedWeight, *args: Any, **kwargs: Any) -> Any:
        return _part(self, lambda tensor: getattr(tensor, name)(*args, **kwargs))

    return method


def _pieces(name: str) -> Any:
    def method(self: StagedWeight, *args: Any, **kwargs: Any) -> Any:
        def piece(i: int) -> Tensor:
            return _part(self, lambda tensor: getattr(tensor, name)(*args, **kwargs)[i])

        return tuple(map(piece, range(len(getattr(_plain(self), name)(*args, **kwargs)))))

    return method


def _turned(name: str) -> Any:
    return property(lambda self: _part(self, lambda tensor: getattr(tensor, name)))


def _set_data(self: StagedWeight, values: Tensor) -> None:
    stored = self.stored()
    _check_shape(stored, values)
    stored.data = values


def _requires_grad(self: StagedWeight) -> bool:
    return self.parameter().requires_grad or _plain(self).requires_grad


def _set(name: str) -> Any:
    return lambda self, value: setattr(self.parameter(), name, value)


for _name in IN_PLACE:
    if _name not in vars(StagedWeight):
        setattr(StagedWeight, _name, _in_place(_name))
for _name in VIEWS:
    setattr(StagedWeight, _name, _view(_name))
for _name in PIECES:
    setattr(StagedWeight, _name, _pieces(_name))
for _name in TURNED:
    setattr(StagedWeight, _name, _turned(_name))
StagedWeight.grad = property(lambda self: self.parameter().grad, _set("grad"))  # type: ignore[assignment]
StagedWeight.requires_grad = property(_requires_grad, _set("requires_grad"))  # type: ignore[assignment]
StagedWeight.data = property(lambda self: self.stored().data, _set_data)  # type: ignore[assignment]


# ---- what cannot be written ------------------------------------------------------------------------


def _check_shape(stored: Tensor, values: Tensor) -> None:
    if values.shape != stored.shape:
        raise ValueError(
            f"a staged weight of shape {tuple(stored.shape)} cannot become {tuple(values.shape)}: take the stages off "
            "first (plugin.detach()), change the layer, then create RobustQ anew"
        )


def refuse_reparametrized(module: nn.Module, tensor: str) -> None:
    """Raise `RuntimeError` where the stored parameter is another tensor than the network's weight."""
    if is_reparametrized(module, tensor):
        raise RuntimeError(
            f"a {tensor} with satnl is stored as another tensor and cannot be written or merged into: "
            "call plugin.detach() first, or write to the stored one, Site.parameter"
        )


def is_reparametrized(module: nn.Module, tensor: str) -> bool:
    """Whether a stage in use stands between the stored parameter and the network's weight."""
    stages = getattr(module, f"{tensor}_stages")
    return any(hasattr(stage, "right_inverse") and getattr(stage, "enabled", True) for stage in stages)


def check_new(module: nn.Module, tensor: str, name: str, parameter: nn.Parameter | None) -> None:
    """Raise for a Parameter that is registered as `name` with a staged module and cannot be."""
    now = module._parameters.get(tensor)
    if now is None or parameter is None or isinstance(parameter, DTensor):  # which is sharding, no other weight
        return
    if name == tensor:
        _check_shape(now, parameter)
        refuse_reparametrized(module, tensor)
    elif parameter is now:
        refuse(tensor)


def refuse(tensor: str) -> None:
    """Raise `RuntimeError` for what would take the parameter away from its stages."""
    raise RuntimeError(
        f"{tensor} is staged and cannot be deleted, moved or computed from other tensors, as pruning, parametrizations "
        "and LoRA on nn.MultiheadAttention do: add it to exclude, or call plugin.detach() first"
    )
