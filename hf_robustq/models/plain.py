"""Plain convolutional networks of WaveQ's and DoReFa's experiments: convolutions, pooling, a classifier."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from hf_robustq.models.cifar import CIFAR, PooledClassifier


class Conv(NamedTuple):
    """A convolution with a ReLU; `pool`: (kernel, stride) of the max-pooling behind it."""

    width: int
    kernel: int = 3
    padding: int = 1
    stride: int = 1
    pool: tuple[int, int] | None = None
    dropout: float = 0.0


HALVE = (2, 2)
SIMPLENET = (Conv(6, 5, 0, pool=HALVE), Conv(16, 5, 0, pool=HALVE), Conv(120, 5, 0), Conv(84, 1, 0))
VGG11 = (
    Conv(64, pool=HALVE), Conv(128, pool=HALVE), Conv(256), Conv(256, pool=HALVE), Conv(512), Conv(512, pool=HALVE),
    Conv(512), Conv(512, pool=HALVE),
)  # fmt: skip
SVHN8 = (
    Conv(48, 5, 0, pool=HALVE), Conv(64), Conv(64, pool=HALVE), Conv(128, padding=0), Conv(128),
    Conv(128, padding=0, dropout=0.5), Conv(512, 5, 0),
)  # fmt: skip
ALEXNET = (
    Conv(64, 11, 2, 4, pool=(3, 2)), Conv(192, 5, 2, pool=(3, 2)), Conv(384), Conv(256),
    Conv(256, pool=(3, 2), dropout=0.5), Conv(4096, 6, 0, dropout=0.5), Conv(4096, 1, 0),
)  # fmt: skip


class PlainNet(PooledClassifier):
    """Images [N, in_chans, H, W] -> logits [N, num_classes]. Linear layers before the last are convolutions that see
    the whole map, which for images of the network's own size is the same.
    """

    def __init__(
        self,
        plan: Sequence[Conv],
        norm: bool = True,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for one in plan:
            convolution = nn.Conv2d(in_chans, one.width, one.kernel, one.stride, one.padding, bias=not norm)
            parts = [convolution, *([nn.BatchNorm2d(one.width)] if norm else []), nn.ReLU()]
            parts += [nn.MaxPool2d(*one.pool)] if one.pool else []
            parts += [nn.Dropout(one.dropout)] if one.dropout else []
            layers.append(nn.Sequential(*parts))
            in_chans = one.width
        self.layers = nn.Sequential(*layers)
        self.num_features = self.head_hidden_size = in_chans
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        return checkpoint_seq(self.layers, x) if self.grad_checkpointing else self.layers(x)


_HEADS = {"first_conv": "layers.0.0", "classifier": "linear"}
default_cfgs = generate_default_cfgs(
    {
        "simplenet_cifar": {**CIFAR, **_HEADS, "pool_size": (1, 1)},
        "vgg11_cifar": {**CIFAR, **_HEADS, "pool_size": (1, 1)},
        "svhn8": {**CIFAR, **_HEADS, "pool_size": (1, 1), "input_size": (3, 40, 40)},
        "alexnet": {
            **CIFAR, **_HEADS, "pool_size": (1, 1), "input_size": (3, 224, 224), "num_classes": 1000, "crop_pct": 0.875
        },
    }
)  # fmt: skip


@register_model
def simplenet_cifar(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """Two 5x5 convolutions and three linear layers, 62 thousand parameters, no norms.

    Choice: WaveQ does not describe its SimpleNet; 74.5% on CIFAR-10 in float is what this one, of the framework its
    code is built on, comes to.
    """
    return build_model_with_cfg(PlainNet, "simplenet_cifar", pretrained, plan=SIMPLENET, norm=False, **kwargs)


@register_model
def vgg11_cifar(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """VGG-11 (arXiv 1409.1556, configuration A) with batch norms and one linear layer, for 32x32 images."""
    return build_model_with_cfg(PlainNet, "vgg11_cifar", pretrained, plan=VGG11, **kwargs)


@register_model
def svhn8(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """Seven convolutions and a linear layer for 40x40 images: DoReFa's for SVHN (arXiv 1606.06160, section 3.1)."""
    return build_model_with_cfg(PlainNet, "svhn8", pretrained, plan=SVHN8, **kwargs)


@register_model
def alexnet(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """AlexNet in one column (arXiv 1404.5997), as torchvision's, for 224x224 images."""
    return build_model_with_cfg(PlainNet, "alexnet", pretrained, plan=ALEXNET, norm=False, **kwargs)


def from_torchvision(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's `alexnet` state dict with the keys and shapes of ours."""
    theirs = list(dict.fromkeys(key.rpartition(".")[0] for key in state_dict))
    ours = [*(f"layers.{i}.0" for i in range(len(ALEXNET))), "linear"]
    if len(theirs) != len(ours):
        raise ValueError("not a torchvision alexnet state dict, give model.state_dict()")
    shapes = {f"layers.{i}.0.weight": (one.width, -1, one.kernel, one.kernel) for i, one in enumerate(ALEXNET)}
    renamed = {}
    for own, their in zip(ours, theirs, strict=True):
        weight = state_dict[f"{their}.weight"]
        renamed[f"{own}.weight"] = weight.reshape(shapes.get(f"{own}.weight", weight.shape))
        renamed[f"{own}.bias"] = state_dict[f"{their}.bias"]
    return renamed
