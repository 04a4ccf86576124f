"""Images with boxes around their objects, as an image processor makes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_robustq.data.splits import load_splits, pick

if TYPE_CHECKING:
    import datasets

CATEGORIES = ("category", "category_id", "label", "labels")


def box_splits(
    name_or_folder: str,
    *,
    image: str | None = None,
    objects: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval) with the columns image, objects and image_id.

    objects: by default the one column with a `bbox` in it: [x, y, width, height] in pixels, as COCO has them, with
    their `category` (or category_id, label), a number.
    """
    import datasets

    both = load_splits(name_or_folder, None, train_split, eval_split)
    features = both[0].features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    boxed = [name for name, kind in features.items() if "bbox" in _fields(kind)]
    image = pick(features, "--image_column_name", image, "Image", images)
    objects = pick(features, "--label_column_name", objects, "objects with a bbox", boxed)
    if not _fields(features[objects]) & {*CATEGORIES}:
        raise ValueError(f"{objects} has no {CATEGORIES[0]} beside its bbox: name the class of each object so")

    def numbered(split: "datasets.Dataset") -> "datasets.Dataset":
        kept = split.select_columns([image, objects]).rename_columns({image: "image", objects: "objects"})
        return kept.add_column("image_id", list(range(len(kept))))

    return numbered(both[0]), numbered(both[1])


def _fields(kind: Any) -> set[str]:
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return set(inner) if isinstance(inner, dict) else set()


@dataclass
class BoxCollator:
    """Batches of the rows of `box_splits`, as `processor` makes them, with the columns in `accepted`."""

    processor: Any
    classes: int
    accepted: Sequence[str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images = [row["image"].convert("RGB") for row in rows]
        annotations = [{"image_id": row["image_id"], "annotations": self._annotations(row["objects"])} for row in rows]
        made = self.processor(images=images, annotations=annotations, return_tensors="pt")
        return {key: value for key, value in made.items() if key in self.accepted}

    def _annotations(self, objects: Any) -> list[dict[str, Any]]:
        if isinstance(objects, Mapping):
            objects = [dict(zip(objects, one, strict=True)) for one in zip(*objects.values(), strict=True)]
        found = []
        for one in objects:
            category = next(one[key] for key in CATEGORIES if key in one)
            if category not in range(self.classes):
                raise ValueError(f"an object has category {category!r}, and the model has 0 to {self.classes - 1}")
            area = one.get("area") or one["bbox"][2] * one["bbox"][3]
            found.append({"bbox": one["bbox"], "category_id": category, "area": area, "iscrowd": one.get("iscrowd", 0)})
        return found
