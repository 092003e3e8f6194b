"""Checkpoints of a training stage: saved in the background, the last two and the best kept, verified when restored.

One folder per step with one item per part of the state, so that evaluation, a teacher or the next stage reads the
variables alone. The item ``meta`` holds, for every other item, a table of its leaves and a SHA-256 of their bytes, and
a SHA-256 of itself.

A step appears, is replaced and goes by a rename. What a killed process leaves beside the steps is dealt with when the
store is next opened for writing: ``N.new`` is complete and takes its name if there is no ``N``; ``N.deleted`` and
unfinished saves are removed. ``N.damaged`` is a step that failed verification; it stays, for a person to look at.
"""

import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

import jax

from bnn_jax import hosts
from bnn_jax.errors import CheckpointError
from bnn_jax.storage import content_hash, host_arrays, orbax_files
from bnn_jax.storage.content_hash import Header
from bnn_jax.storage.orbax_files import Damage, reason

# Folders beside the steps; nothing of another name is ever touched.
_STEP = re.compile(r"0|[1-9][0-9]*")
_NEW = re.compile(r"([0-9]+)\.new")
_LEFT = re.compile(r"[0-9]+\.(new|new\.orbax-checkpoint-tmp.*|deleted)")

Which = Literal["last", "best"] | int
# A mapping of names to pytrees, or a dataclass of them.
State = TypeVar("State")

