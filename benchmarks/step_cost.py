"""What KURE, SymReg, WaveQ, SatNL and ASAM cost: float32 training steps of one network, interleaved in one process.

    python benchmarks/step_cost.py [--sizes 64 224] [--accumulate 16] [--repeats 5] [--model resnet50] [--batch 16]

A step is `--accumulate` micro-batches of `--batch` images and one optimizer step. Prints a Markdown table of medians of
paired ratios to the step of the model without the plugin, beside those of an equal one, and writes them as JSON with
--json FILE. "watch" is the look for non-finite weights that the callbacks add to a step; "inside" the time within the
gradient of a regularizer, as a share of its step.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from hf_robustq import ASAM, RobustQ
from hf_robustq.regularizers import KURE, Regularizer, SymReg, WaveQ

CASES: dict[str, dict[str, Any] | None] = {
    "float": None,
    "float again": None,
    "SatNL": {"satnl": {}},
    "SymReg": {"regularizers": {"sym1": {}}},
    "KURE": {"regularizers": {"kure": {}}},
    "KURE, watch": {"regularizers": {"kure": {}}},
    "absmax": {"weights": {"method": "absmax", "bits": 9}},
    "absmax, WaveQ": {"weights": {"method": "absmax", "bits": 9}, "regularizers": {"waveq": {}}, "budget": {"bits": 4}},
    "ASAM": None,
    "SatNL, SymReg, ASAM": {"satnl": {}, "regularizers": {"sym1": {}}},
}


def prepare(
    name: str, start: nn.Module, images: torch.Tensor, labels: torch.Tensor, accumulate: int
) -> Callable[[], float]:
    model = copy.deepcopy(start).train()
    config = CASES[name]
    plugin = None if config is None else RobustQ(model, config)
    if plugin is not None:
        plugin.calibrate([images[:2]], lambda model, x: model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    twice = ASAM(model, rho=0.5) if "ASAM" in name else None

    def once() -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(images), labels) / accumulate
        loss.backward()
        return loss.detach()

    def step() -> float:
        if images.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(accumulate):
            if plugin is not None:
                plugin.step(0.5, first=i == 0, index=10_000, accumulating=accumulate > 1)
            twice(once) if twice else once()
        if plugin is not None and "watch" in name:
            plugin.watch.look(0)
        optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


INSIDE = {"KURE": KURE, "SymReg": SymReg, "absmax, WaveQ": WaveQ}


def inside(step: Callable[[], float], method: type[Regularizer]) -> float:
    """The share of a step spent in the gradient of a regularizer."""
    spent, original = [], method.gradient

    def timed(self: Regularizer, *args: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        start = time.perf_counter()
        result = original(self, *args)
        spent.append(time.perf_counter() - start)
        return result

    method.gradient = timed
    try:
        whole = step()
    finally:
        method.gradient = original
    return sum(spent) / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 224])
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ["float", *(name for name in options.cases if name != "float")]
    print(f"{options.model}, {options.accumulate} x {options.batch} images, float32, {device}\n")
    timed = [name for name in INSIDE if name in names]
    heads = ["image", "float ms", *names[1:], *(f"inside {INSIDE[name].__name__}" for name in timed)]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    results = []
    for size in options.sizes:
        torch.manual_seed(0)
        images = torch.randn(options.batch, 3, size, size, device=device)
        labels = torch.randint(0, 10, (options.batch,), device=device)
        start = timm.create_model(options.model, num_classes=10).to(device)
        steps = {name: prepare(name, start, images, labels, options.accumulate) for name in names}
        for step in steps.values():
            step()
            step()
        turns = [{name: step() for name, step in steps.items()} for _ in range(options.repeats)]
        plain = statistics.median(turn["float"] for turn in turns) * 1e3
        ratios = {name: statistics.median(turn[name] / turn["float"] for turn in turns) for name in names[1:]}
        shares = {name: inside(steps[name], INSIDE[name]) for name in timed}
        cells = [f"{plain:.1f}", *(f"{ratio:.3f}" for ratio in ratios.values()), *(f"{s:.1%}" for s in shares.values())]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)
        results.append({"size": size, "float_ms": plain, "ratios": ratios, "inside": shares})
    if options.json:
        facts = {"model": options.model, "batch": options.batch, "accumulate": options.accumulate, "device": device}
        facts |= {"torch": torch.__version__, "machine": platform.processor()}
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
