"""From a run to a program: exported, summarised, evaluated and asked for pictures, as a user does it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnn_jax.deploy import load
from tests.integration.launching import launch_here, launch_program, launch_well, refused, rungs

ONE_RUNG = rungs(1, epochs=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy") / "run"
    launch_well(*ONE_RUNG, f"--workdir={folder}")
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    path = run.parent / "network.bnn"
    launch_well(*ONE_RUNG, f"--workdir={run}", "--mode=export", f"--output={path}")
    return path


@pytest.fixture(scope="module")
def pictures(run: Path) -> list[str]:
    random, paths = np.random.default_rng(0), []
    for name, size in (("a.png", (40, 30)), ("b.jpg", (32, 32))):
        paths.append(str(run.parent / name))
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(paths[-1])
    return paths


def test_a_file_has_the_accuracy_of_its_run(run: Path, exported: Path) -> None:
    common = (*ONE_RUNG, f"--workdir={run}", "--mode=evaluate", "--json")
    ours, theirs = launch_well(*common).last_json, launch_well(*common, f"--checkpoint={exported}").last_json
    assert (ours["top1"], ours["num_images"]) == (theirs["top1"], theirs["num_images"])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_bytes_of_the_weights_are_those_that_were_predicted(exported: Path) -> None:
    finished = launch_well("--mode=summary", f"--checkpoint={exported}", "--json")
    rows = [row for row in finished.last_json["layers"] if row["predicted_bytes"] is not None]
    assert rows and all(row["predicted_bytes"] == row["file_bytes"] for row in rows)
    assert finished.last_json["file_bytes"] == exported.stat().st_size
    assert "Bytes of the weights" in finished.stdout


def test_a_file_says_where_it_comes_from(exported: Path) -> None:
    facts = load(exported).facts
    assert (facts["method"], facts["stage"]) == ("asbq", "w1a1")
    assert facts["accuracy"]["last_top1"] >= 0
    assert len(facts["classes"]) == len(load(exported).classes)


def test_pictures_are_classified_by_the_file_and_by_the_run_alike(run: Path, exported: Path, pictures) -> None:
    by_file = launch_well("--mode=predict", f"--checkpoint={exported}", "--json", *pictures)
    by_run = launch_well(*ONE_RUNG, f"--workdir={run}", "--mode=predict", "--json", *pictures)
    assert by_file.last_json == by_run.last_json
    rows = by_file.last_json["predictions"]
    assert [row["image"] for row in rows] == pictures
    assert all(1 >= row["classes"][0]["probability"] >= row["classes"][1]["probability"] for row in rows)
    assert "Predictions" in by_file.stdout


def test_a_program_of_its_own_classifies(exported: Path, pictures) -> None:
    finished = launch_program("--mode=predict", f"--checkpoint={exported}", "--json", *pictures)
    assert finished.code == 0 and len(finished.last_json["predictions"]) == 2, finished.stderr


def test_stablehlo_is_written(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.stablehlo"
    common = (*ONE_RUNG, f"--workdir={run}", "--mode=export", "--format=stablehlo", f"--output={path}", "--json")
    assert launch_well(*common).last_json["file_bytes"] == path.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode=predict", "--checkpoint=absent.bnn", "x.png"), "absent.bnn: no such file"),
        (("--mode=summary", "--checkpoint=absent.bnn"), "absent.bnn: no such file"),
        (("--mode=predict", "x.png"), "--config is missing"),
        ((*ONE_RUNG, "--mode=summary", "--checkpoint=x.pth"), "accepted with --mode=summary is an exported file, .bnn"),
        ((*ONE_RUNG, "--mode=export", "--checkpoint=x.bnn"), "--checkpoint=x.bnn: it is exported already"),
        ((*ONE_RUNG, "--mode=export", "--format=tflite"), "--format=tflite: accepted are bnn, stablehlo, onnx"),
        ((*ONE_RUNG, "--mode=train", "--output=x.bnn"), "--output is of no use with --mode=train"),
        ((*ONE_RUNG, "--mode=export", "x.png"), "'x.png' is no option"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(launch_here(*arguments))


def test_predict_without_a_picture_and_with_a_wrong_one(exported: Path, tmp_path: Path) -> None:
    asked = ("--mode=predict", f"--checkpoint={exported}")
    assert "no picture is given" in refused(launch_here(*asked))
    (tmp_path / "x.png").write_bytes(b"no picture")
    assert "x.png: no picture that can be read" in refused(launch_here(*asked, str(tmp_path / "x.png")))
