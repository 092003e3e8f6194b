"""Max pooling and its gradient against flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.ops.pooling import max_pool


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2)])
@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_values_and_gradients_are_those_of_flax(shape, size, stride, padding):
    generator = np.random.default_rng(0)
    # Few different values: many windows have several largest ones.
    x = jnp.asarray(generator.integers(-2, 2, shape), jnp.float32)
    around = [(padding, padding)] * 2
    reference, pullback = jax.vjp(lambda x: nn.max_pool(x, (size, size), (stride, stride), around), x)  # type: ignore[arg-type]
    y, own_pullback = jax.vjp(lambda x: max_pool(x, size, stride, padding), x)
    np.testing.assert_array_equal(y, reference)
    # Whole numbers: sums over windows are exact in any order.
    cotangent = jnp.asarray(generator.integers(-9, 9, y.shape), jnp.float32)
    np.testing.assert_array_equal(own_pullback(cotangent)[0], pullback(cotangent)[0])
