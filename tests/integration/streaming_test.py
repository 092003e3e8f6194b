"""Images read while training, through ``launch.py``: resumed in the middle of an epoch, on several devices, resized."""

from pathlib import Path

import numpy as np
import pytest

from bnn_jax.data.stream import StreamedSplit
from tests.conftest import ROOT
from tests.data import makers
from tests.integration.launching import (
    SAVE_ALWAYS,
    assert_same_run,
    launch_here,
    launch_killed,
    launch_program,
    launch_well,
    records,
    refused,
    result,
    saved_arrays,
    steps,
)

STAGE = "00_w32a32"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 + 6 small JPEG files as ImageNet is stored, also resized."""
    folder = makers.write_imagenet(
        tmp_path_factory.mktemp("imagenet"), makers.small_pictures(20, seed=1), makers.small_pictures(6, seed=2)
    )
    return folder


def command(data_dir: Path, folder: Path, *more: str) -> tuple[str, ...]:
    """A ResNet-8 for two epochs of three steps, the last one with a partial batch, on images of 16x16 pixels."""
    return (
        f"--config={ROOT / 'configs' / 'quickstart.py'}",
        "--config.data.name=imagenet2012",
        f"--config.data.data_dir={data_dir}",
        "--config.data.image_size=16",
        "--config.data.augment=random_resized_crop_flip",
        "--config.train.batch_size=8",
        "--config.train.eval_batch_size=4",
        "--config.asbq.bits=(32,)",
        "--config.asbq.learning_rates=(0.1,)",
        "--config.asbq.epochs=(2,)",
        f"--workdir={folder}",
        *more,
    )


@pytest.fixture(scope="module")
def whole(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("streamed") / "run"
    launch_well(*command(data_dir, folder))
    return folder


def test_every_image_is_trained_on_and_evaluated(whole):
    assert [record["step"] for record in records(whole / STAGE)] == [3, 6]
    assert (result(whole / STAGE)["num_train"], result(whole / STAGE)["num_test"]) == (20, 6)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [1, 4])
def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_to_the_same_bits(data_dir, whole, tmp_path, saved):
    arguments = command(data_dir, tmp_path / "run", SAVE_ALWAYS)
    launch_killed("saved", saved, *arguments)
    assert steps(tmp_path / "run" / STAGE)[-1] == saved
    launch_well(*command(data_dir, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole, (STAGE,))


def test_the_config_says_how_many_processes_read(data_dir, whole, tmp_path, monkeypatch):
    original, asked = StreamedSplit.batches, []

    def in_threads(self, indices, *, workers=0, **options):
        # That processes give the same batches is tested beside the split; here they would cost a minute.
        asked.append(workers)
        return original(self, indices, **options)

    monkeypatch.setattr(StreamedSplit, "batches", in_threads)
    launch_well(*command(data_dir, tmp_path / "run", "--config.data.workers=3"))
    # The first images are looked at once; then both epochs are trained and evaluated.
    assert asked == [0, 3, 3, 3, 3]
    assert_same_run(tmp_path / "run", whole, (STAGE,))


@pytest.mark.slow
def test_four_devices_train_as_one(data_dir, whole, tmp_path):
    flags = "--xla_force_host_platform_device_count=4"
    finished = launch_program(*command(data_dir, tmp_path / "run"), XLA_FLAGS=flags)
    assert finished.code == 0, finished.stderr
    actual, expected = saved_arrays(tmp_path / "run" / STAGE), saved_arrays(whole / STAGE)
    for path, value in expected.items():
        # Sums in another order, over six steps.
        np.testing.assert_allclose(actual[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


def test_a_folder_of_pictures_is_trained_on_and_evaluated(tmp_path):
    for split, count in (("train", 10), ("val", 5)):
        for number, (content, label) in enumerate(makers.small_pictures(count, seed=1)):
            path = tmp_path / "pictures" / split / f"class{label % 3}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    arguments = command(tmp_path / "pictures", tmp_path / "run", "--config.data.name=folder")
    assert launch_here(*arguments).code == 0
    assert (result(tmp_path / "run" / STAGE)["num_train"], result(tmp_path / "run" / STAGE)["num_test"]) == (10, 5)
    assert saved_arrays(tmp_path / "run" / STAGE)["params/fc/kernel"].shape[-1] == 3
    evaluated = launch_here(*arguments, "--mode=evaluate", "--json")
    assert evaluated.last_json["num_images"] == 5


def test_a_damaged_image_is_one_line(tmp_path):
    pictures = makers.small_pictures(9, seed=1)
    content, label = pictures[4]
    pictures[4] = (content[: len(content) // 2], label)
    data_dir = makers.write_imagenet(tmp_path / "data", pictures, makers.small_pictures(2, seed=2))
    line = refused(launch_here(*command(data_dir, tmp_path / "run")))
    assert "the image is corrupt" in line and "imagenet2012 train" in line


def test_evaluation_reads_the_test_images_only(data_dir, whole):
    finished = launch_well(*command(data_dir, whole, "--mode=evaluate", "--json"))
    assert finished.last_json["num_images"] == 6
    assert finished.last_json["loss"] == pytest.approx(records(whole / STAGE)[-1]["test_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("--config.data.augment=pad_crop_flip", "config.data.augment='pad_crop_flip'"),
        ("--config.data.image_size=0", "config.data.image_size=0"),
    ],
)
def test_what_cannot_be_done_with_images_that_are_read_is_refused_before_training(data_dir, tmp_path, override, line):
    finished = launch_here(*command(data_dir, tmp_path / "run", override))
    assert finished.code == 2 and line in finished.error_line
    assert not (tmp_path / "run" / STAGE).exists()
