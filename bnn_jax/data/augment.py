"""What happens to pictures and images before a network sees them: on the host to pictures, on the device to batches.

On the device: augmentation and normalisation, pure functions of uint8 images and a key, used inside jit. The order is
that of the published recipes: zero padding of the raw pixels, random crop, change of light, horizontal flip, then
normalisation (a padded pixel therefore becomes ``-mean / std``, not 0).

On the host: from a stored picture of any size to a square. Evaluation is Pillow's: the shorter side is resized,
antialiased, and the centre cropped. Training crops at random and resizes the crop by Pillow or by OpenCV. OpenCV
decodes to the same pixels and is faster, but resizes to other ones: where the crop shrinks it averages areas (near to
Pillow's antialiased triangle), where it grows it interpolates. Both crop before they resize, so that no pixel outside
of the crop has any weight, as in the published programs.

Pillow's ``draft`` and ``reducing_gap`` (decoding or shrinking at a fraction of the size first) are not used: they gain
about a tenth, since few crops are twice as large as what they are resized to, and change the pixels.
"""

import functools
import importlib
import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.data.color import jitter
from bnn_jax.errors import DataError
from bnn_jax.picture_files import decode

RANDOM_CROPS = "random_resized_crop_flip"  # of pictures in their own size, which are therefore read while training
AUGMENTATIONS = ("pad_crop_flip", "pad_crop", "edge_crop_flip", RANDOM_CROPS, "none")
LIGHTINGS = ("none", "release", "paper")

# Stream of random numbers apart from the crops': a batch is cropped in the same way with and without other light.
LIGHTING, JITTER = 1, 2

# How the three colours of ImageNet's pixels (0 to 1) vary together: standard deviations along the axes (columns).
LIGHT_DEVIATIONS = (0.2175, 0.0188, 0.0045)
LIGHT_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
LIGHT_STRENGTH = 0.1

PLAIN_FORMATS = (b"\xff\xd8", b"P6")  # how JPEG and PPM begin

ATTEMPTS = 10
DRAWS_PER_ATTEMPT = 4  # area, aspect ratio, top, left
NUM_DRAWS = ATTEMPTS * DRAWS_PER_ATTEMPT
AREA_RANGE = (0.08, 1.0)  # share of the picture's area
ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height


def prepare_train(
    images: jax.Array,
    key: jax.Array,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: str,
    pad: int,
    lighting: str = "none",
    color_jitter: float = 0.0,
) -> jax.Array:
    """Augments and normalises a training batch.

    Args:
      images: uint8 (N, H, W, C).
      key: random key of this step; every image gets its own offsets and flip.
      mean: mean of pixels / 255, per channel.
      std: standard deviation of pixels / 255, per channel.
      augment: 'pad_crop_flip', 'pad_crop', 'edge_crop_flip' (padding repeats the border), 'random_resized_crop_flip'
        (the images are cropped already: they are only flipped) or 'none'.
      pad: zero padding in pixels per side.
      lighting: 'none', 'release' or 'paper', see ``change_light``.
      color_jitter: strength of ``color.jitter``; 0 leaves the colours alone.

    Returns:
      float32 (N, H, W, C).

    Raises:
      ValueError: the augmentation or the lighting is unknown.
    """
    if lighting not in LIGHTINGS:
        raise ValueError(f"lighting {lighting!r}: accepted are {', '.join(LIGHTINGS)}")
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment {augment!r}: accepted are {', '.join(AUGMENTATIONS)}")
    if augment == RANDOM_CROPS:
        _, flips = draw_crops(key, images.shape[0], pad=0, flip=True)
        images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    elif augment != "none":
        offsets, flips = draw_crops(key, images.shape[0], pad=pad, flip=augment.endswith("_flip"))
        images = crop_and_flip(images, offsets, flips, pad=pad, repeat_edge=augment == "edge_crop_flip")
    if lighting != "none":
        # An image's light is the same at all its pixels, so that it makes no difference to have flipped it before.
        draws = jax.random.normal(jax.random.fold_in(key, LIGHTING), (images.shape[0], 3))
        images = change_light(images, draws, in_pixel_units=lighting == "paper")
    if color_jitter:
        images = jitter(images, jax.random.fold_in(key, JITTER), color_jitter)
    return prepare_eval(images, mean=mean, std=std)


def draw_crops(key: jax.Array, num_images: int, *, pad: int, flip: bool) -> tuple[jax.Array, jax.Array]:
    """Draws where each image is cropped and whether it is flipped.

    Args:
      key: random key.
      num_images: number of images N.
      pad: zero padding in pixels per side.
      flip: whether half of the images, on average, are flipped.

    Returns:
      Offsets int32 (N, 2), (row, column) of the crop in the padded image, uniform in [0, 2 * pad]; flips bool (N,).
    """
    offset_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(offset_key, (num_images, 2), 0, 2 * pad + 1, jnp.int32)
    flips = jax.random.bernoulli(flip_key, 0.5, (num_images,)) if flip else jnp.zeros((num_images,), bool)
    return offsets, flips


