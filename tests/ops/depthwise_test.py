import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers.conv import LAYOUT
from bnn_jax.ops.depthwise import depthwise_convolution

CASES = [
    ((2, 6, 6, 5), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((2, 6, 8, 5), (3, 3), (2, 2), ((1, 1), (1, 1))),
    # The last row meets no kernel.
    ((2, 7, 6, 3), (3, 3), (2, 2), ((0, 0), (1, 1))),
    ((1, 9, 7, 4), (5, 3), (2, 1), ((2, 2), (0, 1))),
    ((2, 4, 4, 3), (1, 1), (1, 1), ((0, 0), (0, 0))),
]


@pytest.mark.parametrize(("shape", "size", "strides", "padding"), CASES)
def test_it_is_the_convolution_with_a_group_for_each_channel_and_so_are_its_gradients(shape, size, strides, padding):
    random = np.random.RandomState(0)
    x = jnp.asarray(random.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(*size, 1, shape[-1])), jnp.float32)

    def expected(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=shape[-1]
        )

    y, pullback = jax.vjp(lambda x, kernel: depthwise_convolution(x, kernel, strides, padding), x, kernel)
    y_expected, pullback_expected = jax.vjp(expected, x, kernel)
    cotangent = jnp.asarray(random.normal(size=y_expected.shape), jnp.float32)
    # Sums of up to 9 products, and of up to 72 in the kernel's gradient, in another order.
    np.testing.assert_allclose(y, y_expected, atol=1e-5)
    for own, reference in zip(pullback(cotangent), pullback_expected(cotangent)):
        np.testing.assert_allclose(own, reference, atol=2e-5)
