import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bnn_jax import data
from bnn_jax.data import imagenet, prepare, resize_imagenet, resized, tfds_source
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
    return imagenet.official_classes()


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
    monkeypatch.setattr(resize_imagenet, "IMAGES_PER_SHARD", 4)


def _write(source, data_dir, **options):
    with tfds_source.progress_bar(False) as bar:
        return resize_imagenet.prepare(source, data_dir, **{"side": SIDE, **options}, bar=bar)


def _source(data_dir, name="imagenet2012_resized", **fields):
    options = (("image_size", SIZE), *((("side", SIDE),) if name.endswith("resized") else ()))
    return data.build(DataSpec(name, augment="none", options=options, **fields), data_dir=str(data_dir))


def _images(split, **options):
    ((images, labels),) = split.batches(np.arange(len(split))[None], **options)
    np.testing.assert_array_equal(labels, split.labels)
    return images, labels


def _refused(call, message):
    with pytest.raises(DataError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_evaluated_images_are_those_of_the_files(jpegs, tmp_path):
    folder, counts = _write(jpegs, tmp_path)
    assert folder == tmp_path / "imagenet2012_resized" / str(SIDE)
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
    (content, _), *_ = imagenet.open_tfds("train", str(jpegs)).read([6])
    ((pixels, _),) = records.read([6])
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


def test_the_index_describes_what_was_written(jpegs, tmp_path):
    folder, _ = _write(jpegs, tmp_path)
    index = json.loads((folder / "index.json").read_text())
    assert (index["format"], index["side"]) == (1, SIDE)
    assert [shard["count"] for shard in index["splits"]["train"]["shards"]] == [4, 4, 3]
    named = {"index.json", "train.labels.npy", "validation.labels.npy"}
    for split in index["splits"].values():
        for shard in split["shards"]:
            content = (folder / shard["file"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["size"], shard["sha256"])
            named.add(shard["file"])
    assert {path.name for path in folder.iterdir()} == named
    assert [path.name for path in folder.parent.iterdir()] == [str(SIDE)]


def test_pictures_in_folders_get_the_official_labels_in_a_mixed_order(image_folder, jpegs, tmp_path):
    _write(image_folder, tmp_path / "folder")
    _write(jpegs, tmp_path / "tfds")
    folder, tfds = _source(tmp_path / "folder"), _source(tmp_path / "tfds")
    for split in ("train", "test"):
        ours, theirs = _images(getattr(folder, split)), _images(getattr(tfds, split))
        pairs = [sorted(zip(labels.tolist(), map(np.ndarray.tobytes, images))) for images, labels in (ours, theirs)]
        assert pairs[0] == pairs[1]
    assert folder.train.labels.tolist() != sorted(folder.train.labels)


@pytest.mark.slow
def test_a_second_program_with_several_processes_writes_the_same_bytes(image_folder, tmp_path):
    # Shards of the usual number of images: another program knows nothing of the smaller ones here.
    command = [sys.executable, "-m", "bnn_jax.data.prepare", "imagenet", "--source", image_folder, "--side", str(SIDE)]
    for workers in ("1", "2"):
        result = subprocess.run(
            [*command, "--data_dir", tmp_path / workers, "--workers", workers],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "imagenet: 11 training and 5 validation images in" in result.stdout
        assert f"--config.data.name=imagenet2012_resized --config.data.data_dir={tmp_path / workers}" in result.stdout
        assert result.stderr == ""
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / workers / "imagenet2012_resized" / str(SIDE)).iterdir()}
        for workers in ("1", "2")
    )
    assert one == two and len(one) == 5


def test_what_is_finished_is_not_done_again_after_an_interruption(image_folder, tmp_path, monkeypatch):
    write_records, written = resize_imagenet._write_records, []

    def write(records, task, path):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(task.path.name)
        return write_records(records, task, path)

    monkeypatch.setattr(resize_imagenet, "_write_records", write)
    with pytest.raises(KeyboardInterrupt):
        _write(image_folder, tmp_path)
    _refused(lambda: _source(tmp_path), "imagenet2012_resized with a side of 27 is not prepared in")
    first, written = written, []
    monkeypatch.setattr(
        resize_imagenet, "_write_records", lambda *given: [written.append(given[1].path.name), write_records(*given)][1]
    )
    folder, _ = _write(image_folder, tmp_path)
    assert len(first) == 2 and len(written) == 3 and not set(first) & set(written)
    assert [path.name for path in folder.parent.iterdir()] == [str(SIDE)]
    assert len(_images(_source(tmp_path).train)[0]) == 11


