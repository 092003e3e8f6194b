import io
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bnn_jax import data
from bnn_jax.data import augment, prepare
from bnn_jax.data import tfds as tfds_sets
from bnn_jax.errors import DataError
from bnn_jax.stages import DataSpec
from tests.data import makers

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "tfds_data"
needs_sample = pytest.mark.skipif(not (SHARED / "imagenet2012").is_dir(), reason=f"{SHARED}/imagenet2012 is absent")

TRAIN, VALIDATION = makers.small_pictures(20, seed=1), makers.small_pictures(6, seed=2)


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    return makers.write_imagenet(tmp_path_factory.mktemp("sets"), TRAIN, VALIDATION)


@pytest.fixture
def prepared(prepared_once, tmp_path):
    """A folder that a test may damage."""
    shutil.copytree(prepared_once, tmp_path / "sets")
    return tmp_path / "sets"


def _build(folder, **fields):
    fields = {"augment": "random_resized_crop_flip", "options": (("image_size", 24),), **fields}
    return data.build(DataSpec("imagenet2012", **fields), data_dir=str(folder))


def _refused(folder, message, **fields):
    with pytest.raises(DataError, match=message) as raised:
        _build(folder, **fields)
    assert "\n" not in str(raised.value)


def _folder_of(prepared):
    return prepared / "imagenet2012" / "5.1.0"


def test_the_source_is_streamed_and_has_the_usual_constants(prepared_once):
    source = _build(prepared_once, options=())
    assert source.streamed and data.SOURCES[source.name].streamed and source.validation is None
    assert (source.image_shape, source.num_classes) == ((224, 224, 3), 1000)
    assert (source.mean, source.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (len(source.train), len(source.test)) == (20, 6)
    assert sorted(source.train.labels) == sorted(label for _, label in TRAIN)
    assert source.train.labels.dtype == np.int32
    assert (_build(prepared_once, normalize=False).mean, _build(prepared_once, normalize=False).std) == (
        (0,) * 3,
        (1,) * 3,
    )


def test_records_are_in_the_order_in_which_stock_tfds_gives_them(prepared_once):
    source = _build(prepared_once)
    stock = tfds.data_source("imagenet2012", split="train", data_dir=str(prepared_once), download=False)
    np.testing.assert_array_equal(source.train.labels, [int(record["label"]) for record in stock])
    (content, label), _ = source.train.records.read([3, 0])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), stock[3]["image"])
    assert label == int(stock[3]["label"])


def test_a_part_is_the_first_of_the_whole_and_has_another_fingerprint(prepared_once):
    whole, part = _build(prepared_once), _build(prepared_once, num_train=7, num_eval=2)
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[:7])
    np.testing.assert_array_equal(part.test.labels, whole.test.labels[:2])
    assert part.fingerprint != whole.fingerprint == _build(prepared_once).fingerprint
    assert _build(prepared_once, options=(("image_size", 32),)).fingerprint != whole.fingerprint
    _refused(prepared_once, "config.data.num_train=21: imagenet2012 train in .* has 20 images", num_train=21)
    _refused(prepared_once, "config.data.num_eval=7: imagenet2012 validation in .* has 6 images", num_eval=7)


def test_a_fingerprint_tells_other_files_from_the_same_ones_elsewhere(prepared_once, prepared, tmp_path):
    assert _build(prepared).fingerprint == _build(prepared_once).fingerprint
    other = makers.write_imagenet(tmp_path / "other", TRAIN[::2], VALIDATION)
    assert _build(other).fingerprint != _build(prepared_once, num_train=10).fingerprint


def test_held_out_images_are_training_images_with_their_numbers_and_labels(prepared_once):
    whole, split = _build(prepared_once), _build(prepared_once, validation_fraction=0.25)
    assert (len(split.train), len(split.validation)) == (15, 5)
    assert sorted([*split.train.numbers, *split.validation.numbers]) == list(range(20))
    np.testing.assert_array_equal(split.validation.labels, whole.train.labels[split.validation.numbers])
    assert split.fingerprint != whole.fingerprint


def test_only_what_fits_streamed_images_is_accepted(prepared_once):
    message = r"^config\.data\.augment='pad_crop': accepted with imagenet2012 are random_resized_crop_flip, none$"
    _refused(prepared_once, message, augment="pad_crop")
    assert _build(prepared_once, augment="none", lighting="release").augment == "none"
    _refused(prepared_once, r"config\.data\.image_size=0: accepted is 1 or more", options=(("image_size", 0),))


