"""Site: a module and one of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_robustq.sharded import whole_shape


@dataclass(frozen=True, eq=False)
class Site:
    """Where: a module and one of its tensors; `name` is the parameter's in the model, `axis` its output channels."""

    name: str
    module: nn.Module
    tensor: str
    axis: int

    @property
    def parameter(self) -> Tensor:
        """The stored parameter, looked up anew: FSDP2 replaces parameters, so never keep hold of one."""
        parameter = self.module._parameters[self.tensor]
        assert parameter is not None
        return parameter

    @property
    def shape(self) -> torch.Size:
        """The whole tensor's shape, also where it is stored in pieces."""
        return whole_shape(self.parameter)

    @property
    def weight_stages(self) -> nn.Sequential:
        return getattr(self.module, f"{self.tensor}_stages")

    @property
    def activation_stages(self) -> nn.Sequential:
        return self.module.activation_stages  # type: ignore[return-value]


@dataclass(frozen=True)
class LeftOut:
    """A weight that could have been a site and is not, and why."""

    name: str
    reason: str
