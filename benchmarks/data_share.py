"""What data preparation costs: its share of a CIFAR training step (resnet20_cifar, batch 128), in one process.

python benchmarks/data_share.py [--repeats 30] [--bf16]
"""

import argparse
import statistics
import time

import torch
from torch import nn
from transformers import default_data_collator

from hf_robustq.data import ImageDataset
from hf_robustq.models import image_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (50_000,))
    data = ImageDataset(images, labels, num_labels=10, mean=(0.5,) * 3, std=(0.25,) * 3, padding=4, flip=True)
    model = (
        image_classifier("resnet20_cifar", [str(i) for i in range(10)])[0].to(memory_format=torch.channels_last).train()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    times = []
    for _ in range(options.repeats + 2):
        start = time.perf_counter()
        batch = default_data_collator(data.__getitems__(torch.randint(0, len(data), (128,)).tolist()))
        prepared = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
            logits = model.timm_model(batch["pixel_values"])
        nn.functional.cross_entropy(logits.float(), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append((prepared - start, time.perf_counter() - start))
    times = times[2:]
    share = statistics.median(data / step for data, step in times)
    data_ms, step_ms = (statistics.median(pair[i] for pair in times) * 1e3 for i in (0, 1))
    print(f"data {data_ms:.1f} ms of a {step_ms:.1f} ms step: {100 * share:.1f}%")


if __name__ == "__main__":
    main()
