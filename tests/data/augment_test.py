import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.data.augment import change_light, crop_and_flip, draw_crops, normalize, prepare_eval, prepare_train

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)


def _images(count, size=6):
    return np.random.default_rng(0).integers(0, 256, (count, size, size + 1, 3), dtype=np.uint8)


def _pad_crop_flip(image, offset, flip, pad):
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crop = padded[offset[0] : offset[0] + height, offset[1] : offset[1] + width]
    return crop[:, ::-1] if flip else crop


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_crop_and_flip_equals_padding_cropping_and_flipping(pad):
    grid = np.arange(2 * pad + 1)
    offsets = np.array([(row, column) for row in grid for column in grid for _ in range(2)])
    flips = np.arange(len(offsets)) % 2 == 1
    images = _images(len(offsets))
    result = jax.jit(functools.partial(crop_and_flip, pad=pad))(images, jnp.asarray(offsets), jnp.asarray(flips))
    expected = [_pad_crop_flip(*case, pad) for case in zip(images, offsets, flips)]
    assert result.dtype == jnp.uint8
    np.testing.assert_array_equal(result, np.stack(expected))


@pytest.mark.parametrize("pad", [1, 3])
def test_with_repeated_edges_the_padding_is_the_border(pad):
    grid = np.arange(2 * pad + 1)
    offsets = np.array([(row, column) for row in grid for column in grid for _ in range(2)])
    flips = np.arange(len(offsets)) % 2 == 1
    images = _images(len(offsets))
    crop = jax.jit(functools.partial(crop_and_flip, pad=pad, repeat_edge=True))
    expected = []
    for image, (row, column), flip in zip(images, offsets, flips):
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        cropped = padded[row : row + 6, column : column + 7]
        expected.append(cropped[:, ::-1] if flip else cropped)
    np.testing.assert_array_equal(crop(images, jnp.asarray(offsets), jnp.asarray(flips)), np.stack(expected))


def test_flipping_before_or_after_a_crop_with_repeated_edges_gives_the_same_images():
    # The release flips first. With the border repeated, that is a crop at the mirrored column, flipped afterwards.
    images, pad = _images(25), 2
    offsets = np.array([(row, column) for row in range(5) for column in range(5)])
    mirrored = np.stack([offsets[:, 0], 2 * pad - offsets[:, 1]], axis=1)
    flips = np.ones(25, bool)
    after = crop_and_flip(images, jnp.asarray(mirrored), jnp.asarray(flips), pad=pad, repeat_edge=True)
    before = crop_and_flip(images[:, :, ::-1], jnp.asarray(offsets), jnp.asarray(~flips), pad=pad, repeat_edge=True)
    np.testing.assert_array_equal(after, before)


def test_edge_crop_flip_draws_as_pad_crop_flip_does_and_repeats_the_border():
    images = np.full((64, 6, 6, 1), 255, np.uint8)
    prepare = functools.partial(prepare_train, images, jax.random.key(0), mean=(0.0,), std=(1.0,), pad=2)
    # All-white images stay white with a repeated border, and get black stripes with zeros.
    np.testing.assert_array_equal(prepare(augment="edge_crop_flip"), 1.0)
    assert (prepare(augment="pad_crop_flip") == 0).any()
    images = _images(64)
    prepare = functools.partial(prepare_train, images, jax.random.key(0), mean=(0.0,) * 3, std=(1.0,) * 3, pad=2)
    edge, zeros = (np.asarray(prepare(augment=name)) for name in ("edge_crop_flip", "pad_crop_flip"))
    inside = zeros != 0
    np.testing.assert_array_equal(edge[inside], zeros[inside])


def test_offsets_cover_the_whole_range_evenly():
    offsets, flips = draw_crops(jax.random.key(0), 9000, pad=4, flip=True)
    for axis in range(2):
        # 1000 expected of each, standard deviation 30.
        counts = np.bincount(np.asarray(offsets[:, axis]), minlength=9)
        assert counts.shape == (9,)
        assert (np.abs(counts - 1000) < 150).all()
    # Rows, columns and flips are drawn apart: correlations have standard deviation 0.011.
    drawn = np.corrcoef(np.concatenate([offsets, flips[:, None]], axis=1).T)
    assert np.abs(drawn - np.eye(3)).max() < 0.06
    assert abs(float(flips.mean()) - 0.5) < 0.03


def test_images_of_one_batch_get_their_own_crops():
    images = np.broadcast_to(_images(1), (64, 6, 7, 3))
    crops = prepare_train(images, jax.random.key(0), mean=MEAN, std=STD, augment="pad_crop_flip", pad=2)
    assert len(np.unique(np.asarray(crops), axis=0)) > 20  # of 50 possible


