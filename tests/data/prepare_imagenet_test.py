import io
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from bnn_jax import data
from bnn_jax.data import prepare, tfds
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec
from tests.data import makers

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "tfds_data"
TRAIN, VALIDATION = makers.small_pictures(11, seed=3), makers.small_pictures(5, seed=4)
SIDE, SIZE = 27, 24  # round(24 * 256 / 224)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return makers.write_imagenet(tmp_path_factory.mktemp("jpegs"), TRAIN, VALIDATION)


@pytest.fixture(scope="module")
def wnids():
    return prepare.official_classes()


@pytest.fixture
def image_folder(tmp_path, wnids):
    """The same pictures in train/<wnid>/ and val/<wnid>/."""
    for split, pictures in (("train", TRAIN), ("val", VALIDATION)):
        for number, (content, label) in enumerate(pictures):
            path = tmp_path / "pictures" / split / wnids[label] / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "IMAGES_PER_SHARD", 4)


def _write(source, data_dir, **options):
    return prepare.prepare_imagenet(source, data_dir, **{"side": SIDE, **options})


def _source(data_dir, name="imagenet2012_resized", **fields):
    return data.build(DataSpec(name, augment="none", options=(("image_size", SIZE),), **fields), data_dir=str(data_dir))


def _images(split, **options):
    ((images, labels),) = split.batches(np.arange(len(split))[None], **options)
    np.testing.assert_array_equal(labels, split.labels)
    return images, labels


