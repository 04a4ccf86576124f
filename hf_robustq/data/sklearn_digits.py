"""scikit-learn's embedded handwritten digits: real images that need no download."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hf_robustq.data.images import ImageDataset

TEST_IMAGES = 360
BRIGHTEST = 16  # the 8x8 images count ink in 0..16


def digits(
    image_size: int = 32,
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    seed: int = 0,
) -> tuple[ImageDataset, ImageDataset, list[str]]:
    """(train, eval, labels): 1,437 and 360 images of ten digits, 8x8 upsampled (bilinear) to `image_size`.

    The split is stratified and fixed. Training images shift by up to 1/8 of their size (by `seed`), and are
    never mirrored.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    ink = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) * (255 / BRIGHTEST)
    grey = F.interpolate(ink, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = grey.round().to(torch.uint8).expand(-1, len(mean), -1, -1).contiguous()
    labels = torch.tensor(classes, dtype=torch.int64)
    everyone = range(len(labels))
    train, test = train_test_split(everyone, test_size=TEST_IMAGES, stratify=classes, random_state=0)
    both = ImageDataset(images, labels, num_labels=10, mean=mean, std=std, padding=image_size // 8, seed=seed)
    return both.select(list(train)), both.select(list(test)).evaluation(), [str(digit) for digit in range(10)]
