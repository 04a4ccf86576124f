"""Texts as a tokenizer's model takes them: for classification, and for a causal language model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_robustq.data.splits import label_names, load_splits

if TYPE_CHECKING:
    import datasets


def classified_texts(
    name_or_folder: str,
    tokenizer: Any,
    *,
    text: Sequence[str] = (),
    label: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset", list[str]]:
    """(train, eval, label names): tokenized, with the columns the model takes and `labels`.

    `text` names the column, or the two of a pair; by default the one column of strings. `label`: by default the one
    ClassLabel, else the one integer. Raises `ValueError` where that is not one.
    """
    import datasets

    train, evaluation = load_splits(name_or_folder, None, train_split, eval_split)
    text = text or [_only(train, "--text_column_name", "string", _strings(train))]
    classes = [name for name, kind in train.features.items() if isinstance(kind, datasets.ClassLabel)]
    integers = [name for name, kind in train.features.items() if "int" in str(getattr(kind, "dtype", ""))]
    label = label or _only(train, "--label_column_name", "ClassLabel or integer", classes or integers)
    _check(train, [*text, label])

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {**tokenizer(*(rows[column] for column in text), truncation=True), "labels": rows[label]}

    both = [split.map(tokenize, batched=True, remove_columns=split.column_names) for split in (train, evaluation)]
    return both[0], both[1], label_names(train, label)


def running_text(
    name_or_folder: str,
    tokenizer: Any,
    *,
    text: Sequence[str] = (),
    length: int = 512,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval) for a causal language model: all texts joined and cut into blocks of `length` tokens."""
    train, evaluation = load_splits(name_or_folder, None, train_split, eval_split)
    column = text[0] if text else _only(train, "--text_column_name", "string", _strings(train))
    _check(train, [column])

    def blocks(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        joined = [token for ids in tokenizer(rows[column])["input_ids"] for token in ids]
        cut = [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]
        # nothing predicts the first token; as a label the Trainer would count it in the mean
        return {"input_ids": cut, "labels": [[-100, *block[1:]] for block in cut]}

    both = [
        split.map(blocks, batched=True, batch_size=len(split), remove_columns=split.column_names)
        for split in (train, evaluation)
    ]
    if not (len(both[0]) and len(both[1])):
        raise ValueError(f"{name_or_folder} has fewer than {length} tokens in a split: choose a smaller --block_size")
    return both[0], both[1]


def _strings(dataset: "datasets.Dataset") -> list[str]:
    return [name for name, kind in dataset.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]


def _only(dataset: "datasets.Dataset", flag: str, wanted: str, candidates: Sequence[str]) -> str:
    if len(candidates) != 1:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"{len(candidates)} columns have type {wanted}: name one with {flag} of {columns}.")
    return candidates[0]


def _check(dataset: "datasets.Dataset", columns: Sequence[str]) -> None:
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"no column {column!r}: choose from {', '.join(dataset.column_names)}.")
