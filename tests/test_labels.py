"""The labels of a dataset as the outputs of a model, whatever their order; rows without one."""

import json
import logging
import re

import datasets
import numpy as np
import pytest
import torch

from hf_robustq.cli import main
from hf_robustq.data.labels import outputs_of
from tests.test_cli_tasks import INTEGER, SIZES, SMALL, bert, drawn, mine, saved, speech_model, swept, tokenizer

__all__ = ["mine", "tokenizer"]  # fixtures

CLASSES = datasets.ClassLabel(names=["neg", "pos"])
OTHER_ORDER = {"id2label": {0: "POS", 1: "NEG"}, "label2id": {"POS": 0, "NEG": 1}}
GIVEN = {0: "pos", 1: "neg"}


@pytest.mark.parametrize(
    ("names", "known", "outputs", "said"),
    [
        (["a", "b"], ["a", "b", "c"], [0, 1], None),
        (["a", "b"], ["c", "B", "A"], [2, 1], "matched with the model's by name: a is output 2, b is output 1"),
        (["Not_A", "is a"], ["is-a", "not a"], [1, 0], "by name"),
        (["a", "A"], ["A", "a"], [1, 0], "by name"),
        (["crane", "owl", "crane"], ["crane", "owl", "crane"], [0, 1, 2], None),
        (["a", "b"], ["LABEL_0", "LABEL_1"], [0, 1], None),
        (["a", "b"], ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1], r"the labels of y \(a, b\) and the model's .* number"),
        (["0", "1"], ["LABEL_0", "LABEL_1"], [0, 1], None),
        (["0", "1"], ["pos", "neg"], [0, 1], r"the labels of y \(0, 1\) and the model's \(pos, neg\).* by number"),
        (["0", "1"], ["1", "0"], [0, 1], "by number"),
        (["n1", "n2"], ["tench", "goldfish"], [0, 1], r"\(n1, n2\) and the model's \(tench, goldfish\) differ"),
        (["n1", "b"], ["tench", "b"], [0, 1], "differ"),
    ],
)
def test_labels_are_matched_by_name(names, known, outputs, said, caplog):
    assert outputs_of("y", names, known) == outputs
    assert re.search(said, caplog.text) if said else not caplog.text


@pytest.mark.parametrize(
    ("names", "known", "why"),
    [
        (["a", "b", "c"], ["a", "b"], r"has 2 outputs but the dataset has 3 labels: a, b, but a, b, c in y; choose"),
        (["a", "b", "c"], ["LABEL_0", "LABEL_1"], "has 2 outputs but the dataset has 3 labels"),
        (["a", "b"], ["b", "c"], r"\(a, b\) and the model's \(b, c\) cannot be matched by name: choose"),
        (["a", "b"], ["c", "d", "e"], "cannot be matched by name"),
        (["owl", "crane", "crane"], ["crane", "owl", "crane"], "cannot be matched"),
    ],
)
def test_labels_that_cannot_be_matched_are_refused(names, known, why):
    with pytest.raises(ValueError, match=why):
        outputs_of("y", names, known)


def balanced(model, head, logits):
    """So that a random model says both."""
    with torch.no_grad():
        head.bias[0] -= (logits()[:, 0] - logits()[:, 1]).quantile(0.5)
    return [GIVEN[one] for one in logits().argmax(-1).tolist()]


def kept(folder):
    """The model's own labels are still there."""
    assert json.loads((folder / "model" / "config.json").read_text())["id2label"] == {"0": "POS", "1": "NEG"}


@torch.no_grad()
def test_texts(tokenizer, tmp_path, caplog):
    model = bert("SequenceClassification", **OTHER_ORDER)
    texts = [" ".join(text) for text in drawn(16, 5, 9)]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    said = balanced(model, model.classifier, lambda: model(**encoded).logits)
    features = datasets.Features({"text": datasets.Value("string"), "label": CLASSES})
    both = datasets.Dataset.from_dict({"text": texts, "label": said}, features=features)
    found = swept(tmp_path, saved(tmp_path, model, tokenizer, train=both, validation=both))
    assert found["fp"]["accuracy"] == 1 and len({*said}) == 2
    assert "the labels of label are matched with the model's by name: neg is output 1, pos is output 0" in caplog.text
    kept(tmp_path)


