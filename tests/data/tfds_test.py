import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

from bnn_jax import data
from bnn_jax.data import prepare, tfds
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec
from tests.data import makers

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "tfds_data"


def _prepare(folder, name="mnist", download=None):
    return prepare.write(name, download or makers.random_download(name), folder)


def _load(folder, name="mnist", *, progress=False, **counts):
    return tfds.load(DataSpec(name, **counts), None if folder is None else str(folder), progress=progress)


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    _prepare(folder)
    return folder


@pytest.fixture
def prepared(prepared_once, tmp_path):
    """A folder with a small MNIST that a test may damage."""
    shutil.copytree(prepared_once, tmp_path / "sets")
    return tmp_path / "sets"


def _record_file(folder, split):
    return next(folder.glob(f"mnist/3.0.1/mnist-{split}.array_record*"))


def _refused(folder, message, **counts):
    with pytest.raises(DataError, match=message) as raised:
        _load(folder, **counts)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_source_has_the_usual_constants_and_the_stored_images(prepared_once):
    source = data.build(DataSpec("mnist", augment="none"), data_dir=str(prepared_once))
    assert (source.num_classes, source.image_shape, source.pad) == (10, (28, 28, 1), 3)
    assert (source.mean, source.std) == ((0.1307,), (0.3081,))
    expected = makers.random_download("mnist").test
    assert sorted(zip(source.test.labels, (image.tobytes() for image in source.test.images))) == sorted(
        zip(expected.labels["label"], (image.tobytes() for image in expected.images))
    )


def test_a_part_is_the_first_of_the_whole(prepared_once):
    whole = _load(prepared_once)
    part = _load(prepared_once, num_train=7, num_eval=2)
    np.testing.assert_array_equal(part.train.images, whole.train.images[:7])
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[:7])
    np.testing.assert_array_equal(part.test.labels, whole.test.labels[:2])


def test_images_are_read_across_chunks(prepared_once, monkeypatch):
    whole = _load(prepared_once)
    monkeypatch.setattr(tfds, "CHUNK", 3)
    chunked = _load(prepared_once)
    np.testing.assert_array_equal(chunked.train.images, whole.train.images)
    np.testing.assert_array_equal(chunked.train.labels, whole.train.labels)


def test_more_images_than_there_are_is_an_error(prepared_once):
    _refused(prepared_once, "config.data.num_train=21: mnist train has 20 images", num_train=21)
    _refused(prepared_once, "config.data.num_eval=7: mnist test has 6 images", num_eval=7)


def test_a_set_that_is_not_prepared_says_where_it_was_looked_for_and_how_to_prepare_it(tmp_path):
    message = _refused(tmp_path / "no", "mnist is not prepared in")
    command = f"`python -m bnn_jax.data.prepare mnist --source FOLDER_OF_THE_FOUR_FILES --data_dir {tmp_path / 'no'}`"
    assert command in message
    assert not (tmp_path / "no").exists()


def test_the_default_folder_is_the_one_of_tfds(prepared_once, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_once))
    assert len(_load(None).test) == 6
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(DataError, match="mnist is not prepared in /nowhere/tensorflow_datasets:"):
        _load(None)


def test_a_folder_below_the_right_one_is_recognised(prepared_once):
    for below in ("mnist", "mnist/3.0.1"):
        _refused(prepared_once / below, f"is a data set's own folder: give the one above it, {prepared_once}$")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_record_file_is_damaged(prepared, split, share):
    path = _record_file(prepared, split)
    os.truncate(path, int(share * path.stat().st_size))
    message = _refused(prepared, f"mnist {split} in {path.parent} is damaged: remove that folder and prepare it again")
    assert f"--data_dir {prepared}`" in message


def test_a_flipped_bit_in_a_record_is_damage(prepared):
    path = _record_file(prepared, "train")
    content = bytearray(path.read_bytes())
    content[content.index(b"PNG") + 100] ^= 1
    path.write_bytes(content)
    _refused(prepared, "mnist train in .* is damaged")


def test_a_missing_record_file_is_damage(prepared):
    _record_file(prepared, "test").unlink()
    _refused(prepared, "mnist test in .* is damaged")


@pytest.mark.parametrize("described", ["5", "7"])
def test_another_number_of_records_than_described_is_damage(prepared, described):
    path = prepared / "mnist" / "3.0.1" / "dataset_info.json"
    info = json.loads(path.read_text())
    next(split for split in info["splits"] if split["name"] == "test")["shardLengths"] = [described]
    path.write_text(json.dumps(info))
    _refused(prepared, rf"mnist test in .* is damaged.*\(6 records stored, {described} in its description\)")


def test_a_damaged_description_is_damage(prepared):
    path = prepared / "mnist" / "3.0.1" / "dataset_info.json"
    path.write_text(path.read_text()[:50])
    _refused(prepared, "mnist train in .* is damaged")


def test_records_that_only_tensorflow_reads_say_so(prepared):
    folder = prepared / "mnist" / "3.0.1"
    path = folder / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    for record_file in folder.glob("*.array_record*"):
        record_file.rename(str(record_file).replace("array_record", "tfrecord"))
    _refused(prepared, "mnist in .* is stored as TFRecord, which only TensorFlow reads: prepare it as array_record")


