"""How much the loss rises in a neighbourhood of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hf_robustq.calibrate import switches_kept, undisturbed
from hf_robustq.plugin import RobustQ
from hf_robustq.plugin.stages import quantizers
from hf_robustq.sharded import is_sharded

Loss = Callable[[Any, Any], Tensor]


def sharpness(
    plugin: RobustQ,
    batches: Sequence[Any],
    loss: Loss,
    rho: float = 5e-4,
    kind: Literal["ball", "box"] = "ball",
    iterations: int = 10,
    around: Literal["stored", "quantized"] = "stored",
) -> float:
    """The sharpness of the model as its quantizers have it, of the mean `loss(model, batch)` over fixed batches.

    "ball"   max of L(w + e) - L(w) over |e_i| <= rho (arXiv 2212.05603, section 5.1): ascent by the sign of the
             gradient, in steps of 2 * rho / iterations, projected; the largest value met
    "box"    100 * (max L(w + e) - L(w)) / (1 + L(w)) over |e_i| <= rho * (|w_i| + 1) (arXiv 1609.04836): L-BFGS-B from
             e = 0; that paper's Table 3 is on this scale

    around   "stored": the float weights are moved, and quantized where they have come to, with straight-through
             gradients; training leaves many weights of a low-bit network beside a threshold, so it takes little.
             "quantized": the quantized weights are moved, and stay where they have come to

    The weights are those that would be published (`RobustQ.published`); the other analyses read those of now.

    Choice: the paper does not say which. Steps and other parameters of the quantizers stay, as does what is frozen. In
    evaluation mode; model and RNGs are left as they were. Raises `ValueError` for sharded weights.
    """
    own = plugin.own_parameters()
    weights = [p for name, p in plugin.model.named_parameters() if p.requires_grad and name not in own]
    if any(is_sharded(weight) for weight in weights):
        raise ValueError("sharpness needs whole weights: measure the saved model in one process")
    if not batches or not rho > 0:
        raise ValueError("sharpness needs a batch at least, and a positive rho")

    def rise(moves: Sequence[Tensor], gradient: bool) -> tuple[float, list[Tensor]]:
        """The mean loss at w + e, and its gradient."""
        with torch.no_grad():
            for weight, start, move in zip(weights, origin, moves, strict=True):
                weight.copy_(start + move)
        total, slopes = 0.0, [torch.zeros_like(weight) for weight in weights]
        for batch in batches:
            with torch.set_grad_enabled(gradient):
                value = loss(plugin.model, batch) / len(batches)
            total += float(value)
            if gradient:
                found = torch.autograd.grad(value, weights, allow_unused=True)
                slopes = [s if f is None else s + f for s, f in zip(slopes, found, strict=True)]
        return total, slopes

    if any(weight.dtype not in (torch.float32, torch.float64) for weight in weights):
        raise ValueError("sharpness moves weights by less than half precision can tell: load the model in float32")
    with _restored(plugin.model.parameters()), undisturbed(plugin.model), plugin.published(), ExitStack() as stack:
        if around == "quantized":
            stack.enter_context(_baked(plugin))
        origin = [weight.detach().clone() for weight in weights]
        still = [torch.zeros_like(weight) for weight in weights]
        base, slopes = rise(still, gradient=True)
        if kind == "box":
            limits = [rho * (weight.abs() + 1) for weight in origin]
            highest = _box(rise, limits, iterations)
            return 100 * (highest - base) / (1 + base)
        moves, highest = still, base
        for _ in range(iterations):
            step = 2 * rho / iterations
            moves = [(m + step * s.sign()).clamp(-rho, rho) for m, s in zip(moves, slopes, strict=True)]
            value, slopes = rise(moves, gradient=True)
            highest = max(highest, value)
        return highest - base


def _box(rise: Callable[..., tuple[float, list[Tensor]]], limits: list[Tensor], iterations: int) -> float:
    from scipy.optimize import minimize

    bound = torch.cat([limit.reshape(-1) for limit in limits]).double().cpu().numpy()
    highest = -math.inf

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal highest
        parts = torch.from_numpy(flat).split([limit.numel() for limit in limits])
        moves = [part.to(limit).view_as(limit) for part, limit in zip(parts, limits, strict=True)]
        value, slopes = rise(moves, gradient=True)
        highest = max(highest, value)
        return -value, -torch.cat([slope.reshape(-1) for slope in slopes]).double().cpu().numpy()

    bounds = np.stack([-bound, bound], 1)
    minimize(
        objective, np.zeros_like(bound), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": iterations}
    )
    return highest


@contextmanager
def _baked(plugin: RobustQ) -> Iterator[None]:
    """The stored weights on their grids, the weights' quantizers off."""
    own = [stage for stage in quantizers(plugin.sites) if stage.role == "weight"]
    for site in {id(site.parameter): site for site in plugin.sites}.values():  # a shared weight once
        site.parameter.copy_(site.weight_stages(site.parameter))
    with switches_kept(own):
        for stage in own:
            stage.enabled = False
        yield


@contextmanager
def _restored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """The parameters come back to the bit."""
    weights = list(parameters)
    origin = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, start in zip(weights, origin, strict=True):
                weight.copy_(start)
