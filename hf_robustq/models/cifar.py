"""What the networks that timm lacks have in common: their head, and timm's record of a network for CIFAR's images."""

from abc import ABC, abstractmethod

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import create_classifier
from torch import Tensor, nn

CIFAR = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    # Not the statistics of CIFAR: the public weights were trained with ImageNet's.
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}


class PooledClassifier(nn.Module, ABC):
    """Feature maps, pooled and classified; the methods are those timm and transformers' TimmWrapper call.

    A subclass calls `reset_classifier`.
    """

    num_features: int
    head_hidden_size: int
    grad_checkpointing = False

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        head = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.global_pool, self.linear = head[0], head[-1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, of `num_features` channels."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the last feature map and classify it; stop after pooling if `pre_logits`."""
        x = self.global_pool(x)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
