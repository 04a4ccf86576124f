"""Decode a `datasets.Dataset` of small images once, into one tensor."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hf_robustq.data.labels import class_numbers
from hf_robustq.data.pictures import picture, undecoded

if TYPE_CHECKING:
    import datasets


def decode_images(
    dataset: "datasets.Dataset", image: str, label: str, image_size: int | None = None, channels: int = 3
) -> tuple[Tensor, Tensor]:
    """(images uint8 [N, C, H, W], labels int64 [N]) of the columns `image` and `label`: RGB, or grey for one channel.

    `image_size` resizes each image to a square (bilinear, antialiased). Shows a progress bar on a terminal.
    Raises ValueError if the images differ in size and no `image_size` is given, and for a row without a label or
    with an image that cannot be read.
    """
    from PIL.Image import Resampling
    from tqdm import tqdm

    labels = class_numbers(dataset, label)
    images: Tensor | None = None
    column = undecoded(dataset.select_columns([image]), image)
    for index, row in enumerate(tqdm(column, desc="decoding images", disable=None)):
        one = picture(dict(row)[image], index, channels)
        if image_size is not None:
            one = one.resize((image_size, image_size), Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(one)).view(*reversed(one.size), channels).permute(2, 0, 1)
        if images is None:
            images = torch.empty(len(dataset), *pixels.shape, dtype=torch.uint8)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"image {index} is {pixels.shape[2]}x{pixels.shape[1]} but the first is "
                f"{images.shape[3]}x{images.shape[2]}: give an image size to resize them all to."
            )
        images[index] = pixels
    if images is None:
        raise ValueError("the dataset has no rows: choose another split.")
    return images, labels