def test_the_key_decides_the_crops():
    prepare = functools.partial(prepare_train, _images(8), mean=MEAN, std=STD, augment="pad_crop_flip", pad=2)
    first, again, other = prepare(jax.random.key(1)), prepare(jax.random.key(1)), prepare(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_padding_is_a_black_pixel_before_normalisation():
    white = np.full((1, 4, 4, 3), 255, np.uint8)
    cropped = crop_and_flip(white, jnp.array([[0, 0]]), jnp.array([False]), pad=1)
    result = np.asarray(normalize(cropped, mean=MEAN, std=STD))
    # 1e-6: float32 arithmetic on both sides.
    np.testing.assert_allclose(result[0, 0, 0], -np.array(MEAN) / STD, rtol=1e-6)
    np.testing.assert_allclose(result[0, 1, 1], (1 - np.array(MEAN)) / STD, rtol=1e-6)


def test_pad_crop_does_not_flip():
    images = np.zeros((200, 5, 5, 1), np.uint8)
    images[:, 2, 2, 0], images[:, 2, 3, 0] = 100, 200
    crops = prepare_train(images, jax.random.key(0), mean=(0.0,), std=(1 / 255,), augment="pad_crop", pad=1)
    dark, bright = (np.round(np.asarray(crops)[..., 0]) == value for value in (100, 200))
    columns = np.arange(5)
    assert ((bright * columns).sum((1, 2)) > (dark * columns).sum((1, 2))).all()


def test_none_only_normalises():
    images = _images(4)
    result = prepare_train(images, jax.random.key(0), mean=MEAN, std=STD, augment="none", pad=2)
    np.testing.assert_array_equal(result, prepare_eval(images, mean=MEAN, std=STD))
    np.testing.assert_allclose(result, (images / 255 - MEAN) / STD, atol=1e-6)  # float32 against float64
    assert result.dtype == jnp.float32


def test_images_that_were_cropped_on_the_host_are_only_flipped():
    images = _images(40)
    result = np.asarray(
        prepare_train(
            images, jax.random.key(0), mean=(0.0,) * 3, std=(1.0,) * 3, augment="random_resized_crop_flip", pad=2
        )
    )
    straight, flipped = images / np.float32(255), images[:, :, ::-1] / np.float32(255)
    is_straight = np.array([np.allclose(a, b, atol=1e-6) for a, b in zip(result, straight)])
    is_flipped = np.array([np.allclose(a, b, atol=1e-6) for a, b in zip(result, flipped)])
    assert (is_straight ^ is_flipped).all()
    # The chance that fewer than 8 of 40 fair coins show one side is 1e-4; the key is fixed.
    assert 8 <= is_flipped.sum() <= 32


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="augment 'mixup': accepted are pad_crop_flip, pad_crop, edge_crop_flip, "):
        prepare_train(_images(1), jax.random.key(0), mean=MEAN, std=STD, augment="mixup", pad=1)


def test_light_as_released_darkens_the_channels_with_a_negative_change_by_one():
    images = np.array([0, 1, 128, 255], np.uint8).reshape(1, 4, 1, 1) * np.ones((6, 1, 1, 3), np.uint8)
    draws = np.concatenate([np.eye(3), -np.eye(3)])
    result = np.asarray(change_light(images, jnp.asarray(draws), in_pixel_units=False))
    assert result.dtype == np.uint8
    # One draw along one axis: the signs of the changes are those of the axis.
    negative = np.array([[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1]])[:, None, None]
    np.testing.assert_array_equal(result, np.maximum(images.astype(int) - negative, 0))


def test_light_in_pixel_units_varies_as_the_colours_do():
    grey = np.full((4000, 1, 1, 3), 128, np.uint8)
    draws = jax.random.normal(jax.random.key(0), (4000, 3))
    change = np.asarray(change_light(grey, draws, in_pixel_units=True), np.float64)[:, 0, 0] - 128
    axes = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = axes @ np.diag((25.5 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ axes.T
    # The standard error of a variance is 2.2 % of it; covariances are about as large as the variances here.
    np.testing.assert_allclose(np.cov(change.T), expected, rtol=0.1)
    assert np.abs(change.mean(axis=0)).max() < 0.2


def test_light_in_pixel_units_keeps_to_the_range_of_pixels():
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1) * np.ones((1, 1, 1, 3), np.uint8)
    draws = jnp.array([[100.0, 0, 0], [-100.0, 0, 0]])
    result = np.asarray(change_light(images, draws, in_pixel_units=True))
    # Along the first axis all colours go the same way: beyond black and white.
    np.testing.assert_array_equal(result[:, 0, 0, 0], [0, 255])


@pytest.mark.parametrize("augment", ["none", "pad_crop_flip"])
def test_other_light_leaves_the_crops_as_they_are(augment):
    images = np.full((64, 6, 6, 3), 128, np.uint8)
    images[:, 2:4] = 64
    prepare = functools.partial(
        prepare_train, images, jax.random.key(0), mean=(0.0,) * 3, std=(1 / 255,) * 3, augment=augment, pad=2
    )
    plain, release, paper = (np.asarray(prepare(lighting=name)) for name in ("none", "release", "paper"))
    darker = plain - release
    assert set(np.unique(np.round(darker))) == {0.0, 1.0}
    # Nothing is darker than black.
    assert not np.any(np.round(darker)[plain == 0])
    # 6 standard deviations of 3.2 levels: no pixel takes another's place.
    assert 1 < np.abs(paper - plain).max() < 20


def test_an_unknown_lighting_is_refused():
    with pytest.raises(ValueError, match="lighting 'on': accepted are none, release, paper"):
        prepare_train(_images(1), jax.random.key(0), mean=MEAN, std=STD, augment="none", pad=1, lighting="on")


def test_cropping_compiles_to_one_gather_without_a_loop():
    # A loop would be many times slower on a CPU.
    arguments = jnp.zeros((8, 32, 32, 3), jnp.uint8), jnp.zeros((8, 2), jnp.int32), jnp.zeros(8, bool)
    program = jax.jit(functools.partial(crop_and_flip, pad=4)).lower(*arguments).compile().as_text()
    assert program.count(" gather(") == 1
    assert " while(" not in program
