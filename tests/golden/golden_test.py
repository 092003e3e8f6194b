"""Runs every golden file through its check: ``pytest tests/golden --golden-dir=DIR -k METHOD``.

Files lie in ``DIR/<method>/*.npz``; the ones committed under ``tests/golden/data`` run through the same checks.
"""

import importlib
import pathlib
import re
from collections.abc import Callable

import pytest

from tests.conftest import golden_folder
from tests.golden.comparison import Comparison, GoldenFile, GoldenMismatch

# Methods whose checks are in tests/golden/<method>. A file of these without a check fails.
BUILT = ("asbq", "basq", "skd_bnn", "snn", "weight_search")
# Methods whose golden files exist but which the library does not have yet; their files are skipped by name.
NOT_BUILT = ()

# A value of a trajectory that lies on the edge between two levels falls to either side by the last bit of a sum, and so
# by the processor; one step later much else has followed it. A trajectory that does not agree may agree with images
# changed by their last bit; a real fault agrees with none.
NUDGES = 4

COMMITTED = pathlib.Path(__file__).parent / "data"


def golden_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files ``<method>/*.npz`` in a folder, in order."""
    return sorted(folder.glob("*/*.npz"))


def file_id(path: pathlib.Path) -> str:
    """'asbq/weight_quantizer'."""
    return f"{path.parent.name}/{path.stem}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = golden_folder(metafunc.config)
    if "golden_file" in metafunc.fixturenames:
        metafunc.parametrize("golden_file", _given_files(folder))
    if "committed_file" in metafunc.fixturenames:
        metafunc.parametrize("committed_file", [_committed_file(path, folder) for path in golden_files(COMMITTED)])


def _given_files(folder: pathlib.Path) -> list:
    """Parameters for the files of a folder; one skipped parameter per method where there are none."""
    files = golden_files(folder)
    if files:
        return [pytest.param(path, id=file_id(path)) for path in files]
    skip = pytest.mark.skip(f"no <method>/*.npz below {folder} (--golden-dir)")
    return [pytest.param(None, id=f"{method}/absent", marks=skip) for method in BUILT + NOT_BUILT]


def _committed_file(path: pathlib.Path, folder: pathlib.Path):
    """Parameter for a committed file; skipped where the same bytes run from the given folder."""
    other = folder / path.parent.name / path.name
    same = other.is_file() and other.read_bytes() == path.read_bytes()
    marks = [pytest.mark.skip(f"the same file runs from {folder}")] if same else []
    return pytest.param(path, id=file_id(path), marks=marks)


def check_file(path: pathlib.Path, record_property: Callable[[str, object], None]) -> None:
    """Runs the check of a file, chosen by its name, and records a line for the summary.

    Raises:
      AssertionError: the method or the file's name is unknown, or values do not agree.
    """
    method = path.parent.name
    assert method in BUILT, f"method {method!r} is in no table of {__file__}: accepted are {BUILT + NOT_BUILT}"
    checks = importlib.import_module(f"tests.golden.{method}").CHECKS
    check = next((check for pattern, check in checks if re.fullmatch(pattern, path.stem)), None)
    assert check is not None, f"{file_id(path)}: method {method!r} is built, but no check is registered for this file"
    nudges = NUDGES if path.stem.startswith("traj") else 0
    for nudge in range(1 + nudges):
        file, comparison = GoldenFile(path, nudge=nudge), Comparison()
        try:
            check(file, comparison)
            return comparison.finish(file)
        except GoldenMismatch:
            if nudge == nudges:
                raise
        finally:
            nudged = f" (images changed by their last bit, seed {nudge})" if nudge else ""
            record_property("golden", f"{file_id(path)}{nudged}: {comparison.line}")


@pytest.mark.golden
def test_golden_file(golden_file: pathlib.Path, record_property) -> None:
    if golden_file.parent.name in NOT_BUILT:
        pytest.skip(f"method {golden_file.parent.name} is not built yet")
    check_file(golden_file, record_property)


@pytest.mark.golden
def test_committed_file(committed_file: pathlib.Path, record_property) -> None:
    check_file(committed_file, record_property)
