"""What a sweep costs: k weight-only settings against k plain evaluations, side by side in one process.

    python benchmarks/sweep_cost.py --dataset_name <cifar10 folder> [--samples 5000] [--model resnet20_cifar]
    python benchmarks/sweep_cost.py --dataset_name <cifar10 folder> --settings w4 w4@kmeans w4@log2 w4@mse/bc

Without --dataset_name: the embedded digits, repeated. Prints the time of one plain evaluation, of the sweep, and
their quotient, which should be at most k + 0.5.
"""

import argparse
import statistics
import time

import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_robustq import RobustQ, sweep
from hf_robustq.data import digits, image_datasets, load_image_splits
from hf_robustq.models import image_classifier, preprocessing
from hf_robustq.sweep import parse_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name")
    parser.add_argument("--model", default="resnet20_cifar")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--settings", nargs="+", default=["w8", "w6", "w5", "w4", "w3", "w2"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.dataset_name:
        splits = load_image_splits(options.dataset_name)
        model, _ = image_classifier(options.model, splits[-1])
        _, data = image_datasets(splits[0].select(range(10)), *splits[1:], **preprocessing(model))
    else:
        _, data, labels = digits(32)
        model, _ = image_classifier(options.model, labels)
    data = data.select([i % len(data) for i in range(options.samples)])
    loader = DataLoader(data, batch_size=options.batch, collate_fn=default_data_collator)
    model.eval()
    plugin = RobustQ(model, {})

    def predict(model, batch):
        return model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]

    def accuracy(hits):
        return {"accuracy": float(torch.cat(hits).float().mean())}

    def timed(run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def evaluate() -> None:
        with torch.no_grad():
            accuracy([predict(model, batch) for batch in loader])

    settings = parse_settings(options.settings)
    evaluate()
    pairs = [
        (timed(evaluate), timed(lambda: sweep(plugin, loader, predict, accuracy, settings)))
        for _ in range(options.repeats)
    ]
    plain, swept = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    quotient = statistics.median(pair[1] / pair[0] for pair in pairs)
    print(f"{options.model}, {len(data)} images, k = {len(settings)} weight-only settings")
    print(
        f"plain evaluation {plain:.2f} s, sweep {swept:.2f} s: "
        f"{quotient:.2f} evaluations (k + {quotient - len(settings):.2f})"
    )


if __name__ == "__main__":
    main()
