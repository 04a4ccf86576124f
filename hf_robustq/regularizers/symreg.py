"""SymReg (Symmetry Regularization and Saturating Nonlinearity for Robust Quantization, arXiv 2208.00338)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_robustq.functional import flatten, memory_order, unflatten, working_dtype
from hf_robustq.options import checked
from hf_robustq.regularizers.regularizer import Regularizer

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values ascending, their places) of a 1-D tensor, as `torch.sort`.

    On a CPU float32 values go, with their places, into one 64-bit integer each, which numpy sorts with vector
    instructions: several times faster than torch's sort.
    """
    if not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return x.sort()
    bits = x.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    packed = (ordered.long() << 32) | torch.arange(x.numel())
    packed.numpy().sort()
    ordered = (packed >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), packed & 0xFFFFFFFF


class SymReg(Regularizer):
    """Makes the distribution of a weight symmetric about 0, so that an odd quantizer moves no layer's mean.

    With the elements sorted, w_(1) <= ... <= w_(n), elements of opposite rank belong together:

    sym1   the mean over pairs of |w_(i) + w_(n+1-i)|
    sym2   the mean over quadruples of |w_(2i-1) + w_(2i) + w_(n-2i+1) + w_(n-2i+2)|

    What is left in the middle (n mod 2 elements, or n mod 4) is one more group, of one sum. The gradient of a group is
    the sign of its sum, over the number of groups, for each of its elements.

    relative    divide by the mean |w|, as a constant
    depthwise   act on depthwise convolutions too, which have few weights to a filter

    Choice: the main paper is not among our sources; formulas as they are reported, and a mean where a sum would make
    the strength depend on the size of the layer.
    """

    group = 1
    """Elements of a group from either end."""

    @checked("symreg")
    def __init__(self, relative: bool = False, depthwise: bool = False) -> None:
        super().__init__()
        self.relative = relative
        self.depthwise = depthwise

    def refuses(self, module: nn.Module) -> str:
        if isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels and not self.depthwise:
            return "depthwise (add depthwise: true)"
        return ""

    def _sums(self, ascending: Tensor) -> Tensor:
        """The sums of all groups, that of the middle last, from the sorted elements."""
        groups, middle = divmod(ascending.numel(), 2 * self.group)
        ends = groups * self.group
        low, high = ascending[:ends], ascending[ascending.numel() - ends :].flip(0)
        sums = (low + high).view(groups, self.group).sum(1)
        return torch.cat([sums, ascending[ends : ends + middle].sum()[None]]) if middle else sums

    def _spread(self, of_groups: Tensor, count: int) -> Tensor:
        """[n] what each element of the sorted order gets of its group."""
        groups, middle = divmod(count, 2 * self.group)
        ends = of_groups[:groups].repeat_interleave(self.group)
        return torch.cat([ends, of_groups[groups:].expand(middle), ends.flip(0)])

    def _size(self, w: Tensor) -> Tensor | float:
        return w.abs().mean().clamp(min=torch.finfo(w.dtype).tiny) if self.relative else 1.0

    def penalty(self, w: Tensor, *theta: Tensor) -> Tensor:  # noqa: ARG002 (it learns nothing of its own)
        values = w.to(working_dtype(w)).flatten()
        ascending = values.sort().values if values.requires_grad else sort(values)[0]
        return self._sums(ascending).abs().mean() / self._size(values.detach())

    def gradient(self, grad_output: Tensor, strength: Tensor, w: Tensor, *theta: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG002
        order = memory_order(w)
        values = flatten(w, order).to(working_dtype(w))
        ascending, places = sort(values)
        sums = self._sums(ascending)
        slope = sums.sign_().mul_(strength / (sums.numel() * self._size(values)))
        slopes = torch.empty_like(values).scatter_(0, places, self._spread(slope, values.numel()))
        return (grad_output + unflatten(slopes, w.shape, order).to(grad_output.dtype),)

    def extra_repr(self) -> str:
        return f"relative={self.relative}, depthwise={self.depthwise}"


class SymReg2(SymReg):
    """SymReg with quadruples, `sym2`: a weaker condition, never more than `sym1` as a sum."""

    group = 2
