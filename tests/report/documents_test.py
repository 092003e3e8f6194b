"""Tables in the documents come from the result files, and are what the files say."""

import re

import pytest

from bnn_jax.errors import UserError
from bnn_jax.experiment.config import SECTIONS, keys_of
from bnn_jax.report import documents, results
from tests.conftest import ROOT
from tests.report.results_test import RESULT, changed, written


def rows_of(folder, **contents):
    return results.read_rows(written(folder, **contents))


def test_the_documents_say_what_the_results_say():
    rows = results.read_rows(ROOT / results.FOLDER)
    found = 0
    for path in documents.documents(ROOT):
        text = path.read_text(encoding="utf-8")
        found += len(documents.MARKED.findall(text))
        new = documents.rewritten(text, rows, ROOT / results.FOLDER, name=path.name)
        assert new == text, f"{path.name} differs from results/: python launch.py --mode=report"
    assert found


def test_every_marker_has_its_end():
    for path in documents.documents(ROOT):
        text = path.read_text(encoding="utf-8")
        assert len(documents.MARKED.findall(text)) == text.count("<!-- table:") == text.count("<!-- end of table"), path


def test_only_what_stands_between_the_markers_is_replaced(tmp_path):
    rows = rows_of(tmp_path, run={**RESULT, "headline": True})
    text = "before\n<!-- table: summary -->\nold\n<!-- end of table -->\nafter 1.0\n"
    new = documents.rewritten(text, rows, tmp_path, name="x")
    assert new.startswith("before\n<!-- table: summary -->\n| what |") and new.endswith("-->\nafter 1.0\n")
    assert "old" not in new and "| a run | 2 of 3 | 60.00 | 61.00 |" in new
    assert documents.rewritten(new, rows, tmp_path, name="x") == new


def test_a_run_that_was_stopped_is_compared_with_the_same_epoch(tmp_path):
    [row] = rows_of(tmp_path, run=RESULT)
    line = documents.results_table([row], tmp_path, "").splitlines()[-1]
    assert "| 50,000 / 10,000 |" in line and "| 70.00 after 2 epochs; 90.00 last, 91.00 best | a test |" in line


def test_why_a_run_differs_is_said_once_for_its_stages(tmp_path):
    rows = rows_of(tmp_path, run=RESULT) * 2
    lines = documents.results_table(rows, tmp_path, "").splitlines()[-2:]
    assert [line.split(" | ")[-1] for line in lines] == ["a test |", "as above |"]


def test_a_method_has_its_own_rows_or_says_that_it_has_none(tmp_path):
    rows = rows_of(tmp_path, run=RESULT)
    text = "<!-- table: results: {} -->\n<!-- end of table -->"
    assert "a run" in documents.rewritten(text.format("skd"), rows, tmp_path, name="x")
    assert "No run of BASQ has been recorded" in documents.rewritten(text.format("basq"), rows, tmp_path, name="x")


def test_the_command_of_a_row_names_all_its_seeds(tmp_path):
    rows = rows_of(tmp_path, one=changed(1), two=changed(2))
    assert "`python launch.py` (seeds 1, 2)" in documents.commands_table(rows, tmp_path, "")


@pytest.mark.parametrize("name", ["sumary", "results: foo"])
def test_a_table_that_does_not_exist_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"x: table '{name}': accepted are summary"):
        documents.rewritten(f"<!-- table: {name} -->\n<!-- end of table -->", [], tmp_path, name="x")


def test_the_switches_between_paper_and_program_are_keys_of_configs():
    keys = keys_of(SECTIONS)
    switches = [entry["switch"] for entry in documents.read_differences(ROOT / results.FOLDER)]
    named = {name for text in switches for name in re.findall(r"`([a-z_]+\.[a-z_]\w*)[=`]", text)}
    assert len(named) > 20
    assert named - {"weights.npz"} <= keys.keys()


def test_the_project_is_written_anew_where_it_is_stale(tmp_path):
    (tmp_path / "results").mkdir()
    written(tmp_path / "results", run={**RESULT, "headline": True})
    (tmp_path / "README.md").write_text("<!-- table: summary -->\n<!-- end of table -->\n")
    assert documents.rewrite(tmp_path) == [tmp_path / "README.md"]
    assert documents.rewrite(tmp_path) == []
