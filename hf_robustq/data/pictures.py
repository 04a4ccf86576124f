"""Images of any mode as 8-bit RGB or grey; a broken one is named by its file and row."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    from PIL import Image

WHITE = 65535  # of 16 bits


def undecoded(dataset: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """The dataset with its images as `picture` takes them."""
    import datasets

    return dataset.with_format(None).cast_column(column, datasets.Image(decode=False))


def picture(stored: Any, row: int, channels: int = 3) -> "Image.Image":
    """The image of one row of `undecoded`: upright, as EXIF says, and as `plain` has it.

    Raises `ValueError`, with the row and its file, for an image that is missing, broken or of a kind that cannot be
    read right.
    """
    import datasets

    if stored is None:
        raise ValueError(f"row {row} has no image: leave it out, or name another column with --image_column_name")
    place = f"row {row} ({stored['path']})" if stored["path"] else f"row {row}"
    try:
        if stored["bytes"] is None and Path(stored["path"]).is_file():  # PIL leaves a broken file open
            stored = {"path": None, "bytes": Path(stored["path"]).read_bytes()}
        return plain(datasets.Image().decode_example(stored), channels)
    except Exception as error:  # each format has its own
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the image of {place} cannot be read ({why}): mend it, or leave the row out") from error


def plain(image: "Image.Image", channels: int = 3) -> "Image.Image":
    """RGB for three channels, L for one (luma of ITU-R 601).

    Choice: what is transparent shows white. 16 bits are divided by 257. Raises `ValueError` for 32-bit numbers, as
    nothing says which of them is white.
    """
    import numpy as np
    from PIL import Image

    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError(f"mode {image.mode} has 32-bit numbers, of which none is known to be white: use 8 or 16 bits")
    if sixteen:
        values = np.array(image)
        values[values == image.info.get("transparency", -1)] = WHITE
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "La":  # the alpha is multiplied in, and PIL converts it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image.convert("RGBA"))
        image = background
    image = image.convert("RGB")
    return image if channels == 3 else image.convert("L")
