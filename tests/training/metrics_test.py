import csv
import json
from typing import Any

import jax.numpy as jnp
import pytest

from bnn_jax.errors import UserError
from bnn_jax.training import metrics
from bnn_jax.training.epoch_sums import epoch_means


def record(epoch: int, **changes: Any) -> dict[str, Any]:
    """The record of an epoch of three steps."""
    test = {"test_top1": 50.0 + epoch, "test_top5": 90.0, "test_loss": 1.5}
    times = {"seconds": 0.5, "images_per_second": 9.0}
    return {"epoch": epoch, "step": 3 * epoch + 3, "train_loss": 2.0, **test, **times, **changes}


RECORDS = [record(0), record(1)]


@pytest.fixture
def path(tmp_path):
    for record in RECORDS:
        metrics.append(tmp_path / "metrics.jsonl", record)
    return tmp_path / "metrics.jsonl"


def test_a_record_is_one_line_of_json(path):
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS


def test_what_was_appended_is_read(path):
    assert metrics.read(path) == RECORDS


def test_no_file_is_no_record(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []
    assert metrics.cut_back(tmp_path / "metrics.jsonl", 3) == []
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("rest", [b'{"epoch": 2, "st', b"\0\0\0\0", b"\xff\xfe"])
def test_a_last_line_cut_short_by_a_crash_is_left_out(path, rest):
    path.write_bytes(path.read_bytes() + rest)
    assert metrics.read(path) == RECORDS


@pytest.mark.parametrize("damaged", [b'{"epoch": 2, "st\n', b"\xff\xfe\n", b"3\n", b'{"epoch": 2}\n'])
def test_a_damaged_line_in_the_middle_is_named(path, damaged):
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damaged + second)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        metrics.read(path)


@pytest.mark.parametrize("line", [b"[1]", b"[1]\n", b'{"epoch": 2}', b"null"])
def test_a_last_line_of_another_shape_was_not_cut_short(path, line):
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 is damaged: .* accepted is"):
        metrics.read(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 7}, "epoch=7: accepted is 2"),
        ({"test_top1": "abc"}, "test_top1='abc': accepted is a number from 0 to 100"),
        ({"test_loss": float("nan")}, "test_loss=nan: accepted is a finite number"),
        ({"seeds": [{"seed": 1}]}, r"seeds\[0\]\.test_top1 is missing"),
    ],
)
def test_a_line_with_a_wrong_field_is_named(path, changes, words):
    metrics.append(path, {**record(2), **changes})
    with pytest.raises(UserError, match=f"line 3 is damaged: {words}"):
        metrics.read(path)


def test_missing_epochs_are_counted(path):
    assert metrics.read(path, epochs=2) == RECORDS
    with pytest.raises(UserError, match=r"the records of 2 epochs: accepted are 3; --stage="):
        metrics.read(path, epochs=3)
    with pytest.raises(UserError, match=r"the records of 1 epochs: accepted are 2"):
        metrics.cut_back(path, 5, epochs=2)
    assert metrics.read(path) == RECORDS


def test_all_epochs_have_the_fields_of_the_first(path):
    metrics.append(path, record(2, validation_top1=1.0))
    assert len(metrics.read(path)) == 3
    with pytest.raises(UserError, match="line 3 is damaged: accepted are the fields of line 1"):
        metrics.read(path, epochs=3)


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 2), (100, 2)])
def test_cutting_back_drops_the_records_after_a_step(path, step, kept):
    assert metrics.cut_back(path, step) == RECORDS[:kept]
    assert metrics.read(path) == RECORDS[:kept]


def test_after_cutting_back_a_torn_line_the_next_record_stands_alone(path):
    path.write_text(path.read_text() + '{"epoch": 2')
    metrics.cut_back(path, 6)
    metrics.append(path, record(2))
    assert metrics.read(path) == [*RECORDS, record(2)]


def test_the_table_has_a_row_for_each_record_and_a_column_for_each_key(tmp_path):
    records = [{"epoch": 0, "train_loss": 0.5}, {"epoch": 1, "train_loss": 0.25, "note": "a, b"}]
    metrics.write_csv(records, tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"epoch": "0", "train_loss": "0.5", "note": ""},
        {"epoch": "1", "train_loss": "0.25", "note": "a, b"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_means_of_an_epoch_come_from_its_sums():
    sums = {"count": 20.0, "correct": 5.0, "loss": 30.0, "loss/cross_entropy": 10.0, "non_finite_step": -1}
    means = epoch_means({name: jnp.asarray(value) for name, value in sums.items()})
    assert means == {"train_loss": 1.5, "train_top1": 25.0, "loss/cross_entropy": 0.5}
    means = epoch_means({name: jnp.asarray(value) for name, value in {**sums, "correct5": 15.0}.items()})
    assert (means["train_top1"], means["train_top5"]) == (25.0, 75.0)


def test_of_several_processes_only_the_first_writes(path, monkeypatch):
    monkeypatch.setattr(metrics.hosts, "is_first", lambda: False)
    metrics.append(path, record(2))
    assert metrics.read(path) == RECORDS
