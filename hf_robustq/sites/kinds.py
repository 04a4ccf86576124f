"""Which tensors of a module are weights that can be staged, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_robustq.sharded import whole_shape
from hf_robustq.sites.attach import INPUTS
from hf_robustq.sites.site import Site

OUTPUT_AXIS: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
    Conv1D: 1,
}
"""Modules whose `weight` can be staged, and the axis of its output channels."""


RECURRENT = nn.RNNBase | nn.RNNCellBase
MATRICES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w3", "w2", "weight")
"""What stacks of experts call their matrices, those that read the module's input first."""

RAW = "its module is no known layer"
"""Why the input of what a module holds itself stays float."""

ROUTER = re.compile(r"(Router|(TopK|Top\d|MoE)\w*Gate)$", re.IGNORECASE)
ROUTER_NAMES = ("gate", "router", "wg")


def candidates_of(name: str, module: nn.Module, embeddings: bool, parameters: Sequence[str]) -> list[tuple[Site, str]]:
    """The tensors of a module that are weights, each with the reason why it cannot be staged, or none."""

    def site(tensor: str, axis: int, **more: Any) -> Site:
        return Site(f"{name}.{tensor}" if name else tensor, module, tensor, axis, **more)

    if isinstance(module, nn.MultiheadAttention):
        reason = "attention reads its weight next to other inputs"
        return [] if module.in_proj_weight is None else [(site("in_proj_weight", 0, float_input=reason), "")]
    if isinstance(module, nn.Embedding):
        stored = site("weight", 0, float_input="an embedding's input is indices")
        return [(stored, "")] if embeddings else []
    if isinstance(module, RECURRENT):
        reason, tensors = "a recurrent layer's input may be packed", dict(module.named_parameters(recurse=False))
        names = [tensor for tensor in tensors if tensor.startswith("weight_")]
        return [(site(t, 0, float_input=reason, inputs=f"{t}_{INPUTS}"), "") for t in names]
    axis = next((axis for kind, axis in OUTPUT_AXIS.items() if isinstance(module, kind)), None)
    if axis is not None:
        return [(site("weight", axis), _unfit(module))]
    if matrices := expert_matrices(module):
        first, *rest = matrices
        inside = "it is read inside its module, next to other weights"
        sites = [site(first, matrices[first], stacked=True)]
        sites += [site(t, matrices[t], stacked=True, float_input=inside, inputs=f"{t}_{INPUTS}") for t in rest]
        return [(one, "") for one in sites]
    return [(one, "") for one in _raw(name, module, parameters, site)]


def _raw(name: str, module: nn.Module, parameters: Sequence[str], site: Callable[..., Site]) -> list[Site]:
    """The matrices, stacks of them and kernels that a module of another kind holds itself, by their names."""
    sites = []
    for tensor, parameter in module._parameters.items():
        full, shape = f"{name}.{tensor}" if name else tensor, () if parameter is None else whole_shape(parameter)
        asked = any(fnmatchcase(full, pattern) for pattern in parameters)
        usual = tensor.endswith(("weight", "kernel")) and not isinstance(module, nn.EmbeddingBag)
        matrix = parameter is not None and parameter.is_floating_point() and sum(size > 1 for size in shape) > 1
        if matrix and (asked or usual):
            stacked = len(shape) == 3
            own = {"stacked": stacked, "float_input": RAW, "inputs": f"{tensor}_{INPUTS}"}
            sites.append(site(tensor, int(stacked), **own))
    return sites


def _unfit(module: nn.Module) -> str:
    """Why the weight of a layer cannot be staged; empty where it can."""
    stored = module._parameters.get("weight")
    if not isinstance(stored, nn.Parameter):
        return "its weight is computed from other tensors (weight norm, parametrization)"
    if not stored.is_floating_point():
        return f"its weight is stored as {stored.dtype}"
    if type(module).__name__.startswith(("StdConv2d", "ScaledStdConv2d")):
        return "it standardises its weight after reading it"
    return ""


def expert_matrices(module: nn.Module) -> dict[str, int]:
    """The stacks of matrices of a module that holds experts, by name, with the axis of their output channels.

    Those with one matrix for each of its `num_experts`, [experts, out, in] or, where the module says `is_transposed`
    or the sizes of its first and its last stack do, [experts, in, out].
    """
    count = getattr(module, "num_experts", None)
    stacks = {
        tensor: parameter
        for tensor in MATRICES
        if (parameter := module._parameters.get(tensor)) is not None
        and len(whole_shape(parameter)) == 3
        and whole_shape(parameter)[0] == count
    }
    if not stacks:
        return {}
    shapes = [whole_shape(parameter) for parameter in stacks.values()]
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        transposed = len(shapes) > 1 and shapes[0][1] == shapes[-1][2] and shapes[0][2] != shapes[-1][1]
    return dict.fromkeys(stacks, 2 if transposed else 1)


def routers_of(model: nn.Module) -> set[str]:
    """The names of the modules that choose experts, and of what is in them."""
    modules = dict(model.named_modules())
    lists = {name for name, module in modules.items() if name.endswith("experts") and list(module.children())}
    experts = lists | {name for name, module in modules.items() if expert_matrices(module)}
    beside = {name.rpartition(".")[0] for name in experts}
    routers = {
        name
        for name, module in modules.items()
        if ROUTER.search(type(module).__name__)
        or (name.rpartition(".")[2] in ROUTER_NAMES and name.rpartition(".")[0] in beside)
    }
    return {name for name in modules if any(name == one or name.startswith(f"{one}.") for one in routers)}