def test_opencv_is_asked_for_before_anything_is_trained(prepared_once, monkeypatch):
    monkeypatch.setattr("bnn_jax.data.augment.importlib.util.find_spec", lambda name: None)
    augment.opencv.cache_clear()
    _refused(prepared_once, r"OpenCV is not installed; `pip install 'bnn_jax\[fast\]'`", decoder="opencv")


def test_a_folder_without_it_says_both_ways_to_get_it(tmp_path):
    _refused(
        tmp_path, "imagenet2012 is not prepared in .*: prepare it by `tfds build imagenet2012 --file_format=array_rec"
    )
    _refused(tmp_path, "config.data.name='imagenet2012_resized' reads `python -m bnn_jax.data.prepare imagenet")


def test_a_flipped_bit_in_a_record_is_found_when_it_is_read(prepared):
    path = next(_folder_of(prepared).glob("imagenet2012-train.array_record*"))
    content = bytearray(path.read_bytes())
    content[content.index(b"JFIF") + 300] ^= 1
    path.write_bytes(content)
    source = _build(prepared)
    with pytest.raises(DataError, match=r"imagenet2012 train in .* is damaged") as raised:
        list(source.train.batches(np.arange(20)[None]))
    assert "\n" not in str(raised.value)


def test_a_corrupt_image_is_named_with_split_and_number(tmp_path):
    folder = makers.write_imagenet(tmp_path, [(b"no picture", 1)], VALIDATION)
    source = _build(folder)
    with pytest.raises(DataError, match=r"imagenet2012 train in .*5\.1\.0, image 0: the image is corrupt"):
        list(source.train.batches(np.array([[0]])))


def test_labels_are_read_across_chunks_and_once(prepared_once, monkeypatch):
    expected = _build(prepared_once).train.labels
    monkeypatch.setattr(tfds_sets, "CHUNK", 3)
    train = _build(prepared_once).train
    np.testing.assert_array_equal(train.take(np.array([5, 1, 5])).labels, expected[[5, 1, 5]])
    np.testing.assert_array_equal(train.labels, expected)
    monkeypatch.setattr(train.records, "read", None)  # any further reading would fail
    np.testing.assert_array_equal(train.take(np.arange(4)).labels, expected[:4])


def test_progress_of_the_labels_goes_to_stderr_only_when_asked(prepared_once, capsys):
    spec = DataSpec("imagenet2012", augment="none")
    data.build(spec, data_dir=str(prepared_once)).train.labels
    assert capsys.readouterr() == ("", "")
    data.build(spec, data_dir=str(prepared_once), progress=True).train.labels
    assert "Reading labels of imagenet2012 train" in capsys.readouterr().err


def test_class_names_are_wordnet_numbers(prepared_once):
    stored = data.class_names(DataSpec("imagenet2012"), data_dir=str(prepared_once))
    assert stored == prepare.official_classes()
    assert (len(stored), stored[0], stored[-1]) == (1000, "n01440764", "n15075141")
    assert list(stored) == sorted(stored)


@needs_sample
@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluated_pictures_of_the_sample_have_the_pixels_of_pillow(split):
    images = getattr(_build(SHARED, options=()), split)
    (found,), (labels,) = zip(*images.batches(np.arange(len(images))[None]))
    stock = tfds.data_source(
        "imagenet2012",
        split={"train": "train", "test": "validation"}[split],
        data_dir=str(SHARED),
        decoders={"image": tfds.decode.SkipDecoding()},
        download=False,
    )
    assert len(stock) == len(images)
    for number, record in enumerate(stock):
        picture = Image.open(io.BytesIO(record["image"])).convert("RGB")
        width, height = (
            256 if side == min(picture.size) else int(256 * side / min(picture.size)) for side in picture.size
        )
        resized = picture.resize((width, height), Image.BILINEAR)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        np.testing.assert_array_equal(
            found[number], np.asarray(resized)[top : top + 224, left : left + 224], err_msg=f"image {number}"
        )
        assert labels[number] == int(record["label"])


@needs_sample
def test_training_pictures_of_the_sample_differ_little_between_the_decoders():
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    plan = np.arange(40)[None]
    (pillow,), (opencv,) = (
        [
            images.astype(int)
            for images, _ in _build(SHARED, options=(), decoder=decoder).train.batches(plan, random_crops=(0, 0))
        ]
        for decoder in ("pillow", "opencv")
    )
    difference = np.abs(pillow - opencv)
    # Measured with Pillow 13 and OpenCV 5: 0.87 of 255 levels on average; 0.1 % of the values are over 16 levels apart.
    assert difference.mean() < 1.5
    assert (difference > 16).mean() < 0.005
    # The most detailed picture of the sample: 3.1 levels.
    assert difference.mean(axis=(1, 2, 3)).max() < 5.0
