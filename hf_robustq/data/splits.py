"""Find the train and evaluation split, the image and the label column of any image classification dataset."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_robustq.data.decode import decode_images
from hf_robustq.data.images import ImageDataset
from hf_robustq.data.labels import check_filled, title
from hf_robustq.data.lazy_images import LazyImageDataset
from hf_robustq.data.pictures import picture, undecoded

if TYPE_CHECKING:
    import datasets

IN_MEMORY_SIZE = 64

EVAL_SPLITS = ("validation", "valid", "test")
STRINGS = ("string", "large_string")


def find_columns(features: "datasets.Features", image: str | None = None, label: str | None = None) -> tuple[str, str]:
    """The names of the image column (type Image) and of the label column (ClassLabel, else the one integer).

    `image` and `label` name them instead. Raises ValueError, listing all columns, if a column is missing,
    ambiguous or of another type.
    """
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    return pick(features, "--image_column_name", image, "Image", images), label_column(features, label)


def label_column(features: "datasets.Features", named: str | None) -> str:
    """The one ClassLabel, else the one integer, or the one that is named."""
    import datasets

    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    integers = [name for name, kind in features.items() if _kind(kind).startswith(("int", "uint"))]
    return pick(features, "--label_column_name", named, "ClassLabel or integer", classes, integers)


def text_column(features: "datasets.Features", named: str | None) -> str:
    """The one column of strings, or the one that is named."""
    return pick(features, "--text_column_name", named, "string", of_kinds(features, *STRINGS))


def words_column(features: "datasets.Features", named: str | None) -> str:
    """The one column of lists of strings, or the one that is named."""
    lists = of_kinds(features, *(f"list of {kind}" for kind in STRINGS))
    return pick(features, "--text_column_name", named, "list of string", lists)


def tags_column(features: "datasets.Features", named: str | None, words: str) -> str:
    """The one column of lists of ClassLabels, else of integers or strings besides `words`, or the one that is named."""
    classes = of_kinds(features, "list of ClassLabel")
    others = of_kinds(features, *(f"list of {kind}" for kind in (*STRINGS, "int8", "int16", "int32", "int64")))
    others = [name for name in others if name != words]
    return pick(features, "--label_column_name", named, "list of ClassLabel, integer or string", classes, others)


def of_kinds(features: "datasets.Features", *kinds: str) -> list[str]:
    """The columns of these types, as messages name them."""
    return [name for name, kind in features.items() if _kind(kind) in kinds]


def pick(
    features: "datasets.Features",
    flag: str,
    named: str | None,
    wanted: str,
    preferred: list[str],
    accepted: Sequence[str] = (),
) -> str:
    """The column that is named, else the one of `preferred`, or of `accepted` where there is none of these.

    Raises `ValueError`, listing all columns, for one of another type, and where there is not one.
    """
    columns = ", ".join(f"{name} ({_kind(kind)})" for name, kind in features.items())
    candidates = preferred or accepted
    if named is not None and named not in (*preferred, *accepted):
        raise ValueError(f"{flag} {named} is not a column of type {wanted}: choose from {columns}.")
    if named is None and len(candidates) != 1:
        raise ValueError(f"{len(candidates)} columns have type {wanted}: name one with {flag} of {columns}.")
    return named if named is not None else candidates[0]


def _kind(feature: object) -> str:
    """How messages name a column's type: the dtype of a Value ("int64"), "list of int64", else the class ("Image")."""
    import datasets

    if isinstance(feature, datasets.Value):
        return feature.dtype
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    return f"list of {_kind(inner)}" if inner is not None else type(feature).__name__


def load_splits(
    name_or_folder: str, config_name: str | None, train_split: str, eval_split: str | None
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval) of a hub dataset or a folder; `eval_split` defaults to the first of validation, valid and test."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        splits = datasets.load_dataset(name_or_folder, config_name)
    except (DatasetGenerationError, ValueError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in why:
            raise ValueError(f"{name_or_folder} has an empty split, {why}: leave its file out, or fill it") from error
        raise ValueError(f"{name_or_folder} cannot be read: {why}") from error
    eval_split = eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    for split, flag in ((train_split, "--train_split"), (eval_split, "--eval_split")):
        if split not in splits:
            missing = f"no split {split!r}" if split else f"none of the splits {', '.join(EVAL_SPLITS)}"
            raise ValueError(f"{name_or_folder} has {missing}: choose with {flag} from {', '.join(map(str, splits))}.")
        if not len(splits[split]):
            others = ", ".join(str(name) for name, rows in splits.items() if len(rows)) or "no other"
            raise ValueError(f"{name_or_folder} has no rows in its split {split}: choose with {flag} from {others}")
    return splits[train_split], splits[eval_split]


def load_image_splits(
    name_or_folder: str,
    *,
    config_name: str | None = None,
    image: str | None = None,
    label: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset", str, str, list[str]]:
    """(train, eval, image column, label column, label names) of a hub dataset, a parquet or an image folder.

    `eval_split` defaults to the first of validation, valid and test. Label names are the ClassLabel's, or
    "0", "1", ... up to the largest integer label of the train split.
    Raises ValueError if a split or a column is missing.
    """
    train, evaluation = load_splits(name_or_folder, config_name, train_split, eval_split)
    image, label = find_columns(train.features, image, label)
    find_columns(evaluation.features, image, label)
    check_filled([train, evaluation], {"--image_column_name": image, "--label_column_name": label})
    return train, evaluation, image, label, label_names(train, label)


def label_names(dataset: "datasets.Dataset", label: str) -> list[str]:
    """The ClassLabel's, or "0", "1", ... up to the largest integer."""
    import datasets

    feature = dataset.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    check_filled([dataset], {"--label_column_name": label})
    largest = max(dataset.with_format(None)[label][:])
    if not 0 <= largest < 10**6:
        raise ValueError(f"the largest {label} of {title(dataset)} is {largest}: name classes with --label_column_name")
    return [str(value) for value in range(largest + 1)]


def image_datasets(
    train: "datasets.Dataset",
    evaluation: "datasets.Dataset",
    image: str,
    label: str,
    labels: Sequence[str],
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
    seed: int = 0,
    flip: bool = True,
) -> "tuple[ImageDataset, ImageDataset] | tuple[LazyImageDataset, LazyImageDataset]":
    """(train, eval) of the splits and columns that `load_image_splits` found.

    Up to 64 pixels the images are decoded once and stay in memory, and training shifts them by up to 1/8 of
    their size and, with `flip`, mirrors them; larger ones are decoded on access, with ImageNet's transforms.
    They are RGB where `mean` has three numbers, and grey where it has one.
    """
    how = {"num_labels": len(labels), "mean": mean, "std": std, "seed": seed}
    if image_size > IN_MEMORY_SIZE:
        both = {"image_size": image_size, "interpolation": interpolation, **how}
        lazy, lazy_eval = (LazyImageDataset(split, image, label, **both) for split in (train, evaluation))
        return lazy, lazy_eval.evaluation()
    first = picture(undecoded(train.select(range(1)), image)[0][image], 0).size
    resize = None if first == (image_size, image_size) else image_size
    stored, stored_eval = (decode_images(split, image, label, resize, len(mean)) for split in (train, evaluation))
    return (
        ImageDataset(*stored, padding=image_size // 8, flip=flip, **how),
        ImageDataset(*stored_eval, **how),
    )
