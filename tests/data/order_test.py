import numpy as np
import pytest

from bnn_jax.data.order import Purpose, index_plan, permutation, random_bits, sequential_plan, stratified_choice
from bnn_jax.errors import DataError


def test_random_bits_are_the_ones_every_version_gives():
    # The same in NumPy 1.26 and 2.4; NumPy guarantees this stream, and run folders rely on it.
    expected = [0x4F2F4313B5536B09, 0x5B617BE3219FF32A, 0x097293476F9275CB]
    np.testing.assert_array_equal(random_bits(1, 2, purpose=Purpose.ORDER, count=3), np.array(expected, np.uint64))


def test_index_plan_is_the_one_every_version_gives():
    indices, _ = index_plan(0, 0, num_images=10, batch_size=10, drop_last=False)
    np.testing.assert_array_equal(indices, [[0, 2, 9, 1, 8, 5, 4, 3, 6, 7]])


def test_index_plan_visits_every_image_once():
    indices, mask = index_plan(3, 1, num_images=103, batch_size=10, drop_last=False)
    assert indices.shape == mask.shape == (11, 10)
    assert indices.dtype == np.int32
    assert sorted(indices[mask]) == list(range(103))


def test_last_batch_is_filled_up_with_masked_rows_of_image_0():
    indices, mask = index_plan(3, 1, num_images=103, batch_size=10, drop_last=False)
    assert mask[:-1].all()
    np.testing.assert_array_equal(mask[-1], [True] * 3 + [False] * 7)
    np.testing.assert_array_equal(indices[-1, 3:], 0)


def test_dropping_the_last_batch_keeps_the_others():
    kept, _ = index_plan(3, 1, num_images=103, batch_size=10, drop_last=False)
    dropped, mask = index_plan(3, 1, num_images=103, batch_size=10, drop_last=True)
    np.testing.assert_array_equal(dropped, kept[:-1])
    assert mask.all()


def test_index_plan_is_a_pure_function_of_seed_and_epoch():
    def plan(seed, epoch):
        return index_plan(seed, epoch, num_images=50, batch_size=50, drop_last=False)[0]

    np.random.seed(0)
    first = plan(1, 2)
    np.random.seed(1)
    np.testing.assert_array_equal(plan(1, 2), first)
    assert (plan(1, 3) != first).any()
    assert (plan(2, 2) != first).any()
    assert (plan(2, 1) != first).any()


def test_dropping_the_only_batch_is_an_error():
    with pytest.raises(DataError, match=r"batch_size is 10.*only 9 training images"):
        index_plan(0, 0, num_images=9, batch_size=10, drop_last=True)


def test_purposes_have_unrelated_bits():
    bits = [random_bits(0, 0, purpose=purpose, count=4) for purpose in Purpose]
    assert len(np.unique(bits)) == 4 * len(Purpose)


@pytest.mark.parametrize(("seed", "stream"), [(-1, 0), (0, -1), (2**64, 0)])
def test_random_bits_refuse_seeds_out_of_range(seed, stream):
    with pytest.raises(ValueError, match="must be in"):
        random_bits(seed, stream, purpose=Purpose.ORDER, count=1)


def test_permutation_puts_every_image_everywhere():
    # 400 orders of 4 images: each of the 16 pairs is expected 100 times, standard deviation 8.7; 60 is 4.6 of them.
    orders = np.array([permutation(0, epoch, purpose=Purpose.ORDER, size=4) for epoch in range(400)])
    counts = np.array([np.bincount(orders[:, place], minlength=4) for place in range(4)])
    assert (np.abs(counts - 100) < 40).all()


def test_sequential_plan_keeps_the_order():
    indices, mask = sequential_plan(5, 3)
    np.testing.assert_array_equal(indices, [[0, 1, 2], [3, 4, 0]])
    np.testing.assert_array_equal(mask, [[True] * 3, [True, True, False]])


def test_stratified_choice_keeps_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [50, 30, 20])[permutation(0, 0, purpose=Purpose.ORDER, size=100)]
    chosen = stratified_choice(labels, count=10, seed=0, purpose=Purpose.VALIDATION)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [5, 3, 2])


def test_stratified_choice_hits_the_count_where_shares_are_no_whole_numbers():
    labels = np.repeat(np.arange(7), 3)
    for count in range(22):
        chosen = stratified_choice(labels, count=count, seed=1, purpose=Purpose.VALIDATION)
        assert chosen.sum() == count
        assert np.ptp(np.bincount(labels[chosen], minlength=7)) <= 1


def test_stratified_choice_depends_on_the_seed():
    labels = np.zeros(100, np.int32)
    choices = [stratified_choice(labels, count=50, seed=seed, purpose=Purpose.VALIDATION) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(choices[0], choices[1])
    assert (choices[0] != choices[2]).any()
