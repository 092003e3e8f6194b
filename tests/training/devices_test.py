import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bnn_jax.data.augment import prepare_train
from bnn_jax.training.devices import Devices, all_devices


class Several(Devices):
    """A mesh that says it has eight devices, for what needs their number only."""

    @property
    def count(self) -> int:
        return 8


def test_the_mesh_is_one_axis_over_all_devices():
    devices = all_devices()
    assert devices.mesh.axis_names == ("data",)
    assert devices.count == jax.device_count()


def test_the_three_placements():
    devices = all_devices()
    assert devices.replicated.spec == PartitionSpec()
    assert devices.rows.spec == PartitionSpec("data")
    assert devices.stacked_rows.spec == PartitionSpec(None, "data")


def test_a_replicated_tree_is_on_every_device():
    tree = all_devices().replicate({"a": np.arange(3), "b": jnp.ones(())})
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))
    np.testing.assert_array_equal(tree["a"], np.arange(3))


@pytest.mark.parametrize(("batch", "padded"), [(8, 8), (5, 8), (9, 16), (1, 8)])
def test_batches_are_filled_up_to_a_multiple_of_the_devices_with_masked_rows(batch, padded):
    indices = np.arange(1, 2 * batch + 1, dtype=np.int32).reshape(2, batch)
    mask = np.ones((2, batch), bool)
    new_indices, new_mask = Several(all_devices().mesh).pad_rows(indices, mask)
    assert new_indices.shape == new_mask.shape == (2, padded)
    assert new_indices.dtype == np.int32 and new_mask.dtype == bool
    np.testing.assert_array_equal(new_indices[:, :batch], indices)
    np.testing.assert_array_equal(new_indices[:, batch:], 0)
    np.testing.assert_array_equal(new_mask, np.arange(padded)[None] < [[batch]] * 2)


def test_one_device_needs_no_filling():
    indices, mask = np.arange(6).reshape(2, 3), np.ones((2, 3), bool)
    new_indices, new_mask = all_devices().pad_rows(indices, mask)
    if jax.device_count() == 1:
        assert new_indices.shape == new_mask.shape == (2, 3)


def test_the_images_of_a_filled_up_batch_are_augmented_as_those_of_the_batch_alone():
    # Otherwise the number of devices would change what is trained on.
    images = jnp.asarray(np.random.RandomState(0).randint(0, 256, (8, 6, 6, 3)), jnp.uint8)
    options = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "augment": "pad_crop_flip", "pad": 2, "lighting": "paper"}
    prepare = jax.jit(lambda batch: prepare_train(batch, jax.random.key(1), **options))
    np.testing.assert_array_equal(prepare(images)[:5], prepare(images[:5]))
