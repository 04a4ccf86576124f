"""Saved folders: transformers restores their quantizers, `from_pretrained` gives them others.

A folder is the user's model under its own names, the stages' tensors beside them, and the config under
`quantization_config` in `config.json`. Only JSON and safetensors are read. Importing this registers the
method `robustq` with transformers; transformers without this package loads the float model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_robustq.calibrate import own_buffers, stages
from hf_robustq.config import QuantizerConfig, RobustQConfig
from hf_robustq.files import read_model
from hf_robustq.plugin import BESIDES, METHOD, RobustQ
from hf_robustq.plugin.mark import mark
from hf_robustq.plugin.publish import FloatModel, unfold
from hf_robustq.products import Products
from hf_robustq.quantizers import LEARNED
from hf_robustq.renaming import keep_apart
from hf_robustq.sharded import assign, check_finite

logger = logging.getLogger(__name__)


def read_config(values: Any, where: str) -> RobustQConfig:
    """The config in a folder's `quantization_config`. Raises `ValueError`, in one line, for anything else."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: quantization_config is no mapping, got {str(values)[:80]!r}")
    try:
        return RobustQConfig.from_dict({key: value for key, value in values.items() if key not in BESIDES})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: quantization_config: {error}") from None


def _shapes(file: str | Path) -> dict[str, list[int]]:
    """The shape of every tensor in a safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def _loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers loaded this tensor from a file. It marks those, so as not to initialise them."""
    return getattr(tensor, "_is_hf_initialized", False)


