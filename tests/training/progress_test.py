import re

import pytest

from bnn_jax.training import progress as progress_module
from bnn_jax.training.progress import Progress, speed_text

RECORD = {"epoch": 1, "train_loss": 0.5, "train_top1": 80.0, "test_top1": 75.25, "images_per_second": 1234.5}


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, as a list of one number to be changed."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def update(progress: Progress, step: int) -> None:
    progress.update(step=step, epoch=1, images_per_second=50.0, loss=2.5, top1=12.5)


def test_an_epoch_is_one_plain_line_on_stderr(capsys, clock):
    with Progress("w4a4", total_steps=100, start_step=0, epochs=4) as progress:
        clock[0] += 10
        update(progress, 50)
        progress.epoch_done(RECORD)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "w4a4: epoch 2/4  train loss 0.5000  train top-1 80.00 %  test top-1 75.25 %  1,234 img/s  0:00:10 left\n"
    )


def test_a_long_epoch_says_every_half_minute_how_far_it_is(capsys, clock):
    with Progress("w4a4", total_steps=1000, start_step=0, epochs=4) as progress:
        for second in range(0, 100, 10):
            clock[0] = 100.0 + second
            update(progress, second + 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(
        re.match(r"w4a4: epoch 2/4  50 img/s  loss 2\.500  top-1 12\.5 %  \d:\d\d:\d\d left", ln) for ln in lines
    )


def test_the_time_left_counts_the_steps_of_this_process_only(clock):
    progress = Progress("w4a4", total_steps=1000, start_step=900, epochs=4)
    assert progress.time_left() == "?"
    clock[0] += 100
    update(progress, 910)
    assert progress.time_left() == "0:15:00"


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("w4a4", total_steps=100, start_step=0, epochs=4) as progress:
        update(progress, 50)
        progress.epoch_done(RECORD)
    text = capsys.readouterr().err
    assert "w4a4" in text and "50 %" in text and "50 img/s" in text and "test top-1 75.25 %" in text


def test_of_several_processes_only_the_first_shows_anything(capsys, monkeypatch):
    monkeypatch.setattr(progress_module.hosts, "is_first", lambda: False)
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: True)
    with Progress("stage", total_steps=2, start_step=0, epochs=1) as shown:
        shown.update(step=1, epoch=0, images_per_second=1.0, loss=1.0, top1=0.0)
        shown.say("a line")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("speed", "text"), [(1234.4, "1,234 img/s"), (10.0, "10 img/s"), (9.96, "10.0 img/s"), (0.42, "0.4 img/s")]
)
def test_slow_training_is_shown_with_a_decimal(speed, text):
    assert speed_text(speed) == text