def test_a_picture_that_changed_makes_everything_anew(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(resize_imagenet, "_write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _write(image_folder, tmp_path)
    monkeypatch.undo()
    next((image_folder / "train").rglob("*.JPEG")).unlink()
    _, counts = _write(image_folder, tmp_path)
    assert counts == {"train": 10, "validation": 5}


def test_a_corrupt_picture_is_named(image_folder, tmp_path):
    path = next((image_folder / "val").rglob("*.JPEG"))
    path.write_bytes(b"no picture")
    _refused(lambda: _write(image_folder, tmp_path), f"^{path}: the image is corrupt")


def test_a_corrupt_picture_is_named_by_other_processes_too(image_folder, tmp_path):
    path = next((image_folder / "train").rglob("*.JPEG"))
    path.write_bytes(path.read_bytes()[:200])
    _refused(lambda: _write(image_folder, tmp_path, workers=2), f"^{path}: the image is corrupt")


def test_a_full_disk_is_one_line(image_folder, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(resize_imagenet, "_write_records", fail)
    _refused(lambda: _write(image_folder, tmp_path), "^writing to .* failed: No space left on device")


def _damage_source(folder, wnids, kind):
    if kind == "class":
        (folder / "train" / "n99999999").mkdir()
        return r"train/n99999999 is no class of ImageNet: accepted are folders n01440764 to n15075141"
    if kind == "file":
        (next((folder / "val").iterdir()) / "list.txt").write_text("")
        return r"val/n\d+/list.txt is no image: accepted are \.jpeg, \.jpg, \.png"
    (folder / "val").rename(folder / "test")
    return "holds no ImageNet: accepted is a folder with imagenet2012/<version>/"


@pytest.mark.parametrize("kind", ["class", "file", "no val"])
def test_a_source_that_is_not_imagenet_is_refused(image_folder, tmp_path, wnids, kind):
    message = _damage_source(image_folder, wnids, kind)
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
    assert "exists already: remove it to prepare it anew" in error("--side", str(SIDE))
    assert prepare.main(["mnist", "--source", str(jpegs), "--data_dir", str(tmp_path), "--workers", "2"]) == 2
    assert "--workers and --side: accepted with imagenet only" in capsys.readouterr().err


@pytest.fixture
def written(jpegs, tmp_path):
    return _write(jpegs, tmp_path)[0]


def test_a_side_that_is_not_there_names_those_that_are(written, tmp_path):
    spec = DataSpec("imagenet2012_resized", augment="none")
    message = rf"a side of 256 is not prepared in .*; config\.data\.side has {SIDE} there: prepare it by `python -m"
    _refused(lambda: data.build(spec, data_dir=str(tmp_path)), message)


@pytest.mark.parametrize("change", ["truncate", "remove"])
def test_a_missing_or_truncated_shard_is_damage(written, tmp_path, change):
    path = sorted(written.glob("train.array_record*"))[1]
    if change == "remove":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    message = f"imagenet2012_resized train in .* is damaged: remove that folder .*{path.name} is missing or has another"
    _refused(lambda: _source(tmp_path), message)


def test_a_damaged_index_is_damage(written, tmp_path):
    path = written / "index.json"
    content = path.read_text()
    for change in (content[:50], content.replace('"format": 1', '"format": 2'), "[]", "{}"):
        path.write_text(change)
        _refused(lambda: _source(tmp_path), r"imagenet2012_resized in .* is damaged: .*index\.json: ")


def test_damaged_labels_are_found(written, tmp_path):
    np.save(written / "train.labels.npy", np.zeros(11, np.int32))
    _refused(lambda: _source(tmp_path).train.labels, r"damaged.*train\.labels\.npy is not the one that was written")
    (written / "train.labels.npy").unlink()
    _refused(lambda: _source(tmp_path).train.labels, "damaged")


def test_a_flipped_bit_in_a_record_is_found_when_it_is_read(written, tmp_path):
    path = sorted(written.glob("train.array_record*"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    split = _source(tmp_path).train
    _refused(lambda: list(split.batches(np.arange(4)[None])), "imagenet2012_resized train in .* is damaged")


@pytest.mark.parametrize("record", [b"", b"1234", resized.encode(np.zeros((2, 3, 3), np.uint8), 1000)])
def test_a_record_of_another_form_is_refused(record):
    with pytest.raises(ValueError):
        resized.decode(record)


def test_labels_need_no_record(written, tmp_path, monkeypatch):
    monkeypatch.setattr(resized.ResizedRecords, "_source", None)
    assert sorted(_source(tmp_path).train.labels) == sorted(label for _, label in TRAIN)


def test_fingerprints_tell_files_from_pixels_and_sides(written, jpegs, tmp_path):
    _write(jpegs, tmp_path / "other", side=SIDE + 1)
    spec = DataSpec("imagenet2012_resized", augment="none", options=(("image_size", SIZE), ("side", SIDE + 1)))
    found = {
        _source(tmp_path).fingerprint,
        _source(jpegs, "imagenet2012").fingerprint,
        data.build(spec, data_dir=str(tmp_path / "other")).fingerprint,
    }
    assert len(found) == 3
    assert _source(tmp_path).fingerprint in found
