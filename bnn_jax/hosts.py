"""Several processes that train together: how they find each other, share decisions and end.

The first process decides and writes; the others learn what it decided (``from_first``) and read what it wrote. These
messages go through the coordination service of ``jax.distributed``, not through the devices, so that they never wait
for a training step. On one process every function here is trivial, and nothing is started.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from bnn_jax.errors import UserError

Value = TypeVar("Value")

POLL_SECONDS = 0.3
# How long a process that fails lets the first one speak for all, and how long the first waits for the others to end.
FAILURE_SECONDS = 1.0
ACKNOWLEDGE_SECONDS = 10.0
# One question to the coordination service; asked again until there is an answer or the service is gone.
QUESTION_SECONDS = 60
# What errors of a connection to another process contain, whoever raises them.
CONNECTION_PHRASES = (
    "gloo",
    "nccl",
    "connection closed",
    "connection reset",
    "connection refused",
    "unavailable:",
    "deadline_exceeded",
    "coordination",
    "heartbeat",
)


@dataclasses.dataclass(frozen=True)
class Peers:
    """How to join the other processes.

    Attributes:
      coordinator: 'HOST:PORT' of the first process; None leaves it and the next two to jax.
      count: number of processes; None if jax finds out.
      index: number of this one, from 0; None if jax finds out.
      heartbeat_seconds: silence after which a process counts as lost.
      connect_seconds: how long to wait for the others at the start.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    heartbeat_seconds: int = 100
    connect_seconds: int = 300


@dataclasses.dataclass
class _Group:
    """This process among the others.

    Attributes:
      index: number of this process.
      count: number of processes.
      questions: decisions shared so far, the same number everywhere.
      deciding: whether the first process is inside of a decision.
      saved: tells what is saved, for the message about a lost process.
      ending: set when the process ends by itself.
      watch: the thread that looks for a failure elsewhere.
    """

    index: int = 0
    count: int = 1
    questions: int = 0
    deciding: bool = False
    saved: Callable[[], str] = lambda: "the last checkpoint"
    ending: threading.Event = dataclasses.field(default_factory=threading.Event)
    watch: threading.Thread | None = None


_group = _Group()


def is_first() -> bool:
    """Whether this is the process that decides, writes and prints."""
    return _group.index == 0


def index() -> int:
    """Number of this process, from 0."""
    return _group.index


def count() -> int:
    """Number of processes."""
    return _group.count


# ---- finding each other


