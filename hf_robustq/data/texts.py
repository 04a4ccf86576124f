"""Texts as a tokenizer's model takes them: for classification, and for a causal language model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_robustq.data.splits import label_column, label_names, load_splits, text_column

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
    train, evaluation = load_splits(name_or_folder, None, train_split, eval_split)
    text = [text_column(train.features, name) for name in text or [None]]
    label = label_column(train.features, label)

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
    column = text_column(train.features, text[0] if text else None)

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
