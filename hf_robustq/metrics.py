"""Accuracy and attachment scores without a network: as functions, and each as an `evaluate.Metric`."""

import functools
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
