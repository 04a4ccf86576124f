"""`robustq methods`: every method there is, with its paper."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from hf_robustq.quantizers import QUANTIZERS
from hf_robustq.regularizers import REGULARIZERS
from hf_robustq.scales import CODEBOOK_RULES, SCALE_RULES
from hf_robustq.sweep.lapq import lapq
from hf_robustq.sweep.settings import LAPQ

TABLES: dict[str, dict[str, Any]] = {
    "steps from data": {**SCALE_RULES, LAPQ: lapq},
    "codebooks": CODEBOOK_RULES,
    "quantizers that train": QUANTIZERS,
    "regularizers": REGULARIZERS,
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    return commands.add_parser("methods", help="list every method with its paper", description=__doc__)


def methods() -> Iterator[tuple[str, str, str, str]]:
    """(kind, name, arXiv number or "", what it is in a line) of each."""
    for kind, table in TABLES.items():
        for name, method in sorted(table.items()):
            own, module = inspect.getdoc(method) or "", sys.modules[method.__module__].__doc__ or ""
            texts = (module, own) if inspect.isclass(method) else (own, module)
            paper = next((found[1] for text in texts if (found := re.search(r"arXiv (\d{4}\.\d{5})", text))), "")
            line = re.sub(r",? ?\(?arXiv \d{4}\.\d{5}[^)]*\)|\. Returns.*", "", texts[0].strip().split("\n")[0])
            yield kind, name, paper, line


def run(args: argparse.Namespace) -> None:  # noqa: ARG001
    last = ""
    for kind, name, paper, line in methods():
        if kind != last:
            print(f"{'' if not last else chr(10)}{kind}")
            last = kind
        print(f"  {name:14s} {f'arXiv {paper}' if paper else '':17s} {line}")
