"""How many multiplications a model does with each weight, counted while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from hf_robustq.sites import Site

TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@contextmanager
def counting_products(sites: Sequence[Site], totals: dict[int, float]) -> Iterator[None]:
    """Add up the multiply-accumulates with each weight, by the `id` of its stages, which tied weights share."""
    modules = {id(site.module): site for site in sites}

    def add(site: Site, places: float) -> None:
        key = id(site.weight_stages)
        totals[key] = totals.get(key, 0.0) + places * site.shape.numel()

    def count(site: Site, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        add(site, places := _places(site, inputs, output))
        if isinstance(module, nn.MultiheadAttention) and (inner := modules.get(id(module.out_proj))):
            add(inner, places)  # which it does not call

    hooks = [site.module.register_forward_hook(partial(count, site)) for site in sites]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _places(site: Site, inputs: tuple[Any, ...], output: Any) -> float:
    """How many times a call of its module multiplies by the weight; 0 where that is not known.

    Of a stack of matrices the whole counts: each matrix is used for its share of what is routed.
    """
    module, result = site.module, output[0] if isinstance(output, tuple) else output
    result = result.data if isinstance(result, PackedSequence) else result
    if isinstance(module, nn.Embedding) or not isinstance(result, torch.Tensor):
        return 0.0
    if isinstance(module, TRANSPOSED) and inputs:
        return inputs[0].numel() / module.in_channels
    if site.stacked:
        chosen = [one for one in inputs[1:] if isinstance(one, torch.Tensor) and not one.is_floating_point()]
        return chosen[0].numel() / site.shape[0] if chosen and hasattr(module, "num_experts") else 0.0
    if isinstance(module, nn.RNNBase):
        return result.numel() / ((module.proj_size or module.hidden_size) * (1 + module.bidirectional))
    width = {nn.MultiheadAttention: "embed_dim", nn.RNNCellBase: "hidden_size"}
    known = next((name for kind, name in width.items() if isinstance(module, kind)), None)
    return result.numel() / (getattr(module, known) if known else site.shape[site.axis])
