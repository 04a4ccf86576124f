"""Images with boxes around their objects, as an image processor makes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_robustq.data.labels import check_filled, outputs_of
from hf_robustq.data.pictures import picture, undecoded
from hf_robustq.data.splits import load_splits, pick

if TYPE_CHECKING:
    import datasets

CATEGORIES = ("category", "category_id", "label", "labels")


def box_splits(
    name_or_folder: str,
    known: Sequence[str],
    *,
    image: str | None = None,
    objects: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset", dict[int, int]]:
    """(train, eval, the model's output of each category) with the columns image, objects and image_id.

    known: the names of the outputs.

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
    fields = _fields(features[objects])
    category = next((name for name in CATEGORIES if name in fields), None)
    if category is None:
        raise ValueError(f"{objects} has no {CATEGORIES[0]} beside its bbox: name the class of each object so")
    check_filled(both, {"--image_column_name": image, "--label_column_name": objects})
    kind = getattr(fields[category], "feature", fields[category])
    names = getattr(kind, "names", None) or [str(i) for i in range(len(known))]
    outputs = dict(enumerate(outputs_of(f"{objects}.{category}", names, known)))

    def numbered(split: "datasets.Dataset") -> "datasets.Dataset":
        kept = undecoded(split.select_columns([image, objects]), image)
        kept = kept.rename_columns({image: "image", objects: "objects"})
        return kept.add_column("image_id", list(range(len(kept))))

    return numbered(both[0]), numbered(both[1]), outputs


def _fields(kind: Any) -> dict[str, Any]:
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return inner if isinstance(inner, dict) else {}


@dataclass
class BoxCollator:
    """Batches of the rows of `box_splits`, as `processor` makes them, with the columns in `accepted`.

    outputs: of each category the model's, as `box_splits` returns them.
    """

    processor: Any
    outputs: Mapping[int, int]
    accepted: Sequence[str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images = [picture(row["image"], row["image_id"]) for row in rows]
        annotations = [{"image_id": row["image_id"], "annotations": self._annotations(**row)} for row in rows]
        made = self.processor(images=images, annotations=annotations, return_tensors="pt")
        return {key: value for key, value in made.items() if key in self.accepted}

    def _annotations(self, objects: Any, image_id: int, **_: Any) -> list[dict[str, Any]]:
        if isinstance(objects, Mapping):
            objects = [dict(zip(objects, one, strict=True)) for one in zip(*objects.values(), strict=True)]
        found = []
        for one in objects:
            category = next(one[key] for key in CATEGORIES if key in one)
            if category not in self.outputs or len(one["bbox"] or ()) != 4:
                raise ValueError(
                    f"row {image_id} has an object of category {category!r} in a bbox {one['bbox']}: categories are 0 "
                    f"to {len(self.outputs) - 1}, and a bbox has four numbers: mend the row, or choose another "
                    "--label_column_name"
                )
            area = one.get("area") or one["bbox"][2] * one["bbox"][3]
            found.append(
                {
                    "bbox": one["bbox"],
                    "category_id": self.outputs[category],
                    "area": area,
                    "iscrowd": one.get("iscrowd", 0),
                }
            )
        return found
