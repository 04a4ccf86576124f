"""Image data whose augmentation is a pure function of (seed, epoch, index): a resumed run is exact."""

from hf_robustq.data.decode import decode_images
from hf_robustq.data.images import ImageDataset
from hf_robustq.data.lazy_images import LazyImageDataset
from hf_robustq.data.sklearn_digits import digits
from hf_robustq.data.splits import find_columns, image_datasets, load_image_splits

__all__ = [
    "ImageDataset",
    "LazyImageDataset",
    "decode_images",
    "digits",
    "find_columns",
    "image_datasets",
    "load_image_splits",
]
