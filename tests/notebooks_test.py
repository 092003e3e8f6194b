"""Every notebook runs from top to bottom, in its smoke form."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path, kind: str = "code") -> list[str]:
    """The texts of the cells of one kind."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@each_notebook
def test_notebook_runs(path, monkeypatch, tmp_path):
    matplotlib.use("Agg")
    # What a notebook writes lies where it was started.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # A notebook looks for SMOKE where it trains, so that the test takes seconds.
    names = {"SMOKE": True}
    for cell in cells_of(path):
        exec(compile(cell, f"{path.name}", "exec"), names)
    matplotlib.pyplot.close("all")


def test_all_notebooks_install_in_the_same_way_on_colab():
    assert len({cells_of(path)[0] for path in NOTEBOOKS}) == 1
    assert "google.colab" in cells_of(NOTEBOOKS[0])[0]


@each_notebook
def test_a_notebook_is_stored_without_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs"), f"{path.name}: clear the outputs before committing"
