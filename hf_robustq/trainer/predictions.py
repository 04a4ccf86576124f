"""What a Trainer predicts of batches, and how it scores them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_pt_utils import nested_concat, nested_numpify
from transformers.trainer_utils import EvalPrediction

from hf_robustq.trainer.batches import own_copy


def predicted(
    trainer: Trainer, model: Any, inputs: Any, real: int, own: int, ignore_keys: list[str] | None = None
) -> tuple[Any, Any, Any]:
    """(loss of each sample, logits, labels) of a batch, gathered from all ranks: of its first `real` samples.

    `own`: the samples of this rank.
    """
    loss_only = trainer.compute_metrics is None or bool(trainer.args.prediction_loss_only)
    loss, logits, labels = trainer.prediction_step(model, own_copy(inputs), loss_only, ignore_keys=ignore_keys)
    accelerator = trainer.accelerator
    if labels is not None:
        labels = accelerator.pad_across_processes(labels, dim=1, pad_index=-100)
    if logits is not None:
        logits = accelerator.pad_across_processes(logits, dim=1, pad_index=-100)
        if trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, labels)  # pyright: ignore[reportArgumentType]
    end = real if real < own * trainer.args.world_size else None  # labels of an image are as many as its objects

    def gathered(tensors: Any) -> Any:
        if tensors is None:
            return None
        return _map(lambda tensor: accelerator.gather(tensor.reshape(tensor.shape or 1))[:end].cpu(), tensors)

    return gathered(loss.repeat(own) if loss is not None else None), gathered(logits), gathered(labels)


def scores(trainer: Trainer, parts: Sequence[tuple[Any, Any, Any]]) -> dict[str, float]:
    """What `compute_metrics` says of the batches of a set; its loss, where that has none, is the mean over samples."""
    losses, logits, labels = zip(*parts, strict=True)
    metrics: dict[str, Any] = {}
    if trainer.compute_metrics is not None and logits[0] is not None and labels[0] is not None:
        joined = _join if trainer.args.eval_do_concat_batches else nested_numpify
        pair: list[Any] = [joined([*logits]), joined([*labels])]
        metrics = dict(trainer.compute_metrics(EvalPrediction(*pair)) or {})
    if losses[0] is not None:
        metrics.setdefault("loss", _join([*losses]).mean())
    scalars = {name: float(value) for name, value in metrics.items() if _is_number(value)}
    if not scalars:
        raise ValueError("the sweep has nothing to measure: give labels, or compute_metrics that returns numbers")
    return scalars


def _is_number(value: Any) -> bool:
    """Text, None and mappings beside the numbers are the Trainer's own affair."""
    array = value if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else np.asarray(value)
    return array.ndim == 0 and (isinstance(array, torch.Tensor) or array.dtype.kind in "biuf")


def _join(parts: list[Any]) -> Any:
    """Batches of predictions as one NumPy array (or tuple of them), padded with -100 where lengths differ."""
    first = parts[0]
    if isinstance(first, torch.Tensor) and len({part.shape[1:] for part in parts}) == 1:
        return nested_numpify(torch.cat(parts))
    return nested_numpify(functools.reduce(functools.partial(nested_concat, padding_index=-100), parts))


def _map(function: Callable[[torch.Tensor], torch.Tensor], tensors: Any) -> Any:
    if isinstance(tensors, torch.Tensor):
        return function(tensors)
    if isinstance(tensors, Mapping):
        return {key: _map(function, value) for key, value in tensors.items()}
    return type(tensors)(_map(function, value) for value in tensors)
