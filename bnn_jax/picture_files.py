"""Files of pictures, of any size and format that Pillow opens, as 8-bit pixels: to train on, and to classify."""

import functools
import io
from typing import Any

import numpy as np

# What a transparent pixel shows.
BACKGROUND = "white"
# The published programs evaluate 224 of 256 pixels.
EVALUATION_MARGIN = 256 / 224


@functools.cache
def formats() -> dict[str, list[str]]:
    """The formats that are decoded, each with the ends of its files' names: all that Pillow opens by itself."""
    from PIL import Image

    Image.init()
    # For EPS Pillow would run Ghostscript, on a file that may come from anywhere.
    found: dict[str, list[str]] = {name: [] for name in Image.OPEN if name != "EPS"}
    for suffix, name in Image.registered_extensions().items():
        found.get(name, []).append(suffix)
    return found


@functools.cache
def suffixes() -> frozenset[str]:
    """The ends of pictures' names, in small letters with their dot."""
    return frozenset(suffix for of_format in formats().values() for suffix in of_format)


def open_picture(file: Any) -> Any:
    """A Pillow image of which only the header is read; to be closed.

    Args:
      file: a path, or a file's content in memory.

    Raises:
      Exception: of Pillow's many kinds, where it is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=list(formats()))
    except UnidentifiedImageError:
        # Pillow's own message names an object in memory.
        raise ValueError("cannot identify its format") from None


def decode(content: bytes, *, upright: bool = False, mode: str = "RGB") -> Any:
    """The bytes of a picture's file as a Pillow image.

    Gray, palette and CMYK pictures are converted. Of 16 bits the higher eight are kept, transparent pixels are mixed
    with white.

    Args:
      content: the bytes.
      upright: whether a picture is turned as its file says that the camera was held; the published programs do not.
      mode: 'RGB' or 'L'.

    Raises:
      Exception: of Pillow's many kinds, where it is damaged or no picture; ValueError for pixels of 32 bits.
    """
    from PIL import Image, ImageOps

    if not content:
        raise ValueError("the file is empty")
    with open_picture(io.BytesIO(content)) as image:
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
    image = _of_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
    # ``convert`` would copy what needs no conversion.
    return image if image.mode == mode else image.convert(mode)


def _of_eight_bits(image: Any) -> Any:
    """Gray pictures of 16 bits, which Pillow's own conversion would cut off at 255; of colours it reads 8 bits."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits: accepted are 8 and 16")
    return image


def covering(image: Any, height: int, width: int) -> Any:
    """A Pillow image resized, antialiased, to the least size of its own shape that is ``height`` x ``width`` or larger.

    For a square that is its shorter side. The other side is cut off to an integer.
    """
    from PIL import Image

    if image.width * height < image.height * width:
        size = (width, int(width * image.height / image.width))
    else:
        size = (int(height * image.width / image.height), height)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def central_part(image: Any, height: int, width: int, *, margin: float) -> np.ndarray:
    """The middle of a Pillow image as it is evaluated: uint8 (height, width, 3), of a gray image (height, width).

    Args:
      image: the picture.
      height: rows of the result.
      width: its columns.
      margin: how much larger than the result the picture is resized before its middle is cut out.
    """
    image = covering(image, round(height * margin), round(width * margin))
    # Half a pixel goes to the even offset, as Python rounds.
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def evaluation_image(
    content: bytes, size: int, *, margin: float = EVALUATION_MARGIN, upright: bool = False
) -> np.ndarray:
    """The picture as it is evaluated: uint8 (size, size, 3), the centre of the resized one (224 of 256)."""
    return central_part(decode(content, upright=upright), size, size, margin=margin)
