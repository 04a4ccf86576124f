"""Accuracy against scikit-learn; entities and answers by hand."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction

import hf_robustq.metrics as metrics
from hf_robustq.metrics import Accuracy, answer_scores, compute_accuracy, entities, entity_scores


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


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-A I-A O", {("A", 1, 3)}),
        ("B-A B-A I-A", {("A", 0, 1), ("A", 1, 3)}),
        ("I-A I-A O I-B", {("A", 0, 2), ("B", 3, 4)}),  # without a beginning
        ("B-A I-B I-B", {("A", 0, 1), ("B", 1, 3)}),  # of another type
        ("S-A B-A E-A I-A", {("A", 0, 1), ("A", 1, 3), ("A", 3, 4)}),
        ("U-A B-A L-A", {("A", 0, 1), ("A", 1, 3)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_are_conllevals(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_entity_scores_are_shares_of_all_sentences() -> None:
    ours, gold = (["B-A I-A O B-B", "O B-A"], ["B-A I-A O B-A", "B-A O"])
    found = entity_scores(map(str.split, ours), map(str.split, gold))
    assert found == {"f1": 2 / 6, "precision": 1 / 3, "recall": 1 / 3}
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


@pytest.mark.parametrize(
    ("ours", "gold", "f1", "exact"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in the Eiffel Tower", ["Eiffel Tower", "Paris"], 0.8, 0),  # of 3 and 2 words 2 are the same
        ("a a b", ["b b"], 2 / 3, 0),  # articles are left out
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
    ],
)
def test_answers_are_scored_as_squad_has_it(ours: str, gold: list[str], f1: float, exact: float) -> None:
    assert answer_scores([ours], [gold]) == pytest.approx({"f1": f1, "exact_match": exact})
    assert answer_scores([ours, "x"], [gold, ["x"]])["f1"] == pytest.approx((f1 + 1) / 2)


def test_no_answers_are_an_error() -> None:
    with pytest.raises(ValueError, match="no answer to score"):
        answer_scores([], [])
