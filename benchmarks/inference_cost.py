"""What a loaded model's forward costs against the float model's, side by side in one process.

    python benchmarks/inference_cost.py [--model resnet50] [--batch 16] [--size 64] [--repeats 15]

A saved folder is loaded as the float model, baked at 4 bits (weights only), baked with 8-bit activations, and
quantizing on read (`trainable=True`). Prints medians of paired forwards; weight-only should be at most 1.05. Two
float models beside each other say how far the machine's noise goes.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import AutoModelForImageClassification

from hf_robustq import RobustQ, from_pretrained
from hf_robustq.models import image_classifier


@torch.no_grad()
def timed(model, pixels) -> float:
    start = time.perf_counter()
    model(pixel_values=pixels)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, _ = image_classifier(options.model, [str(label) for label in range(10)])
    pixels = torch.randn(options.batch, 3, options.size, options.size)
    plugin = RobustQ(model, {"weights": {"bits": 4}, "activations": {"bits": 8}})
    plugin.calibrate([pixels], lambda model, batch: model(pixel_values=batch))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kinds = {
            "float": {"bits": None},
            "float again": {"bits": None},
            "W4, baked": {"bits": 4},
            "W4/A8, baked": {"bits": 4, "activation_bits": 8},
            "W4 on read": {"bits": 4, "trainable": True},
        }
        models = {
            name: from_pretrained(AutoModelForImageClassification, folder, **kind).eval()
            for name, kind in kinds.items()
        }
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(-2, options.repeats):
        for name, loaded in models.items():
            seconds = timed(loaded, pixels)
            if repeat >= 0:
                times[name].append(seconds)
    for name, seconds in times.items():
        ratio = statistics.median(one / base for one, base in zip(seconds, times["float"], strict=True))
        print(f"{name:14}{1000 * statistics.median(seconds):8.1f} ms  ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
