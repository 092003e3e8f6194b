"""Checkpoints of a training stage: saved in the background, kept by a policy, verified when restored.

One folder per step, written by Orbax with one item per collection of the ``TrainState``, so that evaluation, a teacher
or the next stage reads the variables alone. Orbax makes a save atomic (a step folder gets its name when it is complete)
but stores no hash of the content and casts types silently; the item ``meta`` therefore holds, for every other item, a
table of its leaves and a SHA-256 of their bytes, and a SHA-256 of itself.

Folders beside the steps, all left by an interruption, are dealt with when the store is next opened for writing:
``N.orbax-checkpoint-tmp`` (an unfinished save) and ``steps.deleted`` (no longer kept) are removed, ``N.replaced`` is
removed or takes its old name back. ``N.damaged`` is a step that failed verification; it stays, for a person to look at.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bnn_jax import hosts
from bnn_jax.errors import CheckpointError
from bnn_jax.storage import content_hash
from bnn_jax.training.state import TrainState

ITEMS = (
    "params",
    "batch_stats",
    "quant_state",
    "knobs",
    "opt_state",
    "objective_state",
    "metric_sums",
    "rng",
    "step",
)
VARIABLES = ("params", "batch_stats", "quant_state", "knobs")
FORMAT = 1

# Folders beside the steps; nothing of another name is ever touched.
_STEP = re.compile(r"0|[1-9][0-9]*")
_TEMPORARY = re.compile(r"[0-9]+\.orbax-checkpoint-tmp.*")
_REPLACED = re.compile(r"([0-9]+)\.replaced")
_DELETED = "steps.deleted"

Which = Literal["last", "best"] | int

_LOG = logging.getLogger(__name__)


class _Damage(Exception):
    """What is wrong with a step's folder."""


