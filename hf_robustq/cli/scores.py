"""What predictions are scored by: as a Trainer takes it, and a user's own from `--metric`."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hf_robustq.config import check_known
from hf_robustq.metrics import IGNORED, accuracy, answer_scores, entity_scores
from hf_robustq.sweep.rows import FACTS


def classes(logits: Any, labels: Any) -> torch.Tensor:  # noqa: ARG001
    """What `compute_metrics` needs of logits: the sweep keeps the predictions of every setting until the end."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def class_accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": accuracy(predicted.predictions, predicted.label_ids)}


CLASSES = {"compute_metrics": class_accuracy, "preprocess_logits_for_metrics": classes}


def token_scores(shift: int = 0) -> dict[str, Any]:
    """Loss (nats a token), perplexity and accuracy over all tokens with a label; logit i is of label i + `shift`."""

    def sums(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """[N, 3]: of each row the loss, the right tokens, the tokens."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
        found = [
            (
                F.cross_entropy(row.float(), of, ignore_index=IGNORED, reduction="sum"),
                ((row.argmax(-1) == of) & (of != IGNORED)).sum(),
                (of != IGNORED).sum(),
            )
            for row, of in zip(logits, labels, strict=True)  # row by row: float32 of all would be large
        ]
        return torch.stack([torch.stack([value.float() for value in row]) for row in found])

    def compute(predicted: Any) -> dict[str, float]:
        loss, right, tokens = predicted.predictions.astype(np.float64).sum(0)
        if not tokens:
            raise ValueError("no token to score: every label of the evaluation set is left out")
        mean = float(loss / tokens)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {"loss": mean, "perplexity": perplexity, "accuracy": float(right / tokens)}

    return {"compute_metrics": compute, "preprocess_logits_for_metrics": sums}


def tag_scores(names: Sequence[str]) -> dict[str, Any]:
    """Accuracy over words; where tags are those of entities (B-LOC, I-LOC, O), these are scored first."""
    of_entities = {*names} > {"O"} and all(re.fullmatch("O|[BIESLU]-.+", name) for name in names)

    def compute(predicted: Any) -> dict[str, float]:
        tags, labels = predicted.predictions, predicted.label_ids
        words = class_accuracy(predicted)
        if not of_entities:
            return words

        def named(numbers: Any) -> list[list[str]]:
            kept = [row[of != IGNORED] for row, of in zip(numbers, labels, strict=True)]
            return [[names[int(tag)] if tag < len(names) else "O" for tag in row] for row in kept]

        return {**entity_scores(named(tags), named(labels)), **words}

    return {"compute_metrics": compute, "preprocess_logits_for_metrics": classes}


def question_scores(questions: Any, windows: Any) -> dict[str, Any]:
    """SQuAD's scores of `windows` in their order: the best span of a question is taken over all of its windows.

    Choice: where some questions have no answers, the null span competes with the best one, without a threshold.
    """
    from hf_robustq.data.questions import best_spans

    contexts, answers = questions["context"][:], questions["texts"][:]
    numbers, nulls, spans = (windows[key][:] for key in ("number", "null", "spans"))
    unanswerable = not all(answers)

    def compute(predicted: Any) -> dict[str, float]:
        starts, ends = predicted.predictions[:2]
        found = np.full((len(numbers), starts.shape[1], 2), -1)
        for row, own in zip(found, spans, strict=True):
            row[: len(own)] = own
        score, first, last = best_spans(starts, ends, found[..., 0] >= 0)
        null = [starts[i, at] + ends[i, at] for i, at in enumerate(nulls)]
        best: dict[int, tuple[float, str]] = {}
        least: dict[int, float] = {}
        for i, number in enumerate(numbers):
            text = contexts[number][found[i, first[i], 0] : found[i, last[i], 1]] if score[i] > -math.inf else ""
            best[number] = max(best.get(number, (-math.inf, "")), (float(score[i]), text))
            least[number] = min(least.get(number, math.inf), float(null[i]))
        texts = [
            "" if unanswerable and least[number] > best[number][0] else best[number][1]
            for number in range(len(contexts))
        ]
        return answer_scores(texts, answers)

    return {"compute_metrics": compute}


def metric_function(text: str) -> dict[str, Any]:
    """The user's `compute_metrics`: `module:function` or `path/to/file.py:function`.

    `preprocess_logits_for_metrics` of the same module, where there is one, is used too. Raises `ValueError` for what
    cannot be imported; what the function returns must hold a number.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ValueError(f"--metric takes module:function or path/to/file.py:function, got {text!r}")
    try:
        module = _module(place)
    except Exception as error:
        raise ValueError(f"--metric {text}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    check_known([name], functions, f"function of {place}")
    own = getattr(module, "preprocess_logits_for_metrics", None)
    return {
        "compute_metrics": _checked(getattr(module, name), text),
        **({"preprocess_logits_for_metrics": own} if own is not None else {}),
    }


def _module(place: str) -> Any:
    """A file by its path, or a module as Python finds it from the folder the command is run in."""
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        sys.path.insert(0, str(path.resolve().parent))  # what the file imports may lie beside it
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(place)


def _checked(function: Callable[[Any], Any], text: str) -> Callable[[Any], dict[str, float]]:
    told: set[str] = set()

    def compute(predicted: Any) -> dict[str, float]:
        try:
            found = function(predicted)
        except Exception as error:
            raise ValueError(f"--metric {text} failed: {type(error).__name__}: {error}") from error
        if not isinstance(found, Mapping):
            raise ValueError(f"--metric {text} must return a dict of numbers, got {type(found).__name__}")
        numbers = {key: float(value) for key, value in found.items() if _is_number(value)}
        if numbers.keys() & FACTS or not numbers:
            clash = ", ".join(sorted(numbers.keys() & FACTS))
            why = f"names what rows have already: rename {clash}" if numbers else "returned no number"
            raise ValueError(f"--metric {text} {why}")
        left = [key for key in found if key not in numbers and key not in told]
        if left:
            print(f"--metric {text}: left out, as they are no numbers: {', '.join(left)}")
            told.update(left)
        return numbers

    return compute


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.ndarray, torch.Tensor)) and not getattr(value, "ndim", 0)
