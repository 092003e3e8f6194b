import json
import random
import sys

import pytest

from benchmarks import fuzz
from bnn_jax import run_files
from tests.integration.launching import launch_program


@pytest.mark.slow
def test_changed_files_are_read_or_refused_in_one_line():
    finished = launch_program("--seconds=5", "--seed=1", program="benchmarks/fuzz.py")
    assert finished.code == 0, finished.stderr
    cases = finished.last_json["cases"]
    # Both answers are there: not everything is changed beyond recognition.
    assert all(min(count.values()) > 0 for count in cases.values()), cases


def test_an_example_has_its_shape():
    for shape, _ in fuzz.JSON_FILES.values():
        assert run_files.problem(json.loads(json.dumps(fuzz.example(shape))), shape) == ""


def test_a_reader_that_fails_is_a_finding(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("last_top1")

    monkeypatch.setitem(fuzz.READERS, "json", lambda draw, path: broken)
    counts, findings = fuzz.fuzz(["json"], seed=0, seconds=0.01)
    assert counts == {"json": {"read": 0, "refused": 0}}
    assert findings and "KeyError: 'last_top1'" in findings[0] and findings[0].startswith("json 0 0: ")


def test_the_same_name_draws_the_same_case(tmp_path):
    for name in fuzz.READERS:
        contents = []
        for path in (tmp_path / "a", tmp_path / "b"):
            fuzz.READERS[name](random.Random(f"{name} 7"), path)
            contents.append(path.read_bytes())
        assert contents[0] == contents[1]


def test_the_benchmark_needs_no_pytorch():
    assert "torch" not in sys.modules