@pytest.mark.parametrize(("channels", "size"), [(3, 16), (1, 16), (3, 80)], ids=["colour", "grey", "large"])
@torch.no_grad()
def test_images(channels, size, tmp_path, caplog):
    """A model of one channel reads grey images, with the mean of ImageNet's statistics."""
    from transformers import ViTConfig, ViTForImageClassification

    from hf_robustq.cli.sweep import add_arguments
    from hf_robustq.cli.tasks import load_task

    torch.manual_seed(0)
    config = ViTConfig(image_size=size, patch_size=8, num_channels=channels, **SIZES, **OTHER_ORDER)
    model = ViTForImageClassification(config).eval()
    whole = size if size < 64 else int(size / 0.875)
    pixels = np.random.default_rng(0).integers(0, 256, (16, whole, whole, 3)[: 4 if channels == 3 else 3], np.uint8)
    inputs = torch.from_numpy(pixels).float().view(16, whole, whole, channels) / 255
    mean, std = (torch.tensor(one) for one in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    inputs = (inputs - mean) / std if channels == 3 else (inputs - mean.mean()) / std.mean()
    inputs = inputs.permute(0, 3, 1, 2)
    cut = (whole - size + 1) // 2
    inputs = inputs[..., cut : cut + size, cut : cut + size]
    said = balanced(model, model.classifier, lambda: model(inputs).logits)
    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    both = datasets.Dataset.from_dict({"image": list(pixels), "label": said}, features=features)
    command = saved(tmp_path, model, train=both, validation=both)
    assert swept(tmp_path, command)["fp"]["accuracy"] == 1 and len({*said}) == 2
    assert "neg is output 1, pos is output 0" in caplog.text
    kept(tmp_path)
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([*command, "--out", "none", *SMALL])
    args.eval_split = "validation"
    assert load_task(command[0], args).model.config.id2label == OTHER_ORDER["id2label"]


@torch.no_grad()
def test_tags(tokenizer, tmp_path, caplog):
    model = bert("TokenClassification", **OTHER_ORDER)
    texts = drawn(12, 3, 9)

    def logits():
        return torch.cat([model(**tokenizer(" ".join(one), return_tensors="pt")).logits[0, 1:-1] for one in texts])

    said = balanced(model, model.classifier, logits)
    ends = np.cumsum([len(one) for one in texts])
    tags = [said[end - len(one) : end] for one, end in zip(texts, ends, strict=True)]
    features = datasets.Features({"words": datasets.List(datasets.Value("string")), "tags": datasets.List(CLASSES)})
    both = datasets.Dataset.from_dict({"words": texts, "tags": tags}, features=features)
    command = saved(tmp_path, model, tokenizer, train=both, validation=both)
    assert swept(tmp_path, command)["fp"]["accuracy"] == 1 and len({*said}) == 2
    assert "the labels of tags are matched with the model's by name: neg is output 1" in caplog.text
    for split in ("train", "validation"):  # as texts, in other letters
        (tmp_path / "data" / f"{split}.parquet").unlink()
    command = saved(
        tmp_path, model, tokenizer, train={"words": texts, "tags": tags}, validation={"words": texts, "tags": tags}
    )
    flags = ["--text_column_name", "words", "--label_column_name", "tags", "--out", str(tmp_path / "texts")]
    main(["sweep", *command, *SMALL, *flags])
    assert json.loads((tmp_path / "texts" / "rows.json").read_text())["rows"][0]["accuracy"] == 1
    kept(tmp_path)


def test_sounds(tmp_path, mine, caplog):
    model, processor = speech_model("SequenceClassification", tmp_path)
    model.config.id2label = {0: "other", 1: "pos", 2: "neg"}
    sounds = [np.random.default_rng(i).normal(size=700).tolist() for i in range(8)]
    features = datasets.Features({"sound": datasets.List(datasets.Value("float32")), "label": CLASSES})
    both = datasets.Dataset.from_dict({"sound": sounds, "label": [0, 1] * 4}, features=features)
    found = swept(tmp_path, saved(tmp_path, model, processor, train=both, validation=both), *mine("mean"))
    assert found["fp"]["labels"] == 4 * (2 + 1) and "neg is output 2, pos is output 1" in caplog.text


def detector():
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    sizes = {"image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 5, **SIZES}
    model = YolosForObjectDetection(YolosConfig(id2label={0: "N/A", 1: "pos", 2: "neg", 3: "N/A"}, **sizes)).eval()
    return model, YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 48})


def pictured(category, **broken):
    """Eight images with an object of each class."""
    images = list(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8))
    objects = [{"bbox": [[1.0, 2.0, 10.0, 8.0]] * 2, "category": [0, 1]} for _ in images]
    kind = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(category)}
    features = datasets.Features({"picture": datasets.Image(), "objects": kind})
    columns = {"picture": images, "objects": objects}
    for name, value in broken.items():
        columns[name][5] = value
    return datasets.Dataset.from_dict(columns, features=features)