def _refused(call, message):
    with pytest.raises(DataError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_evaluated_images_are_those_of_the_files(jpegs, tmp_path):
    target, counts = _write(jpegs, tmp_path)
    assert target == tmp_path / "imagenet2012_resized" / "1.0.0"
    assert counts == {"train": 11, "validation": 5}
    ours, theirs = _source(tmp_path), _source(jpegs, "imagenet2012")
    assert ours.streamed and data.SOURCES[ours.name].streamed and ours.image_shape == theirs.image_shape
    for split in ("train", "test"):
        for found, expected in zip(_images(getattr(ours, split)), _images(getattr(theirs, split))):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(not (SHARED / "imagenet2012").is_dir(), reason=f"{SHARED}/imagenet2012 is absent")
def test_evaluated_images_of_the_sample_are_those_of_the_files(tmp_path):
    _write(SHARED, tmp_path, side=256)
    ours, theirs = (
        data.build(DataSpec(name, augment="none"), data_dir=str(folder)).test
        for name, folder in (("imagenet2012_resized", tmp_path), ("imagenet2012", SHARED))
    )
    for found, expected in zip(_images(ours), _images(theirs)):
        np.testing.assert_array_equal(found, expected)


def test_stored_images_are_the_resized_ones(jpegs, tmp_path):
    _write(jpegs, tmp_path)
    records = _source(tmp_path).train.records
    (content, _), *_ = tfds.open_records("imagenet2012", "train", str(jpegs)).read([6])
    ((stored, _),) = records.read([6])
    pixels = np.asarray(Image.open(io.BytesIO(stored)))
    picture = Image.open(io.BytesIO(content))
    short = min(picture.size)
    size = tuple(SIDE if side == short else int(SIDE * side / short) for side in picture.size)
    np.testing.assert_array_equal(pixels, np.asarray(picture.resize(size, Image.BILINEAR)))


@pytest.mark.parametrize("decoder", ["pillow", "opencv"])
def test_training_crops_are_drawn_as_from_the_files(jpegs, tmp_path, decoder):
    if decoder == "opencv":
        pytest.importorskip("cv2", reason="OpenCV is not installed")
    _write(jpegs, tmp_path)
    ours, theirs = (
        _images(_source(folder, name, decoder=decoder).train, random_crops=(0, 0))[0].astype(int)
        for folder, name in ((tmp_path, "imagenet2012_resized"), (jpegs, "imagenet2012"))
    )
    # The same part of each picture, out of fewer pixels, in boxes rounded to these: alike, and unlike other parts.
    others = _images(_source(jpegs, "imagenet2012").train, random_crops=(0, 1))[0].astype(int)
    assert np.abs(ours - theirs).mean() < 12 < 24 < np.abs(ours - others).mean()


def test_tfds_itself_reads_what_was_written(jpegs, tmp_path):
    target, _ = _write(jpegs, tmp_path)
    names = {path.name.split("-")[0] for path in target.iterdir()}
    assert names == {"imagenet2012_resized", "dataset_info.json", "features.json", "label.labels.txt"} | {
        f"{split}.labels.npy" for split in ("train", "validation")
    }
    assert sorted(path.name for path in target.parent.parent.iterdir()) == ["imagenet2012_resized"]
    stock = tensorflow_datasets.builder_from_directory(target).as_data_source("train")
    ours = _source(tmp_path).train
    assert [int(example["label"]) for example in stock] == ours.labels.tolist()
    ((content, _),) = ours.records.read([2])
    np.testing.assert_array_equal(stock[2]["image"], np.asarray(Image.open(io.BytesIO(content))))


def test_pictures_in_folders_get_the_official_labels_in_a_mixed_order(image_folder, jpegs, tmp_path):
    _write(image_folder, tmp_path / "folder")
    _write(jpegs, tmp_path / "tfds")
    from_folder, from_tfds = _source(tmp_path / "folder"), _source(tmp_path / "tfds")
    for split in ("train", "test"):
        ours, theirs = _images(getattr(from_folder, split)), _images(getattr(from_tfds, split))
        pairs = [sorted(zip(labels.tolist(), map(np.ndarray.tobytes, images))) for images, labels in (ours, theirs)]
        assert pairs[0] == pairs[1]
    assert from_folder.train.labels.tolist() != sorted(from_folder.train.labels)


@pytest.mark.slow
def test_a_program_with_several_processes_writes_the_same_images(image_folder, tmp_path):
    command = [sys.executable, "-m", "bnn_jax.data.prepare", "imagenet", "--source", image_folder, "--side", str(SIDE)]
    result = subprocess.run(
        [*command, "--data_dir", tmp_path / "two", "--workers", "2"], capture_output=True, text=True, check=True
    )
    assert "imagenet: 11 training and 5 validation images in" in result.stdout
    assert f"--config.data.name=imagenet2012_resized --config.data.data_dir={tmp_path / 'two'}" in result.stdout
    assert result.stderr == ""
    _write(image_folder, tmp_path / "one")
    for split in ("train", "test"):
        for one, two in zip(*(_images(getattr(_source(tmp_path / name), split)) for name in ("one", "two"))):
            np.testing.assert_array_equal(one, two)


def _stop_after(monkeypatch, shards):
    """Lets only so many shards be written; returns the list of the names of those written from then on."""
    write_shard, written = prepare._write_shard, []

    def write(path, pictures):
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(path.name)
        write_shard(path, pictures)

    monkeypatch.setattr(prepare, "_write_shard", write)
    return written


def test_what_is_finished_is_not_done_again_after_an_interruption(image_folder, tmp_path, monkeypatch):
    first = _stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        _write(image_folder, tmp_path)
    _refused(lambda: _source(tmp_path), "imagenet2012_resized is not prepared in")
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "IMAGES_PER_SHARD", 4)
    second = _stop_after(monkeypatch, 9)
    _write(image_folder, tmp_path)
    assert len(first) == 2 and len(second) == 3 and not set(first) & set(second)
    _write(image_folder, tmp_path / "at once")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for stopped, whole in zip(*(_images(_source(place).train) for place in (tmp_path, tmp_path / "at once"))):
        np.testing.assert_array_equal(stopped, whole)


def test_a_picture_that_changed_makes_everything_anew(image_folder, tmp_path, monkeypatch):
    _stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        _write(image_folder, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "IMAGES_PER_SHARD", 4)
    shutil.rmtree(next((image_folder / "train").iterdir()))
    _, counts = _write(image_folder, tmp_path)
    assert counts == {"train": 10, "validation": 5}


def test_a_corrupt_picture_is_named(image_folder, tmp_path):
    path = next((image_folder / "val").rglob("*.JPEG"))
    path.write_bytes(b"no picture")
    _refused(lambda: _write(image_folder, tmp_path), f"^{path}: the image is corrupt")


