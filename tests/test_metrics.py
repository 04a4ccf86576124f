"""Accuracy against scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction

import hf_robustq.metrics as metrics
from hf_robustq.metrics import Accuracy, compute_accuracy


def random_case(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(*shape, 5)).astype(np.float32), rng.integers(0, 5, shape)


@pytest.mark.parametrize("shape", [(200,), (20, 7)])
def test_compute_accuracy_is_sklearns(shape: tuple[int, ...]) -> None:
    logits, labels = random_case(*shape)
    expected = {"accuracy": pytest.approx(accuracy_score(labels.ravel(), logits.argmax(-1).ravel()), abs=1e-12)}
    assert compute_accuracy(EvalPrediction(logits, labels)) == expected
    assert compute_accuracy(EvalPrediction((logits, "hidden states"), labels)) == expected


def test_padding_does_not_count() -> None:
    logits, labels = random_case(20, 7)
    padded = np.random.default_rng(1).random(labels.shape) < 0.4
    expected = accuracy_score(labels[~padded], logits.argmax(-1)[~padded])
    labels[padded] = -100
    assert compute_accuracy(EvalPrediction(logits, labels))["accuracy"] == pytest.approx(expected, abs=1e-12)


def test_errors() -> None:
    logits, labels = random_case(20, 7)
    with pytest.raises(ValueError, match=r"predictions \(20, 7\) and labels \(20,\)"):
        compute_accuracy(EvalPrediction(logits, labels[:, 0]))
    with pytest.raises(ValueError, match="no label to score"):
        compute_accuracy(EvalPrediction(logits, np.full_like(labels, -100)))


def test_metric_is_sklearns_and_takes_batches(tmp_path: Path) -> None:
    import evaluate

    logits, labels = random_case(200)
    predictions = logits.argmax(-1)
    metric = Accuracy(cache_dir=str(tmp_path))
    assert isinstance(metric, evaluate.Metric)
    expected = {"accuracy": pytest.approx(accuracy_score(labels, predictions), abs=1e-12)}
    assert metric.compute(predictions=predictions, references=labels) == expected
    for start in range(0, 200, 64):
        metric.add_batch(predictions=predictions[start : start + 64], references=labels[start : start + 64])
    assert metric.compute() == expected


def test_class_is_built_once() -> None:
    assert metrics.Accuracy is Accuracy
    with pytest.raises(AttributeError, match="no attribute 'F1'"):
        metrics.F1  # noqa: B018