def test_objects(tmp_path, caplog):
    from hf_robustq.data.boxes import BoxCollator, box_splits
    from hf_robustq.data.labels import output_names

    model, processor = detector()
    command = saved(tmp_path, model, processor, train=pictured(CLASSES), validation=pictured(CLASSES))
    train, _, outputs = box_splits(command[-1], output_names(model))
    assert outputs == {0: 2, 1: 1} and "neg is output 2, pos is output 1" in caplog.text
    collator = BoxCollator(processor, outputs, ["pixel_values", "labels"])
    assert collator([train[3]])["labels"][0]["class_labels"].tolist() == [2, 1]


def test_what_is_wrong_with_objects_names_their_row(tmp_path):
    from hf_robustq.data.boxes import BoxCollator, box_splits

    for number, (broken, why) in enumerate(
        [
            ({"picture": {"bytes": b"none", "path": "five.png"}}, r"image of row 5 \(five.png\) cannot be read"),
            ({"objects": {"bbox": [[1.0] * 4], "category": [7]}}, "row 5 has an object of category 7"),
            ({"objects": {"bbox": [[1.0] * 3], "category": [1]}}, r"row 5 .* in a bbox \[1.0, 1.0, 1.0\]"),
            ({"objects": {"bbox": [None], "category": [1]}}, "row 5 .* in a bbox None"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        model, processor = detector()
        data = pictured(INTEGER, **broken)
        command = saved(folder, model, processor, train=data, validation=data)
        train, _, outputs = box_splits(command[-1], ["a", "b", "c"])
        with pytest.raises(ValueError, match=why):
            BoxCollator(processor, outputs, ["pixel_values", "labels"])([train[5]])


@pytest.mark.parametrize(
    ("train", "validation", "why"),
    [
        ([0, 1] * 4, [0, 1, None, 1], "row 2 of the validation split has no label .1 such rows.*--label_column_name"),
        ([0, None] * 4, [0, 1] * 4, "row 1 of the train split has no label .4 such rows"),
        (
            [0, 1] * 4,
            [-1] * 8,
            "row 0 of the validation split has label -1, which is outside 0..1 .8 .*--eval_split",
        ),
        ([0, 1] * 4, [0, 1, 5, 6], "row 2 of the validation split has label 5, which is outside 0..1 .2 such rows"),
        ([-1] * 8, [0, 1] * 4, "the largest label of the train split is -1: .*--label_column_name"),
        ([0, 2] * 4, [0, 1] * 4, "the model has 2 outputs but the dataset has 3 labels"),
        ([0, 10**9] * 4, [0, 1] * 4, "the largest label of the train split is 1000000000: .*--label_column_name"),
    ],
)
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_labels_that_are_none_are_named(kind, train, validation, why, tokenizer, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    columns = [{"label": train}, {"label": validation}]
    features = {"label": INTEGER}
    for one in columns:
        count = len(one["label"])
        one |= {"text": ["w1 w2"] * count} if kind == "texts" else {"image": [np.zeros((8, 8, 3), np.uint8)] * count}
    features |= {"text": datasets.Value("string")} if kind == "texts" else {"image": datasets.Image()}
    splits = [datasets.Dataset.from_dict(one, features=datasets.Features(features)) for one in columns]
    if kind == "texts":
        model, *parts = bert("SequenceClassification"), tokenizer
    else:
        model, *parts = (ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES)),)
    command = saved(tmp_path, model, *parts, train=splits[0], validation=splits[1])
    with pytest.raises(SystemExit, match=why) as info:
        main(["sweep", *command, "--out", str(tmp_path / "out"), *SMALL])
    assert "\n" not in str(info.value)


def test_labels_that_are_all_the_same_are_said(tokenizer, tmp_path, caplog):
    model = bert("SequenceClassification", **OTHER_ORDER)
    texts = [" ".join(text) for text in drawn(8, 5, 9)]
    features = datasets.Features({"text": datasets.Value("string"), "label": CLASSES})
    train, same = (
        datasets.Dataset.from_dict({"text": texts, "label": own}, features=features) for own in ([0, 1] * 4, [0] * 8)
    )
    swept(tmp_path, saved(tmp_path, model, tokenizer, train=train, validation=same))
    assert "every row of the validation split has the label neg: is it labelled? --eval_split chooses" in caplog.text


def test_training_for_other_labels_is_said(tmp_path, caplog):
    from hf_robustq.models import image_classifier

    with caplog.at_level(logging.WARNING):
        image_classifier("test_resnet", ["a", "b", "c"])[0].save_pretrained(tmp_path / "three")
        image_classifier(str(tmp_path / "three"), ["a", "b", "c"])
        assert not caplog.text
        model, _ = image_classifier(str(tmp_path / "three"), ["c", "b", "a"])
    assert model.config.id2label == {0: "c", 1: "b", 2: "a"}
    assert "three has outputs for a, b, c, ...; here they are trained for c, b, a, ..." in caplog.text
