"""ImageNet-sized data: images stay encoded in the `datasets.Dataset` and are decoded on access."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_robustq.data.draws import draws, shared_epoch
from hf_robustq.data.images import check_range
from hf_robustq.data.labels import class_numbers
from hf_robustq.data.pictures import picture, undecoded

if TYPE_CHECKING:
    import datasets

EVAL_CROP = 0.875  # the share of the resized image's side that ImageNet evaluation keeps: 224 of 256


class LazyImageDataset(Dataset[dict[str, Tensor | int]]):
    """Items {"pixel_values": float32 [C, S, S], "labels": int}, S = `image_size`, of a `datasets.Dataset`.

    Training: RandomResizedCrop(S) and RandomHorizontalFlip, drawn from (seed, epoch, index) alone.
    Evaluation: Resize(S / 0.875) of the shorter side and CenterCrop(S).
    Both end with (image / 255 - mean) / std, of as many channels C as `mean` has: 3, or 1 for grey.
    `interpolation` is torchvision's name: "bilinear", "bicubic", ...
    Raises ValueError if a label is outside 0 .. num_labels - 1, and on access for an image that cannot be read.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        image: str,
        label: str,
        *,
        num_labels: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bilinear",
        seed: int = 0,
    ) -> None:
        from torchvision.transforms import InterpolationMode, v2

        mode = InterpolationMode(interpolation)
        to_float = v2.ToDtype(torch.float32, scale=True)
        finish = [v2.PILToTensor(), to_float, v2.Normalize(list(mean), list(std))]
        self._train_transform = v2.Compose(
            [v2.RandomResizedCrop(image_size, interpolation=mode), v2.RandomHorizontalFlip(), *finish]
        )
        self._eval_transform = v2.Compose(
            [v2.Resize(int(image_size / EVAL_CROP), interpolation=mode), v2.CenterCrop(image_size), *finish]
        )
        self._images = undecoded(dataset.select_columns([image]), image)
        self._labels = class_numbers(dataset, label)
        check_range(self._labels, num_labels)
        self._column, self._seed, self._augment, self._channels = image, seed, True, len(mean)
        self._indices = torch.arange(len(dataset))
        self._epoch = shared_epoch()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        original = int(self._indices[index])
        image = picture(self._images[original][self._column], original, self._channels)
        return {"pixel_values": self._transform(image, original), "labels": int(self._labels[original])}

    def _transform(self, image: object, original: int) -> Tensor:
        if not self._augment:
            return self._eval_transform(image)
        # torchvision draws from torch's CPU generator and takes no other. Seed that one alone:
        # torch.manual_seed would also reseed the GPU's, which fork_rng(devices=[]) does not restore.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draws(self._seed, int(self._epoch), [original], 1).item())
            return self._train_transform(image)

    def set_epoch(self, epoch: int) -> None:
        """Draw a new augmentation for every image; running DataLoader workers follow."""
        self._epoch.fill_(epoch)

    def evaluation(self) -> "LazyImageDataset":
        """The same images with the evaluation transform."""
        view = copy.copy(self)
        view._augment = False
        return view

    def select(self, indices: Sequence[int] | Tensor) -> "LazyImageDataset":
        """The images at these positions, each augmented as in the whole set; with its own epoch."""
        view = copy.copy(self)
        view._indices = self._indices[torch.as_tensor(indices, dtype=torch.int64)]
        view._epoch = shared_epoch(int(self._epoch))
        return view
