import pickle

import numpy as np
import pytest
from PIL import Image

from bnn_jax import data
from bnn_jax.data import augment
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec
from tests.data import makers

SIZE = 24
# Ends of file names and what Pillow calls the format; sizes and modes of the pictures differ as well.
KINDS = [("a.jpg", "JPEG", "RGB"), ("b.PNG", "PNG", "RGBA"), ("c.bmp", "BMP", "L"), ("d.tif", "TIFF", "RGB")]
KINDS += [("e.gif", "GIF", "P"), ("f.webp", "WEBP", "RGB")]
SPEC = DataSpec("folder", augment="random_resized_crop_flip", options=(("image_size", SIZE),))


def _picture(number):
    return makers.smooth_picture(20 + 7 * number, 60 - 5 * number, seed=number)


@pytest.fixture
def pictures(tmp_path):
    """Three classes; 'ant' is not among the pictures that are evaluated."""
    number = 0
    for split, classes in (("train", ("ant", "Bee", "cow")), ("test", ("Bee", "cow"))):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for file, file_format, mode in KINDS:
                _picture(number % 6).convert(mode).save(tmp_path / split / name / file, file_format)
                number += 1
    (tmp_path / "train" / ".hidden").write_text("is ignored")
    return tmp_path


def _build(folder, **fields):
    return data.build(DataSpec(**{**vars(SPEC), **fields}), data_dir=None if folder is None else str(folder))


def _refused(folder, message, **fields):
    with pytest.raises(DataError, match=message) as raised:
        _build(folder, **fields)
    assert "\n" not in str(raised.value)


def test_the_classes_are_the_folders_of_the_training_pictures(pictures):
    assert data.class_names(SPEC, data_dir=str(pictures)) == ("Bee", "ant", "cow")
    assert data.describe(SPEC, data_dir=str(pictures)) == ((SIZE, SIZE, 3), 3)
    source = _build(pictures)
    assert (source.num_classes, source.image_shape, source.streamed) == (3, (SIZE, SIZE, 3), True)
    assert data.SOURCES["folder"].streamed
    assert np.bincount(source.train.labels).tolist() == [6, 6, 6]
    assert np.bincount(source.test.labels).tolist() == [6, 0, 6]


def test_pictures_of_every_size_and_format_are_read_as_pillow_reads_them(pictures):
    source = _build(pictures)
    for split, folder in ((source.train, "train"), (source.test, "test")):
        ((images, labels),) = split.batches(np.arange(len(split))[None])
        np.testing.assert_array_equal(labels, split.labels)
        for number, image in enumerate(images):
            path = split.records.name_of(number)
            assert path.startswith(f"{pictures}/{folder}/{('Bee', 'ant', 'cow')[labels[number]]}/")
            with Image.open(path) as picture:
                as_png = makers.encoded(picture.convert("RGB"), "PNG")
            np.testing.assert_array_equal(image, augment.evaluation_image(as_png, SIZE), err_msg=path)


def test_random_crops_depend_on_seed_and_epoch(pictures):
    split = _build(pictures).train
    plan = np.arange(len(split))[None]
    first, again, other = (next(split.batches(plan, random_crops=crops))[0] for crops in ((0, 1), (0, 1), (0, 2)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_first_pictures_are_mixed_and_the_first_of_all(pictures):
    whole, part = _build(pictures), _build(pictures, num_train=9, num_eval=4)
    assert whole.train.labels.tolist() != sorted(whole.train.labels)
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[:9])
    assert len(part.test) == 4 and part.fingerprint != whole.fingerprint == _build(pictures).fingerprint
    _refused(pictures, "config.data.num_train=19: .*train has 18 images", num_train=19)


def test_a_copy_for_another_process_reads_the_same(pictures):
    records = _build(pictures).train.records
    assert pickle.loads(pickle.dumps(records)).read([3, 0]) == records.read([3, 0])


def test_images_are_held_out_class_by_class(pictures):
    source = _build(pictures, validation_fraction=1 / 3)
    assert np.bincount(source.validation.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_the_test_pictures_may_lie_in_a_folder_of_another_name(pictures, name):
    (pictures / "test").rename(pictures / name)
    assert len(_build(pictures).test) == 12


def test_a_folder_that_is_none_says_what_is_accepted(pictures, tmp_path):
    accepted = r"accepted is a folder with train/<class>/ and test/<class>/ \(or val/<class>/\)"
    _refused(None, f"config.data.data_dir=None: {accepted}")
    _refused(tmp_path / "nowhere", f"nowhere holds no pictures to train on: {accepted}")
    (pictures / "test").rename(pictures / "others")
    _refused(pictures, f"holds no pictures to train on: {accepted}")


def test_what_does_not_belong_there_is_named(pictures):
    (pictures / "train" / "cow" / "notes.txt").write_text("")
    _refused(pictures, "train/cow/notes.txt is no image: accepted are the formats of Pillow")
    (pictures / "train" / "cow" / "notes.txt").rename(pictures / "train" / "notes.txt")
    _refused(pictures, "train/notes.txt is no folder of a class: accepted are Bee to cow")
    (pictures / "train" / "notes.txt").unlink()
    (pictures / "test" / "dog").mkdir()
    _refused(pictures, "test/dog is no folder of a class")
    (pictures / "test" / "dog").rename(pictures / "train" / "dog")
    _refused(pictures, "train/dog holds no image")


def test_one_class_is_too_few(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
    _refused(tmp_path, "train has 1 folders of classes: accepted is 2 or more")


def test_a_corrupt_picture_is_named(pictures):
    (pictures / "test" / "cow" / "a.jpg").write_bytes(b"no picture")
    split = _build(pictures).test
    with pytest.raises(DataError, match=r"test/cow/a\.jpg: the image is corrupt"):
        list(split.batches(np.arange(12)[None]))


def test_no_other_program_is_run_to_read_a_picture(pictures):
    # For PostScript, whatever a file is called, Pillow would run Ghostscript.
    assert "EPS" not in augment.picture_formats()
    Image.new("RGB", (30, 30)).save(pictures / "test" / "cow" / "a.jpg", "EPS")
    with pytest.raises(DataError, match=r"test/cow/a\.jpg: the image is corrupt .cannot identify"):
        list(_build(pictures).test.batches(np.arange(12)[None]))
