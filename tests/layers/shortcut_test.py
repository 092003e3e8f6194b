import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers.shortcut import flexible_shortcut


def images(channels, side=4):
    return jnp.asarray(np.random.RandomState(channels).normal(size=(2, side, side, channels)), jnp.float32)


@pytest.mark.parametrize(("channels", "features"), [(4, 4), (4, 12), (12, 4), (10, 4), (144, 32)])
def test_it_is_a_product_with_a_matrix_of_zeros_and_ones(channels, features):
    matrix = np.zeros((channels, features), np.float32)
    for index in range(max(channels, features)):
        if index < channels:
            matrix[index, index % features] = 1
        if channels < features:
            matrix[index % channels, index] = 1
    # Sums of up to 5 numbers in another order.
    np.testing.assert_allclose(flexible_shortcut(images(channels), features), images(channels) @ matrix, atol=1e-5)


def test_a_stride_averages_squares():
    y = flexible_shortcut(images(3), 6, stride=2)
    assert y.shape == (2, 2, 2, 6)
    np.testing.assert_allclose(y[0, 0, 0, :3], images(3)[0, :2, :2].mean(axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize("side", [5, 7])
def test_an_odd_side_is_filled_up_with_zeros(side):
    filled = np.pad(images(3, side), ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = filled.reshape(2, (side + 1) // 2, 2, (side + 1) // 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(flexible_shortcut(images(3, side), 3, stride=2), expected, atol=1e-6)


def test_channels_that_are_no_multiple_are_refused():
    with pytest.raises(ValueError, match="10 channels are no multiple of 4"):
        flexible_shortcut(images(4), 10)
