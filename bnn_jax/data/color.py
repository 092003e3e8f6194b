"""Random change of colours, by the image library dm-pix, inside jit."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp


def jitter(images: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and, of three channels, saturation of every image by random amounts, in this order.

    Forward, of pixels x in [0, 1], s the strength: ``x + U(-s, s)``; ``f (x - mean) + mean`` with the image's mean per
    channel, f from U(1 - s, 1 + s); the saturation (HSV) times another such f. Clipped to [0, 1] after each.

    Args:
      images: (N, H, W, C), 0 to 255.
      key: random key; every image gets its own amounts.
      strength: s, 0 <= s < 1.

    Returns:
      float32 (N, H, W, C), 0 to 255.
    """
    pix = library()

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        brightness, contrast, saturation = jax.random.split(key, 3)
        image = jnp.clip(pix.random_brightness(brightness, image, strength), 0.0, 1.0)
        image = jnp.clip(pix.random_contrast(contrast, image, 1 - strength, 1 + strength), 0.0, 1.0)
        if image.shape[-1] == 3:
            image = pix.random_saturation(saturation, image, 1 - strength, 1 + strength)
        return jnp.clip(image, 0.0, 1.0)

    return 255 * jax.vmap(one)(images.astype(jnp.float32) / 255, jax.random.split(key, len(images)))


@functools.cache
def library() -> Any:
    """The module dm_pix, which is an extra."""
    return importlib.import_module("dm_pix")
