import subprocess
import sys

from bnn_jax.experiment.config import SECTIONS, keys_of
from tests.conftest import ROOT
from tests.integration.launching import Finished, launch_here, start, wait

# What takes seconds to import.
HEAVY = {"jax", "flax", "optax", "orbax", "tensorflow_datasets", "numpy", "ml_collections", "matplotlib", "rich"}


def test_help_fits_a_screen():
    lines = launch_here("--help").stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_help_names_every_flag_and_an_example_that_is_there():
    text = launch_here("--help").stdout
    alone = ("config", "config.KEY", "workdir", "mode", "stage", "checkpoint", "fresh", "json", "help", "help-config")
    together = ("coordinator", "num_processes", "process_id", "distributed", "heartbeat_seconds", "connect_seconds")
    for flag in (*alone, *together):
        assert f"--{flag}" in text
    for mode in ("train", "evaluate", "summary", "report"):
        assert mode in text
    example = text.split("example: python ")[1].split()
    assert (ROOT / example[0]).is_file() and (ROOT / example[1].partition("=")[2]).is_file()


def test_help_imports_nothing_heavy():
    # Rather than a time, which depends on the machine: what is imported is what takes the time.
    code = "import sys, launch; code = launch.main(['launch.py', '--help']); print(*sys.modules); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert not imported & HEAVY


def test_help_wins_over_everything_else_and_is_no_mistake():
    finished: Finished = wait(start("--config=nowhere.py", "--help"))
    assert finished.code == 0
    assert finished.stdout.startswith("usage: python launch.py --config=FILE")
    assert finished.stderr == ""


def test_the_help_on_configs_lists_every_key_with_default_meaning_and_accepted_values():
    finished: Finished = wait(start("--help-config"))
    assert (finished.code, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    place = lines.index("  config.train.batch_size = 128")
    assert lines[place + 1].strip() == "images per optimiser step, over all devices"
    assert lines[place + 2].strip() == "accepted: int, 1 to 100,000,000"
    place = lines.index("  config.asbq.w1 = None")
    assert lines[place + 2].strip() == "accepted: one of 'sign', 'levels'; or None"
    listed = {line.split()[0].removeprefix("config.") for line in lines if line.startswith("  config.")}
    assert listed == set(keys_of(SECTIONS))


def test_a_reader_that_stops_early_sees_no_error():
    command = f"{sys.executable} launch.py --help-config | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Keys of a config") and done.stderr == ""
