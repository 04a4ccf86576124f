"""`robustq methods`: every method there is, with its paper."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from hf_robustq.analysis import layer_sensitivity, output_divergence, sharpness
from hf_robustq.optim import ASAM, EMA
from hf_robustq.quantizers import LEARNED, QUANTIZERS, Quantizer
from hf_robustq.regularizers import REGULARIZERS
from hf_robustq.reparam import SatNL
from hf_robustq.scales import CODEBOOK_RULES, SCALE_RULES
from hf_robustq.sweep.batch_norm import reestimated
from hf_robustq.sweep.lapq import lapq
from hf_robustq.sweep.mapping import asymmetric, corrected, folded, into_range, to_integer
from hf_robustq.sweep.settings import LAPQ
from hf_robustq.sweep.steps import perturbed

TABLES: dict[str, dict[str, Any]] = {
    "steps from data, for --methods": {**SCALE_RULES, LAPQ: lapq, LEARNED: Quantizer.set_bits},
    "codebooks, for --methods": CODEBOOK_RULES,
    "in a sweep besides": {
        "/bc, /bcv": corrected,
        "/fold": folded,
        "/bn": reestimated,
        "/x0.9, /pow2": perturbed,
        "/floor, ...": to_integer,
        "/wrap, ...": into_range,
        "/asym": asymmetric,
    },
    "quantizers that train": QUANTIZERS,
    "regularizers": REGULARIZERS,
    "around the weights and the optimizer": {"asam": ASAM, "ema": EMA, "satnl": SatNL},
    "analysis": {"sharpness": sharpness, "sensitivity": layer_sensitivity, "divergence": output_divergence},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def methods() -> Iterator[tuple[str, str, str, str]]:
    """(kind, name, arXiv number or "", what it is in a line) of each."""
    for kind, table in TABLES.items():
        for name, method in sorted(table.items()) if kind != "in a sweep besides" else table.items():
            own, module = inspect.getdoc(method) or "", sys.modules[method.__module__].__doc__ or ""
            texts = (module, own) if inspect.isclass(method) else (own, module)
            paper = next((found[1] for text in texts if (found := re.search(r"arXiv (\d{4}\.\d{4,5})", text))), "")
            line = re.sub(r" \(arXiv [^)]*\)|, arXiv \d{4}\.\d{4,5}|\. Returns.*", "", texts[0].strip().split("\n")[0])
            yield kind, name, paper, line


def run(args: argparse.Namespace) -> None:  # noqa: ARG001
    last = ""
    for kind, name, paper, line in methods():
        if kind != last:
            print(f"{'' if not last else chr(10)}{kind}")
            last = kind
        print(f"  {name:14s} {f'arXiv {paper}' if paper else '':17s} {line}")
