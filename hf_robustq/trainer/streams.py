"""Training data that can be read only once."""

from collections.abc import Iterator
from typing import Any


def check_restarts(dataset: Any) -> None:
    """Raise `ValueError` for a stream that iterating uses up: what calibration reads, training would miss.

    It is its own iterator, or holds one: a generator, an open file.
    """
    if isinstance(dataset, Iterator) or any(isinstance(value, Iterator) for value in vars(dataset).values()):
        raise ValueError(
            f"calibration would use up rows of {type(dataset).__name__}, which can be read only once: pass a "
            "calibration_dataset"
        )
