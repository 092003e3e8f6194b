"""What flags mean, without doing what they ask for."""

import sys

import pytest

from bnn_jax import command_line
from bnn_jax.errors import UserError
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
        ("--checkpoint=x.pth", "--mode=summary"),
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
