"""Augmentation and normalisation on the device: pure functions of uint8 images and a key, used inside jit.

The order is that of the published recipes: zero padding of the raw pixels, random crop, change of light, horizontal
flip, then normalisation (a padded pixel therefore becomes ``-mean / std``, not 0). Images that are read while training
come cropped and resized already, see ``crops``.
"""

import jax
import jax.numpy as jnp

from bnn_jax.data.base import AUGMENTATIONS, LIGHTINGS

# Stream of random numbers apart from the crops': a batch is cropped in the same way with and without other light.
LIGHTING = 1

# How the three colours of ImageNet's pixels (0 to 1) vary together: standard deviations along the axes (columns).
LIGHT_DEVIATIONS = (0.2175, 0.0188, 0.0045)
LIGHT_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
LIGHT_STRENGTH = 0.1


def prepare_train(
    images: jax.Array,
    key: jax.Array,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: str,
    pad: int,
    lighting: str = "none",
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

    Returns:
      float32 (N, H, W, C).

    Raises:
      ValueError: the augmentation or the lighting is unknown.
    """
    if lighting not in LIGHTINGS:
        raise ValueError(f"lighting {lighting!r}: accepted are {', '.join(LIGHTINGS)}")
    if augment not in AUGMENTATIONS:
        raise ValueError(f"augment {augment!r}: accepted are {', '.join(AUGMENTATIONS)}")
    if augment == "random_resized_crop_flip":
        _, flips = draw_crops(key, images.shape[0], pad=0, flip=True)
        images = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    elif augment != "none":
        offsets, flips = draw_crops(key, images.shape[0], pad=pad, flip=augment.endswith("_flip"))
        images = crop_and_flip(images, offsets, flips, pad=pad, repeat_edge=augment == "edge_crop_flip")
    if lighting != "none":
        # An image's light is the same at all its pixels, so that it makes no difference to have flipped it before.
        draws = jax.random.normal(jax.random.fold_in(key, LIGHTING), (images.shape[0], 3))
        images = change_light(images, draws, in_pixel_units=lighting == "paper")
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


def normalize(images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """``(pixels / 255 - mean) / std``, (N, H, W, C) of 0 to 255 -> float32 (N, H, W, C)."""
    mean_of_channel, std_of_channel = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean_of_channel) / std_of_channel
