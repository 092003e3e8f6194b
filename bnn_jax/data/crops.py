"""From a stored picture of any size to the square a network sees: where it is cropped, and how it is resized.

Evaluation is Pillow's: the shorter side is resized, antialiased, and the centre cropped. Training crops at random and
resizes the crop by Pillow or by OpenCV. OpenCV decodes to the same pixels and is faster, but resizes to other ones:
where the crop shrinks it averages areas (near to Pillow's antialiased triangle), where it grows it interpolates. Both
crop before they resize, so that no pixel outside of the crop has any weight, as in the published programs.

Pillow's ``draft`` (decoding at a fraction of the size) is not used: it gains under a tenth, since few crops are twice
as large as what they are resized to.
"""

import functools
import importlib
import importlib.util
import io
import math
from typing import Any, NamedTuple

import numpy as np

from bnn_jax.errors import DataError

ATTEMPTS = 10
DRAWS_PER_ATTEMPT = 4  # area, aspect ratio, top, left
NUM_DRAWS = ATTEMPTS * DRAWS_PER_ATTEMPT
AREA_RANGE = (0.08, 1.0)  # share of the picture's area
ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height

# The published programs crop 224 of 256.
EVALUATION_MARGIN = 256 / 224

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


class Box(NamedTuple):
    """Part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_resized_crop_box(height: int, width: int, bits: np.ndarray) -> Box:
    """A random part of a picture: a share of 8 % to 100 % of its area, of aspect ratio 3/4 to 4/3 (log-uniform).

    The first of ten draws that fits is taken; if none fits, the largest central part of an accepted aspect ratio.

    Args:
      height: height of the picture in pixels.
      width: width of the picture in pixels.
      bits: uint64 (NUM_DRAWS,), random.

    Reference: Szegedy et al. 2015, section 6; release: every ImageNet recipe of the four methods.
    """
    # The 53 highest bits: exactly the numbers that a float64 in [0, 1) holds.
    uniform = (bits >> np.uint64(11)).astype(np.float64).reshape(ATTEMPTS, DRAWS_PER_ATTEMPT) * 2.0**-53
    for area_draw, aspect_draw, top_draw, left_draw in uniform.tolist():
        area = height * width * _between(AREA_RANGE, area_draw)
        aspect = math.exp(_between((math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])), aspect_draw))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = int(top_draw * (height - box_height + 1)), int(left_draw * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    return _largest_central_box(height, width)


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def _largest_central_box(height: int, width: int) -> Box:
    box_height, box_width = height, width
    if width / height < ASPECT_RANGE[0]:
        box_height = round(width / ASPECT_RANGE[0])
    elif width / height > ASPECT_RANGE[1]:
        box_width = round(height * ASPECT_RANGE[1])
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def evaluation_side(size: int) -> int:
    """What the shorter side is resized to before the centre of ``size`` pixels is cropped: 256 for 224."""
    return round(size * EVALUATION_MARGIN)


def shorter_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) after the shorter side is resized to ``side``; the longer one is cut off to an integer."""
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def central_box(height: int, width: int, size: int) -> Box:
    """The central square of ``size`` pixels; half a pixel goes to the even offset, as Python rounds."""
    return Box(round((height - size) / 2.0), round((width - size) / 2.0), size, size)


def decode(content: bytes | np.ndarray) -> Any:
    """A stored picture as a Pillow image of mode RGB; gray, palette and CMYK pictures are converted.

    Args:
      content: the bytes of a file (JPEG, PNG, WebP), or pixels uint8 (H, W, 3).
    """
    from PIL import Image

    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
        return image.convert("RGB")


def resize_shorter_side(image: Any, side: int) -> Any:
    """A Pillow image with its shorter side resized to ``side``, antialiased; the same image if it has that side."""
    from PIL import Image

    height, width = shorter_side_size(image.height, image.width, side)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def evaluation_image(content: bytes | np.ndarray, size: int) -> np.ndarray:
    """The picture as it is evaluated: uint8 (size, size, 3); ``content`` as for ``decode``."""
    image = resize_shorter_side(decode(content), evaluation_side(size))
    top, left, height, width = central_box(image.height, image.width, size)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def training_image(content: bytes | np.ndarray, size: int, bits: np.ndarray, *, decoder: str) -> np.ndarray:
    """A random part of the picture, resized.

    Args:
      content: as for ``decode``.
      size: side of the result in pixels.
      bits: uint64 (NUM_DRAWS,), random.
      decoder: 'pillow' or 'opencv'.

    Returns:
      uint8 (size, size, 3).
    """
    return (_train_with_opencv if decoder == "opencv" else _train_with_pillow)(content, size, bits)


def _train_with_pillow(content: bytes | np.ndarray, size: int, bits: np.ndarray) -> np.ndarray:
    from PIL import Image

    image = decode(content)
    top, left, height, width = random_resized_crop_box(image.height, image.width, bits)
    part = image.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def _train_with_opencv(content: bytes | np.ndarray, size: int, bits: np.ndarray) -> np.ndarray:
    cv2 = opencv()
    pixels = content if isinstance(content, np.ndarray) else _decode_with_opencv(content)
    top, left, height, width = random_resized_crop_box(*pixels.shape[:2], bits)
    shrinks = height >= size and width >= size
    part = pixels[top : top + height, left : left + width]
    resized = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    # Decoded pictures have the channels in the other order; the crop is turned round, which is less than the picture.
    return resized if isinstance(content, np.ndarray) else cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)


def _decode_with_opencv(content: bytes) -> np.ndarray:
    """Pixels uint8 (H, W, 3), channels blue, green, red. Pillow does what OpenCV cannot, and finds what is damaged."""
    cv2 = opencv()
    # Unlike Pillow, OpenCV would turn a picture whose file says that the camera was held upright.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    return np.asarray(decode(content))[:, :, ::-1] if pixels is None else pixels


@functools.cache
def opencv() -> Any:
    """The module cv2, kept to one thread: the pictures of a batch are what is worked on in parallel.

    Raises:
      DataError: it is not installed.
    """
    if importlib.util.find_spec("cv2") is None:
        raise DataError(
            "config.data.decoder='opencv': OpenCV is not installed; `pip install 'bnn_jax[fast]'`, or choose 'pillow'"
        )
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    return cv2
