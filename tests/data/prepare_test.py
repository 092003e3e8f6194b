import pathlib
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from bnn_jax.data import archives, prepare
from bnn_jax.errors import DataError
from tests.data import makers


def _source(name, kind, folder):
    download = makers.random_download(name)
    if name == "mnist":
        return download, makers.write_files(folder / "download", makers.mnist_files(download, compressed=kind == "gz"))
    files = makers.archive_files(name, download, pickled="python" in kind)
    if kind.endswith("folder"):
        return download, makers.write_files(folder / "download", files)
    return download, makers.write_archive(folder / "archive.tar.gz", files)


def _stored(name, split, data_dir):
    """What stock TFDS reads: a list of (image bytes, labels), in the stored order."""
    source = tfds.data_source(name, split=split, data_dir=str(data_dir), download=False)
    features = sorted(set(source.dataset_info.features) - {"image", "id"})
    return [(record["image"].tobytes(), *(int(record[feature]) for feature in features)) for record in source]


def _prepare(name, source, data_dir):
    """The new folder."""
    assert prepare.main([name, "--source", str(source), "--data_dir", str(data_dir)]) == 0
    return next(path.parent for path in data_dir.glob(f"{name}/*/dataset_info.json"))


def _expected(split):
    labels = [split.labels[feature].tolist() for feature in sorted(split.labels)]
    return [(image.tobytes(), *values) for image, *values in zip(split.images, *labels)]


def _error(capsys, *arguments):
    """The one line a mistake prints."""
    assert prepare.main([*map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cifar10", "python archive"),
        ("cifar10", "binary archive"),
        ("cifar10", "python folder"),
        ("cifar100", "python archive"),
        ("cifar100", "binary archive"),
        ("cifar100", "binary folder"),
        ("mnist", "gz"),
        ("mnist", "unpacked"),
    ],
)
def test_stock_tfds_reads_the_very_pixels_and_labels_that_were_prepared(tmp_path, capsys, name, kind):
    download, source = _source(name, kind, tmp_path)
    assert prepare.main([name, "--source", str(source), "--data_dir", str(tmp_path / "sets")]) == 0
    output = capsys.readouterr()
    assert "20 training and 6 test images" in output.out
    assert output.err.startswith("warning: not the official files")
    for key, split in (("train", download.train), ("test", download.test)):
        assert sorted(_stored(name, key, tmp_path / "sets")) == sorted(_expected(split))
    info = tfds.builder(name, data_dir=str(tmp_path / "sets")).info
    if name != "mnist":
        for feature, names in archives.CLASSES[name].items():
            assert tuple(info.features[feature].names) == names
    assert "tensorflow" not in sys.modules


def test_archives_and_images_of_the_same_content_give_the_same_stored_order(tmp_path):
    orders = []
    for kind in ("python archive", "binary archive"):
        _, source = _source("cifar10", kind, tmp_path)
        _prepare("cifar10", source, tmp_path / kind)
        orders.append(_stored("cifar10", "train", tmp_path / kind))
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


def test_a_second_program_writes_the_same_images_in_the_same_order_and_says_little(tmp_path):
    _, source = _source("cifar100", "python archive", tmp_path)
    first = _prepare("cifar100", source, tmp_path / "first")
    command = [sys.executable, "-m", "bnn_jax.data.prepare", "cifar100", "--source", source]
    result = subprocess.run([*command, "--data_dir", tmp_path / "second"], capture_output=True, text=True, check=True)
    assert f"in {tmp_path / 'second' / first.relative_to(tmp_path / 'first')};" in result.stdout
    # One warning and nothing of TFDS's own.
    assert result.stderr.startswith("warning: not the official files")
    assert result.stderr.count("\n") == 1
    stored = [_stored("cifar100", "train", tmp_path / folder) for folder in ("first", "second")]
    assert stored[0] == stored[1]


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    _, source = _source("mnist", "gz", tmp_path)
    folder = _prepare("mnist", source, tmp_path)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    message = _error(capsys, "mnist", "--source", source, "--data_dir", tmp_path)
    assert f"{folder} exists already: remove it" in message
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise DataError("no")

    monkeypatch.setattr(prepare, "_build", fail)
    with pytest.raises(DataError, match="no"):
        prepare.write("mnist", makers.random_download("mnist"), tmp_path / "sets")
    assert list((tmp_path / "sets").iterdir()) == []


def test_official_only_refuses_an_archive_with_another_checksum(tmp_path, capsys):
    _, source = _source("cifar10", "binary archive", tmp_path)
    message = _error(capsys, "cifar10", "--source", source, "--data_dir", tmp_path / "sets", "--official_only")
    assert "not the official files, their MD5" in message
    assert "refused because of --official_only" in message
    assert not (tmp_path / "sets").exists()


def test_a_hostile_pickle_is_one_line_and_runs_nothing(tmp_path, capsys):
    files = makers.archive_files("cifar10", makers.random_download("cifar10"), pickled=True)
    trace = tmp_path / "trace"
    files["cifar-10-batches-py/data_batch_3"] = f"cos\nsystem\n(S'touch {trace}'\ntR.".encode()
    source = makers.write_archive(tmp_path / "archive.tar.gz", files)
    message = _error(capsys, "cifar10", "--source", source, "--data_dir", tmp_path / "sets")
    assert f"{source}, data_batch_3: " in message
    assert "refused" in message
    assert not trace.exists()
    assert not (tmp_path / "sets" / "cifar10").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cifar10", "--source", "nowhere.tar.gz"],
            "--source nowhere.tar.gz does not exist: accepted is cifar-10-python",
        ),
        (["mnist", "--source", "nowhere"], "accepted is a folder with train-images-idx3-ubyte.gz"),
        (["cifar10", "--source", __file__, "--data_dir", __file__], "is a file: accepted is a folder"),
        (["cifar10", "--source", __file__], "is truncated or damaged, download it again"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    assert message in _error(capsys, *arguments)


@pytest.mark.parametrize("arguments", [["svhn", "--source", "x"], ["cifar10"], ["cifar10", "--source", "x", "--force"]])
def test_wrong_arguments_are_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_default_folder_is_the_one_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    _, source = _source("mnist", "gz", tmp_path)
    assert prepare.main(["mnist", "--source", str(source)]) == 0
    assert pathlib.Path(tmp_path / "sets" / "mnist").is_dir()


def test_stopping_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    _, source = _source("mnist", "gz", tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_build", interrupt)
    assert prepare.main(["mnist", "--source", str(source), "--data_dir", str(tmp_path / "sets")]) == 130
    assert "nothing was prepared" in capsys.readouterr().err
    assert list((tmp_path / "sets").iterdir()) == []
