"""The files of one checkpoint, by Orbax: one item per part of a state and ``meta`` for JSON values.

Orbax stores no hash of the content and casts types silently: ``checkpoint.py`` verifies what is read here.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

META = "meta"
# A task that TensorStore never ends must not keep the process.
WAIT_SECONDS = 60.0


class Damage(Exception):
    """What is wrong with the files of a checkpoint."""


def save(folder: Path, items: Mapping[str, Any], meta: Any) -> None:
    """Writes a checkpoint; the folder gets its name when it is complete.

    Args:
      folder: does not exist; the one it is in does.
      items: pytrees of numpy arrays by name.
      meta: JSON values.
    """
    ocp = _orbax()
    handlers = {name: ocp.StandardCheckpointHandler(multiprocessing_options=_alone()) for name in items}
    handlers[META] = ocp.JsonCheckpointHandler(multiprocessing_options=_alone())
    options = ocp.CompositeOptions(multiprocessing_options=_alone())
    handler = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
    arguments = {name: ocp.args.StandardSave(_as_tree(tree)) for name, tree in items.items()}
    arguments[META] = ocp.args.JsonSave(meta)
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as writer:
            writer.save(folder, args=ocp.args.Composite(**arguments))
    except BaseException:
        _join_writers()
        raise


def read_meta(folder: Path) -> Any:
    """The JSON values a checkpoint was saved with.

    Raises:
      Damage: they cannot be read.
    """
    from etils import epath

    with _damage_of(META):
        return _orbax().JsonCheckpointHandler().restore(epath.Path(folder / META))


def read_item(folder: Path, name: str, like: Any) -> Any:
    """One pytree of a checkpoint.

    Args:
      folder: of the checkpoint.
      name: of the item.
      like: numpy arrays of the structure, shapes and types that were saved.

    Raises:
      Damage: it cannot be read.
    """
    ocp = _orbax()
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    with _damage_of(name), ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
        tree = reader.restore(folder / name, args=ocp.args.StandardRestore(_as_tree(like)))
    return tree if _as_tree(like) is like else tree["value"]


def _as_tree(tree: Any) -> Any:
    """Orbax refuses a bare array as an item, so that one becomes {'value': array}."""
    return {"value": tree} if jax.tree_util.all_leaves([tree]) else tree


@contextlib.contextmanager
def _damage_of(name: str) -> Iterator[None]:
    """Turns whatever goes wrong while an item is read into ``Damage``; damaged files raise errors of any type."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise Damage(f"{name} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


# ---- Orbax among others


def _alone() -> Any:
    """Options by which Orbax waits for no other process, also where there are some."""
    index = jax.process_index()
    return _orbax().options.MultiprocessingOptions(primary_host=index, active_processes={index})


def _join_writers() -> None:
    """Waits until nobody writes any more.

    Orbax raises the error of the first item that fails while the threads of the other items go on: they would fill a
    folder that is just being removed, or that of the next save of the same step.
    """
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            # Orbax's own join raises the thread's error, which is raised already.
            threading.Thread.join(thread)


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that is closed only when its tasks are done.

    Orbax reads and writes the arrays of an item side by side in a loop of its own and closes it at the first error.
    TensorStore's threads, which still work for the other arrays, then find the loop closed, and print a traceback each,
    long after the error was shown in one line.
    """

    def close(self) -> None:
        """Waits for what was begun."""
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.wait(tasks, timeout=WAIT_SECONDS))
        super().close()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Prints nothing: of several arrays that fail, Orbax raises the first error and forgets the others."""


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    """Makes loops that are patient; all else is the default."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """A loop, as Orbax asks for one at every call."""
        return _PatientLoop()


class _Chatter(logging.Filter):
    """Drops what Orbax logs, tracebacks included: its errors are raised as well, and shown by us in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record to drop."""
        return "orbax" not in Path(record.pathname).parts


_CHATTER = _Chatter()


def _orbax() -> Any:
    """Orbax, imported at first use: it takes half a second and more."""
    import orbax.checkpoint

    # Adding the same filter again changes nothing.
    logging.getLogger("absl").addFilter(_CHATTER)
    # A policy that somebody else chose stays.
    if type(asyncio.get_event_loop_policy()) is asyncio.DefaultEventLoopPolicy:
        asyncio.set_event_loop_policy(_PatientLoops())
    return orbax.checkpoint
