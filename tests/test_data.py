"""Image data against PIL, plain integers and torchvision; exact across batches, workers and epochs."""

import math
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from transformers import default_data_collator

import hf_robustq.data.draws as splitmix
from hf_robustq.data import (
    ImageDataset,
    LazyImageDataset,
    decode_images,
    digits,
    find_columns,
    load_image_splits,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INT, CLASS, IMAGE = datasets.Value("int64"), datasets.ClassLabel(names=["cat", "dog"]), datasets.Image()


def noise(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def images(count: int = 50, **options: object) -> ImageDataset:
    pixels = torch.from_numpy(noise(count)).permute(0, 3, 1, 2)
    options = {"padding": 2, "flip": True, "mean": MEAN, "std": STD} | options
    return ImageDataset(pixels, torch.arange(count) % 2, num_labels=2, **options)


def table(count: int = 6, size: int = 8, label: object = CLASS) -> datasets.Dataset:
    features = datasets.Features({"picture": IMAGE, "kind": label})
    pictures = [Image.fromarray(pixels) for pixels in noise(count, size)]
    rows = {"picture": pictures, "kind": [index % 2 for index in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


def lazy(**options: object) -> LazyImageDataset:
    options = {"num_labels": 2, "image_size": 16, "mean": MEAN, "std": STD} | options
    return LazyImageDataset(table(size=40), "picture", "kind", **options)


def stacked(dataset: object, indices: range | list[int]) -> torch.Tensor:
    return torch.stack([dataset[index]["pixel_values"] for index in indices])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_import_is_light() -> None:
    package = Path(splitmix.__file__).parents[1]
    code = f"""
import sys, types
parent = types.ModuleType("hf_robustq")  # without the package's own imports
parent.__path__ = [{str(package)!r}]
sys.modules["hf_robustq"] = parent
import hf_robustq.data, hf_robustq.metrics
print(sorted({{"timm", "datasets", "evaluate", "sklearn", "torchvision"}} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- draws


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 7), (-1, 2**40)])
def test_draws_are_splitmix64(seed: int, epoch: int) -> None:
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    for row, index in zip(splitmix.draws(seed, epoch, [0, 3, 10**9], 2), [0, 3, 10**9], strict=True):
        state = 0
        for word in (seed, epoch, index):
            state = mix(((state ^ (word & mask)) + gamma) & mask)
        assert row.tolist() == [mix((state + k * gamma) & mask) for k in (1, 2)]


def test_splitmix64_known_outputs() -> None:
    # Seed 1234567 of Rosetta Code, "Pseudo-random numbers/Splitmix64".
    state = np.array([1234567], np.uint64)
    outputs = [int(splitmix._mix(state + np.array([k * splitmix.GAMMA % 2**64], np.uint64))[0]) for k in (1, 2)]
    assert outputs == [6457827717110365317, 3203168211198807973]


def test_draws_are_uniform_and_independent() -> None:
    count, padding = 40_000, 4
    dataset = ImageDataset(
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8).expand(count, -1, -1, -1),
        torch.zeros(count, dtype=torch.int64),
        num_labels=1,
        mean=MEAN,
        std=STD,
        padding=padding,
        flip=True,
    )
    top, left, flip = dataset.augmentation(torch.arange(count))
    dataset.set_epoch(1)
    later_top, _, later_flip = dataset.augmentation(torch.arange(count))
    cells = (2 * padding + 1) ** 2
    for rows, columns in ((top, left), (top, later_top)):
        observed = torch.bincount(rows * (2 * padding + 1) + columns, minlength=cells).double()
        chi_squared = ((observed - count / cells) ** 2 / (count / cells)).sum()
        # Chi-squared has mean cells - 1 and variance 2 (cells - 1): five standard deviations.
        assert abs(chi_squared - (cells - 1)) < 5 * math.sqrt(2 * (cells - 1))
    for heads in (flip, flip ^ later_flip, flip ^ (top % 2 == 0), flip[1:] ^ flip[:-1]):
        # A fair coin stays fair under exclusive or with anything independent of it.
        assert abs(heads.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(count)


# --- ImageDataset


def test_augmentation_is_pil_pad_crop_mirror() -> None:
    dataset = images()
    top, left, flip = dataset.augmentation(torch.arange(50))
    assert len(set(flip.tolist())) == 2
    for index, pixels in enumerate(noise(50)):
        padded = ImageOps.expand(Image.fromarray(pixels), border=2, fill=0)
        x, y = int(left[index]), int(top[index])
        cut = padded.crop((x, y, x + 8, y + 8))
        cut = ImageOps.mirror(cut) if flip[index] else cut
        expected = (np.asarray(cut, np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
        torch.testing.assert_close(
            dataset[index]["pixel_values"], torch.from_numpy(expected.transpose(2, 0, 1)), rtol=0, atol=1e-6
        )


def test_pixels_are_torchvisions() -> None:
    from torchvision.transforms import v2

    expected = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    for index, pixels in enumerate(noise(50)):
        actual = images().evaluation()[index]["pixel_values"]
        torch.testing.assert_close(actual, expected(Image.fromarray(pixels)), rtol=0, atol=1e-6)


def test_batches_do_not_matter() -> None:
    dataset = images()
    one_by_one = stacked(dataset, range(50))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    for size in (1, 7, 50):
        for start in range(0, 50, size):
            indices = order[start : start + size]
            batch = default_data_collator(dataset.__getitems__(indices))
            assert torch.equal(batch["pixel_values"], one_by_one[indices])
            assert torch.equal(batch["labels"], torch.tensor(indices) % 2)
            assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_workers_follow_the_epoch(context: str) -> None:
    dataset = images(20)
    alone = DataLoader(dataset, batch_size=6)
    workers = DataLoader(dataset, batch_size=6, num_workers=2, persistent_workers=True, multiprocessing_context=context)
    epochs = []
    for epoch in (0, 3, 0):
        dataset.set_epoch(epoch)
        epochs.append(torch.cat([batch["pixel_values"] for batch in workers]))
        assert torch.equal(epochs[-1], torch.cat([batch["pixel_values"] for batch in alone]))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_seed_matters_and_the_global_generator_does_not() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = stacked(images(), range(50))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(stacked(images(), range(50)), first)
    assert not torch.equal(stacked(images(seed=1), range(50)), first)


def test_select_keeps_the_original_draws_and_its_own_epoch() -> None:
    whole = images()
    whole.set_epoch(5)
    part = whole.select([40, 3, 7]).select([2, 0])
    assert torch.equal(stacked(part, range(2)), stacked(whole, [7, 40]))
    assert part._images is whole._images
    before = stacked(part, range(2))
    whole.set_epoch(6)
    assert torch.equal(stacked(part, range(2)), before)


def test_evaluation_is_a_view_without_augmentation() -> None:
    train = images()
    plain = train.evaluation()
    assert plain._images is train._images
    assert torch.equal(stacked(plain, range(50)), stacked(images(padding=0, flip=False), range(50)))
    assert not torch.equal(stacked(train, range(50)), stacked(plain, range(50)))


def test_iteration_ends() -> None:
    assert sum(1 for _ in images(5)) == len(images(5)) == 5


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1], "3 images but 2 labels"), ([0, 2, 1], "label 2"), ([-1, 0, 1], "label -1")],
)
def test_bad_labels(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor(labels), num_labels=2, mean=MEAN, std=STD)


# --- decoding


def test_decode() -> None:
    pixels, labels = decode_images(table(), "picture", "kind")
    assert torch.equal(pixels, torch.from_numpy(noise(6)).permute(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_decode_resizes_and_converts_grey() -> None:
    grey = noise(1, 12)[0, :, :, 0]
    rows = {"picture": [Image.fromarray(grey)], "kind": [1]}
    dataset = datasets.Dataset.from_dict(rows, features=table().features)
    pixels, _ = decode_images(dataset, "picture", "kind", image_size=6)
    expected = np.asarray(Image.fromarray(grey).resize((6, 6), Image.Resampling.BILINEAR))
    assert all(np.array_equal(channel, expected) for channel in pixels[0].numpy())


def test_decode_refuses_mixed_sizes() -> None:
    mixed = datasets.concatenate_datasets([table(), table(size=9)])
    with pytest.raises(ValueError, match="image 6 is 9x9 but the first is 8x8: give an image size"):
        decode_images(mixed, "picture", "kind")


# --- LazyImageDataset


def test_lazy_evaluation_is_resize_and_center_crop() -> None:
    dataset = lazy().evaluation()
    for index, pixels in enumerate(noise(6, 40)):
        resized = Image.fromarray(pixels).resize((18, 18), Image.Resampling.BILINEAR)  # 18 = int(16 / 0.875)
        cut = np.asarray(resized, np.float32)[1:17, 1:17] / np.float32(255)
        expected = (cut - np.float32(MEAN)) / np.float32(STD)
        item = dataset[index]
        torch.testing.assert_close(
            item["pixel_values"], torch.from_numpy(expected.transpose(2, 0, 1)), rtol=0, atol=1e-6
        )
        assert item["labels"] == index % 2


def test_lazy_training_depends_on_seed_epoch_and_index_alone() -> None:
    dataset = lazy()
    state = torch.random.get_rng_state()
    first = stacked(dataset, range(6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (6, 3, 16, 16)
    assert torch.equal(stacked(dataset, list(reversed(range(6)))).flip(0), first)
    assert torch.equal(stacked(dataset.select([4, 2]), range(2)), first[[4, 2]])
    assert not torch.equal(stacked(lazy(seed=1), range(6)), first)
    dataset.set_epoch(1)
    assert not torch.equal(stacked(dataset, range(6)), first)
    dataset.set_epoch(0)
    assert torch.equal(stacked(dataset, range(6)), first)


def test_lazy_workers_agree() -> None:
    dataset = lazy()
    workers = DataLoader(dataset, batch_size=2, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in workers]), stacked(dataset, range(6)))


def test_lazy_checks_labels_and_interpolation() -> None:
    with pytest.raises(ValueError, match=r"label 1 is outside 0\.\.0"):
        lazy(num_labels=1)
    with pytest.raises(ValueError, match="spline"):
        lazy(interpolation="spline")


# --- columns and splits


def test_find_columns_by_type() -> None:
    assert find_columns({"id": INT, "img": IMAGE, "y": CLASS}) == ("img", "y")
    assert find_columns({"img": IMAGE, "name": datasets.Value("string"), "y": INT}) == ("img", "y")
    assert find_columns({"a": IMAGE, "b": IMAGE, "y": CLASS, "z": CLASS}, "b", "z") == ("b", "z")


@pytest.mark.parametrize(
    ("features", "named", "message"),
    [
        ({"y": CLASS}, (None, None), r"0 columns have type Image.*--image_column_name of y \(ClassLabel\)"),
        ({"a": IMAGE, "b": IMAGE, "y": CLASS}, (None, None), r"2 columns have type Image"),
        ({"a": IMAGE}, (None, None), r"--label_column_name of a \(Image\)"),
        (
            {"a": IMAGE, "y": INT, "z": INT},
            (None, None),
            r"2 columns have type ClassLabel or integer.*y \(int64\)",
        ),
        ({"a": IMAGE, "y": CLASS}, ("x", None), r"--image_column_name x is not a column of type Image"),
        ({"a": IMAGE, "y": CLASS}, ("y", None), r"--image_column_name y is not a column of type Image"),
        ({"a": IMAGE, "y": CLASS}, (None, "a"), r"--label_column_name a is not a column"),
    ],
)
def test_find_columns_errors(features: dict, named: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_columns(features, *named)


def test_parquet_folder(tmp_path: Path) -> None:
    table(6).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    table(4).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    train, evaluation, image, label, labels = load_image_splits(str(tmp_path / "data"))
    assert (len(train), len(evaluation), image, label, labels) == (6, 4, "picture", "kind", ["cat", "dog"])
    with pytest.raises(ValueError, match="no split 'dev': choose with --eval_split from train, test"):
        load_image_splits(str(tmp_path / "data"), eval_split="dev")
    with pytest.raises(ValueError, match="no split 'all': choose with --train_split from train, test"):
        load_image_splits(str(tmp_path / "data"), train_split="all")


def test_integer_labels_are_named_by_their_value(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        table(label=INT).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert load_image_splits(str(tmp_path / "data"))[-1] == ["0", "1"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_image_folder(tmp_path: Path, split: str) -> None:
    for index, pixels in enumerate(noise(8)):
        folder = tmp_path / "data" / ("train" if index < 6 else split) / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    train, evaluation, image, label, labels = load_image_splits(str(tmp_path / "data"))
    assert (len(train), len(evaluation), image, label, labels) == (6, 2, "image", "label", ["cat", "dog"])
    pixels, classes = decode_images(train, image, label)
    for row, kind in zip(pixels.permute(0, 2, 3, 1).numpy(), classes.tolist(), strict=True):
        index = next(i for i, original in enumerate(noise(8)) if np.array_equal(original, row))
        assert kind == index % 2


def test_no_evaluation_split(tmp_path: Path) -> None:
    table().to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="none of the splits validation, valid, test.*--eval_split from train"):
        load_image_splits(str(tmp_path / "data"))


# --- digits


def test_digits() -> None:
    from sklearn.datasets import load_digits

    train, test, labels = digits()
    assert (len(train), len(test), labels) == (1437, 360, list("0123456789"))
    assert not set(train._indices.tolist()) & set(test._indices.tolist())
    everyone = np.bincount(load_digits().target)
    counts = np.bincount([item["labels"] for item in test])
    assert np.abs(counts - everyone * 360 / 1797).max() < 1
    for position in (0, 100, 359):
        ink = load_digits().images[int(test._indices[position])] * (255 / 16)
        enlarged = Image.fromarray(ink.astype(np.float32)).resize((32, 32), Image.Resampling.BILINEAR)
        pixels = test[position]["pixel_values"] * 0.5 + 0.5
        assert np.abs(pixels.numpy() * 255 - np.asarray(enlarged)).max() <= 0.5 + 1e-3
    assert digits(image_size=16)[0][0]["pixel_values"].shape == (3, 16, 16)
