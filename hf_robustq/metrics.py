"""Accuracy without a network: as `compute_metrics` of a Trainer, and as an `evaluate.Metric`."""

import functools
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


def __getattr__(name: str) -> Any:
    # The class needs its base at definition, and `evaluate` is slow to import: build it when first asked for.
    if name == "Accuracy":
        return _metric_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
