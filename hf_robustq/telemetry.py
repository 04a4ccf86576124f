"""What is watched while training: kurtosis, penalties, and the first non-finite tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_robustq.functional import along, fake_quantize, kurtosis
from hf_robustq.quantizers import DoReFa, Oscillation, Quantizer
from hf_robustq.regularizers import Regularizer
from hf_robustq.reparam import network_weight
from hf_robustq.sharded import held, is_sharded
from hf_robustq.sites import Site

NEVER = 2**62


def _kurtosis(site: Site, weight: Tensor) -> Tensor:
    """Of a stack of matrices, the mean of theirs."""
    return torch.stack([kurtosis(one) for one in weight]).nanmean() if site.stacked else kurtosis(weight)


@torch.no_grad()
def site_kurtosis(sites: Sequence[Site]) -> dict[str, float]:
    """Kurtosis of each site's weight in the float network."""
    values = []
    for site in sites:
        with network_weight(site) as weight:
            values.append(_kurtosis(site, weight).float())
    return dict(zip((site.name for site in sites), torch.stack(values).tolist(), strict=True)) if values else {}


@torch.no_grad()
def site_histograms(sites: Sequence[Site], bins: int) -> dict[str, dict[str, Any]]:
    """Of each site's weight in the float network {"kurtosis", "largest", "counts"}: bins from -largest to largest.

    None of a weight that is not finite, which `FiniteWatch` names.
    """
    found = {}
    for site in sites:
        with network_weight(site) as weight:
            w = weight.float()
            largest = float(w.abs().amax())
            if not math.isfinite(largest):
                continue
            counts = torch.histc(w, bins, -(largest or 1.0), largest or 1.0)
            found[site.name] = {"kurtosis": float(_kurtosis(site, w)), "largest": largest, "counts": counts.tolist()}
    return found


@torch.no_grad()
def mean_penalties(sites: Sequence[Site]) -> dict[str, float]:
    """Each regularizer's penalty, unscaled, averaged over the sites that carry it."""
    penalties: dict[str, list[Tensor]] = {}
    for site in sites:
        for name, stage in site.weight_stages.named_children():
            if isinstance(stage, Regularizer):
                with network_weight(site) as weight:
                    penalties.setdefault(name, []).append(stage.value(weight))
    return {name: float(torch.stack(values).nanmean()) for name, values in penalties.items()}


@torch.no_grad()
def site_quantization(sites: Sequence[Site]) -> dict[str, dict[str, float]]:
    """Of each site with a weight quantizer, where it is now; of DoReFa's, which reshapes weights, the distance only:

    error     mean |Q(w) - w|
    step      mean over channels
    clipped   share of weights beyond the first and the last level
    largest   max |w|
    distance  mean |Q(w) - w| / step: 0.25 where weights know nothing of the levels, 0 on them
    oscillating  share of weights that oscillate, where that is watched
    """
    found: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        quantizer = site.weight_stages._modules.get("quantizer")
        if not isinstance(quantizer, Quantizer) or not bool(quantizer.initialized):
            continue
        if isinstance(quantizer, DoReFa):
            with network_weight(site) as weight:
                found[site.name] = {"distance": quantizer.distance(weight).float()}
            continue
        with network_weight(site) as weight, quantizer.steps_of(weight) as scale:
            axis, low, high = quantizer.grid.axis, quantizer.low, quantizer.high
            w, step = weight.float(), along(scale, weight, axis)
            away = (fake_quantize(w, scale, low, high, axis=axis) - w).abs()
            clipped = ((w < low * step) | (w > high * step)).float().mean()
            own = {"error": away.mean(), "step": scale.mean(), "clipped": clipped, "largest": w.abs().amax()}
            own["distance"] = (away / step).mean()
            watcher = site.weight_stages._modules.get("oscillation")
            if isinstance(watcher, Oscillation):
                own["oscillating"] = watcher.share
            found[site.name] = own
    values = [torch.stack(list(own.values())).tolist() for own in found.values()]
    return {name: dict(zip(own, row, strict=True)) for (name, own), row in zip(found.items(), values, strict=True)}


def by_layer(sites: Sequence[Site]) -> dict[str, dict[str, float]]:
    """Both of the above and the storage bits, by site: `RobustQ.telemetry`."""
    found = {name: {"kurtosis": value} for name, value in site_kurtosis(sites).items()}
    quantized = site_quantization(sites)
    for site in sites:
        quantizer = site.weight_stages._modules.get("quantizer")
        if isinstance(quantizer, Quantizer) and site.name in quantized:
            found[site.name] |= {"bits": float(quantizer.bits), **quantized[site.name]}
    return found


def means(sites: Sequence[Site], regularized: Sequence[Site]) -> dict[str, float]:
    """One figure for the model from each of the above: `RobustQ.metrics`."""
    kurtoses = [value for value in site_kurtosis(regularized).values() if not math.isnan(value)]
    mean = {"kurtosis": sum(kurtoses) / len(kurtoses)} if kurtoses else {}
    quantized = site_quantization(sites).values()
    for key in ("error", "step", "clipped", "distance", "oscillating"):
        if values := [site[key] for site in quantized if key in site]:
            mean["quantization_error" if key == "error" else key] = sum(values) / len(values)
    if values := [site["largest"] for site in quantized if "largest" in site]:
        mean["largest_weight"] = max(values)
    return {**mean, **mean_penalties(regularized)}


class FiniteWatch:
    """Remembers, on the device and without a host synchronisation, the first step at which a tensor was not finite.

    It looks at every parameter and floating-point buffer of a model (the local shard where it is sharded).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.since: Tensor | None = None

    def reset(self) -> None:
        """Forget what was seen: another run begins."""
        self.since = None

    def _tensors(self) -> dict[str, Tensor]:
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Look at every tensor once."""
        shards = [held(tensor) for tensor in self._tensors().values()]
        sums = [shard.sum(dtype=torch.float32) for shard in shards]  # finite only where every element is
        device = sums[0].device
        finite = torch.stack([value.to(device) for value in sums]).isfinite()
        if self.since is None or self.since.numel() != finite.numel():
            self.since = torch.full((len(shards),), NEVER, device=device)
        self.since = torch.where(finite | (self.since != NEVER), self.since, step)

    def check(self, step: int) -> None:
        """Raise `FloatingPointError` naming the first tensor not to be finite. A collective where any is sharded."""
        self.look(step)
        assert self.since is not None
        since = self.since
        if torch.distributed.is_initialized() and any(is_sharded(p) for p in self.model.parameters()):
            since = since.clone()
            torch.distributed.all_reduce(since, op=torch.distributed.ReduceOp.MIN)
        first, index = since.min(0)
        if int(first) == NEVER:
            return
        name = list(self._tensors())[int(index)]
        others = int((since != NEVER).sum()) - 1
        raise FloatingPointError(
            f"non-finite values in {name} since step {int(first)}"
            f"{f' (and by now in {others} other tensors)' if others else ''}: training stopped and nothing was saved "
            "after that step; resume from the last checkpoint with a lower learning rate or regularizer strength"
        )
