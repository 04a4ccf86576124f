"""A row for each of many architectures: what the plugin makes of it, from weights to a folder and back.

    python -m tests.walk transformers            # every architecture that builds as a tiny model
    python -m tests.walk timm                    # one model of every family
    python -m tests.walk transformers vit mixtral

share      of the elements of all weights in products that is staged
off        with quantizers off the outputs are those of the plain model, to the bit
on         with quantizers on they are others
restored   a saved folder gives the same outputs, to the bit; "stock no": transformers alone does not restore this model
silent     weights in products that are neither staged nor listed by `print(plugin)`
asked      lines of the config that calibration asked for
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import tempfile
from typing import Any

import torch
from torch import nn

from hf_robustq import RobustQ
from hf_robustq.products import ProductWatch
from hf_robustq.sharded import whole_shape
from tests.architectures import architectures, result, small_batch, small_model
from tests.zoo import run

CONFIG: dict[str, Any] = {"weights": {"bits": 4}, "activations": {"bits": 8}}
HEAD = ("architecture", "model", "share", "off", "on", "restored", "silent", "asked")
LARGEST = 40_000_000
"""Parameters of a model of timm that is walked."""


def calibrated(model: nn.Module, batch: Any) -> tuple[RobustQ, list[str]]:
    """A calibrated plugin, and what its config had to say besides."""
    config, asked = dict(CONFIG), []
    while True:
        plugin = RobustQ(model, config)
        try:
            plugin.calibrate([batch], run)
        except ValueError as error:
            plugin.detach()
            found = re.findall(r"(exclude|weights_only): (\[.*?\])", str(error))
            if not found or len(asked) > 2:
                raise
            for option, names in found:
                config[option] = [*config.get(option, ()), *json.loads(names)]
                asked.append(f"{option} {len(json.loads(names))}")
        else:
            return plugin, asked


def silent(plugin: RobustQ, batch: Any) -> list[str]:
    """Matrices that are operands of a product and that nobody says anything of."""
    watch = ProductWatch(plugin.model)
    with torch.no_grad(), watch:
        run(plugin.model, batch)
    parameters = dict(plugin.model.named_parameters(remove_duplicate=False))
    said = [site.name for site in plugin.sites] + [one.name for one in plugin.left_out]
    ids = {id(parameters[name]) for name in said if name in parameters}
    unknown = [
        name for name in watch.names if id(parameters[name]) not in ids and len(whole_shape(parameters[name])) > 1
    ]
    plain = [name.replace(".parametrizations.weight.", ".weight_") for name in unknown]
    return [name for name in plain if not any(name.startswith(f"{one}_") for one in said)]


def in_memory(model: Any) -> Any:
    """A file's tensors are mapped at any alignment, where convolutions sum in another order."""
    return copy.deepcopy(model).eval()


def stock_restores(model: Any, batch: Any, plain: torch.Tensor) -> bool:
    """Whether transformers alone gives back what it has saved."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return torch.equal(result(in_memory(type(model).from_pretrained(folder)), batch), plain)
    except Exception:
        return False


def restores(model: Any, batch: Any, quantized: torch.Tensor) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = in_memory(type(model).from_pretrained(folder))
        return (
            torch.equal(result(loaded, batch), quantized) and RobustQ.of(loaded).products == RobustQ.of(model).products
        )


def row(model: Any, batch: Any) -> tuple[str, ...]:
    """Its cells, from "share" on."""
    plain = result(model, batch)
    stock = stock_restores(model, batch, plain)
    plugin, asked = calibrated(model, batch)
    missed = silent(plugin, batch)
    quantized = result(model, batch)
    plugin.enable(False)
    off = torch.equal(result(model, batch), plain)
    plugin.enable(True)
    restored = restores(model, batch, quantized) if stock else False
    share = f"{plugin.products.share:.0%}" if plugin.products is not None else "?"
    differs = not torch.equal(quantized, plain)
    words = {True: "yes", False: "NO"}
    again = words[restored] if stock else "stock no"
    return share, words[off], words[differs], again, str(len(missed)), "; ".join(asked)


def timm_models() -> dict[str, str]:
    """{family: a small model of it}."""
    import timm

    sizes = ("atto", "femto", "pico", "nano", "tiny", "xxs", "xs", "t0", "_t", "small", "s0", "_s", "b0", "18", "26")
    found = {}
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if names:
            rank = {name: next((i for i, s in enumerate(sizes) if s in name), len(sizes)) for name in names}
            found[family] = min(names, key=lambda name: (rank[name], len(name), name))
    return found


def timm_model(name: str) -> tuple[Any, Any]:
    """In transformers' wrapper, which saves and loads it, with a batch."""
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    with torch.device("meta"):
        bare = timm.create_model(name, num_classes=3)
    count = sum(parameter.numel() for parameter in bare.parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=name, num_labels=3, do_pooling=True)
    model = TimmWrapperForImageClassification(config).eval()
    channels, *size = bare.default_cfg["input_size"]  # type: ignore[union-attr, index]
    size = [min(one, 128) for one in size] if not bare.default_cfg.get("fixed_input_size") else size  # type: ignore[union-attr]
    return model, {"pixel_values": torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))}


def transformers_model(name: str) -> tuple[Any, Any]:
    model = small_model(name)
    return model, small_batch(model)


def main(kind: str, *wanted: str) -> None:
    logging.disable(logging.WARNING)
    known = timm_models() if kind == "timm" else architectures()
    build = timm_model if kind == "timm" else transformers_model
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    built = 0
    for architecture, name in known.items():
        if wanted and architecture not in wanted:
            continue
        try:
            model, batch = build(name)
            result(model, batch)
        except Exception as error:  # what the library itself does not build or run from its defaults
            print(f"| {architecture} | {name} | not run: {' '.join(str(error).split())[:100]} |", flush=True)
            continue
        try:
            cells = row(model, batch)
            built += 1
        except Exception as error:
            cells = (f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}",)
        print(f"| {architecture} | {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{built} rows")


if __name__ == "__main__":
    main(*sys.argv[1:])
