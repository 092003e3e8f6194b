"""What flags mean, without doing what they ask for."""

import sys

import pytest

from bnn_jax import command_line
from bnn_jax.errors import UserError
from bnn_jax.hosts import Peers
from tests.integration.launching import QUICKSTART


def parse(*arguments: str):
    return command_line.parse(["launch.py", *arguments])


def test_without_flags_the_chain_is_trained_in_its_usual_place():
    values = parse(QUICKSTART)
    assert (values.mode, values.workdir, values.stage, values.checkpoint) == ("train", None, None, None)
    assert not values.fresh and not values.json
    assert values.config.name == "quickstart_smoke"


def test_an_override_replaces_one_value():
    changes = ("--config.train.batch_size=4", "--config.asbq.kd_weight=0.25", "--config.asbq.bits=(8,4)")
    config = parse(QUICKSTART, *changes, "--config.data.data_dir=/data").config
    assert (config.train.batch_size, config.asbq.kd_weight, config.data.data_dir) == (4, 0.25, "/data")
    assert config.asbq.bits == (8, 4)
    assert config.train.momentum == 0.9


def test_overrides_may_stand_before_the_config():
    assert parse("--config.train.batch_size=4", QUICKSTART).config.train.batch_size == 4


def test_values_may_stand_apart_from_their_flags():
    values = parse(*QUICKSTART.split("=", 1), "--config.train.batch_size", "4", "--mode", "summary")
    assert (values.config.train.batch_size, values.mode) == (4, "summary")


def test_one_value_is_a_tuple_of_one():
    assert parse(QUICKSTART, "--config.asbq.epochs=3").config.asbq.epochs == (3,)


def test_of_two_overrides_of_a_key_the_last_counts():
    config = parse(QUICKSTART, "--config.asbq.epochs=(2,3)", "--config.asbq.epochs", "(4,)").config
    assert config.asbq.epochs == (4,)


@pytest.mark.parametrize(
    "options",
    [
        ("--checkpoint=x.pth",),
        ("--fresh", "--mode=evaluate"),
        ("--stage=w8a8", "--mode=report"),
        ("--output=x.bnn", "--mode=summary"),
    ],
)
def test_an_option_the_mode_would_ignore_is_refused(options):
    with pytest.raises(UserError, match=r"--\w+ is of no use with --mode=\w+: accepted with \w+"):
        parse(QUICKSTART, *options)


def test_the_config_file_is_executed_once(tmp_path):
    file = tmp_path / "counting.py"
    file.write_text(
        "import pathlib\nfrom configs.quickstart import get_config\n"
        "pathlib.Path(__file__).with_suffix('.log').open('a').write('x')\n"
    )
    parse(f"--config={file}", "--config.seed=3")
    assert file.with_suffix(".log").read_text() == "x"


def test_the_arguments_of_the_program_itself_stay_as_they_are():
    before = list(sys.argv)
    parse(QUICKSTART, "--config.seed=3")
    with pytest.raises(UserError):
        parse(QUICKSTART, "--nonsense")
    assert sys.argv == before


def test_two_command_lines_do_not_know_of_each_other():
    assert parse(QUICKSTART, "--config.seed=3", "--json").config.seed == 3
    values = parse(QUICKSTART)
    assert values.config.seed == 0 and not values.json


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("two\n  lines"), "two lines"), (KeyError(), "KeyError"), (UserError("one"), "one")]
)
def test_a_message_is_put_into_one_line(error, line):
    assert command_line.one_line(error) == line


# ---- several processes

PEERS = ("--coordinator=node1:55527", "--num_processes=2", "--process_id=0")


@pytest.fixture
def under_slurm(monkeypatch):
    for name, value in {"JOB_ID": "7", "STEP_NODELIST": "n1", "PROCID": "0", "LOCALID": "0", "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_one_process_has_no_peers():
    assert command_line.peers_of(parse(QUICKSTART)) is None


def test_process_0_is_a_value_like_any_other():
    peers = command_line.peers_of(parse(QUICKSTART, *PEERS, "--heartbeat_seconds=20"))
    assert peers == Peers("node1:55527", 2, 0, heartbeat_seconds=20, connect_seconds=300)


def test_a_launcher_names_the_peers(under_slurm):
    assert command_line.peers_of(parse(QUICKSTART, "--connect_seconds=9")) == Peers(connect_seconds=9)


def test_flags_come_before_a_launcher(under_slurm):
    assert command_line.peers_of(parse(QUICKSTART, *PEERS)).coordinator == "node1:55527"


def test_tasks_of_a_job_can_be_kept_apart(under_slurm):
    assert command_line.peers_of(parse(QUICKSTART, "--distributed=off")) is None
    assert command_line.peers_of(parse(QUICKSTART, "--distributed=off", "--mode=report")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--distributed=on",), "--distributed=on: accepted are auto, off"),
        (("--distributed=off", *PEERS), "--distributed=off: of no use with --coordinator"),
        (PEERS[:2], "--process_id: missing"),
        ((*PEERS[:2], "--process_id=two"), "--process_id"),
        ((*PEERS, "--mode=summary"), "--coordinator is of no use with --mode=summary: accepted with train, evaluate"),
    ],
)
def test_flags_of_several_processes_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        parse(QUICKSTART, *options)


def test_a_mode_for_one_process_is_refused_where_a_launcher_started_several(under_slurm):
    with pytest.raises(UserError, match="--mode=report works on one process, and SLURM started several"):
        parse(QUICKSTART, "--mode=report")
