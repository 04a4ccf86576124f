"""The labels of a dataset as the outputs of a model; rows that have none."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def class_numbers(dataset: "datasets.Dataset", label: str) -> Tensor:
    """int64 [N]. Raises `ValueError` for a row without a label."""
    check_filled([dataset], {"--label_column_name": label})
    return torch.tensor(dataset.with_format(None)[label][:], dtype=torch.int64)


def check_filled(splits: Sequence["datasets.Dataset"], columns: Mapping[str, str]) -> None:
    """Raise `ValueError` for a row without a value in one of the columns, each under the flag that names it."""
    import pyarrow.compute as pc

    for split in splits:
        for flag, column in columns.items():
            table: Any = split.with_format("arrow").select_columns([column])[:]
            values = table.column(column)
            if values.null_count:
                row = pc.index(pc.is_null(values), True).as_py()  # type: ignore[attr-defined]
                raise ValueError(
                    f"row {row} of {title(split)} has no {column} ({values.null_count} such rows): leave them out, or "
                    f"name another column with {flag}"
                )


def title(split: "datasets.Dataset") -> str:
    return f"the {split.split} split" if split.split else "the dataset"


def output_names(model: Any) -> list[str]:
    """The names of a model's outputs, in their order."""
    return [name for _, name in sorted(model.config.id2label.items())]


def generic(names: Sequence[str]) -> bool:
    """Whether these are transformers' names of outputs that nobody has named."""
    return all(name == f"LABEL_{i}" for i, name in enumerate(names))


def folded(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def outputs_of(column: str, names: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each class of a dataset the output of the model, found by name: as written, else without case, - and _.

    names: of the dataset's classes; "0", "1", ... where it only has numbers. known: of the model's outputs.
    By number where only one side has names, or where no name is shared; both are said. Raises `ValueError` for more
    classes than outputs, and for names of which only some are the model's.
    """
    both = f"the labels of {column} ({some(names)}) and the model's ({some(known)})"
    remedy = "choose the dataset it was trained on or another --label_column_name, or mend id2label in its config.json"
    if len(names) > len(known):
        counts = f"the model has {len(known)} outputs but the dataset has {len(names)} labels"
        raise ValueError(f"{counts}: {some(known)}, but {some(names)} in {column}; {remedy}")
    by_number = list(range(len(names)))
    numbers = list(names) == [str(i) for i in by_number]
    ours, theirs = list(names), list(known)
    for fold in (str, folded):
        ours, theirs = [fold(name) for name in names], [fold(name) for name in known]
        if ours == theirs[: len(ours)]:
            return by_number
        mine, counts = Counter(ours), Counter(theirs)
        if not numbers and all(mine[name] == counts[name] == 1 for name in ours):
            outputs = [theirs.index(name) for name in ours]
            found = some([f"{name} is output {output}" for name, output in zip(names, outputs, strict=True)])
            logger.warning("the labels of %s are matched with the model's by name: %s", column, found)
            return outputs
    if numbers or generic(known):
        if len(names) < len(known) or not generic(known):
            logger.warning("%s are matched by number", both)
        return by_number
    elsewhere = any(name in theirs and theirs[i] != name for i, name in enumerate(ours))
    if elsewhere or len(names) < len(known):
        raise ValueError(f"{both} cannot be matched by name: {remedy}")
    logger.warning("%s differ, and are matched by number: a wrong order makes every figure wrong", both)
    return by_number


def some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:6])) + (f", ... {len(names)} in all" if len(names) > 6 else "")


def renumbered(
    both: Sequence["datasets.Dataset"], label: str, names: Sequence[str], known: Sequence[str]
) -> list["datasets.Dataset"]:
    """(train, eval) with the numbers of the model's outputs as labels, as `outputs_of` has it.

    Raises `ValueError` for a row whose label is none of `names`; says where all rows of eval have the same one.
    """
    outputs = torch.tensor(outputs_of(label, names, known))
    labels = [class_numbers(split, label) for split in both]
    for split, own in zip(both, labels, strict=True):
        outside = ((own < 0) | (own >= len(names))).nonzero().flatten().tolist()
        if outside:
            raise ValueError(
                f"row {outside[0]} of {title(split)} has {label} {int(own[outside[0]])}, which is outside "
                f"0..{len(names) - 1} ({len(outside)} such rows): leave them out, or choose another --eval_split or "
                "--label_column_name"
            )
    if len(labels[1].unique()) == 1 < min(len(known), len(labels[1])):
        same = names[int(labels[1][0])]
        logger.warning("every row of %s has the label %s: is it labelled? --eval_split chooses", title(both[1]), same)
    if outputs.tolist() == list(range(len(names))):
        return list(both)
    return [
        split.remove_columns(label).add_column(label, outputs[own].tolist())
        for split, own in zip(both, labels, strict=True)
    ]
