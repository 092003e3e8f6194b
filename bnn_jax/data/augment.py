"""Augmentation and normalisation on the device: pure functions of uint8 images and a key, used inside jit.

The order is that of the published recipes: zero padding of the raw pixels, random crop, horizontal flip, then
normalisation (a padded pixel therefore becomes ``-mean / std``, not 0).
"""

import jax
import jax.numpy as jnp

from bnn_jax.data.base import AUGMENTATIONS


def prepare_train(
    images: jax.Array, key: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...], augment: str, pad: int
) -> jax.Array:
    """Augments and normalises a training batch.

    Args:
      images: uint8 (N, H, W, C).
      key: random key of this step; every image gets its own offsets and flip.
      mean: mean of pixels / 255, per channel.
      std: standard deviation of pixels / 255, per channel.
      augment: 'pad_crop_flip', 'pad_crop', 'edge_crop_flip' (padding repeats the border) or 'none'.
      pad: zero padding in pixels per side.

    Returns:
      float32 (N, H, W, C).

    Raises:
      ValueError: the augmentation is unknown.
    """
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment {augment!r}: accepted are {', '.join(AUGMENTATIONS)}")
    if augment != "none":
        offsets, flips = draw_crops(key, images.shape[0], pad=pad, flip=augment.endswith("_flip"))
        images = crop_and_flip(images, offsets, flips, pad=pad, repeat_edge=augment == "edge_crop_flip")
    return normalize(images, mean=mean, std=std)


def prepare_eval(images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Normalises an evaluation batch, uint8 (N, H, W, C) -> float32 (N, H, W, C)."""
    return normalize(images, mean=mean, std=std)


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
    inside = _inside(rows, height)[:, :, None] & _inside(columns, width)[:, None, :]
    # A batched gather (vmap) rather than one over (image, row, column): it stays local to each device's images.
    cropped = jax.vmap(lambda image, row, column: image[row[:, None], column[None, :]])(
        images, jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    )
    if repeat_edge:
        return cropped
    return jnp.where(inside[..., None], cropped, jnp.zeros((), images.dtype))


def _inside(indices: jax.Array, size: int) -> jax.Array:
    return (indices >= 0) & (indices < size)


def normalize(images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """``(pixels / 255 - mean) / std``, uint8 (N, H, W, C) -> float32 (N, H, W, C)."""
    mean_of_channel, std_of_channel = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean_of_channel) / std_of_channel
