"""The commands of a document are those of the program."""

import re
import shlex

import pytest

from bnn_jax import command_line
from bnn_jax.experiment.config import validate
from tests.conftest import ROOT

DOCUMENT = (ROOT / "docs" / "your_own_images.md").read_text()
OPTIONS, COMMANDS = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)[:2]


@pytest.mark.parametrize("line", COMMANDS.splitlines())
def test_a_command_about_ones_own_images_is_accepted(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = OPTIONS.partition('"')[2].rpartition('"')[0]
    program, *arguments = shlex.split(line.replace("$OPTIONS", options), comments=True)[1:]
    values = command_line.parse([program, *arguments])
    assert program == "launch.py"
    if "$OPTIONS" in line:
        assert validate(values.config.to_dict())["data"]["name"] == "folder"


def test_there_are_six_commands():
    assert len(COMMANDS.splitlines()) == 6
