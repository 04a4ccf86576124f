"""ASAM: adaptive sharpness-aware minimization (arXiv 2102.11600), and SAM (arXiv 2010.01412)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from hf_robustq.distributed import average, several
from hf_robustq.functional import chunks, flatten, fused, memory_order, working_dtype
from hf_robustq.options import Range, checked
from hf_robustq.quantizers import Quantizer
from hf_robustq.sharded import held, settle, share_held, uses_deepspeed, values_kept

UNDER_DEEPSPEED = (
    "asam: DeepSpeed takes the optimizer step inside the backward, so there is no second pass: "
    "train with DDP or FSDP2, or leave asam out"
)


class ASAM:
    """Each micro-batch twice: its gradient g at w, then the gradient that trains, at w + e. w itself does not move.

    e = rho * T^2 g / || T g ||_2, over all parameters together, with T = |w| + eta for parameters that have "weight" in
    their name and 1 for the others (ASAM, eq. 8, and its code); `adaptive=False`: T = 1 (SAM).

        asam = ASAM(model, rho=1.0, exclude=plugin.own_parameters())      # before accelerator.prepare
        for batch in loader:
            with accelerator.accumulate(model):
                asam(lambda: forward_and_backward(batch), model)           # is called twice, returns the loss
                optimizer.step()
                optimizer.zero_grad()

    model      as it was before wrapping
    rho        the radius, positive
    eta        0 or more
    per_rank   each rank climbs along the gradient of its own micro-batch; default: along the mean over the ranks
    exclude    names of parameters that do not climb (what the stages learn)

    The loss returned is that at w. Batch norms see the batch once, in the first pass; what was accumulated before is
    kept. A first gradient that is not finite makes the second so: the scaler of fp16 then skips the step as a whole.
    Regularizers act in both passes and noise is the same in both. With SatNL, w is the stored weight.

    One process, DDP, and FSDP2 without accumulation (else a `ValueError`, as under DeepSpeed, whose backward takes the
    optimizer step, and for a rho or eta that makes no sense).
    """

    @checked("asam")
    def __init__(
        self,
        model: nn.Module,
        rho: Annotated[float, Range(0, 1000, above=True)] = 0.5,
        eta: Annotated[float, Range(0, 1000)] = 0.01,
        adaptive: bool = True,
        per_rank: bool = False,
        exclude: Collection[str] = (),
    ) -> None:
        self.model = model
        self.rho, self.eta, self.adaptive, self.per_rank = rho, eta, adaptive, per_rank
        self.exclude = frozenset(exclude)

    def __call__(self, run: Callable[[], Tensor], wrapped: nn.Module | None = None) -> Tensor:
        """Both passes of one micro-batch by `run()`, a forward and a backward; `wrapped`: the model, as prepared."""
        settle(self.model)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        engine = hasattr(wrapped, "zero_optimization_stage")
        if engine or any(uses_deepspeed(p) for p in parameters.values()):
            raise ValueError(UNDER_DEEPSPEED)
        in_pieces = any(isinstance(p, DTensor) for p in parameters.values())
        if in_pieces and self.per_rank:
            raise ValueError("asam: FSDP2 has no gradient of one rank: leave per_rank out")
        if in_pieces and not GradientState().sync_gradients:
            raise ValueError("asam: FSDP2 does not keep accumulated gradients apart: use larger batches, or DDP")
        accumulated = [p.grad for p in parameters.values()]
        for parameter in parameters.values():
            parameter.grad = None
        no_sync = getattr(wrapped, "no_sync", nullcontext)  # of DDP
        with no_sync():
            loss = run()
        if all(p.grad is None for p in parameters.values()):
            raise RuntimeError("asam: the first pass left no gradient: run() has to call the backward")
        together = several() and not in_pieces and not self.per_rank
        if together:  # a rank may have none for what it did not use
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        moves = [
            (
                held(p),
                held(p.grad),
                self.eta if self.adaptive and "weight" in name else None,
                share_held(p) if in_pieces else 1.0,  # of a sum over the ranks
            )
            for name, p in parameters.items()
            if p.grad is not None and name not in self.exclude
        ]
        if together:
            average([grad for _, grad, *_ in moves])
        for parameter, grad in zip(parameters.values(), accumulated, strict=True):
            parameter.grad = grad
        with values_kept(self.model, [weight for weight, *_ in moves]), _still(self.model):
            self._climb(moves, in_pieces)
            del moves
            run()
        return loss

    @torch.no_grad()
    def _climb(self, moves: Sequence[tuple[Tensor, Tensor, float | None, float]], in_pieces: bool) -> None:
        square = torch.stack([_square(*_flat(w, g), shift) * share for w, g, shift, share in moves]).sum()
        if in_pieces:
            dist.all_reduce(square)
        factor = self.rho / (square.sqrt() + 1e-16)
        for w, g, shift, _ in moves:
            flat, slope = _flat(w, g)
            _move(flat, slope, factor, shift)
            if flat.data_ptr() != w.data_ptr():  # a layout that has no flat view
                w.copy_(flat.view_as(w))


def check_optimizer(optimizer: Any) -> None:
    """Raise `ValueError` for an optimizer with no place for two passes: it steps in the backward, or by a closure."""
    inner = getattr(optimizer, "optimizer", optimizer)
    kind = type(inner).__name__
    closure = inspect.signature(type(inner).step).parameters.get("closure")
    closes = closure is not None and closure.default is inspect.Parameter.empty
    if closes or kind.lower() in ("lomo", "adalomo") or "layerwise" in kind.lower():
        why = "calls the model itself" if closes else "steps inside the backward"
        raise ValueError(f"asam: {kind} {why}, which leaves no place for a second pass: use SGD or AdamW, say")


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch, as in training, and leave their running statistics alone.

    Quantizers work anew: what they keep for the next micro-batch is of the weights that have not moved.
    """
    modules = list(model.modules())
    norms = [m for m in modules if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    kept = [(m, m.keep, m.kept) for m in modules if isinstance(m, Quantizer)]
    try:
        for norm in norms:
            norm.track_running_stats = False
        for quantizer, _, _ in kept:
            quantizer.keep, quantizer.kept = False, None
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for quantizer, keep, known in kept:
            quantizer.keep, quantizer.kept = keep, known


def _flat(weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dimension, in the order of the weight's memory, whose view the first is where there can be one."""
    order = memory_order(weight)
    return flatten(weight, order), flatten(grad, order)


def _square_of(w: Tensor, g: Tensor, shift: float | None) -> Tensor:
    """|| T g ||^2 of one parameter."""
    dtype, total = working_dtype(w), torch.zeros((), dtype=working_dtype(w), device=w.device)
    for part, slope in zip(chunks(w), chunks(g), strict=True):
        scaled = slope.to(dtype) if shift is None else (part.to(dtype).abs() + shift) * slope.to(dtype)
        total = total + (scaled * scaled).sum()
    return total


def _move_along(w: Tensor, g: Tensor, factor: Tensor, shift: float | None) -> None:
    """w += factor * T^2 g, in place."""
    dtype = working_dtype(w)
    for part, slope in zip(chunks(w), chunks(g), strict=True):
        step = slope.to(dtype) * factor
        values = part.to(dtype)
        part.copy_(values + (step if shift is None else step * (values.abs() + shift) ** 2))


_square, _move = fused(_square_of), fused(_move_along)
