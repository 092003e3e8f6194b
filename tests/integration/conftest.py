"""Runs that several tests look at; nobody changes them, who wants to takes a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.launching import QUICKSTART, TWO_RUNGS, Finished, launch_program, launch_well


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The folder of the whole quickstart chain in its smoke form, and what the program printed."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    return folder, launch_program(QUICKSTART, f"--workdir={folder}")


@pytest.fixture(scope="session")
def two_rungs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two rungs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("two_rungs") / "run"
    launch_well(*TWO_RUNGS, f"--workdir={folder}")
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a run folder to one that may be changed."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))