def test_a_corrupt_image_is_named_with_data_set_split_and_index(tmp_path, monkeypatch):
    encode = prepare.encode_image
    bad = makers.random_download("mnist").test.images[0]
    monkeypatch.setattr(prepare, "encode_image", lambda image: encode(image)[: 150 if (image == bad).all() else None])
    _prepare(tmp_path)
    _refused(tmp_path, r"mnist test in .*, image \d: the image is corrupt")


def test_an_image_of_another_shape_is_named(tmp_path, monkeypatch):
    encode = prepare.encode_image
    monkeypatch.setattr(prepare, "encode_image", lambda image: encode(image[1:]))
    _prepare(tmp_path)
    _refused(tmp_path, r"mnist train in .*, image 0: shape \(27, 28, 1\), mode L; expected \(28, 28, 1\), L")


def test_a_label_out_of_range_is_named(prepared_once, monkeypatch):
    records = tfds.open_records("mnist", "train", str(prepared_once))
    stored = records._source.__getitems__(list(range(20)))
    stored[4]["label"] = 10
    monkeypatch.setattr(type(records._source), "__getitems__", lambda *_: stored)
    with pytest.raises(DataError, match=r"mnist train in .*, image 4: label 10 is not in 0 to 9"):
        records.read(range(20))


def test_another_number_of_classes_is_damage(prepared_once, monkeypatch):
    monkeypatch.setitem(tfds.TFDS_SETS, "mnist", tfds.TfdsSet((28, 28, 1), 9, (0.5,), (0.5,), "x"))
    _refused(prepared_once, r"\(10 classes in its description, 9 expected\)")


def test_progress_goes_to_stderr_only_when_asked(prepared_once, capsys):
    _load(prepared_once)
    assert capsys.readouterr() == ("", "")
    _load(prepared_once, progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert "Reading mnist train" in output.err
    assert "100%" in output.err


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
@pytest.mark.parametrize(
    ("name", "num_train", "num_eval", "first"),
    [
        ("cifar10", 50_000, 10_000, [9, 0, 7, 7, 1, 6, 3, 6, 5, 8]),
        ("cifar100", 5_000, 1_000, [80, 56, 23, 93, 17, 96, 52, 84, 99, 37]),
        ("mnist", 60_000, 10_000, [2, 0, 7, 2, 4, 9, 8, 8, 4, 0]),
    ],
)
def test_the_real_sets_are_there_in_their_fixed_order(name, num_train, num_eval, first):
    loaded = _load(SHARED, name, num_train=1000, num_eval=10)
    assert loaded.train.labels[:10].tolist() == first
    pixels = loaded.train.images / 255
    # 1000 of the images the constants were computed from.
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), loaded.mean, atol=0.02)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), loaded.std, atol=0.02)
    for key, available in (("num_train", num_train), ("num_eval", num_eval)):
        counts = {"num_train": 1, "num_eval": 1, key: available + 1}
        with pytest.raises(DataError, match=f"has {available} images"):
            _load(SHARED, name, **counts)
    assert "tensorflow" not in sys.modules


# ---- names of the classes


def _label_file(folder, lines, version="3.0.2"):
    path = folder / "cifar10" / version / "label.labels.txt"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_class_names_are_those_stored_beside_the_images(tmp_path):
    names = tuple("abcdefghij")
    _label_file(tmp_path, names)
    assert data.class_names(DataSpec("cifar10"), data_dir=str(tmp_path)) == names


def test_class_names_of_our_own_preparation_are_the_official_ones(tmp_path):
    _prepare(tmp_path, "cifar10")
    names = data.class_names(DataSpec("cifar10"), data_dir=str(tmp_path))
    assert names[:3] == ("airplane", "automobile", "bird") and len(names) == 10


def test_the_names_of_the_newest_version_are_taken(tmp_path):
    _label_file(tmp_path, "abcdefghij", version="3.0.0")
    _label_file(tmp_path, "klmnopqrst", version="3.0.2")
    assert data.class_names(DataSpec("cifar10"), data_dir=str(tmp_path))[0] == "k"


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (DataSpec("cifar10"), 10),
        (DataSpec("mnist"), 10),
        (DataSpec("digits"), 10),
        (DataSpec("synthetic", options=(("num_classes", 3),)), 3),
    ],
)
def test_without_a_list_classes_are_numbers(tmp_path, spec, count):
    assert data.class_names(spec, data_dir=str(tmp_path)) == tuple(map(str, range(count)))


def test_an_incomplete_list_is_not_used(tmp_path):
    _label_file(tmp_path, "abc")
    assert data.class_names(DataSpec("cifar10"), data_dir=str(tmp_path)) == tuple("0123456789")


def test_images_may_stay_as_they_are(prepared_once):
    source = data.build(DataSpec("mnist", augment="none", normalize=False), data_dir=str(prepared_once))
    assert (source.mean, source.std) == ((0.0,), (1.0,))


def test_images_of_one_channel_have_no_colour_to_vary(prepared_once):
    with pytest.raises(DataError, match=r"^config\.data\.lighting='paper': accepted with .* one channel is 'none'$"):
        data.build(DataSpec("mnist", augment="none", lighting="paper"), data_dir=str(prepared_once))
