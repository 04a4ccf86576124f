"""Small, equally sized images held in memory: batches are cut, flipped and normalised as one tensor."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from hf_robustq.data.draws import draws, shared_epoch


def crop_and_flip(images: Tensor, padding: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Zero-pad every side by `padding`, cut the original size out again at (top, left), mirror where `flip`.

    images [N, C, H, W]; top, left int64 [N] in 0 .. 2 padding; flip bool [N]. Returns [N, C, H, W].
    """
    height, width = images.shape[-2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    crops = windows[torch.arange(len(images)), :, top, left]
    return torch.where(flip[:, None, None, None], crops.flip(-1), crops)


class ImageDataset(Dataset[dict[str, Tensor | int]]):
    """Items {"pixel_values": float32 [C, H, W], "labels": int} from uint8 images [N, C, H, W] and labels [N].

    pixel_values = (image / 255 - mean) / std, each of C numbers. Training items are cropped out of the image padded
    with `padding` zeros (black), and mirrored with probability 1/2 if `flip`; the draw depends only on
    (seed, epoch, index), never on a global generator, the batch or the worker.
    Raises ValueError if counts differ or a label is outside 0 .. num_labels - 1.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        num_labels: int,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        assert images.dtype == torch.uint8 and images.ndim == 4, "uint8 [N, C, H, W]"
        if not images.shape[1] == len(mean) == len(std):
            raise ValueError(f"images of {images.shape[1]} channels need a mean and a std for each, got {mean}, {std}")
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels: give one label per image.")
        check_range(labels, num_labels)
        self._images, self._labels = images, labels.long()
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self._padding, self._flip, self._seed = padding, flip, seed
        self._indices = torch.arange(len(images))
        self._epoch = shared_epoch()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor | int]]:
        """The items of a whole batch; DataLoader calls this instead of `__getitem__` once per item."""
        original = self._indices[torch.as_tensor(indices, dtype=torch.int64)]
        images = self._images[original]
        if self._padding or self._flip:
            images = crop_and_flip(images, self._padding, *self.augmentation(original))
        pixels = images.float().div_(255).sub_(self._mean).div_(self._std)
        labels = self._labels[original].tolist()
        return [{"pixel_values": x, "labels": y} for x, y in zip(pixels.unbind(), labels, strict=True)]

    def augmentation(self, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(top, left, flip) of this epoch for the images with these ORIGINAL indices, int64 [N]."""
        bits = draws(self._seed, int(self._epoch), original.numpy(), 3)
        offsets = bits[:, :2] % np.uint64(2 * self._padding + 1)
        top, left = torch.from_numpy(offsets.astype(np.int64)).unbind(1)
        flip = torch.from_numpy(bits[:, 2] >> np.uint64(63) == 1)
        return top, left, flip & self._flip

    def set_epoch(self, epoch: int) -> None:
        """Draw a new augmentation for every image; running DataLoader workers follow."""
        self._epoch.fill_(epoch)

    def evaluation(self) -> "ImageDataset":
        """The same images, not copied, without augmentation."""
        view = copy.copy(self)
        view._padding, view._flip = 0, False
        return view

    def select(self, indices: Sequence[int] | Tensor) -> "ImageDataset":
        """The images at these positions, not copied, augmented as in the whole set; with its own epoch."""
        view = copy.copy(self)
        view._indices = self._indices[torch.as_tensor(indices, dtype=torch.int64)]
        view._epoch = shared_epoch(int(self._epoch))
        return view


def check_range(labels: Tensor, num_labels: int) -> None:
    """ValueError if a label is outside 0 .. num_labels - 1."""
    outside = ((labels < 0) | (labels >= num_labels)).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"label {int(labels[row])} is outside 0..{num_labels - 1} (row {row}, {len(outside)} such labels): give "
            "the model more labels, or choose a split that is labelled (--train_split, --eval_split)."
        )
