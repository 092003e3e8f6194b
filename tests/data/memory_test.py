import numpy as np
import pytest

from bnn_jax import data
from bnn_jax.data.memory import Split, fingerprint, limit
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec

SMALL = {"options": (("image_size", 9), ("num_classes", 7)), "num_train": 50, "num_eval": 30}


def _build(name, seed=0, **fields):
    return data.build(DataSpec(name, **fields), data_dir=None, seed=seed)


def test_digits_keep_every_image_and_the_shares_of_the_classes():
    source = _build("digits")
    assert source.train.images.shape == (1437, 16, 16, 3)
    assert source.test.images.shape == (360, 16, 16, 3)
    assert source.image_shape == (16, 16, 3)
    assert source.pad == 2
    train, test = np.bincount(source.train.labels), np.bincount(source.test.labels)
    assert len(train) == len(test) == source.num_classes == 10
    assert (np.abs(test - (train + test) / 5) < 1).all()


def test_digits_at_their_own_size_are_the_stored_ones():
    from sklearn.datasets import load_digits

    source = _build("digits", options=(("image_size", 8),))
    images = np.concatenate([source.train.images, source.test.images])
    assert (images == images[..., :1]).all()
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in images[..., 0]) == sorted(image.tobytes() for image in expected)


def test_digits_constants_are_those_of_the_training_images():
    source = _build("digits", num_train=10)
    pixels = _build("digits").train.images / 255
    # Constants have four digits, and do not change with the number of images used.
    np.testing.assert_allclose(source.mean, pixels.mean((0, 1, 2)), atol=5e-5)
    np.testing.assert_allclose(source.std, pixels.std((0, 1, 2)), atol=5e-5)


def test_the_digits_that_are_evaluated_are_the_same_whatever_the_seed_of_the_run():
    assert _build("digits").fingerprint == _build("digits", 5).fingerprint


def test_synthetic_images_have_the_size_and_classes_asked_for():
    source = _build("synthetic", **SMALL)
    assert source.train.images.shape == (50, 9, 9, 3)
    assert source.test.images.shape == (30, 9, 9, 3)
    assert source.num_classes == 7
    counts = np.bincount(source.train.labels, minlength=7)
    assert counts.max() - counts.min() <= 1
    assert source.train.images.dtype == np.uint8
    assert source.train.labels.dtype == np.int32


def test_synthetic_images_are_the_ones_every_machine_gives():
    source = _build("synthetic", **SMALL)
    assert source.fingerprint == "b962c18de0f1eeb89c86fbc40b7ed09100ef0acadb926bc5156588ed9ec8024e"


def test_fewer_synthetic_images_are_the_first_of_more():
    few, many = (_build("synthetic", options=(("image_size", 4),), num_train=count) for count in (300, 600))
    np.testing.assert_array_equal(few.train.images, many.train.images[:300])
    np.testing.assert_array_equal(few.train.labels, many.train.labels[:300])


def test_synthetic_test_images_are_learnable_from_training_images_but_not_equal():
    source = _build("synthetic", options=(("num_classes", 5),), num_train=100, num_eval=100)
    train, test = (split.images.reshape(100, -1).astype(float) for split in (source.train, source.test))
    centres = np.stack([train[source.train.labels == label].mean(0) for label in range(5)])
    distances = ((test[:, None] - centres) ** 2).sum(-1)
    np.testing.assert_array_equal(distances.argmin(1), source.test.labels)
    assert not (test[:, None] == train).all(-1).any()
    assert not (train[:, None] == train)[np.triu_indices(100, 1)].all(-1).any()


def test_synthetic_constants_are_those_of_its_images():
    pixels = _build("synthetic", options=(("num_classes", 200),), num_train=400).train.images / 255
    # 200 random patterns of 64 cells: the mean of a channel has standard deviation 0.0013.
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), 0.5, atol=0.006)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), 0.205, atol=0.003)


def test_num_train_and_num_eval_take_the_first_images():
    few, many = _build("digits", num_train=100, num_eval=50), _build("digits")
    np.testing.assert_array_equal(few.train.images, many.train.images[:100])
    np.testing.assert_array_equal(few.train.labels, many.train.labels[:100])
    np.testing.assert_array_equal(few.test.labels, many.test.labels[:50])
    assert few.fingerprint != many.fingerprint


