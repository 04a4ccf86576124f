"""Sounds as a feature extractor makes them, with a class or the tokens of what is said."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_robustq.data.labels import check_filled, renumbered
from hf_robustq.data.splits import label_column, label_names, load_splits, of_kinds, pick, text_column
from hf_robustq.data.texts import only

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def sound_splits(
    name_or_folder: str,
    rate: int,
    *,
    audio: str | None = None,
    text: Sequence[str] | None = None,
    label: str | None = None,
    known: Sequence[str] = (),
    train_split: str = "train",
    eval_split: str | None = None,
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """(train, eval) with the columns audio and target: a text where `text` is given, else a class.

    A class is the number of an output of the model, of which `known` has the names.

    audio: the one column of type Audio, brought to `rate` samples a second, else the one of numbers, taken to be of
    that rate; or the one that is named. text: its name, or [] for the one column of strings.
    """
    import datasets

    both = load_splits(name_or_folder, None, train_split, eval_split)
    features = both[0].features
    sounds = [name for name, kind in features.items() if isinstance(kind, datasets.Audio) or _is_decoded(kind)]
    numbers = of_kinds(features, "list of float32", "list of float64")
    audio = pick(features, "--audio_column_name", audio, "Audio or list of float", sounds, numbers)
    if text is None:
        target = label_column(features, label)
        both = renumbered(both, target, label_names(both[0], target), known)
    else:
        target = text_column(features, only(text))
        check_filled(both, {"--text_column_name": target})
    check_filled(both, {"--audio_column_name": audio})
    both = [split.select_columns([audio, target]) for split in both]
    if isinstance(features[audio], datasets.Audio):
        both = [split.cast_column(audio, datasets.Audio(sampling_rate=rate)) for split in both]
    elif audio in numbers:
        logger.warning("%s is taken to have %d samples a second, as the model does", audio, rate)
    train, evaluation = (split.rename_columns({audio: "audio", target: "target"}) for split in both)
    return train, evaluation


def _is_decoded(kind: Any) -> bool:
    return isinstance(kind, dict) and {"array", "sampling_rate"} <= kind.keys()


@dataclass
class SoundCollator:
    """Batches of the rows of `sound_splits`, as `extractor` makes them.

    tokenizer   of the targets, where they are texts
    start       the decoder's first token: the model puts it before the labels itself
    """

    extractor: Any
    tokenizer: Any = None
    start: int | None = None
    _told: bool = field(default=False, init=False)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        how = inspect.signature(self.extractor.__call__).parameters
        padding = {"padding": True} if "padding" in how and how["padding"].default is False else {}
        sounds = [self._samples(row["audio"]) for row in rows]
        rate = self.extractor.sampling_rate
        made = self.extractor(sounds, sampling_rate=rate, return_tensors="pt", **padding)
        return {**made, "labels": self._labels([row["target"] for row in rows])}

    def _samples(self, sound: Any) -> np.ndarray:
        rate, limit = self.extractor.sampling_rate, getattr(self.extractor, "n_samples", None)
        if isinstance(sound, Mapping) and sound["sampling_rate"] != rate:
            raise ValueError(
                f"a sound has {sound['sampling_rate']} samples a second, and the model takes {rate}: cast the column "
                f"to datasets.Audio(sampling_rate={rate})"
            )
        samples = np.asarray(sound if isinstance(sound, (list, np.ndarray)) else sound["array"], np.float32)
        if limit and len(samples) > limit and not self._told:
            self._told = True
            logger.warning("sounds are cut at %g seconds, as the model has it: split longer ones", limit / rate)
        return samples

    def _labels(self, targets: list[Any]) -> torch.Tensor:
        if self.tokenizer is None:
            return torch.tensor(targets)
        made = self.tokenizer(targets, padding=True, return_tensors="pt")
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return labels[:, 1:] if self.start is not None and bool((labels[:, 0] == self.start).all()) else labels