@pytest.mark.slow
def test_a_corrupt_picture_is_named_by_other_processes_too(image_folder, tmp_path):
    path = next((image_folder / "train").rglob("*.JPEG"))
    path.write_bytes(path.read_bytes()[:200])
    _refused(lambda: _write(image_folder, tmp_path, workers=2), f"^{path}: the image is corrupt")


def test_a_full_disk_is_one_line(image_folder, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(prepare, "_write_shard", fail)
    _refused(lambda: _write(image_folder, tmp_path), "^writing to .* failed: No space left on device")


def _damage_source(folder, kind):
    if kind == "class":
        (folder / "train" / "n99999999").mkdir()
        return r"train/n99999999 is no folder of a class: accepted are n01440764 to n15075141"
    if kind == "file":
        (next((folder / "val").iterdir()) / "list.txt").write_text("")
        return r"val/n\d+/list.txt is no image: accepted are the formats of Pillow"
    (folder / "val").rename(folder / "others")
    return "holds no ImageNet: accepted is a folder with imagenet2012/<version>/"


@pytest.mark.parametrize("kind", ["class", "file", "no val"])
def test_a_source_that_is_not_imagenet_is_refused(image_folder, tmp_path, kind):
    message = _damage_source(image_folder, kind)
    _refused(lambda: _write(image_folder, tmp_path), message)


def test_mistakes_of_the_command_line_are_one_line(jpegs, tmp_path, capsys):
    def error(*options):
        assert prepare.main(["imagenet", "--source", str(jpegs), "--data_dir", str(tmp_path), *options]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
        return output.err

    assert "--side 0: accepted is 1 or more" in error("--side", "0")
    assert "--workers 0: accepted is 1 or more" in error("--workers", "0")
    assert "--official_only: no checksum of ImageNet is known" in error("--official_only")
    _write(jpegs, tmp_path)
    assert "exists already: remove it to prepare imagenet2012_resized anew" in error("--side", str(SIDE))
    assert prepare.main(["mnist", "--source", str(jpegs), "--data_dir", str(tmp_path), "--workers", "2"]) == 2
    assert "--workers and --side: accepted with imagenet only" in capsys.readouterr().err


@pytest.fixture
def written(jpegs, tmp_path):
    return _write(jpegs, tmp_path)[0]


def test_damaged_labels_are_found(written, tmp_path):
    path = written / "train.labels.npy"
    for labels in (np.zeros(10, np.int32), np.full(11, 1000)):
        np.save(path, labels)
        _refused(lambda: _source(tmp_path).train.labels, r"damaged.*train\.labels\.npy does not fit the records")
    path.write_bytes(path.read_bytes()[:50])
    _refused(lambda: _source(tmp_path).train.labels, "damaged")


def test_without_the_file_of_labels_they_are_read_from_the_records(written, tmp_path):
    expected = _source(tmp_path).train.labels
    (written / "train.labels.npy").unlink()
    np.testing.assert_array_equal(_source(tmp_path).train.labels, expected)


def test_labels_need_no_record(written, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.TfdsRecords, "read", None)
    assert sorted(_source(tmp_path).train.labels) == sorted(label for _, label in TRAIN)


def test_a_flipped_bit_in_a_record_is_found_when_it_is_read(written, tmp_path):
    path = sorted(written.glob("*train.array_record*"))[0]
    content = bytearray(path.read_bytes())
    content[content.index(b"P6\n") + 300] ^= 1
    path.write_bytes(content)
    split = _source(tmp_path).train
    _refused(lambda: list(split.batches(np.arange(4)[None])), "imagenet2012_resized train in .* is damaged")


def test_fingerprints_tell_files_from_pixels_and_sides(written, jpegs, tmp_path):
    _write(jpegs, tmp_path / "other", side=SIDE + 1)
    places = ((tmp_path, "imagenet2012_resized"), (tmp_path / "other", "imagenet2012_resized"), (jpegs, "imagenet2012"))
    found = [_source(*place).fingerprint for place in places]
    assert len(set(found)) == 3
    assert _source(tmp_path).fingerprint == found[0]
