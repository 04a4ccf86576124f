"""Treebanks as `datasets`: rows of words and annotations, then what a model takes; each made once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hf_robustq.parsing.subwords import check_tokenizer, specials, subwords
from hf_robustq.parsing.treebanks import check_tree, read_conllu, rows_of

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SPLIT = re.compile(r"(?:^|[-_.])(train|dev|test)(?:[-_.].*)?\.conllu$")
ON_THE_HUB = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}
COLUMNS = {"words": ("tokens", "words", "form"), "upos": ("upos",), "heads": ("head", "heads")}
COLUMNS["deprels"] = ("deprel", "deprels")
HELD_OUT = 10
READ = "1"
"""Goes up when a treebank is read in another way: what the cache holds is then not taken."""


def load_treebank(name: str, config: str | None = None) -> dict[str, Dataset]:
    """{"train", "dev", "test"}, as far as there are such, with columns words, upos, heads and deprels.

    `name` is a folder of CoNLL-U files named as Universal Dependencies does (`...-train.conllu`); one such file, of
    which every tenth sentence becomes "dev"; or a dataset of `datasets`, on the Hub or in a folder, with columns
    tokens, upos, head and deprel, and `config` its configuration. Raises `ValueError` for what `read_conllu` refuses,
    and where there is no training split.
    """
    path = Path(name)
    if path.is_dir() and not any(path.glob("*.conllu")) and any(path.glob("*/*.conllu")):
        below = sorted({str(file.parent) for file in path.glob("*/*.conllu")})
        raise ValueError(f"{name} holds treebanks in its folders: name them, such as {below[0]}")
    if path.is_file():
        whole = _read([path])
        every = range(HELD_OUT - 1, len(whole), HELD_OUT)
        parts = {"train": whole.select([i for i in range(len(whole)) if i not in every]), "dev": whole.select(every)}
        found = {split: part for split, part in parts.items() if len(part)}
    elif path.is_dir() and any(path.glob("*.conllu")):
        files: dict[str, list[Path]] = {}
        for file in sorted(path.glob("*.conllu")):
            if match := SPLIT.search(file.name):
                files.setdefault(match[1], []).append(file)
            else:
                logger.warning("%s is not read: its name says neither train, dev nor test", file)
        found = {split: _read(group) for split, group in files.items()}
    else:
        found = _from_hub(name, config)
    if "train" not in found:
        raise ValueError(
            f"{name} has no training sentences: a folder needs a file named like fr_partut-ud-train.conllu"
        )
    return found


def _read(files: Sequence[Path]) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    try:
        made = Dataset.from_generator(_rows, gen_kwargs={"files": [str(f) for f in files], "key": f"{READ} {digests}"})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    assert isinstance(made, Dataset)
    return made


def _rows(files: Sequence[str], key: str) -> Iterator[dict[str, Any]]:  # noqa: ARG001 (for the cache)
    for file in files:
        yield from map(rows_of, read_conllu(file))


def _from_hub(name: str, config: str | None) -> dict[str, Dataset]:
    from datasets import Dataset, Features, List, Value, load_dataset

    text = List(Value("string"))
    features = Features({"words": text, "upos": text, "heads": List(Value("int64")), "deprels": text})
    splits = load_dataset(name, config)
    found = {}
    for split, ours in ON_THE_HUB.items():
        if split in splits:
            dataset = splits[split]
            columns = {key: next((c for c in names if c in dataset.features), None) for key, names in COLUMNS.items()}
            missing = [key for key, column in columns.items() if column is None]
            if missing:
                raise ValueError(
                    f"{name} has no column {COLUMNS[missing[0]][0]!r}: found {', '.join(dataset.features)}"
                )
            made = dataset.map(
                _normalised,
                with_indices=True,
                remove_columns=dataset.column_names,
                features=features,
                fn_kwargs={
                    "columns": columns,
                    "classes": _classes(dataset, columns),
                    "where": f"{name} {split} row",
                    "version": READ,
                },
            )
            assert isinstance(made, Dataset)
            found[ours] = made
    return found


def _classes(dataset: Any, columns: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of columns that hold classes."""
    features = {key: dataset.features[column] for key, column in columns.items()}
    inner = {key: getattr(feature, "feature", feature) for key, feature in features.items()}
    return {key: list(feature.names) for key, feature in inner.items() if hasattr(feature, "names")}


