"""Batches of a Trainer: for calibration, and with the padding of the last one known."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer
from transformers.trainer_utils import RemoveColumnsCollator

from hf_robustq.trainer.streams import check_restarts


def forward(trainer: Trainer) -> Callable[[Any, Any], Any]:
    """How a Trainer runs a batch: its own `prediction_step`, so its placement and what its subclasses do there."""
    return lambda model, batch: trainer.prediction_step(model, dict(batch), prediction_loss_only=True)


def calibration_batches(
    trainer: Trainer, dataset: Any, samples: int, seed: int, augmented: bool = False
) -> Iterator[Any]:
    """`samples` random training samples in batches, the same on every rank; unaugmented, where a dataset can be."""
    if dataset is None:
        raise ValueError("calibration needs training data: pass train_dataset or calibration_dataset")
    if callable(getattr(dataset, "evaluation", None)) and not augmented:
        dataset = dataset.evaluation()
    if isinstance(dataset, IterableDataset):
        check_restarts(dataset)
    else:
        dataset = some_of(dataset, samples, seed)
    collator = trainer.data_collator
    if trainer.args.remove_unused_columns:
        accepted = [
            *inspect.signature(cast(nn.Module, trainer.model).forward).parameters,
            *trainer.label_names,
            "label",
            "label_ids",
        ]
        collator = RemoveColumnsCollator(collator, accepted, logger=None, model_name=None, description=None)
    loader = DataLoader(
        dataset,
        batch_size=trainer.args.per_device_eval_batch_size,
        collate_fn=collator,
        generator=torch.Generator(),  # else its iterator draws a seed from the global RNG
    )
    seen = 0
    for batch in loader:
        yield batch
        seen += count_rows(batch)
        if seen >= samples:
            return


def some_of(dataset: Any, samples: int, seed: int) -> Any:
    """A fixed random subset, in the order of the dataset."""
    samples = min(samples, len(dataset))
    generator = torch.Generator().manual_seed(seed)
    indices = sorted(torch.randperm(len(dataset), generator=generator)[:samples].tolist())
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)


def with_real_samples(trainer: Trainer, dataloader: DataLoader) -> Iterator[tuple[Any, int]]:
    """Batches, each with how many of its samples over all ranks are real: the last may be padded with repeats."""
    state, ranks = trainer.accelerator.gradient_state, trainer.args.world_size
    for batch in dataloader:
        real = count_rows(batch) * ranks
        if ranks > 1 and state.end_of_dataloader and state.remainder > 0:
            real = state.remainder
        yield batch, real


def count_rows(batch: Any) -> int:
    """Samples in a batch: the first size of its first tensor."""
    tensors = batch.values() if isinstance(batch, Mapping) else batch
    return next(t.size(0) for t in tensors if isinstance(t, torch.Tensor) and t.dim())
