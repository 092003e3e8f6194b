"""The run folder: which stages it holds, whether it belongs to this config, and who is writing to it.

``<workdir>/config.json``, ``<workdir>/<nn>_<stage>/{checkpoints/, metrics.jsonl, result.json}``; a finished stage has
``metrics.csv`` and, where its weights are quantized, ``weights.npz`` too (of several seeds ``weights_seed_<n>.npz``,
one for each), one that is trained on a folder of pictures ``images.json``. Nothing here deletes anything: what is in
the way is moved aside to ``<name>.old-<N>``. Of several processes the first one writes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bnn_jax
from bnn_jax import files, hosts, run_files
from bnn_jax.errors import CheckpointError, UserError
from bnn_jax.experiment.config import LOCATION_KEYS, SHARED, flatten, keys_of
from bnn_jax.stages import Stage, differing_keys, parse_choice, to_json

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")
MOST_KEYS_SHOWN = 5
# A file system in a network may show what another host wrote some seconds later.
SHARED_SECONDS = 30.0
CONFIG, CHECKPOINTS, METRICS, RESULT = "config.json", "checkpoints", "metrics.jsonl", "result.json"
IMAGES, METRICS_TABLE, WEIGHTS = "images.json", "metrics.csv", "weights.npz"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where the files of a run lie.

    Attributes:
      path: the folder.
      stages: the chain.
    """

    path: Path
    stages: tuple[Stage, ...]

    @property
    def names(self) -> list[str]:
        """Names of the stages, in their order."""
        return [stage.name for stage in self.stages]

    def stage(self, name: str) -> Path:
        """'<run folder>/<nn>_<stage>'."""
        return self.path / f"{self.names.index(name):02d}_{name}"

    def checkpoints(self, name: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.stage(name) / CHECKPOINTS

    def metrics(self, name: str) -> Path:
        """The record of a stage, epoch by epoch."""
        return self.stage(name) / METRICS

    def result(self, name: str) -> dict[str, Any] | None:
        """``result.json`` of a stage; None if it is not finished.

        Raises:
          UserError: the file is damaged.
        """
        stage = self.stages[self.names.index(name)]
        trained = run_files.WINNER if stage.trains_winner else run_files.TRAINED
        return run_files.read(self.stage(name) / RESULT, run_files.SEARCHED if stage.kind == "search" else trained)

    def images(self, name: str) -> dict[str, Any] | None:
        """Classes and normalisation of the pictures that a stage was trained on; None where they are the data set's.

        Raises:
          UserError: the file is damaged.
        """
        return run_files.read(self.stage(name) / IMAGES, run_files.IMAGES)

    def fold(self, search: str, fold: int) -> Path:
        """The file with what a search found on a fold."""
        return self.stage(search) / f"fold_{fold:02d}.json"

    def winner(self, choice: str, path: Any) -> dict[str, Any]:
        """What a search found on the fold that a choice, 'search:NAME#I', names.

        Args:
          choice: which fold.
          path: shape of a path of the network, see ``run_files.vector``.

        Raises:
          CheckpointError: that fold was not searched.
          UserError: the file is damaged.
        """
        name, fold = parse_choice(choice)
        result = run_files.read(self.fold(name, fold), run_files.fold(fold, path))
        if result is None:
            raise CheckpointError(f"{self.fold(name, fold)} is missing; train stage {name} first")
        return result

    def last_saved(self) -> str:
        """Where a run goes on that ends here, as far as can be seen."""
        for name in reversed(self.names):
            if self.result(name) is not None:
                return f"the end of stage {name}"
            steps = [int(path.name) for path in self.checkpoints(name).glob("*") if path.name.isdecimal()]
            if steps:
                return f"step {max(steps)} of stage {name}"
        return "the start"


def weights_file(seed: int | None) -> str:
    """Name of the file with the weights in use; None: there is one seed only."""
    return WEIGHTS if seed is None else f"{Path(WEIGHTS).stem}_seed_{seed}.npz"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file in one step: it is either the old one or the whole new one."""
    with files.replacing(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def claim(workdir: Path, config: Mapping[str, Any], stages: tuple[Stage, ...]) -> None:
    """Makes the folder this run's, or checks that it is. A folder without any stage's folder is taken over.

    Raises:
      UserError: the folder holds a run of another config (the differing keys are named).
    """
    path = workdir / CONFIG
    rows = _differences(path, config, stages)
    if rows and any(workdir.glob("[0-9][0-9]_*")):
        raise UserError(f"{_describe_differences(path, rows)}; choose another --workdir, or --fresh to move it aside")
    if rows or not path.exists():
        write_json(path, {**_content(config, stages), **provenance()})


def check_shared(workdir: Path) -> None:
    """Checks that a process sees the folder that the first process claimed.

    Raises:
      UserError: it does not.
    """
    written = hosts.from_first("claim", lambda: _read_config(workdir))
    end = time.monotonic() + SHARED_SECONDS
    while (seen := _read_config(workdir)) != written:
        if time.monotonic() > end:
            what = "is not there" if seen is None else "is another one"
            raise UserError(
                f"--workdir={workdir}: the {CONFIG} that process 0 wrote {what}; the folder must be on a file system "
                "that all hosts share"
            )
        time.sleep(0.2)


def _read_config(workdir: Path) -> dict[str, Any] | None:
    return run_files.read(workdir / CONFIG, run_files.CONFIG)


def check_owner(workdir: Path, config: Mapping[str, Any], stages: tuple[Stage, ...]) -> None:
    """Checks that what the folder holds, if anything, is of this config.

    Raises:
      UserError: it is of another config (the differing keys are named).
    """
    if rows := _differences(workdir / CONFIG, config, stages):
        raise UserError(f"{_describe_differences(workdir / CONFIG, rows)}; give the same config and overrides")


def _content(config: Mapping[str, Any], stages: tuple[Stage, ...]) -> dict[str, Any]:
    return {"config": to_json_config(config), "stages": [to_json(stage) for stage in stages]}


def _differences(path: Path, config: Mapping[str, Any], stages: tuple[Stage, ...]) -> list[str]:
    """Keys in which a run's config.json differs from a config, but for where and how it runs; none without a file."""
    existing = _read_config(path.parent)
    if existing is None:
        return []
    new = _content(config, stages)
    # A key that came later had its default's effect before.
    known = to_json_config({name: key.default for name, key in keys_of((*SHARED, config["method"])).items()})
    flat_old, flat_new = (
        {f"config.{key}": value for key, value in {**known, **flatten(config)}.items() if key not in LOCATION_KEYS}
        for config in (existing["config"], new["config"])
    )
    return differing_keys(flat_old, flat_new) or differing_keys(existing["stages"], new["stages"], "stages")


def _describe_differences(path: Path, rows: list[str]) -> str:
    more = f" and {len(rows) - MOST_KEYS_SHOWN} more" if len(rows) > MOST_KEYS_SHOWN else ""
    return f"{path.parent} holds a run of another config: {', '.join(rows[:MOST_KEYS_SHOWN])}{more}"


def to_json_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A validated config in the values JSON gives back (lists for tuples)."""
    return json.loads(json.dumps(config))


def move_aside(path: Path) -> Path | None:
    """Renames a file or folder to ``<name>.old-<N>`` with the first free N; None where there is nothing.

    Raises:
      UserError: the path is '.' or '/', which have no name to change.
    """
    if not path.exists():
        return None
    if not path.name:
        raise UserError(f"{path} cannot be moved aside; name the folder itself")
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(target)
    return target


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Creates the folder and holds its lock, so that no second process trains into it.

    Raises:
      UserError: another process holds it, or the folder cannot be made or written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {describe_os_error(error)}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--workdir={workdir}: another process is training in this folder") from None
        yield


def describe_os_error(error: OSError) -> str:
    """One phrase for an error of the file system."""
    if error.errno == errno.ENOSPC:
        return "no space left on the device"
    return (error.strerror or str(error)).lower()


def provenance() -> dict[str, Any]:
    """Library versions and git commit of this installation."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "bnn_jax": bnn_jax.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"versions": versions, "git_commit": git_commit()}


def git_commit() -> str | None:
    """Commit of the source, with '-dirty' if files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent

    def run(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        # Installed into the environment of some other project, the files lie in that one's checkout, untracked.
        run("ls-files", "--error-unmatch", Path(__file__).name)
        commit = run("rev-parse", "HEAD")
        return f"{commit}-dirty" if run("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None
