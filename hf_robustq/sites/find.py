"""Which weights of a model can be staged, which of them are its edges, and which models are refused."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.tensor import DTensor

from hf_robustq.options import shown
from hf_robustq.sites.adapters import ADAPTER, adapter_modules, inner, layers_of, plain_names
from hf_robustq.sites.kinds import candidates_of, routers_of
from hf_robustq.sites.site import LeftOut, Site


def find_sites(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    first_last: bool = False,
    embeddings: bool = False,
    routers: bool = False,
    parameters: Sequence[str] = (),
    adapters: bool = False,
) -> tuple[list[Site], list[LeftOut], dict[str, str]]:
    """The weights of a model that can be staged, in registration order; those left out with the reason; the edges.

    The edges are the names of the first and last layers' weights, with the word for each (`edge_names`).

    `include`, `exclude`, `parameters` (more of them, of modules that are no known layers): fnmatch patterns of
    parameter names; one that matches nothing raises `ValueError`. `first_last=False` leaves out the first layer (where
    no embedding comes before it) and the output layer; `routers=False` what chooses experts; `adapters=False` the
    layers of adapters (LoRA's A and B). A tensor shared with a module that is no site is left out: both ends of a tie
    are staged, or neither. Names are those of the model without adapters.
    """
    candidates: list[Site] = []
    left: list[LeftOut] = []
    owners: dict[int, list[str]] = {}
    choosing = set() if routers else routers_of(model)
    plain, theirs = plain_names(model), adapter_modules(model)
    for name, module in model.named_modules():
        own = {plain(f"{name}.{key}" if name else key): p for key, p in module._parameters.items() if p is not None}
        for key, parameter in own.items():
            owners.setdefault(id(parameter), []).append(key)
        found, why = candidates_of(plain(name), module, embeddings, parameters), theirs.get(id(module), "")
        if why and not (adapters and why == ADAPTER and found):
            left += [LeftOut(key, why) for key in own if not key.endswith("bias")]
            continue
        for site, reason in found:
            if reason or name in choosing:
                left.append(LeftOut(site.name, reason or "a router (routers=True)"))
            else:
                candidates.append(site)

    for what, patterns in (("include", include), ("exclude", exclude), ("parameters", parameters)):
        for pattern in patterns:
            if candidates and not any(fnmatchcase(site.name, pattern) for site in candidates):
                if any(fnmatchcase(one.name, pattern) for one in left if one.reason == ADAPTER):
                    raise ValueError(f"pattern {pattern!r} matches weights of adapters only: adapters=True stages them")
                examples = ", ".join(site.name for site in candidates[:3])
                raise ValueError(
                    f"{what}: pattern {shown(pattern)} matches no weight; weights are named like {examples}"
                )

    edges = edge_names(inner(model), [site for site in candidates if id(site.module) not in theirs])
    kept: list[Site] = []
    for site in candidates:
        if not any(fnmatchcase(site.name, pattern) for pattern in include):
            left.append(LeftOut(site.name, "not in include"))
        elif any(fnmatchcase(site.name, pattern) for pattern in exclude):
            left.append(LeftOut(site.name, "in exclude"))
        elif site.name in edges and not first_last:
            left.append(LeftOut(site.name, f"{edges[site.name]} (first_last='float')"))
        else:
            kept.append(site)

    names = {site.name for site in kept}
    sites: list[Site] = []
    for site in kept:
        strangers = [name for name in owners[id(site.parameter)] if name not in names]
        if strangers:
            left.append(LeftOut(site.name, f"tied to {strangers[0]}, which is not staged"))
        else:
            sites.append(site)
    return sites, left, edges


def edge_names(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """Names of the first and last layers' weights, with the word for each.

    Last: the module the model itself calls its output (`get_output_embeddings`, timm's `get_classifier`),
    else the last site; poolers belong to the head. First: the first site, unless an embedding or the
    output comes before it (then the embedding is the first layer, and it stays float anyway).
    """
    if not sites:
        return {}
    modules = dict(model.named_modules())
    body = getattr(model, "base_model", model)
    if isinstance(body, nn.Module) and body is not model:  # a head may be registered before it
        own = {id(module) for module in body.modules()}
        sites = sorted(sites, key=lambda site: id(site.module) not in own)
    outputs = [
        layer
        for module in modules.values()
        for getter in (getattr(module, "get_output_embeddings", None), getattr(module, "get_classifier", None))
        if callable(getter)
        for layer in layers_of(getter())
    ]
    edges = {site.name: "output layer" for site in sites if any(site.module is output for output in outputs)}
    if not edges and getattr(model, "base_model", None) is not model:  # a bare transformers backbone has no output
        edges = {sites[-1].name: "output layer"}
    edges |= {site.name: "pooler" for site in sites if "pooler" in site.name.split(".")}
    before = next((m for m in modules.values() if isinstance(m, nn.Embedding) or m is sites[0].module), None)
    if before is sites[0].module:
        edges.setdefault(sites[0].name, "first layer")
    return edges


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `ValueError` for a model that is wrapped, compiled or sharded already."""
    kind = type(model).__name__
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    if distributed is not None or (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "tensor-parallel models cannot be staged: load the model without tp_plan and distributed_config; "
            "FSDP2 and ZeRO-3 (accelerate_configs) shard staged models"
        )
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "nn.DataParallel cannot work with staged weights: "
            "start one process per GPU with `accelerate launch <script>`"
        )
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel) or kind in (
        "FullyShardedDataParallel",
        "DeepSpeedEngine",
        "OptimizedModule",
    )
    if wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        what = kind if wrapped else "sharded (DTensor parameters)"
        raise ValueError(f"the model is {what} already: create RobustQ(model, config) before wrapping or sharding it")
