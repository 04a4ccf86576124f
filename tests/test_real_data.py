"""The given CIFAR-10 ResNet-20 under the sweep, against figures measured with an independent script."""

import json
import os

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, TrainingArguments, default_data_collator

from hf_robustq import RobustQ, RobustTrainer, from_pretrained, sweep
from hf_robustq.data import image_datasets, load_image_splits
from hf_robustq.metrics import compute_accuracy
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


SETTINGS = ["w8", "w6", "w4", "w3", "w8a8", "w6a6", "w4a4", "w3a3"]
IMAGES = int(os.environ.get("HF_ROBUSTQ_IMAGES", "1000"))


def test_a_loaded_folder_has_the_accuracies_of_the_sweep_that_wrote_its_card(data_folder, tmp_path):
    """To the last digit, on the first `HF_ROBUSTQ_IMAGES` test images (10000 are all of them)."""
    splits = load_image_splits(str(data_folder / "cifar10"))
    model, _ = image_classifier("resnet20_cifar", splits[-1])
    load_weights(model, data_folder / "weights" / "resnet20-12fca82f.safetensors")
    splits = (splits[0].select(range(1000)), splits[1].select(range(IMAGES)), *splits[2:])
    train, test = image_datasets(*splits, **preprocessing(model))
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True, per_device_eval_batch_size=250, disable_tqdm=True
    )
    trainer = RobustTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=test, compute_metrics=compute_accuracy,
        robustq={"weights": {"bits": 4}, "activations": {"bits": 8}}, sweep=["trained", *SETTINGS],
    )  # fmt: skip
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "model"))
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    last = json.loads((tmp_path / "run" / "robustq_sweep.json").read_text())["sweeps"][-1]
    rows = {row["setting"]: row["metrics"]["accuracy"] for row in last["rows"]}
    print(rows)
    batches = list(DataLoader(test, batch_size=250, collate_fn=default_data_collator))
    for setting in ["trained", *SETTINGS]:
        weights, _, inputs = setting.removeprefix("w").partition("a")
        bits = (
            {} if setting == "trained" else {"bits": int(weights), "activation_bits": int(inputs) if inputs else None}
        )
        loaded = from_pretrained(AutoModelForImageClassification, tmp_path / "model", **bits).eval()
        with torch.no_grad():
            hits = [loaded(pixel_values=b["pixel_values"]).logits.argmax(-1) == b["labels"] for b in batches]
        assert float(torch.cat(hits).double().mean()) == rows[setting], setting
        assert f"{100 * rows[setting]:.2f}" in card