def test_validation_images_are_held_out_of_the_training_images_class_by_class():
    whole, split = _build("digits", num_train=500), _build("digits", num_train=500, validation_fraction=0.2)
    assert whole.validation is None
    assert (len(split.train), len(split.validation)) == (400, 100)
    together = np.concatenate([split.train.images, split.validation.images])
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in whole.train.images)
    shares = np.bincount(whole.train.labels) / 5
    assert (np.abs(np.bincount(split.validation.labels) - shares) <= 1).all()
    assert split.fingerprint != whole.fingerprint
    np.testing.assert_array_equal(split.test.images, whole.test.images)


def test_the_seed_decides_which_images_are_held_out():
    first, again, other = (_build("digits", seed, validation_fraction=0.1) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "cifar11"},
            r"config.data.name='cifar11': accepted are cifar10, .*, imagenet2012_resized, folder, digits, synthetic",
        ),
        ({"validation_fraction": 1e-5}, r"config.data.validation_fraction=1e-05: it holds out 0 of 1437"),
        ({"num_train": 1438}, r"config.data.num_train=1438: digits train has 1437 images"),
        ({"num_eval": 0}, r"config.data.num_eval=0: digits test has 360 images"),
        ({"options": (("size", 3),)}, r"config.data.size=3: digits has no such option; accepted are image_size"),
        ({"options": (("image_size", 7),)}, r"config.data.image_size=7: accepted is 8 or more"),
    ],
)
def test_mistakes_are_one_line_that_says_what_is_accepted(fields, message):
    with pytest.raises(DataError, match=message) as raised:
        _build(**{"name": "digits", **fields})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [("digits", ()), ("digits", (("image_size", 12),)), ("synthetic", ()), ("synthetic", SMALL["options"])],
)
def test_the_description_of_a_source_is_what_it_then_has(name, options):
    source = _build(name, options=options, num_train=8, num_eval=8)
    assert data.describe(DataSpec(name, options=options)) == (source.image_shape, source.num_classes)


def test_imagenet_is_described_without_reading_it():
    for name in ("imagenet2012", "imagenet2012_resized"):
        assert data.describe(DataSpec(name)) == ((224, 224, 3), 1000)
        assert data.describe(DataSpec(name, options=(("image_size", 64),))) == ((64, 64, 3), 1000)


def test_images_in_memory_refuse_what_is_for_images_that_are_read_while_training():
    assert not _build("digits", num_train=10).streamed and not data.SOURCES["digits"].streamed
    message = r"^config\.data\.augment='random_resized_crop_flip': accepted with digits are pad_crop_flip, .*, none$"
    with pytest.raises(DataError, match=message):
        _build("digits", augment="random_resized_crop_flip")
    with pytest.raises(DataError, match=r"^config\.data\.decoder='opencv': digits is decoded once, by 'pillow'$"):
        _build("digits", decoder="opencv")


@pytest.mark.parametrize("key", ["image_size", "num_classes", "num_train", "num_eval"])
def test_synthetic_refuses_empty_sizes(key):
    fields = {key: 0} if key.startswith("num_") and key != "num_classes" else {"options": ((key, 0),)}
    with pytest.raises(DataError, match=f"config.data.{key}=0: accepted is 1 or more"):
        _build("synthetic", **fields)


def test_fingerprint_sees_pixels_labels_and_which_split_they_are_in():
    images, labels = np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32)
    split, other = Split(images, labels), Split(images + np.uint8(1), labels)
    variants = [(split, other), (other, split), (split, split), (split, other, None), (split, None, other)]
    variants.append((split, Split(images, labels[::-1])))
    assert len({fingerprint(*splits) for splits in variants}) == len(variants) - 1
    assert fingerprint(split, other) == fingerprint(split, other, None)


def test_limit_names_the_key_the_value_and_what_is_accepted():
    assert limit("digits train", "num_train", asked=None, available=7) == 7
    assert limit("digits train", "num_train", asked=5, available=7) == 5
    for asked in (0, 8):
        with pytest.raises(DataError, match=rf"config.data.num_train={asked}: digits train has 7 images.*1 to 7"):
            limit("digits train", "num_train", asked=asked, available=7)


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({}, (0.5,) * 3, (0.205,) * 3),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ({"normalize": False}, (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_images_are_normalised_as_the_spec_says(changes, mean, std):
    source = data.build(DataSpec("synthetic", num_train=2, num_eval=2, **changes), data_dir=None)
    assert (source.mean, source.std) == (mean, std)


def test_statistics_for_another_number_of_channels_are_refused():
    spec = DataSpec("synthetic", num_train=2, num_eval=2, mean=(0.5,), std=(0.5,))
    with pytest.raises(DataError, match=r"^config\.data\.mean=\(0\.5,\): accepted with synthetic are 3 numbers"):
        data.build(spec, data_dir=None)
