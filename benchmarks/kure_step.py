"""What KURE costs: a float32 training step of timm's resnet50 without and with it, interleaved in one process.

    python benchmarks/kure_step.py [--sizes 64 224] [--repeats 10] [--model resnet50] [--batch 16]

Prints a Markdown table (milliseconds are medians, the ratio is the median of the paired ratios) and writes
the same as JSON with --json FILE. `watch` is the look for non-finite weights that the callbacks add to a step.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import timm
import torch
from torch import nn

from hf_robustq import RobustQ


def prepare(name: str, batch: int, size: int, device: str) -> tuple:
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    model = timm.create_model(name, num_classes=10).to(device).train()
    plugin = RobustQ(model, {"regularizers": {"kure": {}}})
    plugin.calibrate([images[:2]], lambda model, x: model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(kure: bool, watch: bool = False) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        plugin.step(0.0, first=True)
        if not kure:
            plugin.end_micro_batch()
        nn.functional.cross_entropy(model(images), labels).backward()
        if watch:
            plugin.watch.look(0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 224])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    print(f"{options.model}, batch {options.batch}, float32, {device}, {torch.get_num_threads()} threads\n")
    print("| image | float ms | + KURE ms | KURE ratio | + watch ratio |\n|---|---|---|---|---|")
    for size in options.sizes:
        step = prepare(options.model, options.batch, size, device)
        for kure in (False, True, True):
            step(kure, watch=kure)
        rows = [(step(False), step(True), step(True, watch=True)) for _ in range(options.repeats)]
        plain, kure = (statistics.median(row[i] for row in rows) * 1e3 for i in (0, 1))
        ratio = statistics.median(row[1] / row[0] for row in rows)
        watch = statistics.median(row[2] / row[0] for row in rows)
        print(f"| {size} | {plain:.1f} | {kure:.1f} | {ratio:.3f} | {watch:.3f} |", flush=True)
        results.append({"size": size, "float_ms": plain, "kure_ms": kure, "ratio": ratio, "ratio_watch": watch})
    if options.json:
        facts = {"model": options.model, "batch": options.batch, "device": device, "torch": torch.__version__}
        options.json.write_text(json.dumps({**facts, "machine": platform.processor(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
