"""A plugin and the adapters of its model: which model it works on, and what a folder that holds an adapter lacks.

Documented at `RobustQ`, which passes its calls on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_robustq import distributed
from hf_robustq.plugin.stages import carriers
from hf_robustq.sharded import assign, whole
from hf_robustq.sites import LeftOut, follow_adapters, has_adapters, inner

if TYPE_CHECKING:
    from hf_robustq.plugin.robustq import RobustQ

logger = logging.getLogger(__name__)

STAGES = "robustq_stages.safetensors"


def follow(plugin: RobustQ, model: nn.Module) -> None:
    """See `RobustQ.follow`."""
    if model is plugin.model:
        return
    if inner(model) is not inner(plugin.model):
        raise ValueError(
            "robustq belongs to another model: pass the model it was created with, or what PEFT made of that one"
        )
    own = {id(site.module) for site in plugin.sites}
    for name, module in model.named_modules():
        if hasattr(type(module), "_unstaged") and id(module) not in own:
            raise ValueError(
                f"{name} is a copy that PEFT made of a staged layer (modules_to_save): create RobustQ after "
                "get_peft_model"
            )
    if plugin.ema is not None and plugin.ema.averages:
        raise ValueError("averages of another wrapping of the model: call plugin.average() after get_peft_model")
    plugin.model = plugin.watch.model = model
    follow_adapters(model)
    plugin.check_in_place()
    check(plugin)
    if plugin.ema is not None:
        plugin.average(plugin.ema.decay)
    plugin.before_wrapping()
    learned = plugin.own_parameters().values()
    if learned and not any(p.requires_grad for p in learned):
        logger.warning("PEFT has frozen what the quantizers learn: create RobustQ after get_peft_model to train it")


def check(plugin: RobustQ) -> None:
    """Raise `ValueError` for what does not go with adapters, and for a regularizer with nothing to act on."""
    if plugin.config.satnl is not None and has_adapters(plugin.model):
        raise ValueError("satnl: adapters leave the weights it would shape as they are: merge them first, or drop it")
    plugin.check_regularizers()


def unregularized(plugin: RobustQ) -> list[LeftOut]:
    """The weights that have a regularizer which does not act, with the reason."""
    acting = {id(site) for r in plugin.config.regularizers for site, _ in carriers(plugin.sites, r.method)}
    names, why = {regularizer.method for regularizer in plugin.config.regularizers}, frozen(plugin)
    return [
        LeftOut(site.name, why)
        for site in plugin.sites
        if names & site.weight_stages._modules.keys() and id(site) not in acting and not site.parameter.requires_grad
    ]


def frozen(plugin: RobustQ) -> str:
    """Why weights do not train."""
    return "frozen, as adapters train instead" if has_adapters(plugin.model) else "frozen"


def _tensors(plugin: RobustQ) -> Iterator[tuple[str, Tensor]]:
    """What the stages save, named by their weight."""
    seen: set[int] = set()
    for site in plugin.sites:
        for name, stages in ((f"{site.tensor}_stages", site.weight_stages), ("inputs", site.activation_stages)):
            for key, tensor in stages.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{site.name.removesuffix(site.tensor)}{name}.{key}", tensor


def save(plugin: RobustQ, folder: str | Path, write: bool) -> None:
    """See `RobustQ.save`; gathered on every rank, written by one (`write`)."""
    found = {}
    for name, tensor in _tensors(plugin):
        with whole(tensor) as values:
            found[name] = values.detach().cpu().clone().contiguous()
    if write:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(found, Path(folder) / STAGES, metadata={"config": json.dumps(plugin.config.to_dict())})


def load(plugin: RobustQ, folder: str | Path) -> None:
    """See `RobustQ.load`."""
    file = Path(folder) / STAGES
    if not file.is_file():
        raise ValueError(f"{folder} has no {STAGES}: plugin.save(folder) writes it, and RobustTrainer where it saves")
    with safe_open(file, framework="pt") as tensors:
        saved = type(plugin.config).from_dict(json.loads((tensors.metadata() or {}).get("config", "{}")))
        for key, theirs, ours in distributed.differences(saved.to_dict(), plugin.config.to_dict()):
            raise ValueError(f"{file} is of another config: {key} is {theirs!r} there and {ours!r} here")
        own = dict(_tensors(plugin))
        if odd := sorted(own.keys() ^ set(tensors.keys())):
            raise ValueError(f"{file} is of other weights: {odd[0]} is not in both")
        for name, tensor in own.items():
            assign(tensor, tensors.get_tensor(name))
    plugin.restored()
    plugin.check_finite()