_LOG = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one stage; a context manager, since a save goes on in the background.

    Kept are the last two steps, because the newest may turn out damaged and one good checkpoint must stand behind it,
    and the one with the best metrics, the earliest of equal ones.

    A save copies the state to the host and returns; hashing, writing and deleting happen in one background thread,
    whose error is raised by the next ``save`` or ``wait`` or by leaving the context.

    Of several processes the first one alone writes: every process holds the whole state. Its background thread never
    waits for the others, so no barrier overtakes a training step; what is saved, which step is restored, it decides for
    all (``from_first``), and the folder must be one that all of them see.

    A process that reads while another trains opens the store ``read_only``; two may not write to one store.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        """Opens a store; for writing, cleans up what an interrupted process left.

        Args:
          directory: folder that holds (or will hold) one folder per step.
          read_only: write and delete nothing.

        Raises:
          CheckpointError: the folder cannot be cleaned up.
        """
        self._directory = Path(directory).absolute()
        self._read_only = read_only
        self._writes = not read_only and hosts.is_first()
        self._damage: dict[int, Damage] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        if self._writes:
            try:
                self._clean_up()
            except OSError as error:
                raise CheckpointError(f"{self._directory}: {reason(error)}") from error

    @property
    def directory(self) -> Path:
        """Folder that holds one folder per step."""
        return self._directory

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            # The error that ends the context is the one to show.
            _LOG.warning("%s", failure)
        finally:
            self._worker.shutdown()

    # ---- saving

    def save(self, state: Any, *, meta: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Saves the state under its step; returns when it is copied to the host.

        Where the step is saved already, it is replaced, except that a save without metrics never replaces one with
        metrics (an epoch's end saved just before).

        Args:
          state: mapping of names to pytrees, or a dataclass of them, with the number of steps done under ``step``; its
            arrays may be donated right after.
          meta: JSON values that ``restore`` gives back.
          metrics: metrics of the epoch that ends here, with 'selection_top1', by which the best is chosen; None in the
            middle of an epoch: such a checkpoint is kept only while it is one of the last two.

        Raises:
          CheckpointError: the save before this one failed.
          ValueError: the store is read-only, or metrics cannot rank the checkpoint.
        """
        if self._read_only:
            raise ValueError(f"{self._directory}: opened read-only")
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            if not math.isfinite(metrics.get("selection_top1", math.nan)):
                raise ValueError(f"metrics {metrics}: selection_top1 must be there and finite")
        if not self._writes:
            return
        self.wait()
        items = {name: tree for name, tree in _named(state).items() if jax.tree.leaves(tree)}
        tables = {name: content_hash.leaf_table(name, tree) for name, tree in items.items()}
        host = {name: host_arrays.copy_to_host(tree) for name, tree in items.items()}
        # States of several seeds, stacked for vmap, have one step per seed, all equal.
        step = int(host["step"].max())
        header = Header(step, json.loads(json.dumps(meta)), metrics, tables, {})
        self._pending = (step, self._worker.submit(self._write, header, host))

    def wait(self) -> None:
        """Waits until the save under way, if any, is complete.

        Raises:
          CheckpointError: it failed; the message names the last good checkpoint.
        """
        if self._pending is None:
            return
        step, future = self._pending
        try:
            future.result()
        except Exception as error:
            full = _is_no_space(error)
            if not full and not isinstance(error, OSError):
                raise
            last = max(self.steps(), default=None)
            good = "there is no good checkpoint" if last is None else f"the last good checkpoint is step {last}"
            what = f"no space left on {self._directory} while step {step} was saved"
            if not full:
                what = f"{self._directory}: step {step} could not be saved: {reason(error)}"
            raise CheckpointError(f"{what}; {good}") from error
        finally:
            if future.done():
                self._pending = None

    def _write(self, header: Header, host: dict[str, Any]) -> None:
        """Hashes and writes one checkpoint; runs in the background thread."""
        saved = self._headers().get(header.step)
        if header.metrics is None and isinstance(saved, Header) and saved.metrics is not None:
            return
        hashes = {name: content_hash.content_hash(header.tables[name], tree) for name, tree in host.items()}
        new = self._directory / f"{header.step}.new"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            orbax_files.save(new, host, dataclasses.replace(header, hashes=hashes).to_json())
            self._put_in_place(new, header.step)
        finally:
            self._clean_up()

    def _put_in_place(self, new: Path, step: int) -> None:
        """Gives a complete checkpoint its name, and takes theirs from damaged ones and from those not kept."""
        for other, header in self._headers().items():
            if isinstance(header, Damage):
                shutil.rmtree(self._directory / f"{other}.damaged", ignore_errors=True)
                self._folder(other).rename(self._directory / f"{other}.damaged")
                self._damage.pop(other, None)
        if self._folder(step).exists():
            self._delete(step)
        new.rename(self._folder(step))
        steps = self.steps()
        for other in set(steps) - {*steps[-2:], self.best_step()}:
            self._delete(other)

    def _delete(self, step: int) -> None:
        """Renames a step that ``_clean_up`` is to remove: one that is half removed is never seen as a step."""
        self._folder(step).rename(self._directory / f"{step}.deleted")

    def _clean_up(self) -> None:
        """Removes what no one needs; gives a complete checkpoint its name where that is free."""
        if not self._directory.is_dir():
            return
        for path in sorted(self._directory.iterdir()):
            new = _NEW.fullmatch(path.name)
            if new and not (step := path.with_name(new[1])).exists():
                path.rename(step)
            elif _LEFT.fullmatch(path.name):
                shutil.rmtree(path)

    # ---- queries

    def steps(self) -> list[int]:
        """Steps saved completely and not known to be damaged, ascending; a save under way is not among them."""
        return [step for step, header in self._headers().items() if isinstance(header, Header)]

    def latest_step(self) -> int | None:
        """The newest of ``steps`` on the first process; None where nothing was ever saved.

        Raises:
          CheckpointError: there are checkpoints and all are damaged, so that nobody takes the stage for a new one.
        """

        def decide() -> int | None:
            steps = self.steps()
            if not steps and self._headers():
                raise self._all_damaged()
            return max(steps, default=None)

        return hosts.from_first("latest step", decide)

    def best_step(self) -> int | None:
        """The one of ``steps`` with the highest selection_top1, the earliest of equal ones; None without metrics."""
        headers = {step: header for step, header in self._headers().items() if isinstance(header, Header)}
        scores = {step: header.metrics["selection_top1"] for step, header in headers.items() if header.metrics}
        return max(scores, key=lambda step: (scores[step], -step), default=None)

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _headers(self) -> dict[int, Header | Damage]:
        """The verified header of each step that has a folder, or what is wrong with the step, ascending."""
        headers: dict[int, Header | Damage] = {}
        for step in _step_folders(self._directory):
            try:
                headers[step] = self._damage.get(step) or Header.read(self._folder(step))
            except Damage as damage:
                headers[step] = damage
        return headers

    # ---- restoring

    def restore(self, target: State, *, which: Which = "last") -> tuple[State, dict[str, Any]]:
        """Restores a state, or those parts of it that the target names; the others are not read.

        Args:
          target: what was saved, or a mapping of some of its names, concrete or abstract (``jax.eval_shape``). Arrays
            go to the devices of the target's shardings where it has them, else to the default device. A part that is
            {} must be empty in the checkpoint too.
          which: 'last' (a damaged newest one gives a warning and the one before it), 'best', or a step.

        Returns:
          The content in the structure of the target, in buffers of its own, and the ``meta`` it was saved with.

        Raises:
          CheckpointError: there is none, it is damaged, or it is of another network or training set-up.
        """
        self.wait()
        wanted = _named(target)
        found: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def decide() -> int:
            step, content = self._restore(wanted, which)
            found.append(content)
            return step

        # What the first process has found good is there before its number is known to the others.
        step = hosts.from_first("restored step", decide)
        items, meta = found[0] if found else self._restore(wanted, step)[1]
        restored = items if isinstance(target, Mapping) else dataclasses.replace(cast(Any, target), **items)
        return cast(State, restored), meta

    def _restore(self, target: dict[str, Any], which: Which) -> tuple[int, tuple[dict[str, Any], dict[str, Any]]]:
        """The step that was restored; its items and ``meta``."""
        headers = self._headers()
        if not headers:
            raise CheckpointError(f"{self._directory}: no checkpoint here")
        if which == "best":
            which = self._certainly_best(headers)
        elif which != "last" and which not in headers:
            raise CheckpointError(f"{self._directory}: no step {which}: there are {', '.join(map(str, headers))}")
        for step in reversed(headers) if which == "last" else [which]:
            try:
                return step, self._restore_step(step, headers[step], target)
            except Damage as damage:
                if which != "last":
                    raise self._damaged(step, damage) from damage
                self._damage[step] = damage
                _LOG.warning("%s: damaged checkpoint, left out: %s", self._folder(step), damage)
        raise self._all_damaged()

    def _damaged(self, step: int, damage: Damage) -> CheckpointError:
        return CheckpointError(f"{self._folder(step)}: damaged checkpoint: {damage}")

    def _all_damaged(self) -> CheckpointError:
        steps = ", ".join(map(str, self._headers()))
        return CheckpointError(f"{self._directory}: all checkpoints (steps {steps}) are damaged")

    def _certainly_best(self, headers: Mapping[int, Header | Damage]) -> int:
        """The best step; an error if a step's metrics cannot be read, since that one may be the best."""
        for step, header in headers.items():
            if isinstance(header, Damage):
                raise self._damaged(step, header)
        best = self.best_step()
        if best is None:
            raise CheckpointError(f"{self._directory}: no checkpoint of a finished epoch here")
        return best

    def _restore_step(
        self, step: int, header: Header | Damage, target: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores and verifies one step.

        Raises:
          Damage: it cannot be read or has another content than was saved.
          CheckpointError: it has another structure than the target.
        """
        if isinstance(header, Damage):
            raise header
        folder = self._folder(step)
        tables = {name: content_hash.leaf_table(name, tree) for name, tree in target.items()}
        header.check_structure(folder, tables)
        restored = dict(target)
        for name in target:
            if tables[name]:
                host = orbax_files.read_item(folder, name, host_arrays.host_like(target[name]))
                if content_hash.content_hash(tables[name], host) != header.hashes[name]:
                    raise Damage(f"{name} does not match its hash")
                restored[name] = host_arrays.to_devices(host, target[name])
        return restored, header.meta


def describe(directory: Path) -> tuple[Path, int | None]:
    """Finds the store a user means by a folder.

    Args:
      directory: a stage's folder, its folder ``checkpoints``, the folder of one step, or a run of one stage.

    Returns:
      The folder to open as ``CheckpointStore``, and the step if one was named, else None.

    Raises:
      CheckpointError: the folder is none of these.
    """
    directory = Path(directory).absolute()
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such folder")
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: a file; accepted is the folder of a stage, of its checkpoints or of one step"
        )
    if _STEP.fullmatch(directory.name) and (directory / orbax_files.META).is_dir():
        return directory.parent, int(directory.name)
    for folder in (directory, directory / "checkpoints"):
        if _step_folders(folder):
            return folder, None
    stages = sorted(path.parent.name for path in directory.glob("*/checkpoints") if _step_folders(path))
    if len(stages) == 1:
        return directory / stages[0] / "checkpoints", None
    if stages:
        raise CheckpointError(f"{directory}: a run of several stages; name the folder of one: {', '.join(stages)}")
    raise CheckpointError(f"{directory}: no checkpoint here; accepted is the folder of a stage or of one step")


def _step_folders(directory: Path) -> list[int]:
    """Steps that have a folder, ascending; none if there is no such directory."""
    try:
        if not directory.is_dir():
            return []
        return sorted(int(path.name) for path in directory.iterdir() if _STEP.fullmatch(path.name) and path.is_dir())
    except OSError as error:
        raise CheckpointError(f"{directory}: {reason(error)}") from error


def _named(state: Any) -> dict[str, Any]:
    """The parts of a mapping or a dataclass by name."""
    if isinstance(state, Mapping):
        return dict(state)
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk, or a used up quota, is behind an error; TensorStore wraps it in others, as text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False
