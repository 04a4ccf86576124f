"""Texts of which each word has a tag."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_robustq.data.labels import check_filled, folded, generic, outputs_of, some, title
from hf_robustq.data.splits import STRINGS, load_splits, of_kinds, tags_column, words_column
from hf_robustq.data.texts import LOST, encoded, longer, only

if TYPE_CHECKING:
    import datasets

IGNORED = -100  # the label that torch's cross entropy leaves out


def tagged_words(
    name_or_folder: str,
    tokenizer: Any,
    known: Sequence[str],
    *,
    text: Sequence[str] = (),
    tags: str | None = None,
    length: int | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset", list[str]]:
    """(train, eval, tags): tokenized words, the first token of each labelled with its tag, all others -100.

    `known`: the model's tags, in the order of its outputs. The dataset's are found among them as `outputs_of` has it;
    where the model only has numbers (LABEL_0, ...), the dataset's own stand. Raises `ValueError` for a row with a tag
    that the model does not have, or with other words than tags.
    """
    both = load_splits(name_or_folder, None, train_split, eval_split)
    words = words_column(both[0].features, only(text))
    tags = tags_column(both[0].features, tags, words)
    check_filled(both, {"--text_column_name": words, "--label_column_name": tags})
    kind = both[0].features[tags]
    kind = kind[0] if isinstance(kind, list) else kind.feature
    own: list[str] = list(getattr(kind, "names", ()))
    names = own if own and generic(known) else list(known)
    numbers: dict[Any, int]
    if tags in of_kinds(both[0].features, *(f"list of {string}" for string in STRINGS)):
        numbers = {**{folded(name): i for i, name in enumerate(known)}, **{name: i for i, name in enumerate(known)}}
    else:
        numbers = dict(enumerate(outputs_of(tags, own or [str(i) for i in range(len(known))], known)))
    numbers[IGNORED] = IGNORED
    for split in both:
        _check(split, words, tags, numbers, names)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        made = tokenizer(rows[words], is_split_into_words=True, truncation=length is not None, max_length=length)
        made["labels"], made[LOST] = [], []
        for i, (row, given) in enumerate(zip(rows[words], rows[tags], strict=True)):
            of = made.word_ids(i)
            first = [word is not None and word != before for word, before in zip(of, [None, *of], strict=False)]
            made["labels"].append(
                [_number(given[word], numbers) if begins else IGNORED for word, begins in zip(of, first, strict=True)]
            )
            made[LOST].append(len(row) - sum(first))
        return dict(made)

    return *encoded(both, encode, longer(length, "words")), names


def _number(tag: Any, numbers: Mapping[Any, int]) -> int | None:
    return numbers.get(tag, numbers.get(folded(tag)) if isinstance(tag, str) else None)


def _check(split: "datasets.Dataset", words: str, tags: str, numbers: Mapping[Any, int], names: Sequence[str]) -> None:
    for i, (row, given) in enumerate(zip(split[words][:], split[tags][:], strict=True)):
        place = f"row {i} of {title(split)}"
        if len(given) != len(row) or None in row:
            raise ValueError(f"{place}: a row has {len(row)} {words} but {len(given)} {tags}: {some(row)}")
        wrong = [tag for tag in given if _number(tag, numbers) is None]
        if wrong:
            raise ValueError(
                f"{place}: {tags} has {wrong[0]!r}, and the tags of the model are {', '.join(names)}: choose another "
                "--label_column_name, or set id2label in the model's config.json"
            )
