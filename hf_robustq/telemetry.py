"""What is watched while training: kurtosis, penalties, and the first non-finite weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_robustq.functional import kurtosis
from hf_robustq.regularizers import Regularizer
from hf_robustq.sites import Site, whole

NEVER = 2**62


@torch.no_grad()
def site_kurtosis(sites: Sequence[Site]) -> dict[str, float]:
    """Kurtosis of each site's stored weight."""
    values = []
    for site in sites:
        with whole(site.parameter) as weight:
            values.append(kurtosis(weight).float())
    return dict(zip((site.name for site in sites), torch.stack(values).tolist(), strict=True)) if values else {}


@torch.no_grad()
def mean_penalties(sites: Sequence[Site]) -> dict[str, float]:
    """Each regularizer's penalty, unscaled, averaged over the sites that carry it."""
    penalties: dict[str, list[Tensor]] = {}
    for site in sites:
        for name, stage in site.weight_stages.named_children():
            if isinstance(stage, Regularizer):
                with whole(site.parameter) as weight:
                    penalties.setdefault(name, []).append(stage.penalty(weight, *stage.parameters()).float())
    return {name: float(torch.stack(values).mean()) for name, values in penalties.items()}


class FiniteWatch:
    """Remembers, on the device and without a host synchronisation, the first step at which a weight was not finite."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.since: Tensor | None = None

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Look at every site's stored weight (the local shard where it is sharded)."""
        shards = []
        for site in self.sites:
            stored = site.parameter
            stored = stored.to_local() if isinstance(stored, DTensor) else getattr(stored, "ds_tensor", stored)
            shards.append(stored.detach())
        norms = torch._foreach_norm(shards)  # pyright: ignore[reportPrivateImportUsage]
        finite = torch.isfinite(torch.stack(norms))
        if self.since is None or self.since.device != finite.device:
            self.since = torch.full((len(shards),), NEVER, device=finite.device)
        self.since = torch.where(finite | (self.since != NEVER), self.since, step)

    def check(self, step: int) -> None:
        """Raise `FloatingPointError` naming the layer whose weight was the first not to be finite."""
        self.look(step)
        assert self.since is not None
        since = self.since
        if torch.distributed.is_initialized():
            since = since.clone()
            torch.distributed.all_reduce(since, op=torch.distributed.ReduceOp.MIN)
        first, index = since.min(0)
        if int(first) == NEVER:
            return
        others = int((since != NEVER).sum()) - 1
        raise FloatingPointError(
            f"non-finite values in {self.sites[int(index)].name} since step {int(first)}"
            f"{f' (and by now in {others} other layers)' if others else ''}: training stopped and nothing was saved "
            "after that step; resume from the last checkpoint with a lower learning rate or regularizer strength"
        )