def _normalised(
    row: Mapping[str, Any],
    index: int,
    columns: Mapping[str, str],
    classes: Mapping[str, Sequence[str]],
    where: str,
    version: str,  # noqa: ARG001 (for the cache)
) -> dict[str, Any]:
    """A row of the Hub's; multiword tokens and empty nodes among its tokens have no head or label, and are left out."""
    words = []
    for i, (head, label) in enumerate(zip(row[columns["heads"]], row[columns["deprels"]], strict=True)):
        if str(head).removesuffix(".0").isdecimal():
            words.append(i)
        elif label not in (None, "", "_", "None"):
            raise ValueError(f"{where}:{index}: token {i + 1} has the label {label!r} and no head, but {head!r}")
    if not words:
        raise ValueError(f"{where}:{index}: a sentence without words")
    made = {key: [row[column][i] for i in words] for key, column in columns.items()}
    for key, names in classes.items():
        made[key] = [names[i] for i in made[key]]
    made["heads"] = [int(float(head)) for head in made["heads"]]
    check_tree(where, index, made["heads"], [index] * len(words))
    return made


@dataclass(frozen=True)
class Labels:
    """Tags and labels: those a model knows, in the order of its outputs, then those seen elsewhere only."""

    upos: tuple[str, ...]
    deprels: tuple[str, ...]
    new_upos: tuple[str, ...] = ()
    new_deprels: tuple[str, ...] = ()

    @classmethod
    def of(cls, train: Sequence[Dataset], others: Sequence[Dataset] = ()) -> Self:
        """Known are those of `train`; what only `others` have is named in a warning, and counts as an error there."""
        known = {key: _distinct(train, key) for key in ("upos", "deprels")}
        return cls(tuple(known["upos"]), tuple(known["deprels"])).and_of(others)

    def and_of(self, others: Sequence[Dataset]) -> Self:
        """With the tags and labels of other treebanks after the known ones."""
        new = {key: sorted({*_distinct(others, key)} - {*getattr(self, key)}) for key in ("upos", "deprels")}
        for key, names in new.items():
            if names:
                logger.warning("%s that the model does not know, and gets wrong: %s", key, ", ".join(names))
        return type(self)(self.upos, self.deprels, tuple(new["upos"]), tuple(new["deprels"]))

    def names(self, key: str) -> tuple[str, ...]:
        """All of "upos" or "deprels", by id."""
        return getattr(self, key) + getattr(self, f"new_{key}")


def _distinct(datasets: Sequence[Dataset], key: str) -> list[str]:
    return sorted({name for dataset in datasets for names in dataset[key] for name in names})


def encode(dataset: Dataset, tokenizer: Any, labels: Labels, limit: int | None = None) -> Dataset:
    """What a parser takes of rows of words: input_ids, attention_mask, word_ids, upos, heads, deprels.

    Made once for these rows, tokenizer and labels, in the cache of `datasets`. Raises `ValueError` for a sentence of
    more than `limit` subwords with the special ones: nothing is cut off.
    """
    check_tokenizer(tokenizer, tokenizer.name_or_path)
    names = {key: labels.names(key) for key in ("upos", "deprels")}
    ids = {key: {name: i for i, name in enumerate(known)} for key, known in names.items()}
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    text = json.dumps([dataset._fingerprint, tokenizer_json, names, limit, "1"])
    return dataset.map(
        _encoded,
        batched=True,
        remove_columns=dataset.column_names,
        fn_kwargs={"tokenizer": tokenizer, "around": specials(tokenizer), "ids": ids, "limit": limit},
        new_fingerprint=hashlib.sha256(text.encode()).hexdigest()[:32],
        desc="tokenizing",
    )


def _encoded(
    rows: Mapping[str, list[Any]], tokenizer: Any, around: Any, ids: Mapping[str, Mapping[str, int]], limit: int | None
) -> dict[str, list[Any]]:
    made = subwords(rows["words"], tokenizer, around, limit)
    annotated = {key: [[ids[key][name] for name in names] for names in rows[key]] for key in ids}
    return {**made, **annotated, "heads": rows["heads"]}
