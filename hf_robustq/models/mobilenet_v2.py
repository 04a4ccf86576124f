"""MobileNetV2: torchvision's weights under timm's names, and the network for CIFAR's images.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2: the two libraries
build the same network; torchvision numbers its 17 blocks through, timm within the table's seven rows.
"""

from collections.abc import Mapping
from typing import Any

from timm.models import create_model, generate_default_cfgs, register_model
from torch import Tensor, nn

from hf_robustq.models.cifar import CIFAR

BLOCKS_PER_STAGE = (1, 2, 3, 4, 3, 3, 1)
# Within a block, torchvision -> timm. The first block has expansion 1, hence no expanding convolution.
FIRST_BLOCK = {"conv.0.0": "conv_dw", "conv.0.1": "bn1", "conv.1": "conv_pw", "conv.2": "bn2"}
OTHER_BLOCK = {
    "conv.0.0": "conv_pw",
    "conv.0.1": "bn1",
    "conv.1.0": "conv_dw",
    "conv.1.1": "bn2",
    "conv.2": "conv_pwl",
    "conv.3": "bn3",
}


def _module_names() -> dict[str, str]:
    """torchvision module name -> timm module name, for every module with parameters."""
    blocks = [(stage, block) for stage, count in enumerate(BLOCKS_PER_STAGE) for block in range(count)]
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    for number, (stage, block) in enumerate(blocks, start=1):
        for theirs, ours in (FIRST_BLOCK if number == 1 else OTHER_BLOCK).items():
            names[f"features.{number}.{theirs}"] = f"blocks.{stage}.{block}.{ours}"
    head = len(blocks) + 1
    names |= {f"features.{head}.0": "conv_head", f"features.{head}.1": "bn2", "classifier.1": "classifier"}
    return names


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's `mobilenet_v2` state dict with the keys of timm's `mobilenetv2_100`; tensors are shared.

    Raises ValueError naming what is missing or unexpected.
    """
    names = _module_names()
    modules = {key.rpartition(".")[0] for key in state_dict}
    missing, unexpected = sorted(names.keys() - modules), sorted(modules - names.keys())
    if missing or unexpected:
        raise ValueError(
            f"not a torchvision mobilenet_v2 state dict, give model.state_dict() "
            f"(missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'})"
        )
    renamed = {}
    for key, tensor in state_dict.items():
        module, _, leaf = key.rpartition(".")
        renamed[f"{names[module]}.{leaf}"] = tensor
    return renamed


_CFG = {**CIFAR, "num_classes": 100, "pool_size": (4, 4), "first_conv": "conv_stem", "classifier": "classifier"}
default_cfgs = generate_default_cfgs({"mobilenetv2_cifar": _CFG})


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's `mobilenetv2_100` for 32x32 images: the stem and the second row of table 2 keep the resolution (stride 1).

    Choice: the papers that train it on CIFAR do not give their strides; these end at 4x4 as most public code does.
    """
    if pretrained:
        raise ValueError("mobilenetv2_cifar has no trained weights: train it, or load a file with --weights")
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith("pretrained_cfg")}
    model: Any = create_model("mobilenetv2_100", **{"num_classes": 100, **kwargs})
    for convolution in (model.conv_stem, model.blocks[1][0].conv_dw):
        convolution.stride = (1, 1)
    model.pretrained_cfg = model.default_cfg = default_cfgs["mobilenetv2_cifar"].default.to_dict()
    return model
