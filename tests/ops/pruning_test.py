import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.ops import pruning


@pytest.mark.parametrize(
    ("num_filters", "num_masked"),
    # round(0.05 * O), half to even: the table of the ASBQ specification, section 2.3.
    [(16, 1), (32, 2), (64, 3), (128, 6), (256, 13), (512, 26), (10, 0), (30, 2), (50, 2)],
)
def test_number_of_masked_filters(num_filters: int, num_masked: int) -> None:
    kernel = jnp.asarray(np.random.RandomState(num_filters).normal(size=(3, 3, 2, num_filters)), jnp.float32)
    mask = np.asarray(pruning.filter_mask(kernel, 0.05))
    dropped = np.all(mask == 0, axis=(0, 1, 2))
    assert dropped.sum() == num_masked
    np.testing.assert_array_equal(mask, np.broadcast_to(~dropped, mask.shape))
    norms = np.sqrt(np.sum(np.square(kernel), axis=(0, 1, 2)))
    assert num_masked == 0 or norms[dropped].max() <= norms[~dropped].min()


def test_equal_norms_drop_the_filter_of_lower_index() -> None:
    mask = np.asarray(pruning.filter_mask(jnp.ones((1, 1, 4, 6)), 0.3))
    np.testing.assert_array_equal(mask[0, 0, 0], [0, 0, 1, 1, 1, 1])


def test_the_last_column_of_a_three_wide_row_is_never_dropped() -> None:
    kernel = np.random.RandomState(0).normal(size=(3, 3, 5, 8)).astype(np.float32)
    kernel[:, 2] = 0
    mask = np.asarray(pruning.row_block_mask(jnp.asarray(kernel), 0.5))
    np.testing.assert_array_equal(mask[:, 2], 1)
    np.testing.assert_array_equal(mask[:, 0], mask[:, 1])
    assert np.sum(mask[:, 0] == 0) == 3 * 5 * 8 // 2


def test_dropped_row_blocks_are_those_of_least_sum() -> None:
    kernel = np.random.RandomState(1).normal(size=(3, 3, 4, 10)).astype(np.float32)
    mask = np.asarray(pruning.row_block_mask(jnp.asarray(kernel), 0.05))
    sums = np.abs(kernel[:, 0]) + np.abs(kernel[:, 1])
    dropped = mask[:, 0] == 0
    assert dropped.sum() == 6
    assert sums[dropped].max() <= sums[~dropped].min()


def test_equal_row_blocks_are_dropped_in_the_order_output_input_row() -> None:
    mask = np.asarray(pruning.row_block_mask(jnp.ones((3, 3, 2, 2)), 0.34))
    # 4 of 12 blocks: output 0 has 6; of its first input all three rows, of its second the first.
    expected = np.ones((3, 3, 2, 2))
    expected[:, :2, 0, 0] = 0
    expected[0, :2, 1, 0] = 0
    np.testing.assert_array_equal(mask, expected)


def test_row_blocks_of_an_even_width_cover_the_row() -> None:
    mask = np.asarray(pruning.row_block_mask(jnp.ones((2, 4, 1, 1)), 0.5))
    np.testing.assert_array_equal(mask[:, :, 0, 0], [[0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("pattern", [pruning.filter_mask, pruning.row_block_mask])
def test_amount_zero_masks_nothing(pattern) -> None:
    np.testing.assert_array_equal(pattern(jnp.ones((3, 3, 2, 20)), 0.0), 1)
