"""Texts as a tokenizer's model takes them: classified, running, in pairs."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hf_robustq.data.labels import check_filled, renumbered
from hf_robustq.data.splits import label_column, label_names, load_splits, text_column

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

LOST = "lost"  # the column in which an encoder says how much of a row it has left out


def classified_texts(
    name_or_folder: str,
    tokenizer: Any,
    known: Sequence[str],
    *,
    text: Sequence[str] = (),
    label: str | None = None,
    length: int | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval): tokenized, with the columns the model takes and `labels`, numbered as its outputs `known` are.

    `text` names the column, or the two of a pair; by default the one column of strings. `label`: by default the one
    ClassLabel, else the one integer. Raises `ValueError` where that is not one, and as `renumbered` does.
    """
    both = load_splits(name_or_folder, None, train_split, eval_split)
    text = [text_column(both[0].features, name) for name in text or [None]]
    for column in text:
        check_filled(both, {"--text_column_name": column})
    label = label_column(both[0].features, label)
    both = renumbered(both, label, label_names(both[0], label), known)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded, lost = truncated([rows[column] for column in text], tokenizer, length)
        return {**encoded, "labels": rows[label], LOST: lost}

    return encoded(both, encode, longer(length, "tokens"))


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
    both = load_splits(name_or_folder, None, train_split, eval_split)
    column = text_column(both[0].features, only(text))
    check_filled(both, {"--text_column_name": column})

    def blocks(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = [token for ids in tokenizer(rows[column])["input_ids"] for token in ids]
        cut = [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]
        # nothing predicts the first token; as a label the Trainer would count it in the mean
        labels = [[-100, *block[1:]] for block in cut]
        return {"input_ids": cut, "labels": labels, LOST: [len(joined) % length, *[0] * len(cut)][: len(cut)]}

    left = f"the last {{lost}} tokens fill no block of {length} and are not measured: --block_size sets its size"
    train, evaluation = encoded(both, blocks, left, max(map(len, both)))
    if not (len(train) and len(evaluation)):
        raise ValueError(f"{name_or_folder} has fewer than {length} tokens in a split: choose a smaller --block_size")
    return train, evaluation


def masked_text(
    name_or_folder: str, tokenizer: Any, *, seed: int = 0, **options: Any
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval) for a masked language model: `running_text`, 15% of the tokens to be found, as BERT has it.

    Of these 80% are masked, 10% random and 10% as they are (arXiv 1810.04805). Which ones depends on `seed` alone.
    """
    from transformers import DataCollatorForLanguageModeling

    def masked(split: "datasets.Dataset") -> "datasets.Dataset":
        collator = DataCollatorForLanguageModeling(tokenizer, return_tensors="np", seed=seed)

        def mask(rows: dict[str, list[Any]]) -> dict[str, Any]:
            return dict(collator([{"input_ids": ids} for ids in rows["input_ids"]]))

        return split.map(mask, batched=True)

    train, evaluation = running_text(name_or_folder, tokenizer, **options)
    return masked(train), masked(evaluation)


def text_pairs(
    name_or_folder: str,
    tokenizer: Any,
    *,
    text: Sequence[str] = (),
    length: int | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval) for a sequence-to-sequence model: `text` names the source column and the target's.

    A column within another is named with a dot: translation.en.
    """
    both = [split.flatten() for split in load_splits(name_or_folder, None, train_split, eval_split)]
    if len(text) != 2:
        raise ValueError(f"name source and target with --text_column_name, of {', '.join(both[0].column_names)}")
    source, target = (text_column(both[0].features, name) for name in text)
    for column in (source, target):
        check_filled(both, {"--text_column_name": column})

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        made, lost = truncated([rows[source]], tokenizer, length)
        labels, more = truncated([rows[target]], lambda texts, **how: tokenizer(text_target=texts, **how), length)
        together = [one + other for one, other in zip(lost, more, strict=True)]
        return {**made, "labels": labels["input_ids"], LOST: together}

    return encoded(both, encode, longer(length, "tokens"))


def only(text: Sequence[str]) -> str | None:
    """The one column that is named, if any. Raises `ValueError` for more."""
    if len(text) > 1:
        raise ValueError(f"--text_column_name takes one column here, got {' '.join(text)}")
    return text[0] if text else None


def truncated(texts: Sequence[list[str]], tokenizer: Any, length: int | None) -> tuple[Any, list[int]]:
    """(what a tokenizer makes of texts or pairs, cut at `length` tokens; of each, how many tokens are cut off)."""
    if length is None:
        return tokenizer(*texts), [0] * len(texts[0])
    made = tokenizer(*texts, truncation=True, max_length=length)
    whole = tokenizer(*texts, verbose=False)["input_ids"]
    return made, [len(full) - len(kept) for full, kept in zip(whole, made["input_ids"], strict=True)]


def longer(length: int | None, what: str) -> str:
    """How `encoded` says what is left out of rows, as they are too long, or by the tokenizer."""
    if length is None:
        return f"{{lost}} {what} of {{rows}} rows are nothing to the tokenizer, and are not measured"
    return (
        f"{{rows}} of {{all}} rows are longer than {length} tokens: their last {{lost}} {what} are not measured; "
        "split these rows to measure all"
    )


def encoded(
    both: Sequence["datasets.Dataset"],
    encode: Callable[[dict[str, list[Any]]], dict[str, Any]],
    left_out: str,
    batch_size: int = 1000,
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval) as `encode` makes them; what it says it has `lost` of the latter is said as `left_out` has it."""
    train, evaluation = (
        split.map(encode, batched=True, batch_size=batch_size, remove_columns=split.column_names) for split in both
    )
    lost = [count for count in evaluation[LOST][:] if count] if len(evaluation) else []
    if lost:
        logger.warning(left_out.format(rows=len(lost), all=len(evaluation), lost=sum(lost)))
    return train.remove_columns(LOST), evaluation.remove_columns(LOST)
