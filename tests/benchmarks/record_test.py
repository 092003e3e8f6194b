"""A run folder becomes a result file, finished or not."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from bnn_jax import run_files
from bnn_jax.experiment import load_config
from bnn_jax.experiment.config import validate
from bnn_jax.report import results
from tests.report.results_test import written

EPOCHS = [
    {"epoch": 0, "step": 2, "test_top1": 20.0},
    {"epoch": 1, "step": 4, "test_top1": 40.0},
    {"epoch": 2, "step": 6, "test_top1": 30.0},
]
DEFAULTS = {
    **{"train_loss": 1.0, "test_top5": 90.0, "test_loss": 1.0, "seconds": 1.0, "images_per_second": 1.0},
}
TEXTS = ("--what=a test", "--command=python launch.py", "--hardware=a test's", "--gap=a test")


def run_folder(folder: Path, **changes: Any) -> Path:
    """The folder of a chain that was stopped in its first rung."""
    config = validate(load_config("quickstart:smoke", {"data.data_dir": "/home/me", **changes}).to_dict())
    stage = folder / "00_w32a32"
    stage.mkdir(parents=True)
    content = {"config": config, "stages": [], "git_commit": "0" * 40}
    (folder / "config.json").write_text(
        json.dumps({**content, "versions": {"python": "3", "bnn_jax": "0", "jax": "0"}})
    )
    (stage / "metrics.jsonl").write_text("".join(json.dumps({**DEFAULTS, **epoch}) + "\n" for epoch in EPOCHS))
    return folder


def recorded(folder: Path, output: Path, *arguments: str) -> dict[str, Any]:
    record.main([str(folder), f"--output={output}", *TEXTS, *arguments])
    return json.loads(output.read_text())


def test_a_run_that_was_stopped_is_recorded_as_far_as_it_came(tmp_path):
    results_folder = tmp_path / "results"
    results_folder.mkdir()
    written(results_folder)
    arguments = ("--device=1 x cpu (cpu)", "--images=16,8", "--title=chain", "--published=known")
    content = recorded(run_folder(tmp_path / "run"), results_folder / "chain.json", *arguments)
    [row] = results.read_rows(results_folder)
    assert (row.title, row.epochs, row.num_train, row.num_test) == ("chain", 3, 16, 8)
    assert (row.last.mean, row.best and row.best.mean, len(row.curve)) == (30, 40, 3)
    assert row.published is not None and row.stored_bits
    assert content["config"]["data"]["data_dir"] == "DIR"


def test_what_no_file_says_is_asked_for_by_the_report(tmp_path):
    results_folder = tmp_path / "results"
    results_folder.mkdir()
    written(results_folder)
    recorded(run_folder(tmp_path / "run"), results_folder / "chain.json")
    with pytest.raises(record.UserError, match=r"stage w32a32\.device=None"):
        results.read_rows(results_folder)


def test_published_numbers_belong_to_the_stage_they_name(tmp_path):
    options = record.parsed([str(tmp_path), "--output=x", *TEXTS, "--shown=a,b", "--published=a=one,two"])
    assert record.shown(options, [{"stage": "b"}])["published"] == {"a": "one", "b": "two"}


def test_a_config_from_before_a_key_was_there_has_its_default():
    config = validate(load_config("quickstart").to_dict())
    old = json.loads(json.dumps(config))
    del old["num_seeds"], old["train"]["remat"], old["asbq"]["init_from"]
    assert run_files.problem(validate(record.with_defaults(old)), {"num_seeds": run_files.whole(1, 1)}) == ""


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no run folder"):
        record.main([str(tmp_path), f"--output={tmp_path / 'x.json'}", *TEXTS])


def test_files_are_named_without_their_folders():
    config = {"init_from": "file:/a/b/x.th", "data": {"name": "cifar10"}, "bits": (1,)}
    assert record.without_folders(config) == {**config, "init_from": "file:x.th"}
