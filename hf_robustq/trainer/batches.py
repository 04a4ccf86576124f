"""Batches of a Trainer: for calibration, and with the padding of the last one known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer

from hf_robustq.calibrate import rows
from hf_robustq.trainer.streams import check_restarts


def forward(trainer: Trainer) -> Callable[[Any, Any], Any]:
    """How a Trainer runs a batch: its own `prediction_step`, so its placement and what its subclasses do there."""
    return lambda model, batch: trainer.prediction_step(model, own_copy(batch), prediction_loss_only=True)


def own_copy(batch: Any) -> Any:
    """For a `prediction_step`, which may take things out of a batch."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def calibration_batches(
    trainer: Trainer, dataset: Any, samples: int, seed: int, augmented: bool = False
) -> Iterator[Any]:
    """`samples` random training samples in batches, the same on every rank; unaugmented, where a dataset can be."""
    return (batch for batch, _ in counted_batches(trainer, dataset, samples, seed, augmented))


def counted_batches(
    trainer: Trainer, dataset: Any, samples: int, seed: int, augmented: bool = False
) -> Iterator[tuple[Any, int]]:
    """`calibration_batches`, each with the number of its samples.

    Columns and collator are those of the Trainer's own test dataloader, which a rank sees only a part of.
    """
    if dataset is None:
        raise ValueError("calibration needs training data: pass train_dataset or calibration_dataset")
    if callable(getattr(dataset, "evaluation", None)) and not augmented:
        dataset = dataset.evaluation()
    if isinstance(dataset, IterableDataset):
        check_restarts(dataset)
    else:
        dataset = some_of(dataset, samples, seed)
    theirs = trainer.get_test_dataloader(dataset)
    loader = DataLoader(
        dataset if isinstance(dataset, IterableDataset) else theirs.dataset,
        batch_size=trainer.args.per_device_eval_batch_size,
        collate_fn=lambda features: (theirs.collate_fn(features), len(features)),
        generator=torch.Generator(),  # else its iterator draws a seed from the global RNG
    )
    seen = 0
    for batch, count in loader:
        yield batch, count
        seen += count
        if seen >= samples:
            return


def some_of(dataset: Any, samples: int, seed: int) -> Any:
    """A fixed random subset, in the order of the dataset."""
    samples = min(samples, len(dataset))
    generator = torch.Generator().manual_seed(seed)
    indices = sorted(torch.randperm(len(dataset), generator=generator)[:samples].tolist())
    return dataset.select(indices) if hasattr(dataset, "select") else Subset(dataset, indices)


def with_real_samples(trainer: Trainer, dataloader: DataLoader) -> Iterator[tuple[Any, int, int]]:
    """Batches, each with how many of its samples over all ranks are real, and how many this rank has.

    The last batch may be padded with repeats. Samples are counted by the dataloader where that knows them, as the
    tensors of a batch need not have one row for each.
    """
    state, ranks = trainer.accelerator.gradient_state, trainer.args.world_size
    size, left = _sizes(dataloader)
    for batch in dataloader:
        own = size // ranks if size else rows(batch)
        real = min(size, left) if left > 0 else own * ranks  # a sampler may draw samples more than once
        left -= real
        if ranks > 1 and state.end_of_dataloader and state.remainder > 0:
            real = state.remainder
        yield batch, real, own if ranks > 1 else real


def _sizes(dataloader: Any) -> tuple[int, int]:
    """(samples of a full batch over all ranks, samples in all); zeros where a dataloader does not know them."""
    try:
        return dataloader.total_batch_size, dataloader.total_dataset_length
    except (AttributeError, TypeError):
        return 0, 0
