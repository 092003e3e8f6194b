import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from bnn_jax import data, picture_files
from bnn_jax.data import folder, folder_images
from bnn_jax.data.augment import RANDOM_CROPS
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec
from tests.data import makers

SIZE = 24
# Ends of file names and what Pillow calls the format; sizes and modes of the pictures differ as well.
KINDS = [("a.jpg", "JPEG", "RGB"), ("b.PNG", "PNG", "RGBA"), ("c.bmp", "BMP", "L"), ("d.tif", "TIFF", "RGB")]
KINDS += [("e.gif", "GIF", "P"), ("f.webp", "WEBP", "RGB")]
SPEC = DataSpec("folder", augment=RANDOM_CROPS, options=(("image_size", SIZE),))


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


def _build(folder, *, seed=0, normalization=None, test_fraction=None, **fields):
    options = SPEC.options if test_fraction is None else (*SPEC.options, ("test_fraction", test_fraction))
    spec = DataSpec(**{**vars(SPEC), "options": options, **fields})
    return data.build(spec, data_dir=None if folder is None else str(folder), seed=seed, normalization=normalization)


def _refused(folder, message, **fields):
    with pytest.raises(DataError, match=message) as raised:
        _build(folder, **fields)
    assert "\n" not in str(raised.value)


def test_the_classes_are_the_folders_of_the_training_pictures(pictures):
    assert data.class_names(SPEC, data_dir=str(pictures)) == ("Bee", "ant", "cow")
    assert data.describe(SPEC, data_dir=str(pictures)) == ((SIZE, SIZE, 3), 3)
    source = _build(pictures)
    assert (source.num_classes, source.image_shape, source.streamed) == (3, (SIZE, SIZE, 3), True)
    assert data.reads_while_training(SPEC, data_dir=str(pictures))
    assert np.bincount(source.train.labels).tolist() == [6, 6, 6]
    assert np.bincount(source.test.labels).tolist() == [6, 0, 6]


def test_pictures_of_every_size_and_format_are_read_as_pillow_reads_them(pictures):
    source = _build(pictures)
    for split, place in ((source.train, "train"), (source.test, "test")):
        ((images, labels),) = split.batches(np.arange(len(split))[None])
        np.testing.assert_array_equal(labels, split.labels)
        for number, image in enumerate(images):
            path = split.records.name_of(number)
            assert path.startswith(f"{pictures}/{place}/{('Bee', 'ant', 'cow')[labels[number]]}/")
            with Image.open(path) as picture:
                as_png = makers.encoded(picture.convert("RGB"), "PNG")
            np.testing.assert_array_equal(image, picture_files.evaluation_image(as_png, SIZE), err_msg=path)


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
    _refused(pictures, r"config.data.num_train=19: .* \(train\) has 18 images", num_train=19)


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
    _refused(
        pictures, "config.data.test_fraction=0.5: .*/test is there already; accepted with it is 0", test_fraction=0.5
    )
    (pictures / "test").rename(pictures / "others")
    _refused(pictures, f"has no folder of test pictures: {accepted}, or config.data.test_fraction")


def test_a_class_without_training_pictures_is_refused(pictures):
    (pictures / "test" / "dog").mkdir()
    _refused(pictures, "test/dog: .*/train has no such class; accepted are Bee to cow")
    (pictures / "test" / "dog").rename(pictures / "train" / "dog")
    _refused(pictures, "train/dog holds no image: add some, or remove the folder")


def test_a_class_without_test_pictures_is_said(pictures):
    (pictures / "test" / "ant").mkdir()
    assert "no test picture of ant: how well such pictures are recognised remains unknown" in _build(pictures).notes
    shutil.rmtree(pictures / "test" / "cow")
    assert any("no test picture of ant and 1 more" in line for line in _build(pictures).notes)
    shutil.rmtree(pictures / "test" / "Bee")
    _refused(pictures, "test: there is no picture to test with")


