"""The given CIFAR-10 ResNet-20 under the sweep, against figures measured with an independent script."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_robustq import RobustQ, sweep
from hf_robustq.data import image_datasets, load_image_splits
from hf_robustq.models import image_classifier, load_weights, preprocessing

# Percent top-1 on the 10,000 test images: weights only, per tensor, 2^b - 1 levels, MSE steps, first convolution
# and classifier in float.
INDEPENDENT = {"fp": 91.73, "w8": 91.74, "w6": 91.63, "w5": 90.87, "w4": 87.91}


def test_accuracies_of_the_given_resnet20_agree_with_the_independent_ones(data_folder):
    splits = load_image_splits(str(data_folder / "cifar10"))
    model, _ = image_classifier("resnet20_cifar", splits[-1])
    load_weights(model, data_folder / "weights" / "resnet20-12fca82f.safetensors")
    model.to(memory_format=torch.channels_last).eval()
    _, test = image_datasets(splits[0].select(range(2)), *splits[1:], **preprocessing(model))
    assert len(test) == 10_000
    plugin = RobustQ(model, {})
    assert plugin.metrics()["kurtosis"] == pytest.approx(5.1, abs=0.05)

    def hits(model, batch):
        return model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]

    loader = DataLoader(test, batch_size=500, collate_fn=default_data_collator)
    rows = sweep(
        plugin, loader, hits, lambda found: {"top1": 100 * float(torch.cat(found).float().mean())}, INDEPENDENT
    )
    for setting, expected in INDEPENDENT.items():
        assert rows[setting]["top1"] == pytest.approx(expected, abs=0.02 if setting == "fp" else 0.5), setting
