"""Which parameters of a model reach a matrix product or a convolution, seen while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_robustq.sharded import whole_shape
from hf_robustq.sites import LeftOut, Site, plain_names

OPERANDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "linear", "matmul", "convolution", "_convolution"), (0, 1)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm"), (0, 1)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "chain_matmul"), (0, 1)),
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv", "addr"), (1, 2)),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn", "miopen_rnn"), (1, 2)),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), (2, 3)),
    **dict.fromkeys(("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"), (0, 1, 2)),
    **dict.fromkeys(("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"), (0, 1, 2)),
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_fused_attention_overrideable"), (0, 1, 2)),
    "mkldnn_rnn_layer": (1, 2),
    "einsum": (1,),
    "linalg_multi_dot": (0,),
    "_trilinear": (0, 1, 2),
}
"""Operators of aten that multiply matrices or convolve, and which of their arguments are the operands."""

Names = frozenset[str]


class ProductWatch(TorchDispatchMode):
    """While it is entered: `names` of the parameters that are operands of products, and those operands are made of.

    A tensor that is made of parameters and constants alone (a weight that is standardised before its convolution) is
    followed; what has met the data is not, nor is what is looked up in a table.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names: set[str] = set()
        self._parameters: dict[int, str] = {}
        self._made: dict[StorageWeakRef, Names] = {}
        self.forget()

    def forget(self) -> None:
        """Another batch begins: tensors of the last one are gone."""
        self._parameters = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._made = {}
        for buffer in self.model.buffers():
            self._note(buffer, frozenset())
        for name, parameter in self.model.named_parameters():
            self._note(parameter, (self._of(parameter) or frozenset()) | {name})

    def _note(self, tensor: Tensor, names: Names | None) -> None:
        storage = _storage(tensor)
        if storage is not None and names is not None:
            self._made[storage] = names
        elif storage is not None:
            self._made.pop(storage, None)

    def _of(self, tensor: Tensor) -> Names | None:
        """The parameters it is made of; None where it has met the data."""
        if isinstance(tensor, nn.Parameter):
            if id(tensor) not in self._parameters:  # a sharded model's, which come and go
                self._parameters |= {id(parameter): name for name, parameter in self.model.named_parameters()}
            name = self._parameters.get(id(tensor))
            return None if name is None else frozenset({name})
        storage = _storage(tensor)
        return None if storage is None else self._made.get(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = OPERANDS.get(func.overloadpacket.__name__.rstrip("_"))
        if operands is not None:
            for tensor in _tensors([args[i] for i in operands if i < len(args)]):
                self.names |= self._of(tensor) or frozenset()
            made = None
        elif func.overloadpacket.__name__ == "embedding":
            made = None
        else:
            sources = [self._of(tensor) for tensor in _tensors((args, kwargs))]
            known = [names for names in sources if names is not None]
            made = frozenset().union(*known) if len(known) == len(sources) else None
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._note(tensor, made)
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a wrapper without storage
        return None


ENOUGH = 0.9
"""The share from which on what stays float is not worth a warning."""
NAMED = 5
"""How many weights a warning names."""


@dataclass(frozen=True, kw_only=True)
class Products:
    """The matrices and kernels that a model multiplies by or convolves with, as calibration saw them.

    staged     elements of those with stages
    unstaged   elements of each of the others, which stay float, by name
    """

    staged: int
    unstaged: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[Site], names: Collection[str]) -> Self:
        """Of the parameters of these names; vectors (norms, biases) are none."""
        own, plain = {id(site.parameter) for site in sites}, plain_names(model)
        found = {plain(name): p for name, p in model.named_parameters() if name in names and len(whole_shape(p)) > 1}
        staged = sum(whole_shape(p).numel() for p in found.values() if id(p) in own)
        return cls(staged=staged, unstaged={n: whole_shape(p).numel() for n, p in found.items() if id(p) not in own})

    @property
    def share(self) -> float:
        """The share of their elements that is staged."""
        total = self.staged + sum(self.unstaged.values())
        return self.staged / total if total else 1.0

    @property
    def sentence(self) -> str:
        """What to say of it; empty where all is staged."""
        if not self.unstaged:
            return ""
        largest = sorted(self.unstaged, key=lambda name: -self.unstaged[name])
        named = ", ".join(largest[:NAMED]) + (f" and {len(largest) - NAMED} more" if len(largest) > NAMED else "")
        return f"{self.share:.0%} of the elements of all weights in products are staged; in float: {named}."

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str = "") -> Self:
        """What `to_dict` gave. Raises `ValueError` for anything else."""
        staged, unstaged = (values.get("staged"), values.get("unstaged")) if isinstance(values, Mapping) else (0, None)
        counts = [staged, *unstaged.values()] if isinstance(unstaged, Mapping) else []
        if not counts or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{where}products: counts of elements, got {str(values)[:80]!r}")
        return cls(staged=counts[0], unstaged=dict(unstaged or {}))


def reasons(model: nn.Module, left_out: Sequence[LeftOut], unstaged: Collection[str]) -> list[LeftOut]:
    """Why each of the `unstaged` is not staged, where `left_out` does not say so yet."""
    plain, said = plain_names(model), [one.name for one in left_out]
    modules = {plain(name): module for name, module in model.named_modules()}
    ids = {plain(name): id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    known = {ids[name] for name in said if name in ids}  # under another name, where it is tied

    def reason(name: str) -> str:
        module = modules[name.rpartition(".")[0]]
        if isinstance(module, nn.Embedding):
            return "an embedding that is multiplied by (embeddings=True)"
        return f"{type(module).__name__} is no known layer (parameters=[{name!r}])"

    def told(name: str) -> bool:
        plain = name.replace(".parametrizations.weight.", ".weight_")  # which its layer's weight is computed from
        return ids[name] in known or any(plain.startswith(f"{one}_") for one in said)

    return [LeftOut(name, reason(name)) for name in unstaged if not told(name)]
