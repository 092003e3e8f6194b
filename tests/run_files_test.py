import json

import numpy as np
import pytest

from bnn_jax import run_files
from bnn_jax.errors import UserError
from bnn_jax.search.evolution import Evolution, Settings, rng_state

RESULT = {
    **{"stage": "w1a1", "stage_fingerprint": "ab12", "bits": 1, "seconds": 2.5, "images_per_second": 8.0, "epochs": 2},
    **{"last_top1": 50.0, "best_top1": 60.0, "best_epoch": 1, "selection": "test"},
    **{"quantized_weight_bits": 3, "stored_bits": 4, "level_bits": None, "more": [1]},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "result.json"


def read(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return run_files.read(path, run_files.TRAINED)


def test_no_file_is_no_error(path):
    assert run_files.read(path, run_files.TRAINED) is None


def test_what_fits_is_read_as_it_is(path):
    assert read(path, RESULT) == RESULT
    short = {name: value for name, value in RESULT.items() if name != "level_bits"}
    assert read(path, short) == short


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"last_top1": "abc"}, "last_top1='abc': accepted is a number from 0 to 100"),
        ({"last_top1": True}, "last_top1=True: accepted is a number from 0 to 100"),
        ({"last_top1": None}, "last_top1=None: accepted is a number from 0 to 100"),
        ({"last_top1": float("nan")}, "last_top1=nan: accepted is a number from 0 to 100"),
        ({"best_top1": 100.5}, "best_top1=100.5: accepted is a number from 0 to 100"),
        ({"best_epoch": [1]}, "best_epoch=[1]: accepted is a whole number from 0"),
        ({"best_epoch": -1}, "best_epoch=-1: accepted is a whole number from 0"),
        ({"epochs": 10**400}, "epochs=1000"),
        ({"seconds": 10**400}, "accepted is a finite number"),
        ({"bits": float("inf")}, "bits=inf: accepted is a finite number"),
        ({"level_bits": "1"}, "level_bits='1': accepted is a finite number"),
        # The tables take square brackets for a style.
        ({"stage": "[/b]"}, "stage='[/b]': accepted is a name of letters"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_accepted(path, changes, words):
    with pytest.raises(UserError) as error:
        read(path, {**RESULT, **changes})
    message = str(error.value)
    assert message.startswith(f"{path} is damaged: ") and words in message and len(message) < len(str(path)) + 200
    assert message.endswith("; move it away to make it anew")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "accepted is JSON"),
        ('{"stage": 1', "accepted is JSON"),
        ("[" * 100_000 + "]" * 100_000, "accepted is JSON"),
        ('{"more": ' + "[" * 60 + "]" * 60 + "}", "accepted is JSON of at most 50 levels"),
        ("9" * 5000, "accepted is JSON"),
        ("[1]", "[1]: accepted is an object with stage, "),
        ("{}", "stage is missing: accepted is a name of letters"),
    ],
)
def test_a_file_of_another_shape_is_refused(path, content, words):
    with pytest.raises(UserError, match=r"result\.json is damaged: ") as error:
        read(path, content)
    assert words in str(error.value)


def test_the_search_under_way_fits_its_shape_and_no_other():
    settings = Settings(genes=3, choices=4, population=4, mutations=1, crossovers=1, generations=1)
    evolution = Evolution(settings, np.random.RandomState(0))
    evolution.tell([float(index) for index in range(len(evolution.ask()))])
    row = {"path": list(evolution.best), "fold_top1": 100.0, "full_top1": 50}
    state = json.loads(json.dumps({"fold": 0, "evolution": evolution.state(), "history": [row]}))
    assert run_files.problem(state, run_files.search_state(run_files.vector(3, 4))) == ""
    found = run_files.problem(state, run_files.search_state(run_files.vector(2, 4)))
    assert found.startswith("evolution.evaluated[0][0]=[") and found.endswith("accepted is a list of 2")
    assert "accepted is a whole number from 0 to 0" in run_files.problem(
        state, run_files.search_state(run_files.vector(3, 1))
    )
    # A generator of these words never draws anything but 0.
    for words in ([0] * 624, [-1] * 624, [1] * 623, [1.0] * 624):
        state["evolution"]["rng"][1] = words
        found = run_files.problem(state, run_files.search_state(run_files.vector(3, 4)))
        assert found.startswith("evolution.rng[1]=[") and found.endswith("below 2**32, not all of them 0")


def test_a_fold_has_its_own_number():
    path = run_files.vector(1, 2)
    row = {"path": [1], "fold_top1": 1.0, "full_top1": 1.0}
    content = {**row, "fold": 1, "evaluations": 1, "history": [row], "rng": rng_state(np.random.RandomState(0))}
    assert run_files.problem(content, run_files.fold(1, path)) == ""
    assert "fold=1: accepted is a whole number from 0 to 0" in run_files.problem(content, run_files.fold(0, path))
