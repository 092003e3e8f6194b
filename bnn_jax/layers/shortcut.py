"""Full-precision shortcuts between any two numbers of channels, without weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def flexible_shortcut(x: jax.Array, features: int, *, stride: int = 1) -> jax.Array:
    """Changes the number of channels by repeating or adding them up, and the resolution by averaging ("FlexConn").

    Forward: fewer channels than ``features``: ``features / C`` copies one behind another. More: consecutive groups of
      ``features`` channels, the last one filled up with zeros at its end, added up. Then an average over
      ``stride x stride`` positions.
    Backward: ordinary differentiation.

    Args:
      x: (N, H, W, C).
      features: channels of the result.
      stride: side of the squares that are averaged.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), features).

    Raises:
      ValueError: ``features`` is more than C and no multiple of it.

    Reference: BASQ, Kim et al. 2022 (ECCV), section 3.4; release: HanByulKim/BASQ: mbv2_supernet.py.
    """
    channels = x.shape[-1]
    if channels < features:
        if features % channels:
            raise ValueError(f"flexible shortcut: {features} channels are no multiple of {channels}")
        x = jnp.concatenate([x] * (features // channels), axis=-1)
    elif channels > features:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -channels % features)))
        x = sum(jnp.split(x, x.shape[-1] // features, axis=-1), start=jnp.zeros((), x.dtype))
    return average_pool(x, stride)


def average_pool(x: jax.Array, stride: int) -> jax.Array:
    """Mean over squares of ``stride x stride`` positions; what is missing in the last row and column counts as 0.

    So there are as many squares as a convolution of this stride has positions, ceil(H / stride).
    """
    if stride == 1:
        return x
    missing: Any = tuple((0, -side % stride) for side in x.shape[1:3])  # flax calls it a string
    return nn.avg_pool(x, (stride, stride), strides=(stride, stride), padding=missing)
