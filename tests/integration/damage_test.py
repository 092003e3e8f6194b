"""Files of a run folder that are damaged or missing: one line that begins with 'error:', exit status 2, no change.

Most cases run in this process, since most of the time of one of its own is importing jax.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnn_jax import command_line
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment.build import make_experiment
from bnn_jax.experiment.config import validate
from bnn_jax.search.evolution import rng_state
from bnn_jax.stages import fingerprint
from tests.conftest import ROOT
from tests.integration.launching import STAGES, TWO_RUNGS, Finished, half_done, launch_here, launch_program, launch_well

FIRST, LAST = STAGES
Damage = Callable[[Path], Any]

# ---- what can happen to a file


def holds(text: str) -> Damage:
    return lambda path: path.write_text(text)


def with_fields(**fields: Any) -> Damage:
    """Replaces fields of a JSON file."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def in_last_line(**fields: Any) -> Damage:
    def change(path: Path) -> None:
        *lines, last = path.read_text().splitlines()
        path.write_text("".join(f"{line}\n" for line in [*lines, json.dumps({**json.loads(last), **fields})]))

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_last_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def flipped(folder: Path) -> None:
    """Another byte in the middle of every file."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            flipped_middle(path)


def flipped_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


BRACKETS = holds("[" * 100_000 + "]" * 100_000)

# ---- which file, how, with which modes, and words of the answer

ALL = ("train", "evaluate", "report")
FINISHED_RUN: list[tuple[str, Damage, tuple[str, ...], str]] = [
    ("config.json", holds('{"config": null}'), ALL, "config=None: accepted is an object"),
    ("config.json", holds('{"config": 1, "stages": "x"}'), ("evaluate", "report"), "config=1: accepted is an object"),
    ("config.json", with_fields(stages="x"), ("report",), "stages='x': accepted is a list"),
    ("config.json", with_fields(stages=[1]), ("report",), "stages[0]=1: accepted is an object"),
    ("config.json", BRACKETS, ALL, "accepted is JSON"),
    ("config.json", cut, ("report",), "accepted is JSON"),
    ("config.json", a_folder, ("report",), "config.json: is a directory"),
    ("config.json", with_fields(config={}), ("report",), "holds a run of another config"),
    (f"{LAST}/result.json", holds("{}"), ALL, "stage is missing: accepted is a name"),
    (f"{LAST}/result.json", BRACKETS, ALL, "accepted is JSON"),
    (f"{LAST}/result.json", holds(""), ("report",), "accepted is JSON"),
    (f"{LAST}/result.json", cut, ("evaluate",), "accepted is JSON"),
    (f"{LAST}/result.json", a_folder, ("report",), "result.json: is a directory"),
    (f"{FIRST}/result.json", holds("[1]"), ("train", "report"), "[1]: accepted is an object with stage"),
    (f"{FIRST}/result.json", with_fields(last_top1="abc"), ("train", "report"), "last_top1='abc': accepted is a numb"),
    (f"{FIRST}/result.json", with_fields(best_epoch=[1]), ("train", "report"), "best_epoch=[1]: accepted is a whole"),
    (f"{FIRST}/result.json", with_fields(stored_bits=1e400), ("report",), "stored_bits=inf: accepted is a whole"),
    (f"{FIRST}/result.json", with_fields(stage="[/b]"), ("report",), "stage='[/b]': accepted is a name"),
    (f"{FIRST}/result.json", with_fields(stage_fingerprint="0"), ("train",), "holds a result of another config"),
    (f"{FIRST}/metrics.jsonl", holds("[1]"), ("report",), "line 1 is damaged: [1]: accepted is an object with"),
    (f"{FIRST}/metrics.jsonl", holds("[1]\n"), ("report",), "line 1 is damaged: [1]: accepted is an object with"),
    (f"{FIRST}/metrics.jsonl", BRACKETS, ("report",), "the records of 0 epochs: accepted are 2"),
    (f"{FIRST}/metrics.jsonl", holds("{}\n{}\n"), ("report",), "line 1 is damaged: epoch is missing"),
    (f"{FIRST}/metrics.jsonl", in_last_line(test_top1=[]), ("report",), "line 2 is damaged: test_top1=[]: accepted"),
    (f"{FIRST}/metrics.jsonl", in_last_line(epoch=0), ("report",), "line 2 is damaged: epoch=0: accepted is 1"),
    (f"{FIRST}/metrics.jsonl", without_last_line, ("report",), "the records of 1 epochs: accepted are 2"),
    (f"{FIRST}/metrics.jsonl", gone, ("report",), f"accepted are 2; --stage={FIRST[3:]} trains the stage again"),
    (f"{LAST}/checkpoints", gone, ("evaluate",), "no checkpoint here"),
    (f"{LAST}/checkpoints", flipped, ("evaluate",), "are damaged"),
]
INTERRUPTED_RUN: list[tuple[str, Damage, tuple[str, ...], str]] = [
    ("config.json", holds('{"config": null}'), ("train",), "config=None: accepted is an object"),
    (f"{FIRST}/result.json", holds("{}"), ("train", "evaluate"), "stage is missing: accepted is a name"),
    (f"{LAST}/metrics.jsonl", holds("[1]"), ("train",), "line 1 is damaged: [1]: accepted is an object with"),
    (f"{LAST}/metrics.jsonl", gone, ("train",), "the records of 0 epochs: accepted are 1"),
    (f"{LAST}/checkpoints", flipped, ("train",), "are damaged"),
    (f"{FIRST}/checkpoints", flipped, ("evaluate",), "are damaged"),
]


def cases(table: list[tuple[str, Damage, tuple[str, ...], str]]) -> list[Any]:
    return [
        pytest.param(name, damage, mode, words, id=f"{mode}-{name}-{number}")
        for number, (name, damage, modes, words) in enumerate(table)
        for mode in modes
    ]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuse(folder: Path, *arguments: str, launch: Callable[..., Finished] = launch_here) -> Finished:
    """Launches a run that must be refused and leave everything as it is."""
    before = contents(folder)
    finished = launch(*arguments, f"--workdir={folder}")
    assert finished.code == 2, finished.stderr
    assert contents(folder) == before
    return finished


@pytest.mark.parametrize(("name", "damage", "mode", "words"), cases(FINISHED_RUN))
def test_damage_of_a_finished_run_is_one_line(two_rungs, copy_of, name, damage, mode, words):
    folder = copy_of(two_rungs)
    damage(folder / name)
    line = refuse(folder, *TWO_RUNGS, f"--mode={mode}").error_line
    assert words in line and str(folder) in line


@pytest.mark.parametrize(("name", "damage", "mode", "words"), cases(INTERRUPTED_RUN))
def test_damage_of_an_interrupted_run_is_one_line(two_rungs, tmp_path, name, damage, mode, words):
    folder = half_done(two_rungs, tmp_path / "run")
    damage(folder / name)
    line = refuse(folder, *TWO_RUNGS, f"--mode={mode}").error_line
    assert words in line and str(folder) in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "mode"),
    [
        (f"{LAST}/result.json", BRACKETS, "train"),
        ("config.json", holds('{"config": null}'), "evaluate"),
        (f"{FIRST}/metrics.jsonl", holds("[1]"), "report"),
    ],
)
def test_a_user_sees_that_line_and_no_other_on_standard_error(two_rungs, copy_of, name, damage, mode):
    folder = copy_of(two_rungs)
    damage(folder / name)
    finished = refuse(folder, *TWO_RUNGS, f"--mode={mode}", launch=launch_program)
    assert finished.stderr == f"{finished.error_line}\n"
    assert ("Stages" in finished.stdout) == (mode == "train")


# ---- what can be made again


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_missing_weights_and_tables_of_a_finished_stage_are_made_again(two_rungs, copy_of):
    folder = copy_of(two_rungs)
    lost = [f"{FIRST}/metrics.csv", f"{LAST}/metrics.csv", f"{LAST}/weights.npz"]
    for name in lost:
        (folder / name).unlink()
    finished = launch_well(*TWO_RUNGS, f"--workdir={folder}")
    assert finished.stderr.count(" anew from the ") == 3 and "epoch 1/" not in finished.stderr
    before, after = contents(two_rungs), contents(folder)
    expected, made = arrays(two_rungs / lost[-1]), arrays(folder / lost[-1])
    assert expected.keys() == made.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(made[name], array)
    # The archive of the arrays holds the time it was written.
    del before[lost[-1]], after[lost[-1]]
    assert before == after


@pytest.mark.parametrize("damage", [cut, flipped_middle], ids=["cut", "flipped"])
def test_damaged_weights_of_a_finished_stage_are_made_again(two_rungs, copy_of, damage):
    folder = copy_of(two_rungs)
    weights = folder / LAST / "weights.npz"
    damage(weights)
    finished = launch_well(*TWO_RUNGS, f"--workdir={folder}")
    assert "wrote weights.npz anew from the last checkpoint" in finished.stderr
    expected, made = arrays(two_rungs / LAST / "weights.npz"), arrays(weights)
    assert expected.keys() == made.keys() and all(np.array_equal(made[name], expected[name]) for name in expected)


def test_weights_are_not_made_of_a_damaged_checkpoint(two_rungs, copy_of):
    folder = copy_of(two_rungs)
    (folder / LAST / "weights.npz").unlink()
    flipped(folder / LAST / "checkpoints")
    assert "are damaged" in refuse(folder, *TWO_RUNGS).error_line


def test_a_missing_result_is_made_again(two_rungs, copy_of):
    folder = copy_of(two_rungs)
    (folder / LAST / "result.json").unlink()
    assert "epoch 1/" not in launch_well(*TWO_RUNGS, f"--workdir={folder}").stderr
    old, new = (json.loads((run / LAST / "result.json").read_text()) for run in (two_rungs, folder))
    del old["process_seconds"], new["process_seconds"]
    assert old == new


# ---- the files of a search

SEARCH = (
    f"--config={ROOT / 'configs' / 'basq_resnet20_cifar.py'}:smoke",
    *("--config.network=basq_resnet8_cifar", "--config.basq.teacher_network=resnet8", "--config.data.image_size=8"),
    *("--config.data.num_classes=2", "--config.data.num_train=56", f"--config.data.validation_fraction={40 / 56}"),
)
LAYERS = 6


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder, written by hand, in which the first fold is searched; the folder of the search in it."""
    path = tmp_path_factory.mktemp("searching") / "run"
    experiment = make_experiment(validate(command_line.parse(["launch.py", *SEARCH]).config.to_dict()))
    folder = run_folder.RunFolder(path, experiment.stages)
    path.mkdir()
    (path / ".lock").touch()
    run_folder.claim(path, experiment.config, experiment.stages)
    stages = experiment.stages[: [stage.kind for stage in experiment.stages].index("search") + 1]
    for stage in stages:
        folder.stage(stage.name).mkdir()
    numbers = {"seconds": 1, "images_per_second": 1, "last_top1": 1, "best_top1": 1, "epochs": 1, "best_epoch": 0}
    sizes = {"quantized_weight_bits": 0, "stored_bits": 0, "selection": "test"}
    for stage in stages[:-1]:
        own = {"stage": stage.name, "stage_fingerprint": fingerprint(stage, experiment.stages), "bits": 4}
        run_folder.write_json(folder.stage(stage.name) / run_folder.RESULT, {**own, **numbers, **sizes})
        (folder.stage(stage.name) / run_folder.METRICS_TABLE).touch()
    row = {"path": [0] * LAYERS, "fold_top1": 50.0, "full_top1": 40.0}
    rng = rng_state(np.random.RandomState(0))
    run_folder.write_json(
        folder.fold(stages[-1].name, 0), {"fold": 0, **row, "evaluations": 1, "history": [row], "rng": rng}
    )
    return path, folder.stage(stages[-1].name).relative_to(path)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("fold_00.json", holds("{}"), "path is missing: accepted is a list of 6"),
        ("fold_00.json", with_fields(path=[0] * 5), "path=[0, 0, 0, 0, 0]: accepted is a list of 6"),
        ("fold_00.json", with_fields(path=[0] * 5 + [7]), "path[5]=7: accepted is a whole number from 0 to 6"),
        ("fold_00.json", with_fields(fold=1), "fold=1: accepted is a whole number from 0 to 0"),
        ("fold_00.json", with_fields(history=3), "history=3: accepted is a list"),
        ("fold_00.json", BRACKETS, "accepted is JSON"),
        ("fold_00.json", cut, "accepted is JSON"),
    ],
)
def test_damage_of_a_searched_fold_is_one_line(searching, copy_of, name, damage, words):
    run, stage = searching
    folder = copy_of(run)
    damage(folder / stage / name)
    line = refuse(folder, *SEARCH).error_line
    assert f"{folder / stage / name} is damaged: {words}" in line
