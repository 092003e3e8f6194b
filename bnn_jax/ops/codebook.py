"""Codebooks of 3x3 binary kernels: patterns and their codes, nearest assignment, memory, refill of duplicates.

A pattern is a row of nine signs, a 3x3 kernel row by row (position ``q = 3 * y + x``). A codebook has n rows; a list of
kernels has one row per pair of output and input channel, row ``o * I + i``.
"""

import jax
import jax.numpy as jnp

# Weights of a 3x3 kernel, and the number of patterns of as many signs.
POSITIONS = 9
PATTERNS = 2**POSITIONS


def all_patterns() -> jax.Array:
    """The table of all patterns: in row m, position q is the sign of bit ``8 - q`` of m.

    Returns:
      (512, 9), float32, -1 and +1; the first row is all -1, the last all +1.

    Reference: release: yikaiw/SNN.
    """
    bits = jnp.arange(PATTERNS, dtype=jnp.int32)[:, None] >> jnp.arange(POSITIONS - 1, -1, -1, dtype=jnp.int32)[None]
    return (2 * (bits & 1) - 1).astype(jnp.float32)


def codes(rows: jax.Array) -> jax.Array:
    """Number of the pattern of each row: ``sum_q [row_q > 0] * 2**q``; an exact 0 counts as -1.

    The bits run the other way than in ``all_patterns``: row m of that table has the code with m's nine bits reversed.

    Args:
      rows: (..., 9).

    Returns:
      (...), int32, 0 to 511.
    """
    values = jnp.broadcast_to(2 ** jnp.arange(POSITIONS, dtype=jnp.int32), rows.shape)
    return jnp.sum(jnp.where(rows > 0, values, 0), axis=-1)


def random_patterns(key: jax.Array, count: int) -> jax.Array:
    """Different patterns in random order, all choices equally likely.

    Args:
      key: random key.
      count: n, 1 to 512.

    Returns:
      (n,), int32, rows of ``all_patterns``.
    """
    return jax.random.permutation(key, PATTERNS)[:count].astype(jnp.int32)


def to_rows(kernel: jax.Array) -> jax.Array:
    """(3, 3, I, O) -> (O * I, 9): one row for each 3x3 kernel."""
    return jnp.transpose(kernel, (3, 2, 0, 1)).reshape(-1, POSITIONS)


