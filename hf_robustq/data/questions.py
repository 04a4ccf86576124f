"""Questions with their answers in a text (SQuAD, arXiv 1606.05250), in windows of the text that a model can read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_robustq.data.labels import check_filled
from hf_robustq.data.splits import load_splits

if TYPE_CHECKING:
    import datasets


def question_splits(
    name_or_folder: str,
    *,
    text: Sequence[str] = (),
    answers: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval) with the columns question, context, texts and begins: the answers, and where they are.

    `text` names question and context, `answers` the column of {"text": [...], "answer_start": [...]}; by default
    question, context, answers, as in SQuAD. A question without answers cannot be answered from its context.
    """
    if len(text) not in (0, 2):
        raise ValueError(f"--text_column_name takes two columns, question and context, got {' '.join(text)}")
    names = [*(text or ("question", "context")), *(f"{answers or 'answers'}.{key}" for key in ("text", "answer_start"))]
    both = [split.flatten() for split in load_splits(name_or_folder, None, train_split, eval_split)]
    missing = [name for name in names if name not in both[1].column_names]
    if missing:
        raise ValueError(
            f"{name_or_folder} has no column {missing[0]}: name question and context with --text_column_name, the "
            f"answers with --label_column_name, of {', '.join(both[1].column_names)}"
        )
    for name, flag in zip(names, [*["--text_column_name"] * 2, *["--label_column_name"] * 2], strict=True):
        check_filled(both, {flag: name})
    renamed: dict[str, str] = dict(zip(names, ("question", "context", "texts", "begins"), strict=True))
    train, evaluation = (split.select_columns(names).rename_columns(renamed) for split in both)
    return train, evaluation


def windows(questions: "datasets.Dataset", tokenizer: Any, length: int) -> "datasets.Dataset":
    """Each question with as many windows of its context as it takes, which overlap by a quarter of `length` tokens.

    A row is a window: what the model takes; `start_positions` and `end_positions` of the first answer, both `null`
    where it is not all there; `number` of its question; `spans` [T, 2], the characters of each token of the context,
    -1 for others; `null`, the position that stands for no answer, that of [CLS].

    Raises `ValueError` for a question that leaves no room for a context.
    """
    overlap = length // 4
    room = length - overlap - tokenizer.num_special_tokens_to_add(pair=True) - 1
    texts = questions["question"][:]
    tokens, longest = max(
        (len(ids), text)
        for ids, text in zip(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], texts, strict=True)
    )
    if tokens > room:
        raise ValueError(
            f"a question has {tokens} tokens, and {max(room, 0)} go into a window of {length} with a context: raise "
            f"--block_size, or shorten it: {longest[:60]}"
        )

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
        how = {"max_length": length, "stride": overlap, "return_overflowing_tokens": True}
        how |= {"return_offsets_mapping": True, "truncation": "only_second"}
        made = tokenizer(rows["question"], rows["context"], **how)
        of, offsets = made.pop("overflow_to_sample_mapping"), made.pop("offset_mapping")
        more: dict[str, list[Any]] = {"start_positions": [], "end_positions": [], "number": [], "spans": [], "null": []}
        for i, row in enumerate(of):
            context = np.array([part == 1 for part in made.sequence_ids(i)])
            spans = np.where(context[:, None], np.array(offsets[i]), -1)
            ids = made["input_ids"][i]
            null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
            answers = zip(rows["begins"][row], rows["texts"][row], strict=True)
            start, end = next((position(spans, begin, text) for begin, text in answers), None) or (null, null)
            for key, value in zip(more, (start, end, indices[row], spans.tolist(), null), strict=True):
                more[key].append(value)
        return {**made, **more}

    return questions.map(encode, batched=True, with_indices=True, remove_columns=questions.column_names)


def position(spans: np.ndarray, begin: int, text: str) -> tuple[int, int] | None:
    """The first and the last token of a text that begins at a character; None where the spans do not hold it all."""
    end, inside = begin + len(text), spans[:, 0] >= 0
    at = np.flatnonzero(inside & (spans[:, 1] > begin) & (spans[:, 0] < end))
    if not len(at) or spans[inside, 0].min() > begin or spans[inside, 1].max() < end:
        return None
    return int(at[0]), int(at[-1])


def best_spans(
    starts: np.ndarray, ends: np.ndarray, allowed: np.ndarray, longest: int = 30
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(score, first, last) [N] of the span of at most `longest` allowed tokens with the largest sum of both logits.

    starts, ends, allowed: [N, T]. A row without an allowed token has the score -inf.
    """
    starts, ends = (np.where(allowed, logits, -np.inf) for logits in (starts, ends))
    score = np.full(len(starts), -np.inf)
    first, last = np.zeros_like(score, np.int64), np.zeros_like(score, np.int64)
    for more in range(min(longest, starts.shape[1])):
        sums = starts[:, : starts.shape[1] - more] + ends[:, more:]
        at = sums.argmax(1)
        value = np.take_along_axis(sums, at[:, None], 1)[:, 0]
        better = value > score
        score, first = np.where(better, value, score), np.where(better, at, first)
        last = np.where(better, at + more, last)
    return score, first, last
