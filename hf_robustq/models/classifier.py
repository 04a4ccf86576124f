"""One way to get an image classifier, whatever names it: a folder, a Hub id, or an architecture of timm."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from hf_robustq.files import loading
from hf_robustq.models import mobilenet_v2, plain

logger = logging.getLogger(__name__)

TORCHVISION = {
    "mobilenet_v2.torchvision": ("mobilenetv2_100", mobilenet_v2.from_torchvision),
    "alexnet.torchvision": ("alexnet", plain.from_torchvision),
}
"""Networks whose trained weights torchvision has: timm's architecture, and the key map."""


def image_classifier(
    name: str,
    labels: Sequence[str],
    new_head: bool = False,
    timm_options: Mapping[str, Any] | None = None,
    keep_labels: bool = False,
) -> tuple[nn.Module, str]:
    """(model, where its weights come from). The model takes `pixel_values` and `labels`, as the Trainer gives them.

    name       a folder or Hub id of transformers or timm (`timm/resnet50.tv_in1k`); a timm name with its weights'
               tag (`resnet50.tv_in1k`); `mobilenet_v2.torchvision` or `alexnet.torchvision` (IMAGENET1K_V1, through a
               key map); or a bare timm architecture (`resnet50`, `resnet20_cifar`), which starts from random weights
    labels     the dataset's label names; trained weights with another number of outputs raise `ValueError`
               unless `new_head`
    timm_options  keyword arguments for the architecture, where it starts from random weights
    keep_labels   trained weights keep the names of their outputs, of any number: to measure them
    """
    from transformers import AutoModelForImageClassification

    if name in TORCHVISION:
        import torchvision

        architecture, from_torchvision = TORCHVISION[name]
        wrapped = _timm_wrapper(architecture, 1000, {})
        trained = torchvision.models.get_model(name.partition(".")[0], weights="IMAGENET1K_V1")
        wrapped.timm_model.load_state_dict(from_torchvision(trained.state_dict()))
        wrapped.timm_model.pretrained_cfg = {**wrapped.timm_model.pretrained_cfg, "interpolation": "bilinear"}
        if new_head:
            wrapped.timm_model.reset_classifier(len(labels))
            wrapped.config.num_labels = wrapped.num_labels = len(labels)
        model, source = wrapped, f"torchvision {name.partition('.')[0]} IMAGENET1K_V1"
    elif "/" in name or Path(name).exists() or "." in name:
        source = name if "/" in name or Path(name).exists() else f"timm/{name}"
        extra = {"num_labels": len(labels), "ignore_mismatched_sizes": True} if new_head else {}
        with loading(source):
            model = AutoModelForImageClassification.from_pretrained(source, **extra)
    else:
        model, source = _timm_wrapper(name, len(labels), timm_options or {}), f"random ({name})"
        keep_labels = False
    if keep_labels:
        return model, source
    if model.config.num_labels != len(labels):
        raise ValueError(
            f"{source} has {model.config.num_labels} outputs but the dataset has {len(labels)} labels: "
            "choose the dataset it was trained on, or start a new head with --new_head"
        )
    before, after = model.config.id2label, dict(enumerate(labels))
    if before != after and any(name != f"LABEL_{i}" for i, name in before.items()):
        first = [", ".join(names[i] for i in range(min(len(names), 6))) for names in (before, after)]
        logger.warning("%s has outputs for %s, ...; here they are trained for %s, ...", source, *first)
    model.config.id2label = after
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    return model, source


def _timm_wrapper(architecture: str, num_labels: int, options: Mapping[str, Any]) -> Any:
    from transformers import TimmWrapperForImageClassification
    from transformers.models.timm_wrapper import TimmWrapperConfig

    settings = {"architecture": architecture, "num_labels": num_labels, "model_args": dict(options) or None}
    config = TimmWrapperConfig(**settings)
    wrapped = TimmWrapperForImageClassification(config)
    # The wrapper draws every weight anew from N(0, 0.02); timm's own initialisation is the architecture's.
    wrapped.timm_model.load_state_dict(timm.create_model(architecture, num_classes=num_labels, **options).state_dict())
    return wrapped


def preprocessing(model: Any) -> dict[str, Any]:
    """`image_size`, `mean`, `std` and `interpolation` that a classifier's weights want; one mean and std a channel.

    timm's own record, else the image processor beside the weights, else ImageNet's statistics.
    """
    own = getattr(getattr(model, "timm_model", None), "pretrained_cfg", None)
    if own is None:
        own = _processor(model)
    channels = getattr(model.config, "num_channels", own.get("input_size", (3,))[0])
    channels = (getattr(model.config, "model_args", None) or {}).get("in_chans", channels)
    if channels not in (1, 3):
        raise ValueError(f"the model takes images of {channels} channels: images here have 3, or 1 (grey)")
    return {
        "image_size": own.get("input_size", (3, getattr(model.config, "image_size", 224)))[1],
        "mean": _by_channel(own.get("mean", IMAGENET_DEFAULT_MEAN), channels),
        "std": _by_channel(own.get("std", IMAGENET_DEFAULT_STD), channels),
        "interpolation": own.get("interpolation", "bilinear"),
    }


def _by_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A grey image is normalised by the mean of three; one number is of every channel."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _processor(model: Any) -> dict[str, Any]:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model.config._name_or_path)
    except (OSError, ValueError):  # weights without a preprocessor_config.json
        return {}
    if not getattr(processor, "do_normalize", True) or processor.image_mean is None:
        return {"mean": (0.0,), "std": (1.0,)}
    return {"mean": processor.image_mean, "std": processor.image_std}
