import pytest

from bnn_jax.training import progress as progress_module
from bnn_jax.training.progress import Progress, speed_text


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, as a list of one number to be changed."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_a_report_is_one_plain_line_on_stderr(capsys, clock):
    with Progress("w4a4", total=100) as progress:
        clock[0] += 10
        progress.update(50, "epoch 2/4")
        progress.report("test top-1 75.25 %")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "w4a4: test top-1 75.25 %  0:00:10 left\n"


def test_long_work_says_every_half_minute_how_far_it_is(capsys, clock):
    with Progress("w4a4", total=1000) as progress:
        for second in range(0, 100, 10):
            clock[0] = 100.0 + second
            progress.update(second + 1, f"step {second + 1}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "w4a4: step 31  0:15:38 left",
        "w4a4: step 61  0:15:24 left",
        "w4a4: step 91  0:14:59 left",
    ]


def test_an_update_with_a_line_says_that_one_only(capsys, clock):
    with Progress("search", total=4) as progress:
        clock[0] += 60
        progress.update(1, "generation 1", line="generation 1  path 3 0 6")
        progress.update(1, "generation 1")
    assert capsys.readouterr().err == "search: generation 1  path 3 0 6  0:03:00 left\n"


def test_the_time_left_counts_what_this_process_did_only(clock):
    progress = Progress("w4a4", total=1000, done=800)
    progress.skip(100)
    assert progress.time_left() == "?"
    clock[0] += 100
    progress.update(910, "")
    assert progress.time_left() == "0:15:00"


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("w4a4", total=100) as progress:
        progress.update(50, "50 img/s")
        progress.report("test top-1 75.25 %")
    text = capsys.readouterr().err
    assert "w4a4" in text and "50 %" in text and "50 img/s" in text and "test top-1 75.25 %" in text


def test_of_several_processes_only_the_first_shows_anything(capsys, monkeypatch):
    monkeypatch.setattr(progress_module.hosts, "is_first", lambda: False)
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: True)
    with Progress("stage", total=2) as shown:
        shown.update(1, "half", line="a line")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("speed", "text"), [(1234.4, "1,234 img/s"), (10.0, "10 img/s"), (9.96, "10.0 img/s"), (0.42, "0.4 img/s")]
)
def test_slow_training_is_shown_with_a_decimal(speed, text):
    assert speed_text(speed) == text
