"""transformers renames tensors between a model and its files, and joins or splits some: where that meets the stages."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

OWN = re.compile(r"_stages\.[a-z]\w*\.")
"""A part of the name of what a stage saves."""


class _Stored:
    """A model to a converter: what it asks for are the stored parameters, not what the stages make of them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def get_parameter(self, name: str) -> nn.Parameter:
        return dict(self.model.named_parameters(remove_duplicate=False))[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@functools.cache
def _apart(cls: type) -> type:
    """The subclass of a converter that does not take what belongs to a stage for the weight it is a stage of."""

    def rename_source_key(self: Any, source_key: str) -> tuple[str, str | None]:
        return (source_key, None) if OWN.search(source_key) else cls.rename_source_key(self, source_key)

    def convert(self: Any, layer_name: str, model: Any = None, **kwargs: Any) -> Any:
        return cls.convert(self, layer_name, model=None if model is None else _Stored(model), **kwargs)

    own = {"rename_source_key": rename_source_key, "convert": convert, "__slots__": (), "_apart": True}
    return type(cls.__name__, (cls,), own)


def keep_apart(transforms: Iterable[Any]) -> list[Any]:
    """transformers' transforms of names and tensors, of which those that join or split tensors leave stages alone."""
    found = list(transforms)
    for one in found:
        if hasattr(one, "operations") and not hasattr(type(one), "_apart"):
            one.__class__ = _apart(type(one))
    return found


def guard(model: nn.Module) -> None:
    """See to it that a model of transformers saves what its stages have beside its weights, not as a part of them.

    A model that was loaded knows its transforms; one that was built gets those that transformers would save it with.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:  # older than the transforms
        return
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)  # pyright: ignore[reportArgumentType]
        transforms = [one for one in transforms if not isinstance(one, PrefixChange)]
    if any(hasattr(one, "operations") for one in transforms):
        model._weight_conversions = keep_apart(transforms)  # type: ignore[assignment]


def saves_other_names(model: nn.Module) -> bool:
    """Whether the names in a saved file are not those of the model's state dict."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return False
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return False
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return revert_weight_conversion(model, state).keys() != state.keys()  # pyright: ignore[reportArgumentType]