@register_quantization_config(METHOD)
class RobustQQuantizationConfig(QuantizationConfigMixin):
    """transformers' view of a `RobustQConfig`."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.robustq = read_config(values, "config.json")
        known = values.get("products")
        self.products = None if known is None else Products.from_dict(known, "config.json: quantization_config: ")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        products = {} if self.products is None else {"products": self.products.to_dict()}
        return {"quant_method": METHOD, **self.robustq.to_dict(), **products}

    to_diff_dict = to_dict


@register_quantizer(METHOD)
class RobustQHfQuantizer(FloatModel):
    """Gives a model its stages before transformers loads the weights, and takes over what was loaded.

    The result is what it was before it was saved: the user's float model with stages, trainable, and no
    "quantized model" to transformers, whose own limits for those (no `half()`, no training) do not apply.
    """

    quantization_config: Any

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        return keep_apart(super().update_weight_conversions(weight_conversions, model))

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.files = list(kwargs.get("checkpoint_files") or ())
        odd = [file for file in self.files if not str(file).endswith(".safetensors")]
        if odd:
            raise ValueError(f"{odd[0]}: only safetensors are read: save the model with save_pretrained")
        for one, other in getattr(model, "all_tied_weights_keys", {}).items():  # they are tied only after loading
            owner, _, name = one.rpartition(".")
            model.get_submodule(owner).register_parameter(name, model.get_parameter(other))
        with torch.device("cpu"):  # transformers builds on the meta device
            plugin = RobustQ(model, self.quantization_config.robustq)
        plugin.after_wrapping()  # the tensors are to be loaded, whatever the backend
        self.initial = {name: tensor.detach().clone() for name, tensor in self._own_tensors(model, plugin)}
        plugin.enable(False)  # transformers reads the parameters through the attribute while it loads

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:  # noqa: ARG002
        plugin = RobustQ.of(model)
        for stage in stages(plugin.sites):
            for name in stage._non_persistent_buffers_set:  # transformers leaves them uninitialised
                stage.get_buffer(name).zero_()
        new = self._check_complete(model, plugin)
        unfold(plugin, new)
        for name, parameter in model.named_parameters():
            check_finite(name, parameter)
        plugin.enable(True)
        plugin.restored()
        plugin.check_finite()
        products = self.quantization_config.products
        if products is not None and products.unstaged.keys() <= dict(model.named_parameters()).keys():
            plugin.know(products)  # of another class of model it would not be true
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        mark(plugin)
        plugin.before_wrapping()

    def _check_complete(self, model: nn.Module, plugin: RobustQ) -> frozenset[str]:
        """A weight that was not loaded, such as a new head, gets fresh stages; a warning names it.

        Of every other weight all stage tensors must have been loaded. transformers renames keys between file and
        model, so we read its mark on loaded tensors and do not compare names. Returns the names of the new weights.
        """
        shapes = [(name, shape) for file in self.files for name, shape in _shapes(file).items()]
        lost, new = [], []
        for site in plugin.sites:
            tensors = {n: tensor for n, tensor in self._own_tensors(model, plugin) if n.startswith(site.prefixes)}
            gone = [name for name, tensor in tensors.items() if not _loaded(tensor)]
            leaf = ".".join(site.name.split(".")[-2:])
            resized = any(f".{name}".endswith(f".{leaf}") and shape != list(site.shape) for name, shape in shapes)
            if _loaded(site.parameter):
                lost += gone
            elif len(gone) < len(tensors) and not resized:  # its stages are there, the weight itself is not
                lost.append(site.name)
            else:
                new.append(site.name)
                for name, tensor in tensors.items():
                    assign(tensor, self.initial[name])
        if lost:
            raise ValueError(
                f"{len(lost)} quantizer tensors are missing in {Path(self.files[0]).parent}, {lost[0]} among them: "
                "the folder does not belong to its config.json, or to another class of model"
            )
        if new:
            logger.warning(
                "the folder has no such weights; their quantizers are not calibrated yet: %s", ", ".join(new)
            )
        return frozenset(new)

    def _own_tensors(self, model: nn.Module, plugin: RobustQ) -> list[tuple[str, torch.Tensor]]:
        """What the stages save, by name."""
        own = {*own_buffers(model, plugin.sites), *plugin.own_parameters()}
        named = (*model.named_parameters(), *model.named_buffers())
        saved = model.state_dict().keys()
        return [(name, tensor) for name, tensor in named if name in own and name in saved]


def from_pretrained(
    cls: Any,
    path: str | Path,
    *,
    bits: int | Literal["trained"] | None = "trained",
    activation_bits: int | None = None,
    scale: str = "mse",
    per_channel: bool = False,
    trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model as any quantizer would have it: `from_pretrained(AutoModelForImageClassification, path, bits=4)`.

    cls              a class of transformers with `from_pretrained`
    path             folder or Hub id
    bits             weight bits, 2 to 16; "trained": the quantizers it was trained with; None: float weights
    activation_bits  bits of the layers' inputs, by the statistics stored in the folder; None: float
                     (with "trained": as trained)
    scale            rule of `SCALE_RULES` that finds the steps, from the stored weights and statistics; or "learned":
                     the trained quantizers at these bits, within the clip ranges they were trained to
    per_channel      a step per output channel of the weights
    trainable        keep quantizing on read, so that training can go on; else weights are quantized once,
                     now, and a forward costs what the float model's does (and activation quantizers, if any)
    kwargs           to `cls.from_pretrained`; a `device_map` may name one device only

    The figures equal those of a sweep's row of the same setting. A folder without our config (any float
    model) takes `bits` too, without `activation_bits`. Raises `ValueError`, in one line, for what is no
    whole checkpoint, and for options that do not go together.
    """
    if bits == "trained" and activation_bits is not None:
        raise ValueError('activation_bits needs bits: "trained" restores both as they were trained')
    learned = scale == LEARNED and isinstance(bits, int)
    if learned and per_channel:
        raise ValueError("the learned steps are per tensor or per channel as they were trained: drop per_channel")
    if scale == LEARNED:
        scale = "mse"
    weights = None if bits in (None, "trained") else QuantizerConfig(bits=bits, scale=scale, per_channel=per_channel)
    activations = None if activation_bits is None else QuantizerConfig(bits=activation_bits, scale=scale)
    if kwargs.get("output_loading_info"):
        raise ValueError("output_loading_info is not supported: cls.from_pretrained(path, ...) gives it")
    check_folder(Path(path) / kwargs.get("subfolder", ""))
    model = cls.from_pretrained(path, **{**kwargs, "use_safetensors": True})
    try:
        plugin = RobustQ.of(model)
    except ValueError:
        if bits == "trained" or activations is not None or learned:
            raise ValueError(
                f"{path} has no quantizers and no statistics of activations: pass bits= alone, "
                "or save it from a calibrated RobustQ"
            ) from None
        plugin = RobustQ(model, {})
    if bits != "trained" and not learned:
        plugin.warn_reshaped([f"bits={bits}"])
    if learned:
        if plugin.config.activations is not None and activations is None and trainable:
            raise ValueError(
                'scale="learned" keeps the input quantizers of a trainable model: pass activation_bits too'
            )
        plugin.change_bits(cast(int, bits), activation_bits)
        return model if trainable else plugin.bake(activations=activations is not None)
    if bits != "trained":
        plugin = plugin.requantized(weights, activations)
    if trainable:
        return model
    keep = plugin.config.activations is not None
    return plugin.bake(activations=keep)


def check_folder(folder: Path) -> None:
    """Raise `ValueError` for a local folder that is no checkpoint or not a whole one."""
    if not folder.exists():
        return  # a Hub id
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json")
    values = read_model(folder)
    known = values.get("quantization_config")
    if known is not None and not isinstance(known, dict):
        raise ValueError(f"{file}: quantization_config is no mapping, got {str(known)[:80]!r}")
    if known is not None and known.get("quant_method") == METHOD:
        read_config(known, str(file))
    for weights in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{weights} is cut short or damaged ({error}): copy or download it again") from None
