import csv
import json

import jax.numpy as jnp
import pytest

from bnn_jax.errors import UserError
from bnn_jax.training import metrics
from bnn_jax.training.epoch_sums import epoch_means

RECORDS = [{"epoch": 0, "step": 3, "test_top1": 50.0}, {"epoch": 1, "step": 6, "test_top1": 60.0}]


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


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 2), (100, 2)])
def test_cutting_back_drops_the_records_after_a_step(path, step, kept):
    assert metrics.cut_back(path, step) == RECORDS[:kept]
    assert metrics.read(path) == RECORDS[:kept]


def test_after_cutting_back_a_torn_line_the_next_record_stands_alone(path):
    path.write_text(path.read_text() + '{"epoch": 2')
    metrics.cut_back(path, 6)
    metrics.append(path, {"epoch": 2, "step": 9})
    assert metrics.read(path) == [*RECORDS, {"epoch": 2, "step": 9}]


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
    metrics.append(path, {"epoch": 2, "step": 9})
    assert metrics.read(path) == RECORDS
