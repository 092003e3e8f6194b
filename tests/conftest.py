"""Set-up of every test: JAX on the CPU, a persistent compilation cache, and the folder of the golden files."""

import contextlib
import hashlib
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Generator

import pytest

TESTS_RUN = pytest.StashKey[int]()
ROOT = pathlib.Path(__file__).resolve().parents[1]
# Tests of whole runs and networks; most of their time is compiling, which takes a third of it without optimisation.
WHOLE_RUNS = {ROOT / "tests" / name for name in ("integration", "benchmarks", "deploy", "notebooks_test.py")}
OPTIMIZATION = "JAX_DISABLE_MOST_OPTIMIZATIONS"
OPTIMIZATION_CHOSEN = OPTIMIZATION in os.environ


def cache_folder() -> pathlib.Path:
    """Where compiled programs are kept for the next session, of this processor alone; jax knows versions and flags."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    processor = hashlib.sha256("\n".join([platform.platform(), *sorted(features)]).encode()).hexdigest()[:12]
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "bnn_jax" / f"xla-{processor}"


# Environment variables rather than jax.config: collecting tests then needs no import of jax, and programs the tests
# start (launch.py) run under the same settings. A value that is already set wins.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache_folder()),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # An array with fewer axes than its partner is a mistake more often than an intention.
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}.items():
    os.environ.setdefault(name, value)


# jax keeps the last 8192 programs of a process and stops counting when they are that many (`_cache_size` is then 0, and
# calls take a longer way). The tests need about four each.
TESTS_BETWEEN_CLEARINGS = 500


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Lets jax compile as for users, but quickly in tests of whole runs."""
    quick = "false" if WHOLE_RUNS.isdisjoint((item.path, *item.path.parents)) else "true"
    if os.environ.get(OPTIMIZATION) != quick and not OPTIMIZATION_CHOSEN:
        # Processes that the test starts read the variable.
        os.environ[OPTIMIZATION] = quick
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_disable_most_optimizations", quick == "true")
            sys.modules["jax"].clear_caches()
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets compiled programs at the end of a file, once enough tests have run; what is needed again is on disk."""
    count = item.config.stash.get(TESTS_RUN, 0) + 1
    end_of_file = nextitem is None or nextitem.path != item.path
    if end_of_file and count >= TESTS_BETWEEN_CLEARINGS and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        count = 0
    item.config.stash[TESTS_RUN] = count


@contextlib.contextmanager
def mounted_disk(folder: pathlib.Path, megabytes: int) -> Generator[pathlib.Path, None, None]:
    """A file system of a few megabytes in ``folder``; the test is skipped where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


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
