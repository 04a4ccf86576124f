"""How a model knows its plugin, and how its `config.json` comes to say what was done to it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_robustq.plugin.publish import Publisher, differs
from hf_robustq.renaming import guard
from hf_robustq.sites import inner

if TYPE_CHECKING:
    from hf_robustq.plugin.robustq import RobustQ

PLUGIN = "_robustq"
METHOD = "robustq"
"""The `quant_method` of transformers' `quantization_config`."""
BESIDES = ("quant_method", "products")
"""What a `quantization_config` has besides the plugin's config."""


def mark(plugin: RobustQ) -> None:
    """The model leads to its plugin; `save_pretrained` writes its config into `config.json`, and what it publishes."""
    model: Any = inner(plugin.model)
    object.__setattr__(model, PLUGIN, plugin)
    if has_config(model):
        _own_config(plugin.model, model.config)
        guard(model)
        values = {"quant_method": METHOD, **plugin.config.to_dict()}
        if plugin.products is not None:
            values["products"] = plugin.products.to_dict()
        model.config.quantization_config = values
        if differs(plugin):
            model.hf_quantizer = Publisher(plugin)


def _own_config(model: nn.Module, shared: Any) -> None:
    """A copy of the config wherever the model holds it: another model may have been built from the same object."""
    own = copy.copy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own


def unmark(plugin: RobustQ) -> None:
    """Undo `mark`."""
    model: Any = inner(plugin.model)
    vars(model).pop(PLUGIN, None)
    if isinstance(vars(model).get("hf_quantizer"), Publisher):
        del model.hf_quantizer
    if has_config(model) and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def has_config(model: nn.Module) -> bool:
    """Whether the model is one of transformers', with a config to save."""
    return hasattr(getattr(model, "config", None), "save_pretrained")


def refuse_quantized(model: nn.Module) -> None:
    """Raise `ValueError` for a model that another method quantized."""
    known = getattr(getattr(model, "config", None), "quantization_config", None)
    method = known.get("quant_method") if isinstance(known, dict) else getattr(known, "quant_method", None)
    if method is not None and method != METHOD:
        name = getattr(method, "value", method)
        raise ValueError(f"the model is quantized with {name}: load the float model, RobustQ quantizes it itself")
