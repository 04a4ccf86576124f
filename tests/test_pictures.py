"""Images of every mode of PIL against the formulas of their colour spaces; broken ones are named."""

import colorsys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_robustq.data import LazyImageDataset, decode_images, image_datasets
from hf_robustq.data.pictures import picture, plain

BYTES = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
GREY, RGB, ALPHA = BYTES[..., 0], BYTES[..., :3].astype(float), BYTES[..., 3:] / 255
DEEP = np.random.default_rng(1).integers(0, 2**16, (6, 5), dtype=np.uint16)
PALETTE = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(float)[..., None], 3, -1)


def on_white(values: np.ndarray, alpha: np.ndarray = ALPHA) -> np.ndarray:
    return values * alpha + 255 * (1 - alpha)


def from_hsv() -> np.ndarray:
    rows = [[colorsys.hsv_to_rgb(*(value / 255)) for value in row] for row in BYTES[..., :3]]
    return 255 * np.array(rows)


def from_ycbcr() -> np.ndarray:
    """JFIF."""
    y, cb, cr = RGB[..., 0], RGB[..., 1] - 128, RGB[..., 2] - 128
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255)


def from_lab(lightness: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CIELAB under D50 to sRGB (IEC 61966-2-1), with Bradford's adaptation to D65."""
    y = (lightness / 255 * 100 + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1, 0.82521]
    red, green, blue = [3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]
    linear = (xyz @ np.array([red, green, blue]).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def of(mode: str, values: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (5, 6), np.ascontiguousarray(values).tobytes())


def with_palette(mode: str, values: np.ndarray) -> Image.Image:
    image = of(mode, values)
    image.putpalette(PALETTE.tobytes())
    return image


def clear(image: Image.Image, value: object) -> Image.Image:
    """As a PNG says that one value is transparent."""
    image.info["transparency"] = value
    return image


def premultiplied() -> Image.Image:
    return of("RGBA", BYTES).convert("RGBa")


LAB = np.stack([GREY // 2 + 64, *(BYTES[..., i] // 16 - 8 for i in (1, 2))], -1)  # near grey: all inside sRGB
SIGNED = LAB.astype(np.int8)[..., 1:].astype(float)
CMYK = (255 - RGB) * (255 - BYTES[..., 3:]) / 255
TWO = np.stack([GREY, BYTES[..., 3]], -1)

MODES = {
    "1": (Image.fromarray(GREY > 127), grey(np.where(GREY > 127, 255, 0)), 0),
    "L": (of("L", GREY), grey(GREY), 0),
    "LA": (of("LA", TWO), on_white(grey(GREY)), 1),
    "La": (of("LA", TWO).convert("La"), on_white(grey(GREY)), 2),
    "P": (with_palette("P", GREY), PALETTE[GREY].astype(float), 0),
    "PA": (with_palette("PA", TWO), on_white(PALETTE[GREY].astype(float)), 1),
    "RGB": (of("RGB", BYTES[..., :3]), RGB, 0),
    "RGBA": (of("RGBA", BYTES), on_white(RGB), 1),
    "RGBa": (premultiplied(), on_white(RGB), 2),
    "RGBX": (of("RGBX", BYTES), RGB, 0),
    "CMYK": (of("CMYK", BYTES), CMYK, 1),
    "YCbCr": (of("YCbCr", BYTES[..., :3]), from_ycbcr(), 2),
    "LAB": (of("LAB", LAB), from_lab(LAB[..., 0].astype(float), SIGNED[..., 0], SIGNED[..., 1]), 3),
    "HSV": (of("HSV", BYTES[..., :3]), from_hsv(), 2),
    "I;16": (of("I;16", DEEP.astype("<u2")), grey(DEEP * (255 / 65535)), 0.51),
    "I;16L": (of("I;16L", DEEP.astype("<u2")), grey(DEEP * (255 / 65535)), 0.51),
    "I;16B": (of("I;16B", DEEP.astype(">u2")), grey(DEEP * (255 / 65535)), 0.51),
    "I;16N": (of("I;16N", DEEP), grey(DEEP * (255 / 65535)), 0.51),
    "I": None,
    "F": None,
}


def test_every_mode_of_pil_is_here() -> None:
    assert {*Image.MODES} <= {*MODES}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_right_or_refused(mode: str) -> None:
    if MODES[mode] is None:
        with pytest.raises(ValueError, match=f"mode {mode} has 32-bit numbers"):
            plain(Image.new(mode, (5, 6)))
        return
    image, expected, most = MODES[mode]
    assert image.mode == mode
    image.load()
    assert np.abs(np.asarray(plain(image), float) - expected).max() <= most
    luma = expected @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert np.abs(np.asarray(plain(image, channels=1), float) - luma).max() <= most + 1


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (clear(of("L", GREY), int(GREY[2, 2])), np.where(grey(GREY) == GREY[2, 2], 255, grey(GREY))),
        (clear(with_palette("P", GREY), int(GREY[2, 2])), None),
        (clear(of("RGB", BYTES[..., :3]), tuple(map(int, RGB[2, 2]))), None),
        (clear(of("I;16", DEEP), int(DEEP[2, 2])), np.where(grey(DEEP) == DEEP[2, 2], 255, grey(DEEP * (255 / 65535)))),
    ],
    ids=["L", "P", "RGB", "I;16"],
)
def test_a_transparent_value_is_white(image: Image.Image, expected: np.ndarray | None) -> None:
    found = np.asarray(plain(image), float)
    assert (found[2, 2] == 255).all() and not (found == 255).all()
    if expected is not None:
        assert np.abs(found - expected).max() <= 0.51


def saved(folder: Path, kind: str, *pictures: Image.Image) -> datasets.Dataset:
    paths = []
    for i, image in enumerate(pictures):
        paths.append(str(folder / f"{i}.{kind}"))
        image.save(paths[-1])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": paths, "label": [0] * len(paths)}, features=features)


def lazy(dataset: datasets.Dataset, size: int = 8, channels: int = 3) -> LazyImageDataset:
    how = {"num_labels": 1, "image_size": size, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    return LazyImageDataset(dataset, "image", "label", **how).evaluation()


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_files_of_16_bits(kind: str, tmp_path: Path) -> None:
    ramp = np.arange(0, 2**16, 2**12, dtype=np.uint16).reshape(4, 4)
    image = Image.fromarray(ramp)
    dataset = saved(tmp_path, kind, image)
    pixels, _ = decode_images(dataset, "image", "label")
    assert np.abs(pixels[0, 0].numpy() - ramp * (255 / 65535)).max() <= 0.51
    wide = Image.fromarray(np.repeat(np.repeat(ramp, 8, 0), 8, 1))
    values = lazy(saved(tmp_path, kind, wide), 28)[0]["pixel_values"]
    assert values.max() < 0.95 and values.mean() == pytest.approx(ramp.mean() / 65535, abs=0.02)


def test_images_are_upright_and_grey_models_read_grey(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    of("L", GREY).save(tmp_path / "turned.png", exif=exif)
    stored = {"path": str(tmp_path / "turned.png"), "bytes": None}
    assert np.array_equal(np.asarray(picture(stored, 0, channels=1)), np.rot90(GREY, -1))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "turned.png")], "label": [0]}, features=features)
    train, evaluation = image_datasets(dataset, dataset, "image", "label", ["a"], image_size=6, mean=(0.5,), std=(0.5,))
    assert train[0]["pixel_values"].shape == evaluation[0]["pixel_values"].shape == (1, 6, 6)
    pixels, _ = decode_images(dataset, "image", "label", channels=1)
    assert torch.equal(pixels[0, 0], torch.from_numpy(np.rot90(GREY, -1).copy()))
    assert lazy(dataset, 4, channels=1)[0]["pixel_values"].shape == (1, 4, 4)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    dataset = saved(tmp_path, "png", noise, noise, noise)
    whole = (tmp_path / "1.png").read_bytes()
    for content, why in ((whole[: len(whole) // 2], ""), (b"no image", "cannot identify")):
        (tmp_path / "1.png").write_bytes(content)
        for read in (lambda: decode_images(dataset, "image", "label"), lambda: lazy(dataset)[1]):
            with pytest.raises(ValueError, match=r"the image of row 1 \(.*1.png\) cannot be read \(.*" + why) as info:
                read()
            assert "\n" not in str(info.value)
    Image.new("F", (8, 8)).save(tmp_path / "1.tiff")
    with pytest.raises(ValueError, match="row 0 .*1.tiff.*mode F has 32-bit numbers"):
        picture({"path": str(tmp_path / "1.tiff"), "bytes": None}, 0)
    empty = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=dataset.features)
    for read in (lambda: decode_images(empty, "image", "label"), lambda: lazy(empty)[0]):
        with pytest.raises(ValueError, match="row 0 has no image: leave it out, or name another column with --image"):
            read()
