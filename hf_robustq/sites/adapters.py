"""Adapters, those of PEFT: which modules of a model are theirs, and how a layer inside one is read.

A tuner layer holds the layer it adapts as `base_layer`: its forward computes with the staged weight, its merging
works on the stored one. PEFT is looked up and never imported: where nobody has imported it, no model has adapters.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

ADAPTER = "an adapter"
"""Why a parameter of an adapter is left out."""


def _kinds(module: str, *names: str) -> tuple[type, ...]:
    """Classes of PEFT; none where it is not imported."""
    found = sys.modules.get(module)
    return tuple(kind for name in names if isinstance(kind := getattr(found, name, None), type))


def is_tuner_layer(module: Any) -> bool:
    """Whether this is an adapter around a layer."""
    return isinstance(module, _kinds("peft.tuners.tuners_utils", "BaseTunerLayer"))


def inner(model: nn.Module) -> nn.Module:
    """The model without PEFT's wrapping; itself where there is none."""
    if not isinstance(model, _kinds("peft", "PeftModel", "PeftMixedModel")):
        return model
    base: Any = model.base_model
    return base.model if isinstance(base, _kinds("peft.tuners.tuners_utils", "BaseTuner")) else base


def has_adapters(model: nn.Module) -> bool:
    """Whether there are adapters in or around this model."""
    return inner(model) is not model or any(is_tuner_layer(module) for module in model.modules())


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """The name of a module or tensor as it was before the adapters came, and will be once they are merged."""
    modules = dict(model.named_modules())
    outer = next(name for name, module in modules.items() if module is inner(model))
    bases = {f"{name}.base_layer" for name, module in modules.items() if is_tuner_layer(module)}

    def plain(name: str) -> str:
        parts, path = [], ""
        for part in name.split("."):
            path = f"{path}.{part}" if path else part
            if path not in bases:
                parts.append(part)
        return ".".join(parts).removeprefix(f"{outer}.")

    return plain


def adapter_modules(model: nn.Module) -> dict[int, str]:
    """Why each module that belongs to an adapter, or is replaced by one, is left out; by its `id`."""
    peft, tuners = _kinds("peft", "PeftModel", "PeftMixedModel"), _kinds("peft.tuners.tuners_utils", "BaseTuner")
    copies = _kinds("peft.utils.other", "ModulesToSaveWrapper")
    found: dict[int, str] = {}
    for module in model.modules():
        if is_tuner_layer(module):
            found.update(_all_but(module, "base_layer"))
        elif isinstance(module, tuners):
            found.update(_all_but(module, "model"))
        elif isinstance(module, peft):
            found.update(_all_but(module, "base_model"))
        elif isinstance(module, copies):
            original: Any = module.original_module
            found.update(dict.fromkeys(map(id, original.modules()), "an adapter trains a copy of it (modules_to_save)"))
    return found


def _all_but(module: nn.Module, name: str) -> dict[int, str]:
    return {id(one): ADAPTER for key, child in module.named_children() if key != name for one in child.modules()}


def layers_of(module: Any) -> list[nn.Module]:
    """What a layer is, or what stands for it: where adapters wrap it, what they wrap and what they train for it."""
    if is_tuner_layer(module) or isinstance(module, _kinds("peft.utils.other", "AuxiliaryTrainingWrapper")):
        own = adapter_modules(module)
        return [one for one in module.modules() if own.get(id(one)) != ADAPTER]
    return [module]


# ---- a staged layer inside an adapter --------------------------------------------------------------


def inside(module: nn.Module) -> bool:
    """Whether a staged layer is read by its own forward, or by that of an adapter around it. Compiled code: always."""
    return torch.compiler.is_compiling() or module.__dict__.get("_readers", 0) > 0


def enter(module: nn.Module, by: int = 1) -> None:
    """From now on a staged layer is read by a forward; `by=-1`: no longer."""
    readers = module.__dict__.get("_readers", 0)
    object.__setattr__(module, "_readers", readers + by)
    if not readers and module.__dict__.get("_adapter", 0) < 0:  # called by itself
        object.__setattr__(module, "_adapter", 0)


def is_adapted(module: nn.Module) -> bool:
    """Whether a staged layer is inside an adapter, or is being taken out of one."""
    return bool(module.__dict__.get("_adapter"))


def follow_adapters(model: nn.Module) -> None:
    """Tell the staged layers inside adapters that they are."""
    for module in model.modules():
        if is_tuner_layer(module):
            _wrapped(module, _base(module))


def watch_adapters() -> None:
    """The same for adapters to come: PyTorch tells of every module that becomes a part of another."""
    if not _watching:
        _watching.append(register_module_module_registration_hook(_on_registration))


_watching: list[Any] = []
_numbers = itertools.count(1)
"""Of the times that an adapter came around a layer: its `_adapter`, negative while it goes."""


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == "base_layer" and is_tuner_layer(parent):
        _wrapped(parent, _base(child))
        return
    before = parent._modules.get(name) if hasattr(type(child), "_unstaged") else None
    if is_tuner_layer(before) and _base(before) is child:
        going = -abs(child.__dict__.get("_adapter", 0))
        object.__setattr__(child, "_adapter", going)
        weakref.finalize(before, _gone, weakref.ref(child), going).atexit = False  # PEFT still reads and assigns it


def _gone(reference: Callable[[], nn.Module | None], number: int) -> None:
    module = reference()
    if module is not None and module.__dict__.get("_adapter") == number:
        object.__setattr__(module, "_adapter", 0)


def _base(tuner: Any) -> nn.Module:
    while is_tuner_layer(tuner):
        tuner = tuner.base_layer
    return tuner


def _wrapped(tuner: nn.Module, base: nn.Module) -> None:
    if hasattr(type(base), "_unstaged"):
        object.__setattr__(base, "_adapter", next(_numbers))
        if _enter_base not in tuner._forward_pre_hooks.values():
            tuner.register_forward_pre_hook(_enter_base)
            tuner.register_forward_hook(_leave_base, always_call=True)


def _enter_base(tuner: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    if not torch.compiler.is_compiling():
        enter(_base(tuner))


def _leave_base(tuner: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:  # noqa: ARG001
    if not torch.compiler.is_compiling():
        enter(_base(tuner), by=-1)