def peers(
    *, coordinator: str | None, count: int | None, index: int | None, heartbeat_seconds: int, connect_seconds: int
) -> Peers | None:
    """Checks flags that name the other processes.

    Returns:
      The peers, or None if no flag names any.

    Raises:
      UserError: a flag is missing, or has a value that cannot be.
    """
    for name, value in (("heartbeat_seconds", heartbeat_seconds), ("connect_seconds", connect_seconds)):
        if value < 1:
            raise UserError(f"--{name}={value}: accepted are whole numbers from 1")
    given = {"coordinator": coordinator, "num_processes": count, "process_id": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(f"{', '.join(missing)}: missing; --coordinator, --num_processes and --process_id go together")
    assert coordinator is not None and count is not None and index is not None  # none is missing
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator}: accepted is HOST:PORT of the first process, e.g. node1:55527")
    if count < 1:
        raise UserError(f"--num_processes={count}: accepted are whole numbers from 1")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index}: accepted are 0 to {count - 1} with --num_processes={count}")
    return Peers(coordinator, count, index, heartbeat_seconds, connect_seconds)


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """Name of the launcher that started this process as one of several, or None.

    The variables are those by which jax detects it. Inside of a pod of Kubernetes jax asks the cluster, which needs
    the package ``kubernetes``; a pod that is not one of an indexed job (each pod of a JobSet is) is left alone.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    in_job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    if in_job and importlib.util.find_spec("kubernetes") is not None:
        return "Kubernetes"
    return None


def connect(peers: Peers) -> None:
    """Joins the other processes; before any use of a device.

    Raises:
      UserError: they cannot be joined.
    """
    import jax

    # Its handler would swallow a SIGTERM that comes before training; this library has one of its own.
    jax.config.update("jax_enable_preemption_service", False)
    where = peers.coordinator or "the coordinator that the launcher names"
    message = (
        f"process {'?' if peers.index is None else peers.index}: not all processes met at {where} within "
        f"{peers.connect_seconds} s; --connect_seconds says how long to wait"
    )
    with _abort_says(lambda: message, status=2):
        try:
            jax.distributed.initialize(
                peers.coordinator,
                peers.count,
                peers.index,
                cluster_detection_method="deactivate" if peers.coordinator else None,
                initialization_timeout=peers.connect_seconds,
                heartbeat_timeout_seconds=peers.heartbeat_seconds,
            )
        except Exception as error:
            # From sockets, from the cluster's interface or from jax: of any type.
            raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    state = _service()
    _group.index, _group.count = state.process_id, state.num_processes
    if _group.count > 1:
        _set_abort_handler(_lost_message, status=1)
        _group.watch = threading.Thread(target=_watch, name="watch", daemon=True)
        _group.watch.start()


def _service() -> Any:
    """The state of ``jax.distributed``: its client passes messages between processes. jax has no public name for it."""
    from jax._src import distributed

    return distributed.global_state


# ---- deciding together


def from_first(name: str, decide: Callable[[], Value]) -> Value:
    """Runs a function on the first process and gives its result to all, in the order of the calls.

    An error on the first process is raised there; the others end with it (see ``fail``).

    Args:
      name: of the decision, to find processes that do not run the same program.
      decide: returns JSON values; what it writes is written when the others get the result. A decision inside of it is
        part of it.

    Returns:
      The result; on the others as JSON gives it back (lists for tuples).
    """
    if _group.count == 1 or _group.deciding:
        return decide()
    client, key = _service().client, f"bnn_jax/decision/{_group.questions}"
    _group.questions += 1
    if is_first():
        _group.deciding = True
        try:
            result = decide()
        finally:
            _group.deciding = False
        client.key_value_set(key, json.dumps({"name": name, "result": result}))
        return result
    answer = json.loads(_wait_for(lambda: client.blocking_key_value_get(key, QUESTION_SECONDS * 1000)))
    if answer["name"] != name:
        raise RuntimeError(f"process {_group.index} asks for {name!r} where process 0 decides {answer['name']!r}")
    return answer["result"]


def _wait_for(ask: Callable[[], str]) -> str:
    """Asks until there is an answer; a first process that is gone ends the waiting by its own."""
    while True:
        try:
            return ask()
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def same_everywhere(name: str, value: Any) -> None:
    """Checks that a JSON value is that of the first process.

    Args:
      name: what it is, for the message.
      value: JSON value.

    Raises:
      UserError: it is another one here.
    """
    value = json.loads(json.dumps(value))
    first = from_first(name, lambda: value)
    if value != first:
        raise UserError(f"another {name} than that of process 0: {_difference(value, first)}")


def _difference(here: Any, first: Any) -> str:
    if isinstance(here, dict) and isinstance(first, dict):
        key = next(key for key in sorted(here.keys() | first.keys()) if here.get(key) != first.get(key))
        return f"{key}{'.' if isinstance(here.get(key), dict) else ' '}{_difference(here.get(key), first.get(key))}"
    return f"{str(here)[:80]!r} here, {str(first)[:80]!r} there"


def values_of_first(tree: Any) -> Any:
    """The arrays of the first process on every process, bit for bit.

    Two accelerators may round differently what each computes for itself, such as a start from statistics of images;
    copies of the state that differ would never meet again.
    """
    if _group.count == 1:
        return tree
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    def share(leaf: Any) -> Any:
        host = np.asarray(leaf)
        # As bytes: the sum behind the broadcast would change the sign of a zero.
        data = np.ascontiguousarray(host).reshape(-1).view(np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(data)).view(host.dtype).reshape(host.shape)

    return jax.tree.map(share, tree)


# ---- ending


def on_loss(saved: Callable[[], str]) -> None:
    """Sets what tells, if a process is lost, where a new start goes on."""
    _group.saved = saved


def finish(status: int, message: str | None) -> int:
    """Ends what all processes end together; the first one says it.

    Args:
      status: exit status, the same everywhere.
      message: line for stderr, or None.

    Returns:
      The status.
    """
    if message is not None and is_first():
        print(message, file=sys.stderr, flush=True)
    # Until the first one is here, who may still write, it may fail.
    from_first("end", lambda: status)
    _group.ending.set()
    if _group.watch is not None:
        _group.watch.join()
        import jax

        # Waits for the others, who are at the same place.
        jax.distributed.shutdown()
        _set_abort_handler(None)
    return status


def fail(status: int, message: str, *, label: str = "error: ") -> int:
    """Ends with an error of this process, or of all; ends the others, with the same status and without a message.

    Where several fail at the same time, one of them tells, the first if it is among them. With several processes this
    does not return: they cannot be left in order while some of them wait for others in the middle of a step.

    Args:
      status: exit status.
      message: line for stderr.
      label: what stands before it.

    Returns:
      The status.
    """
    if _group.count == 1:
        print(f"{label}{message}", file=sys.stderr, flush=True)
        return status
    if not is_first():
        # The watching thread ends this process meanwhile if another one tells.
        time.sleep(FAILURE_SECONDS)
    _group.ending.set()
    content = json.dumps({"status": status, "process": _group.index})
    try:
        _service().client.key_value_set("bnn_jax/failure", content)
    except Exception as error:
        if "ALREADY_EXISTS" in str(error):
            # Another one was faster, and tells.
            _end_with_others(status)
    origin = "" if is_first() else f"process {_group.index}: "
    print(f"{label}{origin}{message}", file=sys.stderr, flush=True)
    _end_with_others(status)


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error came about because another process is gone."""
    if _group.count == 1:
        return False
    chain: BaseException | None = error
    while chain is not None:
        if not isinstance(chain, UserError) and any(phrase in str(chain).lower() for phrase in CONNECTION_PHRASES):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def lose_contact(error: BaseException) -> NoReturn:
    """Ends this process because another one is gone: nothing can be waited for any more.

    Args:
      error: what showed it.
    """
    # If that one ended with an error of its own, it has told, and the watching thread ends this one in the same way.
    time.sleep(2 * POLL_SECONDS)
    _leave(1, f"{' '.join(str(error).split())[:300]}\n{_lost_message()}")


