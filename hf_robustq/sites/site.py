"""Site: a module and one of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_robustq.sharded import whole_shape


@dataclass(frozen=True, eq=False)
class Site:
    """Where: a module and one of its tensors.

    name          of the parameter in the model
    axis          of its output channels
    stacked       the first dimension counts matrices (experts, say), each of which has steps of its own
    float_input   why the module's input cannot be quantized for this tensor; empty where it can
    inputs        the name of the stages of its input, among the module's submodules
    """

    name: str
    module: nn.Module
    tensor: str
    axis: int
    stacked: bool = False
    float_input: str = ""
    inputs: str = "activation_stages"

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
    def channels(self) -> int | tuple[int, int]:
        """The axis of its output channels, or the axes of its matrices and their output channels."""
        return (0, self.axis) if self.stacked else self.axis

    def steps_axis(self, per_channel: bool) -> int | tuple[int, int] | None:
        """What has a step of its own: an output channel or the whole tensor; of a stack, of each matrix."""
        return self.channels if per_channel else 0 if self.stacked else None

    @property
    def weight_stages(self) -> nn.Sequential:
        return getattr(self.module, f"{self.tensor}_stages")

    @property
    def activation_stages(self) -> nn.Sequential:
        return getattr(self.module, self.inputs)

    @property
    def prefixes(self) -> tuple[str, str]:
        """How the names of what its stages save begin."""
        return f"{self.name}_stages.", f"{self.name.removesuffix(self.tensor)}{self.inputs}."


@dataclass(frozen=True)
class LeftOut:
    """A weight that could have been a site and is not, and why."""

    name: str
    reason: str