def crop_and_flip(
    images: jax.Array, offsets: jax.Array, flips: jax.Array, *, pad: int, repeat_edge: bool = False
) -> jax.Array:
    """Crops each image, padded with zeros, back to its size, then flips it horizontally where asked.

    The padded image is never made: row and column of every output pixel's source are computed, one gather reads them,
    and sources outside the image give 0.

    Args:
      images: (N, H, W, C).
      offsets: int (N, 2), (row, column) of the crop in the padded image, in [0, 2 * pad].
      flips: bool (N,).
      pad: padding in pixels per side.
      repeat_edge: pads with the pixels of the border instead of zeros.

    Returns:
      (N, H, W, C), dtype of ``images``.
    """
    _, height, width, _ = images.shape
    columns = jnp.arange(width)[None, :]
    columns = jnp.where(flips[:, None], columns[:, ::-1], columns)
    columns = columns + offsets[:, 1:] - pad
    rows = jnp.arange(height)[None, :] + offsets[:, :1] - pad
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    # A batched gather (vmap) rather than one over (image, row, column): it stays local to each device's images.
    cropped = jax.vmap(lambda image, row, column: image[row[:, None], column[None, :]])(
        images, jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    )
    if repeat_edge:
        return cropped
    return jnp.where(inside[..., None], cropped, jnp.zeros((), images.dtype))


def change_light(images: jax.Array, draws: jax.Array, *, in_pixel_units: bool) -> jax.Array:
    """Adds to every pixel of an image the same random colour, drawn along the axes in which colours vary.

    Forward: ``delta = V (deviations * 0.1 * draws)`` for pixels in [0, 1]. ``in_pixel_units`` (config 'paper') adds
    ``255 * delta``, clipped to [0, 255]. Otherwise (config 'release') ``delta`` itself is added to the pixels of 0 to
    255, then clipped and cut off to integers, as the release does: |delta| is about 0.01, so what is left of it is that
    a channel with a negative delta gets darker by one.

    Args:
      images: uint8 (N, H, W, 3).
      draws: (N, 3), standard normal.
      in_pixel_units: whether delta is scaled as pixels are.

    Returns:
      (N, H, W, 3), float32 with ``in_pixel_units``, else uint8.

    Reference: Krizhevsky et al. 2012, section 4.1; release: liuzechun/ReActNet, yikaiw/SNN: class Lighting.
    """
    axes, deviations = jnp.asarray(LIGHT_AXES), LIGHT_STRENGTH * jnp.asarray(LIGHT_DEVIATIONS)
    # Three products and not a matrix product, which an accelerator may round to fewer digits.
    delta = jnp.sum(axes[None] * (deviations[None] * draws)[:, None, :], axis=-1)[:, None, None, :]
    if in_pixel_units:
        return jnp.clip(images.astype(jnp.float32) + 255 * delta, 0.0, 255.0)
    # Cutting off integer + delta is integer + floor(delta), without the rounding of the sum.
    return jnp.clip(images.astype(jnp.int32) + jnp.floor(delta).astype(jnp.int32), 0, 255).astype(jnp.uint8)


def prepare_eval(images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Normalises a batch: ``(pixels / 255 - mean) / std``, (N, H, W, C) of 0 to 255 -> float32 (N, H, W, C)."""
    mean_of_channel, std_of_channel = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean_of_channel) / std_of_channel


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


def training_image(content: bytes, size: int, bits: np.ndarray, *, decoder: str, upright: bool = False) -> np.ndarray:
    """A random part of the picture, resized.

    Args:
      content: the bytes of its file.
      size: side of the result in pixels.
      bits: uint64 (NUM_DRAWS,), random.
      decoder: 'pillow' or 'opencv'.
      upright: whether the picture is turned as its file says.

    Returns:
      uint8 (size, size, 3).
    """
    from PIL import Image

    if decoder == "opencv":
        return _train_with_opencv(content, size, bits, upright)
    image = decode(content, upright=upright)
    top, left, height, width = random_resized_crop_box(image.height, image.width, bits)
    part = image.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def _train_with_opencv(content: bytes, size: int, bits: np.ndarray, upright: bool) -> np.ndarray:
    cv2 = opencv()
    pixels = _decode_with_opencv(content, upright)
    top, left, height, width = random_resized_crop_box(pixels.shape[0], pixels.shape[1], bits)
    shrinks = height >= size and width >= size
    part = pixels[top : top + height, left : left + width]
    resized = cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    # The channels are in the other order; the crop is turned round, which is less than the picture.
    return cv2.cvtColor(resized, cv2.COLOR_BGR2RGB)


def _decode_with_opencv(content: bytes, upright: bool) -> np.ndarray:
    """Pixels uint8 (H, W, 3), channels blue, green, red. Pillow does what OpenCV cannot, and finds what is damaged."""
    cv2 = opencv()
    # Unlike Pillow, OpenCV would turn a picture whose file says that the camera was held upright.
    flags = cv2.IMREAD_COLOR | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    # It knows neither transparent pixels nor the higher half of 16 bits, which other formats have.
    ours = content.startswith(PLAIN_FORMATS)
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if ours else None
    return np.asarray(decode(content, upright=upright))[:, :, ::-1] if pixels is None else pixels


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
