"""Set-up of every test: JAX on the CPU, a persistent compilation cache, and the folder of the golden files."""

import os
import pathlib
import sys

import pytest

TESTS_RUN = pytest.StashKey[int]()
ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bnn_jax" / "xla"

# Environment variables rather than jax.config: collecting tests then needs no import of jax, and programs the tests
# start (launch.py) run under the same settings. A value that is already set wins.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # An array with fewer axes than its partner is a mistake more often than an intention.
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}.items():
    os.environ.setdefault(name, value)


# jax keeps the last 8192 programs of a process and stops counting when they are that many (`_cache_size` is then 0, and
# calls take a longer way). The tests need about four each.
TESTS_BETWEEN_CLEARINGS = 500


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets compiled programs at the end of a file, once enough tests have run; what is needed again is on disk."""
    count = item.config.stash.get(TESTS_RUN, 0) + 1
    end_of_file = nextitem is None or nextitem.path != item.path
    if end_of_file and count >= TESTS_BETWEEN_CLEARINGS and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        count = 0
    item.config.stash[TESTS_RUN] = count


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=None,
        help="folder with <method>/*.npz, recorded from the published programs (default: ../shared/golden)",
    )


@pytest.fixture(scope="session")
def golden_dir(pytestconfig: pytest.Config) -> pathlib.Path:
    """Folder of the golden files; it may be absent."""
    return golden_folder(pytestconfig)


def golden_folder(config: pytest.Config) -> pathlib.Path:
    """Folder that --golden-dir names, or the default."""
    chosen = config.getoption("--golden-dir")
    return pathlib.Path(chosen).resolve() if chosen else ROOT.parent / "shared" / "golden"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per golden file: its largest error beside the tolerance. Properties of reports survive parallel runs."""
    lines = [
        f"{outcome:6} {line}"
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, line in getattr(report, "user_properties", ())
        if name == "golden" and report.when == "call"
    ]
    if lines:
        terminalreporter.section("golden files: largest error relative to its tolerance")
        for line in sorted(lines, key=lambda line: line[7:]):
            terminalreporter.write_line(line)