def from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(O * I, 9) -> (3, 3, I, O), the inverse of ``to_rows``."""
    height, width, num_in, num_out = shape
    return jnp.transpose(rows.reshape(num_out, num_in, height, width), (2, 3, 1, 0))


def remember(codebook: jax.Array, memory: jax.Array, dead_zone: float) -> jax.Array:
    """The patterns a codebook stands for: its signs, and within the dead zone the signs it had before.

    Forward: ``sign(p) if |p| >= dead_zone and p != 0 else memory``; no gradient.

    Args:
      codebook: (n, 9), real.
      memory: (n, 9), -1 and +1, what this function gave last.
      dead_zone: at least 0.

    Returns:
      (n, 9), -1 and +1.
    """
    codebook = jax.lax.stop_gradient(codebook)
    outside = (jnp.abs(codebook) >= dead_zone) & (codebook != 0)
    return jnp.where(outside, jnp.sign(codebook), memory)


def nearest(rows: jax.Array, patterns: jax.Array) -> jax.Array:
    """Index of the pattern nearest to each row, the first one of several.

    Forward: ``argmin_j ||row - pattern_j||_2``, which is ``argmax_j <row, pattern_j>`` as all patterns are equally
      long. The sums are float32 on every device: a coarser product would choose other patterns.

    Args:
      rows: (K, 9), real.
      patterns: (n, 9), -1 and +1.

    Returns:
      (K,), int32, 0 to n - 1.
    """
    products = jnp.matmul(rows, patterns.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(products, axis=-1).astype(jnp.int32)


def assign(rows: jax.Array, codebook: jax.Array, patterns: jax.Array, refine: jax.Array | float = 0.0) -> jax.Array:
    """Replaces each row by its nearest pattern; the codebook gets a gradient where ``refine`` says so.

    Forward: ``b_k = patterns[nearest(rows_k)]``, exactly -1 and +1.
    Backward: ``drows = db * [|rows| <= 1]``; ``dcodebook_j`` = the sum of ``db_k`` over the rows k assigned to j if
      ``refine`` > 0, else 0. No clipping of the latter, no mean; a pattern nobody uses gets 0.

    Args:
      rows: (K, 9), real.
      codebook: (n, 9), real, whose values play no part in the forward pass.
      patterns: (n, 9), -1 and +1, made from the codebook by ``remember``.
      refine: scalar.

    Returns:
      (K, 9), -1 and +1.

    Reference: SNN, Wang et al. 2021 (arXiv 2110.09195); release: yikaiw/SNN.
    """
    return _assign(rows, codebook, jax.lax.stop_gradient(patterns), jnp.asarray(refine, jnp.float32))


@jax.custom_vjp
def _assign(rows: jax.Array, codebook: jax.Array, patterns: jax.Array, refine: jax.Array) -> jax.Array:
    return patterns[nearest(rows, patterns)]


def _assign_forward(rows, codebook, patterns, refine):
    indices = nearest(rows, patterns)
    return patterns[indices], (rows, codebook, indices, refine)


def _assign_backward(residuals, cotangent):
    rows, codebook, indices, refine = residuals

    def summed() -> jax.Array:
        return jax.ops.segment_sum(cotangent, indices, num_segments=codebook.shape[0])

    # On 24 of 25 steps nothing of it is needed: a conditional then costs 0.05 ms for 512 x 512 kernels on two cores,
    # the sums 1 ms, and a product with one-hot rows 10 to 300 ms.
    for_codebook = jax.lax.cond(refine > 0, summed, lambda: jnp.zeros_like(codebook))
    inside = (jnp.abs(rows) <= 1).astype(cotangent.dtype)
    return cotangent * inside, for_codebook, jnp.zeros_like(codebook), jnp.zeros_like(refine)


_assign.defvjp(_assign_forward, _assign_backward)


def duplicates(codebook: jax.Array) -> jax.Array:
    """Which rows have the signs of an earlier row (0 counts as -1); (n, 9) -> (n,) bool."""
    own = codes(codebook)
    same = own[:, None] == own[None, :]
    return jnp.any(jnp.tril(same, k=-1), axis=1)


def replace_duplicates(codebook: jax.Array, candidates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Puts new patterns in place of duplicate rows: the candidates in order, without those the codebook has already.

    Args:
      codebook: (n, 9), real.
      candidates: (n,) int, different rows of ``all_patterns``; n of them always suffice.

    Returns:
      The codebook (n, 9), in which the other rows are as they were and the new ones -1 and +1; and which rows are new,
      (n,) bool.
    """
    twice = duplicates(codebook)
    offered = all_patterns()[candidates]
    known = jnp.any(codes(offered)[:, None] == codes(codebook)[None, :], axis=1)
    # The candidates not yet known first, in their order; the r-th duplicate takes the r-th of them.
    offered = offered[jnp.argsort(known, stable=True)]
    rank = jnp.cumsum(twice.astype(jnp.int32)) - 1
    return jnp.where(twice[:, None], offered[rank], codebook), twice


def refill_as_released(codebook: jax.Array, candidates: jax.Array) -> jax.Array:
    """Replaces duplicates in the release's order of rows: those kept move up, the new ones follow them.

    Whatever belongs to the rows elsewhere (memory, moments, gradient) is not moved with them.

    Args:
      codebook: (n, 9), real.
      candidates: (n,) int, different rows of ``all_patterns``.

    Returns:
      (n, 9).

    Reference: release: yikaiw/SNN.
    """
    replaced, new = replace_duplicates(codebook, candidates)
    return replaced[jnp.argsort(new, stable=True)]
