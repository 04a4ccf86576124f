"""ResNet for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2.

Depth 6n + 2: a 3x3 convolution, three layers of n basic blocks with 16, 32 and 64 channels, global average
pooling, a linear classifier. Shortcuts are option A: subsample by 2, pad channels with zeros, no parameters.
"""

from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from hf_robustq.models.cifar import CIFAR, PooledClassifier

WIDTHS = (16, 32, 64)


def _conv3x3(in_chans: int, out_chans: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)


class ZeroPadShortcut(nn.Module):
    """Option A: [N, C, H, W] -> [N, C + 2 pad, H/2, W/2]: every 2nd pixel, `pad` zero channels each side."""

    def __init__(self, pad: int) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)); halves the resolution where the width changes."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        widens = in_chans != width
        self.conv1 = _conv3x3(in_chans, width, stride=2 if widens else 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = ZeroPadShortcut((width - in_chans) // 2) if widens else nn.Identity()
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNetCifar(PooledClassifier):
    """Images [N, in_chans, H, W] -> logits [N, num_classes]; pooled features [N, 64] if num_classes is 0.

    Raises ValueError if depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 2: choose 20, 32, 44, 56, ...")
        self.conv1 = _conv3x3(in_chans, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.act1 = nn.ReLU()
        starts = (WIDTHS[0], *WIDTHS)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(BasicBlock(start if n == 0 else width, width) for n in range(blocks)))
            for start, width in zip(starts, WIDTHS, strict=False)
        )
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, [N, 64, H/4, W/4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = checkpoint_seq(layer, x) if self.grad_checkpointing else layer(x)
        return x


_CFG = {**CIFAR, "pool_size": (8, 8), "first_conv": "conv1", "classifier": "linear"}
default_cfgs = generate_default_cfgs({"resnet20_cifar": _CFG, "resnet56_cifar": _CFG})


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-20, 0.27M parameters. `kwargs` are timm's and ResNetCifar's."""
    return build_model_with_cfg(ResNetCifar, "resnet20_cifar", pretrained, depth=20, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> ResNetCifar:
    """ResNet-56, 0.85M parameters. `kwargs` are timm's and ResNetCifar's."""
    return build_model_with_cfg(ResNetCifar, "resnet56_cifar", pretrained, depth=56, **kwargs)
