"""Result files become rows; one that does not say where it comes from is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bnn_jax.errors import UserError
from bnn_jax.report import results
from tests.conftest import ROOT

STAGE = {
    **{"stage": "train", "bits": 1.0, "seed": 0, "data": "cifar10", "device": "1 x cpu (cpu)"},
    **{"num_train": 50000, "num_test": 10000, "epochs": 2, "last_top1": 60.0, "best_top1": 61.0},
    "metrics": [{"test_top1": 61.0}, {"test_top1": 60.0}],
}
RESULT = {
    **{"title": "a run", "what": "a run of a test", "command": "python launch.py", "hardware": "a test's"},
    **{"shown": ["train"], "published": {"train": "known"}, "gap": "a test"},
    **{"git_commit": "0" * 40, "versions": {"python": "3", "bnn_jax": "0", "jax": "0"}},
    "config": {"method": "skd", "name": "run", "network": "resnet8", "seed": 0, "data": {"name": "cifar10"}},
    "stages": [STAGE],
}
KNOWN = {
    "title": "it",
    "source": "a paper",
    "epochs": 3,
    "last": 90.0,
    "best": 91.0,
    "note": "-",
    "curve": [50, 70, 90],
}


def written(folder: Path, **contents: Any) -> Path:
    """A folder with the published numbers and some result files."""
    (folder / results.PUBLISHED).write_text(json.dumps({"known": KNOWN}))
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def changed(seed: int = 0, **stage: Any) -> dict[str, Any]:
    """The result with another seed, and other values of its stage."""
    content = copy.deepcopy(RESULT)
    content["config"]["seed"] = seed
    content["stages"][0].update(seed=seed, **stage)
    return content


def test_a_row_says_what_its_file_says(tmp_path):
    [row] = results.read_rows(written(tmp_path, run=RESULT))
    assert (row.title, row.epochs, row.num_train, row.num_test) == ("a run", 2, 50000, 10000)
    assert (str(row.last), str(row.best)) == ("60.00", "61.00")
    assert row.published is not None and row.published.best == 91
    assert [point.mean for point in row.curve] == [61, 60]


@pytest.mark.parametrize("field", ["what", "command", "hardware", "git_commit", "versions", "config", "stages"])
def test_a_result_without_provenance_is_refused(tmp_path, field):
    content = {name: value for name, value in RESULT.items() if name != field}
    with pytest.raises(UserError, match=rf"run\.json: {field} is missing: accepted is"):
        results.read_rows(written(tmp_path, run=content))


@pytest.mark.parametrize("field", ["seed", "data", "device", "num_test", "last_top1"])
def test_a_stage_without_provenance_is_refused(tmp_path, field):
    content = copy.deepcopy(RESULT)
    del content["stages"][0][field]
    with pytest.raises(UserError, match=rf"stage train\.{field} is missing"):
        results.read_rows(written(tmp_path, run=content))


def test_an_empty_hardware_is_refused(tmp_path):
    with pytest.raises(UserError, match="hardware=''"):
        results.read_rows(written(tmp_path, run={**RESULT, "hardware": ""}))


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path):
    runs = {f"run{seed}": changed(seed, last_top1=60.0 + seed) for seed in range(3)}
    runs["longer"] = changed(3, epochs=3)
    rows = results.read_rows(written(tmp_path, **runs))
    assert [row.files for row in rows] == [("longer",), ("run0", "run1", "run2")]
    assert (str(rows[1].last), rows[1].seeds, rows[1].count) == ("61.00 ± 1.00", (0, 1, 2), 3)
    assert rows[1].curve[0].deviation == 0


def test_a_pattern_makes_one_row_of_several_stages(tmp_path):
    content = copy.deepcopy(RESULT)
    content["stages"] = [{**STAGE, "stage": f"finetune_{i}", "last_top1": 50.0 + i} for i in range(2)]
    content.update(shown=["finetune_*"], published={})
    [row] = results.read_rows(written(tmp_path, run=content))
    assert (row.count, row.last.mean, row.published) == (2, 50.5, None)


def test_without_a_choice_the_last_trained_stage_is_shown(tmp_path):
    content = copy.deepcopy(RESULT)
    content["stages"] = [STAGE, {**STAGE, "stage": "second"}, {"stage": "search", "kind": "search"}]
    del content["shown"], content["title"], content["gap"]
    [row] = results.read_rows(written(tmp_path, run=content))
    assert (row.stage, row.title, row.gap) == ("second", "a run of a test", "")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("shown", ["other"], "it has no such stage"), ("published", {"train": "unknown"}, "has no such entry")],
)
def test_names_that_lead_nowhere_are_refused(tmp_path, field, value, words):
    with pytest.raises(UserError, match=words):
        results.read_rows(written(tmp_path, run={**RESULT, field: value}))


def test_every_result_of_the_project_says_where_it_comes_from():
    rows = results.read_rows(ROOT / results.FOLDER)
    assert rows and all(row.gap or row.published is None for row in rows), "say why a result differs: --gap"
