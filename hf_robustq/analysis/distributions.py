"""What weights and outputs are distributed like, and what quantizing does to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_robustq.calibrate import undisturbed
from hf_robustq.plugin import RobustQ
from hf_robustq.reparam import network_weight
from hf_robustq.sharded import whole
from hf_robustq.sites import Site
from hf_robustq.sweep import Calibration, Setting, Steps, quantized

Forward = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class WeightStatistics:
    """Of one stored weight; moments are the population's.

    counts, edges   [n] and [n + 1], its histogram
    symmetry        1 - mean |w_(i) + w_(n+1-i)| / (2 * mean |w|) over the sorted elements: 1 where they are symmetric
                    about 0, 0 where all have one sign
    """

    mean: float
    deviation: float
    skewness: float
    kurtosis: float
    symmetry: float
    counts: Tensor
    edges: Tensor


def weight_statistics(plugin: RobustQ, bins: int = 101) -> dict[str, WeightStatistics]:
    """By weight: what Fig. 2A of SymReg and SatNL shows of a network."""
    return {site.name: _statistics(site, bins) for site in plugin.sites}


def _statistics(site: Site, bins: int) -> WeightStatistics:
    with network_weight(site) as weight:
        w = weight.detach().double().flatten().sort().values
    largest = max(float(w.abs().amax()), torch.finfo(torch.float64).tiny)
    deviation = float(w.std(correction=0))
    centred = (w - w.mean()) / (deviation or 1.0)
    return WeightStatistics(
        mean=float(w.mean()),
        deviation=deviation,
        skewness=float((centred**3).mean()),
        kurtosis=float((centred**4).mean()),
        symmetry=1 - float((w + w.flip(0)).abs().mean() / (2 * w.abs().mean())) if float(w.abs().mean()) else 1.0,
        counts=torch.histc(w, bins, -largest, largest),
        edges=torch.linspace(-largest, largest, bins + 1, dtype=torch.float64),
    )


def weight_sqnr(plugin: RobustQ, setting: Setting | str, steps: Steps | None = None) -> dict[str, float]:
    """By weight, 10 * log10(sum w^2 / sum (w - Q(w))^2) in dB under a setting; infinity where nothing is lost.

    steps   `Steps(plugin, calibration=..., forward=...)` for settings that need training samples or fold batch norms
    """
    setting = Setting.parse(setting) if isinstance(setting, str) else setting
    found = {}
    with undisturbed(plugin.model), quantized(plugin, setting, steps or Steps(plugin)):
        for site in plugin.sites:
            with whole(site.parameter) as stored, network_weight(site) as weight:
                w = weight.double()
                noise = float((site.weight_stages(stored).double() - w).pow(2).sum())
                power = float(w.pow(2).sum())
                found[site.name] = 10 * math.log10(power / noise) if noise else math.inf
    return found


def output_divergence(
    plugin: RobustQ,
    batches: Iterable[Any],
    forward: Forward,
    setting: Setting | str,
    calibration: Calibration | None = None,
    bins: int = 256,
) -> dict[str, float]:
    """By layer, in the order of the forward pass: KL(P || Q) in nats between histograms of its output, as in Fig. 1A of
    SymReg and SatNL: P of the float model, Q of the model as `setting` has it, errors of earlier layers included.

    Both on `bins` bins over the range of P and two beyond it. Choice: half a count is added to every bin, or what Q
    leaves empty would make it infinite. Settings with activations need `plugin.observe(...)` first.
    """
    setting = Setting.parse(setting) if isinstance(setting, str) else setting
    kept = list(batches)
    ranges: dict[str, tuple[float, float]] = {}
    found: dict[str, list[Tensor]] = {}

    def widen(name: str, x: Tensor) -> None:
        low, high = (float(end) for end in x.aminmax())
        known = ranges.get(name, (low, high))
        ranges[name] = min(low, known[0]), max(high, known[1])

    def count(column: int) -> Callable[[str, Tensor], None]:
        def add(name: str, x: Tensor) -> None:
            low, high = ranges[name]
            position = (x.double().flatten() - low) / max(high - low, 1e-30) * bins
            index = (position.floor() + 1).clamp(0, bins + 1)
            index[position == bins] = bins  # the upper end of P's range is in its last bin
            counts = torch.bincount(index.long(), minlength=bins + 2).double()
            known = found.setdefault(name, [torch.zeros_like(counts) for _ in range(2)])
            known[column] += counts

        return add

    steps = Steps(plugin, calibration=calibration, forward=lambda: forward(plugin.model, kept[0]))
    with undisturbed(plugin.model):
        for observe, how in ((widen, Setting()), (count(0), Setting()), (count(1), setting)):
            with quantized(plugin, how, steps), _outputs(plugin.sites, observe):
                for batch in kept:
                    forward(plugin.model, batch)
    return {name: _divergence(*counts) for name, counts in found.items()}


def _divergence(p: Tensor, q: Tensor) -> float:
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (p, q))
    return float((p * (p / q).log()).sum())


@contextmanager
def _outputs(sites: Sequence[Site], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def tell(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            if isinstance(output, Tensor):
                see(name, output.detach())

        return tell

    layers = {id(site.module): site for site in sites}
    hooks = [site.module.register_forward_hook(hook(site.name)) for site in layers.values()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