@dataclasses.dataclass(frozen=True)
class _Header:
    """The verified content of a step's item ``meta``.

    Attributes:
      step: optimiser steps done.
      meta: what the caller of ``save`` handed over.
      metrics: of the finished epoch, or None in the middle of one.
      tables: leaves of each saved item.
      hashes: content hash of each saved item.
    """

    step: int
    meta: dict[str, Any]
    metrics: dict[str, float] | None
    tables: dict[str, content_hash.LeafTable]
    hashes: dict[str, str]

    @property
    def rank(self) -> tuple[float, int] | None:
        """Larger is better; of equal scores the earlier step is the better one. None without metrics."""
        return None if self.metrics is None else (self.metrics["selection_top1"], -self.step)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with their own hash."""
        content = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))
        return {**content, "sha256": _json_hash(content)}

    @classmethod
    def from_json(cls, value: Any) -> "_Header":
        """Reads what ``to_json`` wrote.

        Raises:
          _Damage: the content does not have its hash, or is of another format.
        """
        if not isinstance(value, dict) or value.pop("sha256", None) != _json_hash(value):
            raise _Damage("meta does not match its hash")
        if value.pop("format", None) != FORMAT:
            raise _Damage("meta is of another version of this program")
        tables = {
            name: {path: (dtype, tuple(shape)) for path, (dtype, shape) in table.items()}
            for name, table in value.pop("tables").items()
        }
        return cls(tables=tables, **value)


class _PreservationPolicy:
    """Keeps the last two and the best step, by the metrics of verified headers.

    Orbax's own bookkeeping reads metrics from a file without a hash, where a flipped byte makes another step the best.
    """

    def __init__(self, rank_of: Callable[[int], tuple[float, int] | None]):
        from orbax.checkpoint import checkpoint_managers

        self._rank_of = rank_of
        best = checkpoint_managers.BestN(get_metric_fn=lambda rank: rank, n=1, keep_checkpoints_without_metrics=False)
        self._policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(2), best])

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """One answer per checkpoint, as Orbax asks for them."""
        ranked = [dataclasses.replace(info, metrics=self._rank_of(info.step)) for info in checkpoints]
        return self._policy.should_preserve(ranked, context=context)


class CheckpointStore:
    """The checkpoints of one stage; a context manager, since a save goes on in the background.

    What is kept, and why: ``LatestN(2)``, because the newest may turn out damaged and one good checkpoint must stand
    behind it; ``BestN(1)``, because the best epoch would otherwise be gone as soon as two later ones are saved; and
    ``keep_checkpoints_without_metrics=False``, because Orbax otherwise keeps every save made in the middle of an epoch
    for ever. (``best_fn`` with ``max_to_keep`` keeps the best ones only and deletes the latest, from which training has
    to go on.) Orbax gives a tie to the later step, so the step takes part in the ranking: the earlier of two equal
    epochs stays the best.

    A save copies the state to the host and returns; hashing, writing and deleting happen in one background thread,
    whose error is raised by the next ``save`` or ``wait`` or by leaving the context. Orbax's own asynchronous mode
    would have to wait for the hashes before it starts, and after a failed save it no longer knows the steps it meant
    to delete.

    Of several processes the first one alone writes: every process holds the whole state. Its background thread never
    waits for the others, so no barrier overtakes a training step; what is saved, which step is restored, it decides for
    all (``from_first``), and the folder must be one that all of them see.

    A process that is killed leaves the store usable at every moment: step folders appear, are replaced and go by a
    rename. A process that reads while another trains opens the store ``read_only``; two may not write to one store.
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
        self._damage: dict[int, str] = {}
        self._manager: Any = None
        self._worker: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future[None]] | None = None
        if self._writes:
            try:
                self._clean_up()
            except OSError as error:
                raise CheckpointError(f"{self._directory}: {_reason(error)}") from error

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
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            # The error that ends the context is the one to show.
            _LOG.warning("%s", failure)

    def close(self) -> None:
        """Waits for the save under way and ends the background thread.

        Raises:
          CheckpointError: that save failed.
        """
        try:
            self.wait()
        finally:
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None
            self._close_manager()

    # ---- saving

    def save(self, state: TrainState, *, meta: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Saves the state under its step; returns when it is copied to the host.

        Where the step is saved already, a save with metrics replaces it, as does one without if the saved one has none
        either; a save without metrics never replaces one with metrics (an epoch's end saved just before).

        Args:
          state: state; its arrays may be donated right after.
          meta: JSON values that ``restore`` gives back.
          metrics: metrics of the epoch that ends here, with 'selection_top1', by which the best is chosen; None in the
            middle of an epoch: such a checkpoint is kept only while it is one of the last two.

        Raises:
          CheckpointError: the save before this one failed.
          ValueError: the store is read-only, or state or metrics cannot be saved.
        """
        if self._read_only:
            raise ValueError(f"{self._directory}: opened read-only")
        metrics = _checked_metrics(metrics)
        if not self._writes:
            return
        self.wait()
        items = {name: getattr(state, name) for name in ITEMS if jax.tree.leaves(getattr(state, name))}
        for name, tree in items.items():
            content_hash.check_storable(name, tree)
        tables = {name: content_hash.leaf_table(name, tree) for name, tree in items.items()}
        host = {name: content_hash.copy_to_host(tree) for name, tree in items.items()}
        # States of several seeds, stacked for vmap, have one step per seed, all equal.
        step = int(host["step"].max())
        header = _Header(step, json.loads(json.dumps(meta)), metrics, tables, {})
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
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
            failure = self._save_failure(step, error)
            if failure is None:
                raise
            raise failure from error
        finally:
            if future.done():
                self._pending = None

    def _write(self, header: _Header, host: dict[str, Any]) -> None:
        """Hashes and writes one checkpoint; runs in the background thread."""
        if self._keeps_saved_one(header):
            return
        hashes = {name: content_hash.content_hash(header.tables[name], tree) for name, tree in host.items()}
        header = dataclasses.replace(header, hashes=hashes)
        try:
            self._move_aside(header.step)
            self._orbax_save(header, host)
        except BaseException:
            # Orbax's list of steps is no longer that of the folder.
            self._close_manager()
            _join_orbax_threads()
            self._clean_up()
            raise
        self._clean_up()

    def _orbax_save(self, header: _Header, host: dict[str, Any]) -> None:
        ocp = _orbax()
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_PreservationPolicy(self._rank),
                enable_async_checkpointing=False,
                lightweight_initialize=True,
                # Renamed at once and removed later: a step that is half deleted is never seen as a step.
                todelete_subdir=_DELETED,
                multiprocessing_options=_alone(),
                # Orbax makes no folder for some of several processes alone.
                create=False,
            )
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._manager.reload()
        items = {name: ocp.args.StandardSave(_as_tree(tree)) for name, tree in host.items()}
        arguments = ocp.args.Composite(meta=ocp.args.JsonSave(header.to_json()), **items)
        # force: without it Orbax skips, silently, a step that is not larger than all others.
        self._manager.save(header.step, args=arguments, force=True)

    def _keeps_saved_one(self, new: _Header) -> bool:
        """Whether the step is saved already and that one is to stay."""
        if new.metrics is not None or new.step in self._damage:
            return False
        saved = self._header(new.step)
        return saved is not None and saved.metrics is not None

    def _move_aside(self, step: int) -> None:
        """Renames damaged steps, which would count as kept ones, and the one that is about to be saved again."""
        damaged = [other for other in self._folders() if self._header(other) is None]
        for other in damaged:
            self._damage.pop(other, None)
        for other in damaged:
            self._folder(other).rename(_free_name(self._folder(other), "damaged"))
        if self._folder(step).exists():
            self._folder(step).rename(self._folder(step).with_name(f"{step}.replaced"))

    def _clean_up(self) -> None:
        """Removes what no one needs; gives a step its name back if its replacement was never completed."""
        if self._directory.is_dir():
            for path in sorted(self._directory.iterdir()):
                replaced = _REPLACED.fullmatch(path.name)
                if replaced and not (original := path.with_name(replaced[1])).exists():
                    path.rename(original)
                elif replaced or _TEMPORARY.fullmatch(path.name) or path.name == _DELETED:
                    shutil.rmtree(path)

    def _close_manager(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _save_failure(self, step: int, error: Exception) -> CheckpointError | None:
        """The error to show for a failed save, or None if it is no fault of the disk."""
        last = max(self.steps(), default=None)
        good = "there is no good checkpoint" if last is None else f"the last good checkpoint is step {last}"
        if _is_no_space(error):
            return CheckpointError(f"no space left on {self._directory} while step {step} was saved; {good}")
        if isinstance(error, OSError):
            return CheckpointError(f"{self._directory}: step {step} could not be saved: {_reason(error)}; {good}")
        return None

    # ---- queries

    def steps(self) -> list[int]:
        """Steps saved completely and not known to be damaged, ascending; a save under way is not among them."""
        return [step for step in self._folders() if self._header(step) is not None]

    def latest_step(self) -> int | None:
        """The newest of ``steps`` on the first process; None where nothing was ever saved.

        Raises:
          CheckpointError: there are checkpoints and all are damaged, so that nobody takes the stage for a new one.
        """

        def decide() -> int | None:
            steps = self.steps()
            if not steps and self._folders():
                raise self._all_damaged()
            return max(steps, default=None)

        return hosts.from_first("latest step", decide)

    def best_step(self) -> int | None:
        """The one of ``steps`` with the highest selection_top1, the earliest of equal ones; None without metrics."""
        ranks = [rank for step in self._folders() if (rank := self._rank(step)) is not None]
        return -max(ranks)[1] if ranks else None

    def metrics(self, step: int) -> dict[str, float] | None:
        """The metrics that ``step`` was saved with; None if there were none or the step is not there or is damaged."""
        header = self._header(step)
        return None if header is None else header.metrics

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _folders(self) -> list[int]:
        """Steps that have a folder, good or damaged, ascending."""
        return _step_folders(self._directory)

    def _header(self, step: int) -> _Header | None:
        """The step's header, or None if the step is not there or known to be damaged."""
        try:
            return None if step in self._damage else self._read_header(step)
        except _Damage:
            return None

    def _rank(self, step: int) -> tuple[float, int] | None:
        header = self._header(step)
        return None if header is None else header.rank

    def _read_header(self, step: int) -> _Header:
        """Reads and verifies the item ``meta``.

        Raises:
          _Damage: it is missing or does not match its hash.
        """
        with _damage_of("meta"):
            value = _orbax().JsonCheckpointHandler().restore(_path(self._folder(step) / "meta"))
            header = _Header.from_json(value)
        if header.step != step:
            raise _Damage(f"it is a copy of step {header.step}")
        return header

    # ---- restoring

    def restore(self, target: TrainState, *, which: Which = "last") -> tuple[TrainState, dict[str, Any]]:
        """Restores a whole state.

        Args:
          target: state of the same structure, concrete or abstract (``jax.eval_shape``). Arrays go to the devices of
            the target's shardings where it has them, else to the default device.
          which: 'last' (a damaged newest one gives a warning and the one before it), 'best', or a step.

        Returns:
          The state, in buffers of its own, and the ``meta`` it was saved with.

        Raises:
          CheckpointError: there is none, it is damaged, or it is of another network or training set-up.
        """
        items, meta = self._restore({name: getattr(target, name) for name in ITEMS}, which)
        return target.replace(**items), meta

    def restore_variables(
        self, target: dict[str, Any], *, which: Which = "last"
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores the collections a network is applied with, without optimiser and the rest.

        Args:
          target: any of ``VARIABLES``, concrete or abstract. A collection that is not in it is not read;
            one that is {} must be empty in the checkpoint too.
          which: as in ``restore``.

        Returns:
          The collections of ``target`` and the ``meta`` of the checkpoint.

        Raises:
          CheckpointError: there is none, it is damaged, or it is of another network.
          ValueError: ``target`` has another key.
        """
        if unknown := target.keys() - set(VARIABLES):
            raise ValueError(f"collections {sorted(unknown)}: accepted are {', '.join(VARIABLES)}")
        return self._restore(target, which)

    def restore_items(self, target: dict[str, Any], *, which: Which = "last") -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores a part of the state, such as what the objectives collected.

        Args:
          target: any of the fields of ``TrainState``, concrete or abstract; the others are not read.
          which: as in ``restore``.

        Returns:
          The fields of ``target`` and the ``meta`` of the checkpoint.

        Raises:
          CheckpointError: there is none, it is damaged, or it is of another network or training set-up.
          ValueError: ``target`` has another key.
        """
        if unknown := target.keys() - set(ITEMS):
            raise ValueError(f"items {sorted(unknown)}: accepted are {', '.join(ITEMS)}")
        return self._restore(target, which)

    def _restore(self, target: dict[str, Any], which: Which) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores the step that the first process found good; there before it is known to the others."""
        self.wait()
        found: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def decide() -> int:
            step, *content = self._restore_here(target, which)
            found.append((content[0], content[1]))
            return step

        step = hosts.from_first("restored step", decide)
        return found[0] if found else self._restore_here(target, step)[1:]

    def _restore_here(self, target: dict[str, Any], which: Which) -> tuple[int, dict[str, Any], dict[str, Any]]:
        for step in self._candidates(which):
            try:
                return step, *self._restore_step(step, target)
            except _Damage as damage:
                self._damage[step] = str(damage)
                if which != "last":
                    raise CheckpointError(f"{self._folder(step)}: damaged checkpoint: {damage}") from damage
                _LOG.warning("%s: damaged checkpoint, left out: %s", self._folder(step), damage)
        raise self._all_damaged()

    def _all_damaged(self) -> CheckpointError:
        steps = ", ".join(map(str, self._folders()))
        return CheckpointError(f"{self._directory}: all checkpoints (steps {steps}) are damaged")

    def _candidates(self, which: Which) -> list[int]:
        """Steps to try, in order."""
        folders = self._folders()
        if not folders:
            raise CheckpointError(f"{self._directory}: no checkpoint here")
        if which == "last":
            return folders[::-1]
        if which == "best":
            return [self._certainly_best(folders)]
        if which not in folders:
            raise CheckpointError(f"{self._directory}: no step {which}: there are {', '.join(map(str, folders))}")
        return [which]

    def _certainly_best(self, folders: list[int]) -> int:
        """The best step; an error if a step's metrics cannot be read, since that one may be the best."""
        ranks = []
        for step in folders:
            try:
                ranks.append(self._read_header(step).rank)
            except _Damage as damage:
                raise CheckpointError(f"{self._folder(step)}: damaged checkpoint: {damage}") from damage
        known = [rank for rank in ranks if rank is not None]
        if not known:
            raise CheckpointError(f"{self._directory}: no checkpoint of a finished epoch here")
        return -max(known)[1]

    def _restore_step(self, step: int, target: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Restores and verifies one step.

        Raises:
          _Damage: it cannot be read or has another content than was saved.
          CheckpointError: it has another structure than the target.
        """
        header = self._read_header(step)
        tables = {name: content_hash.leaf_table(name, tree) for name, tree in target.items()}
        self._check_structure(header, tables)
        host = {name: self._read_item(step, name, target[name]) for name in target if tables[name]}
        for name, tree in host.items():
            if content_hash.content_hash(tables[name], tree) != header.hashes[name]:
                raise _Damage(f"{name} does not match its hash")
        return {name: _to_devices(host.get(name), tree) for name, tree in target.items()}, header.meta

    def _read_item(self, step: int, name: str, target: Any) -> Any:
        """Reads one item as numpy arrays."""
        ocp = _orbax()
        like = content_hash.host_like(target)
        with _damage_of(name), _reader(ocp) as reader:
            arguments = ocp.args.StandardRestore(_as_tree(like))
            tree = reader.restore(_path(self._folder(step) / name), args=arguments)
        return tree if _as_tree(like) is like else tree["value"]

    def _check_structure(self, header: _Header, tables: dict[str, content_hash.LeafTable]) -> None:
        """Raises CheckpointError unless the saved leaves are those of the target."""
        found = {name: content_hash.differences(header.tables.get(name, {}), table) for name, table in tables.items()}
        phrases = [phrase for name in found for phrase in found[name]]
        if phrases:
            other_network = any(found.get(name) for name in VARIABLES)
            what = "network" if other_network else "optimiser, objective or random generator"
            more = f" (and {len(phrases) - 3} more)" if len(phrases) > 3 else ""
            shown = "; ".join(phrases[:3])
            raise CheckpointError(f"{self._folder(header.step)}: checkpoint of another {what}: {shown}{more}")


def describe(directory: Path) -> tuple[Path, int | None]:
    """Finds the store a user means by a folder.

    Args:
      directory: a stage's folder, its folder ``checkpoints``, or the folder of one step.

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
    if _STEP.fullmatch(directory.name) and (directory / "meta").is_dir():
        return directory.parent, int(directory.name)
    for folder in (directory, directory / "checkpoints"):
        if _step_folders(folder):
            return folder, None
    stages = sorted(path.parent.name for path in directory.glob("*/checkpoints") if _step_folders(path))
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
        raise CheckpointError(f"{directory}: {_reason(error)}") from error


def _checked_metrics(metrics: dict[str, float] | None) -> dict[str, float] | None:
    """Metrics as plain floats.

    Raises:
      ValueError: selection_top1 is missing or not finite, so that no best could be chosen.
    """
    if metrics is None:
        return None
    if not math.isfinite(metrics.get("selection_top1", math.nan)):
        raise ValueError(f"metrics {metrics}: selection_top1 must be there and finite")
    return {name: float(value) for name, value in metrics.items()}


def _json_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _as_tree(tree: Any) -> Any:
    """Orbax refuses a bare array as an item, so that one becomes {'value': array}."""
    return {"value": tree} if jax.tree_util.all_leaves([tree]) else tree


def _to_devices(host_tree: Any, target: Any) -> Any:
    """Puts numpy arrays where the target's arrays are, in buffers that nothing else refers to.

    Args:
      host_tree: the restored arrays; None if the target has no leaves.
      target: concrete or abstract arrays.
    """

    def put(leaf: jax.Array | jax.ShapeDtypeStruct, value: Any) -> jax.Array:
        # An array that was never assigned to devices must stay free to move to those of the others.
        sharding = leaf.sharding if getattr(leaf, "committed", True) else None
        if sharding is not None and not sharding.is_fully_addressable:
            # Devices of other processes: device_put refuses them, and each process has the same values.
            array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
        else:
            # jnp.array copies; device_put alone may keep the numpy memory, and one and the same for all devices.
            array = jnp.array(value) if sharding is None else jax.device_put(jnp.array(value), sharding)
        if content_hash.is_key(leaf):
            return jax.random.wrap_key_data(array, impl=content_hash.key_implementation(leaf))
        return array

    return target if host_tree is None else jax.tree.map(put, target, host_tree)


def _free_name(folder: Path, suffix: str) -> Path:
    """First of N.suffix, N.suffix-2, N.suffix-3, ... that does not exist."""
    names = [f"{folder.name}.{suffix}", *(f"{folder.name}.{suffix}-{count}" for count in range(2, 1000))]
    return next(path for name in names if not (path := folder.with_name(name)).exists())


def _reason(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk, or a used up quota, is behind an error; TensorStore wraps it in others, as text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _damage_of(name: str) -> Iterator[None]:
    """Turns whatever goes wrong while an item is read into ``_Damage``; damaged files raise errors of any type."""
    try:
        yield
    except (_Damage, MemoryError):
        raise
    except Exception as error:
        raise _Damage(f"{name} cannot be read: {_reason(error)}") from error


def _join_orbax_threads() -> None:
    """Waits until nobody writes any more.

    Orbax raises the error of the first item that fails while the threads of the other items go on: they would fill a
    folder that is just being removed, or that of the next save of the same step.
    """
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            # Orbax's own join raises the thread's error, which is raised already.
            threading.Thread.join(thread)


def _alone() -> Any:
    """Options by which Orbax waits for no other process, also where there are some."""
    index = jax.process_index()
    return _orbax().options.MultiprocessingOptions(primary_host=index, active_processes={index})


def _reader(ocp: Any) -> Any:
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    return ocp.Checkpointer(handler, multiprocessing_options=_alone())


def _path(path: Path) -> Any:
    """The path type that Orbax's handlers want."""
    from etils import epath

    return epath.Path(path)


class _OrbaxChatter(logging.Filter):
    """Drops what Orbax logs, tracebacks included: its errors are raised as well, and shown by us in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record to drop."""
        return "orbax" not in Path(record.pathname).parts


_ORBAX_CHATTER = _OrbaxChatter()


def _orbax() -> Any:
    """Orbax, imported at first use: it takes half a second and more."""
    import orbax.checkpoint

    # Adding the same filter again changes nothing.
    logging.getLogger("absl").addFilter(_ORBAX_CHATTER)
    return orbax.checkpoint
