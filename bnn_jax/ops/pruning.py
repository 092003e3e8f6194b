"""Fixed masks of structured pruning: whole filters, or blocks of neighbouring weights in a row.

Kernels have the layout (height, width, input channels, output channels).
"""

import jax
import jax.numpy as jnp


def filter_mask(kernel: jax.Array, amount: float) -> jax.Array:
    """Mask that drops the output filters of least L2 norm.

    Forward: ``round_half_even(amount * O)`` filters of smallest ``||kernel[..., o]||_2`` get 0, the rest 1;
      among equal norms the filter with the lower index is dropped first.

    Args:
      kernel: (kh, kw, I, O).
      amount: share of filters to drop, 0 to 1.

    Returns:
      (kh, kw, I, O), float32 zeros and ones.

    Reference: ASBQ, coarse-grained pruning; release: Luadoo/ASBQ: quantization/resnet_quant.py (ln_structured, n=2).
    """
    num_filters = kernel.shape[-1]
    # Python's round is half to even, as the release's.
    num_dropped = round(amount * num_filters)
    norms = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=(0, 1, 2)))
    rank = jnp.argsort(jnp.argsort(norms, stable=True), stable=True)
    return jnp.broadcast_to((rank >= num_dropped).astype(kernel.dtype), kernel.shape)


def row_block_mask(kernel: jax.Array, amount: float, block: int = 2) -> jax.Array:
    """Mask that drops the 1 x ``block`` groups of neighbouring weights of least L1 norm.

    Forward: every kernel row is cut into ``kw // block`` groups from its left end (weights that do not fill a group are
      never dropped); the ``floor(amount * number of groups)`` groups of smallest ``sum |w|`` over the whole tensor get
      0. Groups are ordered by (output, input, row, group); among equal sums the earlier group is dropped first.

    Args:
      kernel: (kh, kw, I, O).
      amount: share of groups to drop, 0 to 1.
      block: weights per group.

    Returns:
      (kh, kw, I, O), float32 zeros and ones.

    Reference: ASBQ, 1xN pruning of VGG-Small; release: Luadoo/ASBQ: quantization/vgg_small.py.
    """
    kh, kw, num_in, num_out = kernel.shape
    groups_per_row = kw // block
    used = groups_per_row * block
    oirw = jnp.transpose(kernel, (3, 2, 0, 1))
    groups = oirw[..., :used].reshape(num_out, num_in, kh, groups_per_row, block)
    norms = jnp.sum(jnp.abs(groups), axis=-1).ravel()
    num_dropped = int(amount * norms.size)
    rank = jnp.argsort(jnp.argsort(norms, stable=True), stable=True)
    keep = (rank >= num_dropped).reshape(num_out, num_in, kh, groups_per_row)
    mask = jnp.ones(oirw.shape, kernel.dtype).at[..., :used].set(jnp.repeat(keep, block, axis=-1).astype(kernel.dtype))
    return jnp.transpose(mask, (2, 3, 1, 0))
