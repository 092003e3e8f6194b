import json
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bnn_jax import methods
from bnn_jax.errors import UserError
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment.config import LOCATION_KEYS, flatten, validate
from configs import quickstart


def config(**changes: Any) -> dict[str, Any]:
    chosen = quickstart.get_config("smoke")
    chosen.update_from_flattened_dict(changes)
    return validate(chosen.to_dict())


def claim(folder: Path, **changes: Any) -> None:
    chosen = config(**changes)
    run_folder.claim(folder, chosen, methods.build(chosen))


@pytest.fixture
def started(tmp_path) -> Path:
    """The folder of a run whose first stage was started."""
    claim(tmp_path)
    (tmp_path / "00_w32a32").mkdir()
    return tmp_path


# ---- whose folder it is


def test_a_new_folder_gets_the_config_the_stages_and_where_they_come_from(tmp_path):
    claim(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["config"] == run_folder.to_json_config(config())
    assert [stage["name"] for stage in content["stages"]] == ["w32a32", "w8a8", "w4a4", "w2a2", "w1a1"]
    assert {"python", "jax", "flax", "numpy"} <= set(content["versions"])
    assert "git_commit" in content


def test_the_same_config_may_go_on(started):
    before = (started / "config.json").read_bytes()
    claim(started)
    assert (started / "config.json").read_bytes() == before


def test_another_config_is_refused_with_the_differing_keys(started):
    with pytest.raises(UserError) as error:
        claim(started, **{"train.batch_size": 4, "asbq.kd_weight": 0.25})
    message = str(error.value)
    assert message.startswith(f"{started} holds a run of another config: ")
    assert "config.asbq.kd_weight: null -> 0.25" in message
    assert "config.train.batch_size: 8 -> 4" in message
    assert "--workdir" in message and "--fresh" in message and "\n" not in message


def test_many_differing_keys_are_counted(started):
    changes = {f"train.{key}": value for key, value in (("batch_size", 4), ("momentum", 0.5), ("nesterov", False))}
    changes |= {"seed": 7, "network": "resnet14", "data.augment": "none", "data.num_train": 8}
    with pytest.raises(UserError, match=f"and {len(changes) - run_folder.MOST_KEYS_SHOWN} more;"):
        claim(started, **changes)


def test_a_folder_in_which_nothing_was_trained_is_taken_over(tmp_path):
    # As after a first try whose images could not be read.
    claim(tmp_path)
    claim(tmp_path, seed=7)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 7


def test_keys_that_say_where_or_how_may_change(started):
    changes = {
        "data.data_dir": "/elsewhere",
        "data.workers": 3,
        "train.eval_batch_size": 4,
        "train.steps_per_dispatch": 2,
        "train.checkpoint_seconds": 1.0,
        "log.tensorboard": True,
        "log.wandb": True,
    }
    # One belongs to a method of its own.
    assert set(changes) | {"basq.paths_at_once"} == LOCATION_KEYS
    assert set(changes) <= set(flatten(config()))
    claim(started, **changes)


def test_a_key_that_an_older_run_does_not_know_had_the_effect_of_its_default(started):
    path = started / "config.json"
    content = json.loads(path.read_text())
    del content["config"]["log"], content["config"]["train"]["ema_decay"]
    path.write_text(json.dumps(content))
    claim(started)
    with pytest.raises(UserError, match=r"another config: config\.train\.ema_decay: 0\.0 -> 0\.9;"):
        claim(started, **{"train.ema_decay": 0.9})


def test_equal_configs_that_mean_other_stages_are_refused(started):
    # As after an update of the program that changes what a preset means.
    path = started / "config.json"
    content = json.loads(path.read_text())
    content["stages"][1]["optim"]["learning_rate"]["values"][0] = 7.0
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config: stages\[1\]\.optim\.learning_rate\.values\[0\]: 7\.0 -> 0\.05"):
        claim(started)


def test_what_lies_in_a_folder_of_another_config_is_not_taken_for_this_one_s(started):
    mine, other = config(), config(**{"asbq.preset": "release"})
    run_folder.check_owner(started, mine, methods.build(mine))
    run_folder.check_owner(started / "nothing_here", other, methods.build(other))
    with pytest.raises(UserError, match=r'config\.asbq\.preset: "paper" -> "release"; give the same config'):
        run_folder.check_owner(started, other, methods.build(other))


@pytest.mark.parametrize("content", ["", "{", "\xff", "[]", "3"])
def test_a_damaged_config_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        claim(tmp_path)


# ---- files


def test_what_is_in_the_way_is_moved_aside_with_the_first_free_number(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").write_text(str(number))
        assert run_folder.move_aside(tmp_path / "run") == tmp_path / f"run.old-{number}"
    assert [(tmp_path / f"run.old-{n}" / "file").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]


def test_nothing_is_moved_aside_where_nothing_is(tmp_path):
    assert run_folder.move_aside(tmp_path / "run") is None


@pytest.mark.parametrize("path", [".", "/"])
def test_a_folder_without_a_name_cannot_be_moved_aside(path):
    with pytest.raises(UserError, match="cannot be moved aside"):
        run_folder.move_aside(Path(path))


# ---- one process at a time


def _try_to_lock(folder: Path, answers: Any) -> None:
    try:
        with run_folder.locked(folder):
            answers.put("locked")
    except UserError as error:
        answers.put(str(error))


def in_another_process(folder: Path) -> str:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_try_to_lock, args=(folder, answers))
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    return answer


def test_a_second_process_is_refused_until_the_first_is_done(tmp_path):
    folder = tmp_path / "new" / "run"
    with run_folder.locked(folder):
        assert folder.is_dir()
        assert in_another_process(folder) == f"--workdir={folder}: another process is training in this folder"
    assert in_another_process(folder) == "locked"


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*run: file exists"), run_folder.locked(tmp_path / "run"):
        pass


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"), run_folder.locked(tmp_path / "run"):
        pass


def test_a_full_disk_is_named_as_such():
    with pytest.raises(OSError) as error, open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    assert run_folder.describe_os_error(error.value) == "no space left on the device"


def test_the_commit_is_that_of_the_checkout_or_nothing():
    commit = run_folder.git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_not_that_of_another_project_the_library_is_installed_in(tmp_path, monkeypatch):
    def git(*command: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *command], cwd=tmp_path, check=True)

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=theirs")
    installed = tmp_path / "folder.py"
    installed.write_text("")
    monkeypatch.setattr(run_folder, "__file__", str(installed))
    assert run_folder.git_commit() is None
    git("add", "folder.py")
    assert run_folder.git_commit() is not None


# ---- several processes


def test_a_process_that_sees_what_the_first_one_wrote_goes_on(started):
    run_folder.check_shared(started)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is not there"), ({"config": {}, "stages": []}, "is another one")]
)
def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch, content, message):
    if content is not None:
        run_folder.write_json(tmp_path / "config.json", content)
    monkeypatch.setattr(run_folder, "SHARED_SECONDS", 0.0)
    monkeypatch.setattr(run_folder.hosts, "from_first", lambda name, decide: {"written": "there"})
    with pytest.raises(
        UserError, match=f"config.json that process 0 wrote {message}; the folder must be on a file sys"
    ):
        run_folder.check_shared(tmp_path)


def test_a_file_that_shows_late_is_waited_for(tmp_path, monkeypatch):
    written = {"config": {"written": "there"}, "stages": []}
    monkeypatch.setattr(run_folder.hosts, "from_first", lambda name, decide: written)
    late = lambda seconds: run_folder.write_json(tmp_path / "config.json", written)  # noqa: E731
    monkeypatch.setattr(run_folder.time, "sleep", late)
    run_folder.check_shared(tmp_path)