def test_files_that_are_no_pictures_are_left_out_and_said(pictures):
    assert not any("left out" in line for line in _build(pictures).notes)
    for name in ("train/labels.csv", "train/cow/Thumbs.db", "test/cow/notes.txt"):
        (pictures / name).write_text("x")
    source = _build(pictures)
    assert (len(source.train), len(source.test)) == (18, 12)
    assert any(
        f"left out, since they are no pictures: {pictures}/train/labels.csv and 2 more" in n for n in source.notes
    )


def test_pictures_may_lie_in_folders_within_that_of_their_class(pictures):
    (pictures / "train" / "cow" / "more").mkdir()
    (pictures / "train" / "cow" / "a.jpg").rename(pictures / "train" / "cow" / "more" / "a.jpg")
    assert np.bincount(_build(pictures).train.labels).tolist() == [6, 6, 6]


def test_uneven_classes_are_said(pictures):
    assert "training pictures of each class: Bee 6, ant 6, cow 6" in _build(pictures).notes
    for name in ("a.jpg", "b.PNG", "c.bmp"):
        (pictures / "train" / "ant" / name).unlink()
    assert any("Bee 6, ant 3, cow 6; Bee has 2.0 times as many as ant" in line for line in _build(pictures).notes)


def test_one_class_is_too_few(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
    _refused(tmp_path, "train has 1 folders of classes: accepted is 2 or more")


@pytest.mark.parametrize("augment", [RANDOM_CROPS, "pad_crop"])
def test_of_damaged_pictures_the_first_is_named_and_the_others_are_counted(pictures, augment):
    (pictures / "test" / "cow" / "a.jpg").write_bytes(b"no picture")
    _refused(pictures, r"test/cow/a\.jpg: the image is corrupt \(cannot identify its format\): mend", augment=augment)
    (pictures / "train" / "cow" / "a.jpg").write_bytes(b"")
    (pictures / "train" / "ant" / "a.jpg").write_bytes((pictures / "train" / "ant" / "a.jpg").read_bytes()[:200])
    _refused(
        pictures,
        r"train/(cow|ant)/a\.jpg: the image is corrupt .*, and 2 more like it: mend or remove",
        augment=augment,
    )


def test_no_other_program_is_run_to_read_a_picture(pictures):
    # For PostScript, whatever a file is called, Pillow would run Ghostscript.
    assert "EPS" not in picture_files.formats()
    Image.new("RGB", (30, 30)).save(pictures / "test" / "cow" / "a.jpg", "EPS")
    _refused(pictures, r"test/cow/a\.jpg: the image is corrupt .cannot identify")


def _pixels(split):
    return split.images if isinstance(split, data.Split) else next(split.batches(np.arange(len(split))[None]))[0]


def test_images_in_memory_are_those_that_are_read_while_training(pictures, monkeypatch):
    inside = _build(pictures, augment="pad_crop")
    monkeypatch.setattr(folder_images, "MEMORY_LIMIT", 30 * 3 * SIZE**2 - 1)
    outside = _build(pictures, augment="pad_crop")
    assert (inside.streamed, outside.streamed) == (False, True)
    assert (inside.mean, inside.std, inside.crop_margin) == (outside.mean, outside.std, outside.crop_margin)
    for name in ("train", "test"):
        ours, theirs = getattr(inside, name), getattr(outside, name)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(_pixels(ours), _pixels(theirs))
    assert "decoded once into memory (0.0 MiB; up to 1,024 fit there)" in inside.notes[0]
    assert "read while training (0.0 MiB; up to 0 fit there)" in outside.notes[0]


def test_whole_pictures_are_evaluated_where_whole_pictures_are_trained_on(pictures):
    source = _build(pictures, augment="none")
    with Image.open(pictures / "test" / "Bee" / "a.jpg") as picture:
        expected = picture_files.central_part(picture, SIZE, SIZE, margin=1.0)
    assert (source.test.images == expected).all(axis=(1, 2, 3)).any() and source.crop_margin == 1.0
    assert _build(pictures).crop_margin == picture_files.EVALUATION_MARGIN


def test_the_normalisation_is_that_of_all_training_pictures(pictures):
    source = _build(pictures, augment="none")
    pixels = source.train.images / 255
    # Rounded to four digits.
    np.testing.assert_allclose(source.mean, pixels.mean((0, 1, 2)), atol=6e-5)
    np.testing.assert_allclose(source.std, pixels.std((0, 1, 2)), atol=6e-5)
    part = _build(pictures, augment="none", num_train=1)
    assert (part.mean, part.std) == (source.mean, source.std)
    assert folder_images.measure(np.zeros((2, 4, 4, 3), np.uint8)) == ((0.0,) * 3, (1.0,) * 3)


def test_a_known_normalisation_is_taken_and_nothing_read_for_it(pictures):
    (pictures / "train" / "cow" / "a.jpg").write_bytes(b"")
    known = data.Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    source = _build(pictures, normalization=known)
    assert (source.mean, source.std) == known


def _names(source):
    return {
        split: {
            os.path.relpath(getattr(source, split).records.name_of(n), source.train.records.folder)
            for n in range(len(getattr(source, split)))
        }
        for split in ("train", "test")
    }


@pytest.fixture
def one_level(pictures):
    """A folder of classes alone, of six pictures each."""
    return pictures / "train"


def test_a_share_of_each_class_is_held_out_by_names_and_seed_alone(one_level, tmp_path):
    first, other = (_names(_build(one_level, test_fraction=1 / 3, seed=seed)) for seed in (0, 1))
    assert [len(first[split]) for split in ("train", "test")] == [12, 6] and not first["train"] & first["test"]
    assert sorted(name.split("/")[0] for name in first["test"]) == ["Bee"] * 2 + ["ant"] * 2 + ["cow"] * 2
    assert first["test"] != other["test"]
    copy = tmp_path / "copy"
    shutil.copytree(one_level, copy)
    for path in copy.glob("*/*"):
        path.write_bytes((one_level / "ant" / "a.jpg").read_bytes())
    assert _names(_build(copy, test_fraction=1 / 3)) == first
    # A train/ without a test/ is divided in the same way.
    shutil.rmtree(one_level.parent / "test")
    assert data.class_names(DataSpec("folder", options=(("test_fraction", 0.5),)), data_dir=str(one_level.parent))
    assert len(_build(one_level.parent, test_fraction=1 / 3).test) == 6


def test_of_a_class_something_is_left_to_train_on_and_if_possible_to_test(one_level):
    for name in ("b.PNG", "c.bmp", "d.tif", "e.gif", "f.webp"):
        (one_level / "ant" / name).unlink()
    few, many = (_build(one_level, test_fraction=fraction) for fraction in (0.01, 0.99))
    assert np.bincount(few.test.labels).tolist() == [1, 0, 1]
    assert np.bincount(many.train.labels).tolist() == [1, 1, 1]


def test_pictures_that_are_read_while_training_are_augmented_like_those_in_memory(pictures, monkeypatch):
    monkeypatch.setattr(folder_images, "MEMORY_LIMIT", 0)
    assert _build(pictures, augment="pad_crop_flip").augment == "pad_crop_flip"


def test_many_classes_are_shown_by_the_smallest_and_the_largest():
    note = folder_images._balance([f"c{k}" for k in range(37)], np.arange(1, 38))
    assert note == "training pictures of each class: 1 (c0) to 37 (c36); c36 has 37.0 times as many as c0"


def test_the_folder_of_imagenet_is_read_strictly(pictures):
    names = folder.class_names(str(pictures))
    assert len(folder.picture_files(pictures / "train", names)) == 18
    (pictures / "train" / "cow" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes\.txt is no image"):
        folder.picture_files(pictures / "train", names)