def _lost_message() -> str:
    return (
        f"error: process {_group.index} of {_group.count} lost contact with another process; what was saved is kept, "
        f"the same command on all hosts goes on from {_group.saved()}"
    )


def _watch() -> None:
    """Ends this process when another one says that it failed."""
    client = _service().client
    while not _group.ending.wait(POLL_SECONDS):
        try:
            content = json.loads(client.key_value_try_get("bnn_jax/failure"))
        except Exception:
            # There is none; or the service is gone, which ends the process in its own way.
            continue
        if not _group.ending.is_set():
            _end_with_others(content["status"])


def _end_with_others(status: int) -> NoReturn:
    """Ends the process when all know why: the service ends with the first one."""
    with contextlib.suppress(Exception):
        _service().client.wait_at_barrier("bnn_jax/failed", int(ACKNOWLEDGE_SECONDS * 1000))
    _leave(status, None)


def _leave(status: int, message: str | None) -> NoReturn:
    """Ends the process at once: an orderly end would wait for the others."""
    if sys.stderr.isatty():
        # A progress bar had hidden the cursor.
        sys.stderr.write("\x1b[?25h")
    if message is not None:
        print(message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []


def _set_abort_handler(message: Callable[[], str] | None, *, status: int = 1) -> None:
    """Makes an abort of the process print one more line and end with a status; None takes the handler away.

    jaxlib ends a process by ``abort`` when its service finds another one dead or cannot be reached, in a thread of its
    own and without a hook. Python's own handlers run too late: when the C function returns, the process is gone.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    if message is None:
        libc.signal(signal.SIGABRT, None)
        return
    handler = _Handler(lambda _: _leave(status, message()))
    # As long as the process lives: C keeps no reference.
    _handlers.append(handler)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


@contextlib.contextmanager
def _abort_says(message: Callable[[], str], *, status: int):
    """Inside, an abort prints a message as an error and ends with a status."""
    _set_abort_handler(lambda: f"error: {message()}", status=status)
    try:
        yield
    finally:
        _set_abort_handler(None)
