"""Scores without a network: accuracy, dependencies, entities, answers; the first two as `evaluate.Metric` too."""

import functools
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import evaluate
    from transformers import EvalPrediction

IGNORED = -100  # the label that torch's cross entropy and the Trainer's padding leave out


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """The fraction (0..1) of equal entries, over those whose reference is not -100.

    Raises ValueError if the shapes differ or no reference is left.
    """
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions {predictions.shape} and labels {references.shape} differ: give one class per label."
        )
    scored = references != IGNORED
    if not scored.any():
        raise ValueError(f"no label to score: the evaluation set is empty or every label is {IGNORED}.")
    return float((predictions == references)[scored].mean())


def compute_accuracy(eval_prediction: "EvalPrediction") -> dict[str, float]:
    """{"accuracy": fraction} of logits [N, C] or [N, T, C], or a tuple led by them; labels [N] or [N, T]."""
    logits = eval_prediction.predictions
    if isinstance(logits, tuple):
        logits = logits[0]
    return {"accuracy": accuracy(np.argmax(logits, axis=-1), np.asarray(eval_prediction.label_ids))}


Annotated = Mapping[str, Sequence[Any]]
"""A sentence: {"upos": tags, "heads": numbers of words, "deprels": labels}, of a word each."""


def dependency_scores(predictions: Iterable[Annotated], references: Iterable[Annotated]) -> dict[str, float]:
    """{"upos", "uas", "las"}: fractions (0..1) of the words with the right tag, head, and head and label.

    As the CoNLL 2018 shared task scores given words: punctuation counts, subtypes of labels (`nsubj:pass`) do not.
    Raises `ValueError` for other sentences or words than the references', and for none.
    """
    words, right = 0, dict.fromkeys(("upos", "uas", "las"), 0)
    for i, (ours, gold) in enumerate(zip(predictions, references, strict=True)):
        if any(len(one[name]) != len(gold["heads"]) for one in (ours, gold) for name in ("upos", "heads", "deprels")):
            raise ValueError(f"sentence {i + 1} has {len(gold['heads'])} words, and not all annotations are of so many")
        words += len(gold["heads"])
        heads = [a == b for a, b in zip(ours["heads"], gold["heads"], strict=True)]
        labels = [_universal(a) == _universal(b) for a, b in zip(ours["deprels"], gold["deprels"], strict=True)]
        right["upos"] += sum(a == b for a, b in zip(ours["upos"], gold["upos"], strict=True))
        right["uas"] += sum(heads)
        right["las"] += sum(a and b for a, b in zip(heads, labels, strict=True))
    if not words:
        raise ValueError("no word to score: the evaluation set is empty.")
    return {name: count / words for name, count in right.items()}


def _universal(label: str) -> str:
    return label.split(":")[0]


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first, after the last) of each entity of a sentence: tags as B-LOC, I-LOC, O; E- and S- (L-, U-) too.

    As conlleval has it: an I- without a beginning, or of another type than the tag before, begins an entity.
    """
    found: list[tuple[str, int, int]] = []
    before, inside = "", False
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        begins = prefix != "O" and (prefix in "BSU" or not inside or kind != before)
        if begins:
            found.append((kind, i, i + 1))
        elif prefix != "O":
            found[-1] = (kind, found[-1][1], i + 1)
        before, inside = kind, prefix != "O" and prefix not in "ESLU"
    return set(found)


def entity_scores(predictions: Iterable[Sequence[str]], references: Iterable[Sequence[str]]) -> dict[str, float]:
    """{"f1", "precision", "recall"}: fractions (0..1) over the entities of all sentences; type and both ends count."""
    right = guessed = there = 0
    for ours, gold in zip(predictions, references, strict=True):
        one, other = entities(ours), entities(gold)
        right, guessed, there = right + len(one & other), guessed + len(one), there + len(other)
    scores = {"f1": (2 * right, guessed + there), "precision": (right, guessed), "recall": (right, there)}
    return {name: count / of if of else 0.0 for name, (count, of) in scores.items()}


def answer_scores(predictions: Iterable[str], references: Iterable[Sequence[str]]) -> dict[str, float]:
    """{"f1", "exact_match"}: fractions (0..1) as SQuAD's evaluation has them (arXiv 1606.05250, section 6.1).

    references: the answers of each question, of which the best match counts; none: it has no answer, which "" is.
    """
    found = []
    for ours, answers in zip(predictions, references, strict=True):
        golds = [gold for gold in map(_words, answers) if gold] or [[]]
        found.append([max(_overlap(_words(ours), gold) for gold in golds), float(_words(ours) in golds)])
    if not found:
        raise ValueError("no answer to score: the evaluation set is empty.")
    f1, exact = np.mean(found, axis=0)
    return {"f1": float(f1), "exact_match": float(exact)}


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _overlap(ours: Sequence[str], gold: Sequence[str]) -> float:
    same = sum((Counter(ours) & Counter(gold)).values())
    return 2 * same / (len(ours) + len(gold)) if ours and gold else float(ours == gold)


@functools.cache
def _metric_class() -> "type[evaluate.Metric]":
    import datasets
    import evaluate

    class Accuracy(evaluate.Metric):
        """`evaluate.load("accuracy")` without the download: integer classes in, a fraction 0..1 out."""

        def _info(self) -> "evaluate.MetricInfo":
            integer = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Share of predictions equal to their reference; references of -100 are ignored.",
                citation="",
                inputs_description="predictions, references: one integer class each.",
                features=datasets.Features({"predictions": integer, "references": integer}),
            )

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            return {"accuracy": accuracy(np.asarray(predictions), np.asarray(references))}

    return Accuracy


@functools.cache
def _dependency_class() -> "type[evaluate.Metric]":
    import datasets
    import evaluate

    class DependencyScore(evaluate.Metric):
        """Tagging and parsing of given words, as `dependency_scores` has it."""

        def _info(self) -> "evaluate.MetricInfo":
            text, number = datasets.Sequence(datasets.Value("string")), datasets.Sequence(datasets.Value("int64"))
            sentence = {"upos": text, "heads": number, "deprels": text}
            return evaluate.MetricInfo(
                description="UPOS accuracy, unlabelled and labelled attachment score of given words.",
                citation="Zeman et al., CoNLL 2018 Shared Task",
                inputs_description='predictions, references: {"upos", "heads", "deprels"} of each sentence.',
                features=datasets.Features({"predictions": sentence, "references": sentence}),
            )

        def _compute(self, predictions: list[Annotated], references: list[Annotated]) -> dict[str, float]:
            return dependency_scores(predictions, references)

    return DependencyScore


def __getattr__(name: str) -> Any:
    # A class needs its base at definition, and `evaluate` is slow to import: build it when first asked for.
    if name == "Accuracy":
        return _metric_class()
    if name == "DependencyScore":
        return _dependency_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
