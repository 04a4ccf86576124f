"""The given CIFAR-10 ResNet-20 under the sweep, against figures measured with an independent script."""

import copy
import json

import numpy as np
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


@pytest.fixture(scope="module")
def given(data_folder):
    """given(images): the trained ResNet-20, a few training images, and the first test images."""
    splits = load_image_splits(str(data_folder / "cifar10"))

    def of(train, test):
        model, _ = image_classifier("resnet20_cifar", splits[-1])
        load_weights(model, data_folder / "weights" / "resnet20-12fca82f.safetensors")
        model.to(memory_format=torch.channels_last).eval()
        some = splits[0].select(range(train)), splits[1].select(range(test)), *splits[2:]
        return model, *image_datasets(*some, **preprocessing(model))

    return of


def hits(model, batch):
    return model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]


def batches(dataset):
    return DataLoader(dataset, batch_size=250, collate_fn=default_data_collator)


@pytest.mark.slow
def test_accuracies_of_the_given_resnet20_agree_with_the_independent_ones(given):
    model, _, test = given(2, 10_000)
    assert len(test) == 10_000
    plugin = RobustQ(model, {})

    def top1(found):
        return {"top1": 100 * float(torch.cat(found).float().mean())}

    rows = sweep(plugin, batches(test), hits, top1, INDEPENDENT)
    for setting, expected in INDEPENDENT.items():
        assert rows[setting]["top1"] == pytest.approx(expected, abs=0.02 if setting == "fp" else 0.5), setting


def by_hand(w, bits):
    """`w` on the grid of 2^bits - 1 levels of that step, of 2,000 up to the largest weight's, with the least error."""
    w, last = w.double(), 2 ** (bits - 1) - 1
    steps = torch.linspace(0, float(w.abs().max()) / last, 2001, dtype=torch.double)[1:]
    errors = [float(((w / s).round().clamp(-last, last) * s - w).square().sum()) for s in steps]
    step = steps[int(np.argmin(errors))]
    return ((w / step).round().clamp(-last, last) * step).float()


def test_the_given_resnet20_quantized_by_hand_makes_the_same_predictions(given):
    """The kurtosis of its weights, its accuracy, and every prediction at 4 and 3 bits but a few."""
    model, _, test = given(2, 1000)
    plugin = RobustQ(copy.deepcopy(model), {})
    assert plugin.metrics()["kurtosis"] == pytest.approx(5.1, abs=0.05)
    inner = [site.name for site in plugin.sites]
    found = {}
    for setting, bits in (("fp", None), ("w6", 6), ("w4", 4), ("w3", 3)):
        twin = copy.deepcopy(model)
        for name in inner if bits else ():
            twin.get_parameter(name).data = by_hand(twin.get_parameter(name).data, bits)
        with torch.no_grad():
            found[setting] = torch.cat([hits(twin, batch) for batch in batches(test)])
    assert float(found["fp"].float().mean()) == pytest.approx(0.9173, abs=0.01)
    rows = sweep(plugin, batches(test), hits, lambda own: {"hits": torch.cat(own)}, list(found))
    for (setting, expected), most in zip(found.items(), (0, 0.005, 0.01, 0.03), strict=True):
        assert float((rows[setting]["hits"] != expected).float().mean()) <= most, setting


SETTINGS = ["w8", "w6", "w4", "w3", "w8a8", "w6a6", "w4a4", "w3a3"]


@pytest.mark.parametrize("images", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_loaded_folder_has_the_accuracies_of_the_sweep_that_wrote_its_card(given, tmp_path, images):
    """To the last digit, on the first test images, or on all."""
    model, train, test = given(1000, images)
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
    for setting in ["trained", *SETTINGS]:
        weights, _, inputs = setting.removeprefix("w").partition("a")
        bits = (
            {} if setting == "trained" else {"bits": int(weights), "activation_bits": int(inputs) if inputs else None}
        )
        loaded = from_pretrained(AutoModelForImageClassification, tmp_path / "model", **bits).eval()
        with torch.no_grad():
            found = torch.cat([hits(loaded, batch) for batch in batches(test)])
        assert float(found.double().mean()) == rows[setting], setting
        assert f"{100 * rows[setting]:.2f}" in card
