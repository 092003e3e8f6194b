import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.objectives.base import Batch
from bnn_jax.training.mixup import mixed

RNG = np.random.RandomState(0)
IMAGES, LABELS = RNG.normal(size=(6, 2, 2, 3)).astype(np.float32), np.array([0, 1, 2, 3, 4, 5], np.int32)
MASK = np.array([True, True, False, True, True, False])
ALPHA, DRAWS = 0.4, 2000


@jax.jit
def mix(images: jax.Array) -> Batch:
    """The batch mixed with many keys, each a row of the first axis."""
    batch = Batch(images, jnp.asarray(LABELS), jnp.asarray(MASK))
    return jax.vmap(lambda key: mixed(batch, key, alpha=ALPHA))(jax.random.split(jax.random.key(0), DRAWS))


@pytest.fixture(scope="module")
def found() -> Batch:
    return jax.device_get(mix(IMAGES))


def test_an_image_is_the_weighted_mean_of_two_and_its_label_that_of_the_larger_share(found):
    assert (found.share == found.share[:, :1]).all() and found.share.min() >= 0.5 and found.share.max() <= 1
    # Every label is that of one image here, so that it names the partner.
    partners, share = IMAGES[found.other_labels], found.share[..., None, None, None]
    np.testing.assert_allclose(found.images, share * IMAGES + (1 - share) * partners, rtol=1e-5, atol=1e-6)
    assert (found.labels == LABELS).all()


def test_the_share_follows_the_beta_distribution(found):
    drawn = np.random.RandomState(0).beta(ALPHA, ALPHA, 100_000)
    expected = np.quantile(np.maximum(drawn, 1 - drawn), (0.1, 0.3, 0.5))
    # Quantiles of 2,000 draws scatter by about 0.01.
    np.testing.assert_allclose(np.quantile(found.share[:, 0], (0.1, 0.3, 0.5)), expected, atol=0.04)


def test_what_fills_up_a_batch_is_mixed_into_no_valid_image(found):
    other = mix(np.where(MASK[:, None, None, None], IMAGES, np.float32(np.nan))).images
    np.testing.assert_array_equal(np.asarray(other)[:, MASK], found.images[:, MASK])


def test_the_valid_rows_are_permuted_among_each_other_in_every_way(found):
    ways, counts = np.unique(found.other_labels[:, MASK], axis=0, return_counts=True)
    assert (np.sort(ways, axis=1) == LABELS[MASK]).all()
    # 24 ways, each expected 83 times with a deviation of 9.
    assert len(ways) == 24 and counts.min() > 40 and counts.max() < 130
