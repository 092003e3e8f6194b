"""The record for other programs: no value twice, whatever happened before."""

import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bnn_jax import hosts
from bnn_jax.training.writers import WandbWriter, open_writer, scalars

CONFIG = {"name": "mine", "log": {"tensorboard": True, "wandb": False}}


def record(epoch: int, **values: Any) -> dict[str, Any]:
    return {"epoch": epoch, "step": 3 * (epoch + 1), "train_loss": 1.0 / (epoch + 1), **values}


def written(folder: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of every scalar in all event files of a folder, read as TFRecords."""
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in folder.glob("tensorboard/*"):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            # Length with its checksum, the event, its checksum.
            event = events.Event.FromString(content[place + 12 : place + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            place += length + 16
    return found


def test_event_files_hold_every_value_once_after_a_run_went_on(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install 'bnn_jax[tensorboard]'")
    with open_writer(CONFIG, tmp_path) as writer:
        writer.start([])
        for epoch in range(3):
            writer.write(record(epoch))
    # The last epoch was not saved and is trained again.
    with open_writer(CONFIG, tmp_path) as writer:
        writer.start([record(0), record(1)])
        for epoch in (2, 3):
            writer.write(record(epoch))
    losses = sorted((step, value) for tag, step, value in written(tmp_path) if tag == "train_loss")
    assert losses == [(3, 1.0), (6, 0.5), (9, pytest.approx(1 / 3)), (12, 0.25)]


def test_the_values_of_several_seeds_have_names_of_their_own():
    seeds = [{"seed": 4, "test_top1": 50.0}, {"seed": 5, "test_top1": 52.0}]
    found = scalars(record(0, test_top1=51.0, seeds=seeds))
    assert found == {
        "epoch": 0,
        "train_loss": 1.0,
        "test_top1": 51.0,
        "seed_4/test_top1": 50.0,
        "seed_5/test_top1": 52.0,
    }


class FakeRun:
    """What ``wandb.init`` gives: keeps what it is told."""

    def __init__(self, **options: Any):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged.append((step, values["train_loss"]))

    def finish(self) -> None:
        self.finished = True


def test_a_run_that_goes_on_is_one_offline_run_of_weights_and_biases(tmp_path, monkeypatch):
    fake = types.SimpleNamespace(init=lambda **options: FakeRun(**options), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    left = tmp_path / "wandb" / "offline-run-1"
    left.mkdir(parents=True)
    writer = WandbWriter(tmp_path, CONFIG)
    writer.start([record(0)])
    writer.write(record(1))
    writer.close()
    assert not left.exists()
    assert writer._run.logged == [(3, 1.0), (6, 0.5)] and writer._run.finished
    assert writer._run.options["mode"] == "offline" and writer._run.options["dir"] == str(tmp_path)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    with open_writer(CONFIG, tmp_path) as writer:
        writer.start([record(0)])
    assert list(tmp_path.iterdir()) == []
