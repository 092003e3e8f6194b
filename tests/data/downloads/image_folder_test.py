import numpy as np
import pytest
from PIL import Image

from bnn_jax.data import prepare
from bnn_jax.data.downloads import class_names, image_folder
from bnn_jax.data.tfds import progress_bar
from bnn_jax.errors import DataError
from tests.data import makers

CIFAR10, SHAPE = class_names.CIFAR10_CLASSES, (32, 32, 3)


def _read(name, folder):
    with progress_bar(False) as bar:
        return image_folder.read(name, folder, bar=bar)


def _refused(folder, message, name="cifar10"):
    with pytest.raises(DataError, match=message) as raised:
        _read(name, folder)
    assert "\n" not in str(raised.value)


def test_images_get_the_official_label_of_their_folder(tmp_path):
    train, test = makers.write_image_folder(tmp_path, CIFAR10[::-1], shape=SHAPE)
    found = _read("cifar10", tmp_path)
    np.testing.assert_array_equal(found.train.images, train[::-1])
    np.testing.assert_array_equal(found.test.images, test[::-1])
    np.testing.assert_array_equal(found.train.labels["label"], range(10))
    assert found.class_names == {"label": CIFAR10}
    assert "no checksum exists for images in a folder" in found.unofficial[0]


def test_folders_named_by_numbers_are_ordered_as_numbers(tmp_path):
    train, _ = makers.write_image_folder(tmp_path, tuple(str(i) for i in range(100)), shape=SHAPE)
    np.testing.assert_array_equal(_read("cifar100", tmp_path).train.images, train)


def test_cifar100_superclasses_follow_from_the_classes(tmp_path):
    makers.write_image_folder(tmp_path, class_names.CIFAR100_CLASSES, shape=SHAPE)
    found = _read("cifar100", tmp_path)
    for fine, coarse in zip(found.train.labels["label"], found.train.labels["coarse_label"]):
        group = class_names.CIFAR100_SUPERCLASSES[found.class_names["coarse_label"][coarse]]
        assert found.class_names["label"][fine] in group


def test_the_table_of_cifar100_has_twenty_groups_of_five():
    assert len(class_names.CIFAR100_SUPERCLASSES) == 20
    assert len(set(class_names.CIFAR100_CLASSES)) == len(class_names.CIFAR100_CLASSES) == 100
    assert np.bincount(class_names.CIFAR100_COARSE_LABELS).tolist() == [5] * 20
    assert list(class_names.CIFAR100_SUPERCLASSES) == sorted(class_names.CIFAR100_SUPERCLASSES)


def test_gray_images_make_an_mnist(tmp_path):
    train, _ = makers.write_image_folder(tmp_path, class_names.MNIST_CLASSES, shape=(28, 28, 1))
    np.testing.assert_array_equal(_read("mnist", tmp_path).train.images, train)


def test_an_image_folder_is_prepared_with_its_very_pixels(tmp_path):
    import tensorflow_datasets as tfds

    train, _ = makers.write_image_folder(tmp_path / "images", CIFAR10, shape=SHAPE)
    prepare.prepare("cifar10", tmp_path / "images", tmp_path / "sets")
    source = tfds.data_source("cifar10", split="train", data_dir=str(tmp_path / "sets"), download=False)
    found = sorted((int(record["label"]), record["image"].tobytes()) for record in source)
    assert found == [(label, image.tobytes()) for label, image in enumerate(train)]


def test_files_of_a_class_are_taken_in_the_order_of_their_names(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    for value in (3, 1, 2):
        Image.fromarray(np.full(SHAPE, value, np.uint8)).save(tmp_path / "train" / "bird" / f"{value}.png")
    found = _read("cifar10", tmp_path).train
    birds = found.images[found.labels["label"] == 2]
    np.testing.assert_array_equal(birds[1:, 0, 0, 0], [1, 2, 3])


def test_jpeg_images_are_read_with_a_warning(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    path = tmp_path / "test" / "cat" / "0.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    assert "JPEG" in _read("cifar10", tmp_path).unofficial[1]


def test_other_class_names_are_refused(tmp_path):
    makers.write_image_folder(tmp_path, ("plane", *CIFAR10[1:]), shape=SHAPE)
    _refused(tmp_path, "not those of cifar10 .see 'plane'.: accepted are the official names, 'airplane' to 'truck', or")


def test_a_missing_class_is_named(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10[:-1], shape=SHAPE)
    _refused(tmp_path, "9 class folders, not those of cifar10 .see 'truck'.")


def test_a_corrupt_image_is_named(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    path = tmp_path / "train" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    _refused(tmp_path, "train/dog/0.png: the image is corrupt")


@pytest.mark.parametrize(("size", "mode"), [((31, 32), "RGB"), ((32, 32), "L"), ((32, 32), "P"), ((32, 32), "RGBA")])
def test_images_of_another_shape_are_named(tmp_path, size, mode):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    Image.new(mode, size).save(tmp_path / "train" / "dog" / "0.png")
    _refused(tmp_path, r"train/dog/0.png: shape .*; expected \(32, 32, 3\), RGB")


def test_a_palette_image_is_not_taken_for_a_gray_one(tmp_path):
    makers.write_image_folder(tmp_path, class_names.MNIST_CLASSES, shape=(28, 28, 1))
    Image.new("P", (28, 28)).save(tmp_path / "train" / "3" / "0.png")
    _refused(tmp_path, r"train/3/0.png: shape \(28, 28, 1\), mode P; expected \(28, 28, 1\), L", name="mnist")


def test_other_files_and_empty_folders_are_named(tmp_path):
    makers.write_image_folder(tmp_path, CIFAR10, shape=SHAPE)
    (tmp_path / "train" / "dog" / ".DS_Store").write_text("hidden files are ignored")
    _read("cifar10", tmp_path)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("x")
    _refused(tmp_path, "notes.txt is no image: accepted are .png")
    (tmp_path / "train" / "dog" / "notes.txt").unlink()
    (tmp_path / "train" / "dog" / "0.png").unlink()
    _refused(tmp_path, "train/dog holds no image")
