"""Several processes that train together: how they find each other, share decisions and end.

The first process decides and writes; the others learn what it decided (``from_first``) and read what it wrote. These
messages go through the coordination service of ``jax.distributed``, not through the devices, so that they never wait
for a training step. On one process every function here is trivial, and nothing is started.
"""

import contextlib
import contextvars
import ctypes
import dataclasses
import importlib.util
import json
import os
import re
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
FAILURE = "bnn_jax/failure"
# What errors of a connection to another process contain, whoever raises them.
CONNECTION_PHRASES = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|unavailable:|deadline_exceeded|coordination|heartbeat", re.IGNORECASE
)
# Whether the code that runs belongs to a decision of the first process.
_DECIDING = contextvars.ContextVar("deciding", default=False)


def _service() -> Any:
    """The state of ``jax.distributed``: its client passes messages between processes. jax has no public name for it."""
    from jax._src import distributed

    return distributed.global_state


def is_first() -> bool:
    """Whether this is the process that decides, writes and prints."""
    return index() == 0


def index() -> int:
    """Number of this process, from 0."""
    return _service().process_id


def count() -> int:
    """Number of processes."""
    return _service().num_processes


# ---- finding each other


@dataclasses.dataclass(frozen=True)
class Peers:
    """How to join the other processes; the first three go together, and are None where jax finds out.

    Attributes:
      coordinator: 'HOST:PORT' of the first process.
      num_processes: number of processes.
      process_id: number of this one, from 0.
      heartbeat_seconds: silence after which a process counts as lost.
      connect_seconds: how long to wait for the others at the start.

    Raises:
      UserError: one is missing, or has a value that cannot be.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = 100
    connect_seconds: int = 300

    def __post_init__(self) -> None:
        count, index = self.num_processes, self.process_id
        for name in ("heartbeat_seconds", "connect_seconds", "num_processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}={value}: accepted are whole numbers from 1")
        if self.coordinator is None and count is None and index is None:
            return
        if self.coordinator is None or count is None or index is None:
            together = ("coordinator", "num_processes", "process_id")
            missing = ", ".join(f"--{name}" for name in together if getattr(self, name) is None)
            raise UserError(f"{missing}: missing; --coordinator, --num_processes and --process_id go together")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(
                f"--coordinator={self.coordinator}: accepted is HOST:PORT of the first process, e.g. node1:55527"
            )
        if not 0 <= index < count:
            raise UserError(f"--process_id={index}: accepted are 0 to {count - 1} with --num_processes={count}")


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
    return "Kubernetes" if in_job and importlib.util.find_spec("kubernetes") is not None else None


# ---- deciding together


def from_first(name: str, decide: Callable[[], Value]) -> Value:
    """Runs a function on the first process and gives its result to all, in the order of the calls.

    An error on the first process is raised there; the others end with it (see ``Group.fail``).

    Args:
      name: of the decision, to find processes that do not run the same program.
      decide: returns JSON values; what it writes is written when the others get the result. A decision inside of it is
        part of it.

    Returns:
      The result; on the others as JSON gives it back (lists for tuples).
    """
    if count() == 1 or _DECIDING.get():
        return decide()
    import jax

    client = _service().client
    # The service counts the decisions of each process; they are numbered in the same way everywhere.
    key = f"bnn_jax/decision/{client.key_value_increment(f'bnn_jax/decisions_of/{index()}', 1)}"
    if is_first():
        token = _DECIDING.set(True)
        try:
            result = decide()
        finally:
            _DECIDING.reset(token)
        client.key_value_set(key, json.dumps({"name": name, "result": result}))
        return result
    while True:
        # A first process that is gone ends the waiting with another error, or ends this process.
        try:
            answer = json.loads(client.blocking_key_value_get(key, QUESTION_SECONDS * 1000))
            break
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    if answer["name"] != name:
        raise RuntimeError(f"process {index()} asks for {name!r} where process 0 decides {answer['name']!r}")
    return answer["result"]


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
    if count() == 1:
        return tree
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    # As bytes: the sum behind the broadcast would change the sign of a zero.
    host = jax.tree.map(np.asarray, tree)
    data = jax.tree.map(lambda leaf: np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), host)
    shared = multihost_utils.broadcast_one_to_all(data)
    return jax.tree.map(lambda leaf, raw: np.asarray(raw).view(leaf.dtype).reshape(leaf.shape), host, shared)


# ---- ending


class Group:
    """How this process joins the others, and how it ends: alone, with them, or because one of them is gone.

    Attributes:
      goes_on_from: tells where the same command goes on, for the message of a process that ends early.
    """

    def __init__(self) -> None:
        self.goes_on_from: Callable[[], str] = lambda: "the last checkpoint"
        self._ended = threading.Event()
        # Looks for a failure elsewhere; None while this process is alone.
        self._watch: threading.Thread | None = None
        self._abort_handler: Any = None

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self._watch is None

    def connect(self, peers: Peers) -> None:
        """Joins the other processes; before any use of a device.

        Raises:
          UserError: they cannot be joined.
        """
        import jax

        # Its handler would swallow a SIGTERM that comes before training; this library has one of its own.
        jax.config.update("jax_enable_preemption_service", False)
        where = peers.coordinator or "the coordinator that the launcher names"
        own = "?" if peers.process_id is None else peers.process_id
        too_late = (
            f"error: process {own}: not all processes met at {where} within {peers.connect_seconds} s; "
            "--connect_seconds says how long to wait"
        )
        self._at_abort(lambda: (2, too_late) if self.is_alone else (1, self._lost_message()))
        try:
            jax.distributed.initialize(
                peers.coordinator,
                peers.num_processes,
                peers.process_id,
                cluster_detection_method="deactivate" if peers.coordinator else None,
                initialization_timeout=peers.connect_seconds,
                heartbeat_timeout_seconds=peers.heartbeat_seconds,
            )
        except Exception as error:
            # From sockets, from the cluster's interface or from jax: of any type.
            raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
        if count() > 1:
            self._watch = threading.Thread(target=self._look_for_failure, name="watch", daemon=True)
            self._watch.start()

    def finish(self, status: int, message: str | None) -> int:
        """Ends what all processes end together; the first one says it.

        Args:
          status: exit status, the same everywhere.
          message: line for stderr, or None.

        Returns:
          The status.
        """
        if message is not None and (self.is_alone or is_first()):
            print(message, file=sys.stderr, flush=True)
        if self._watch is not None:
            import jax

            # Until the first one is here, who may still write, it may fail.
            from_first("end", lambda: status)
            self._ended.set()
            self._watch.join()
            # Waits for the others, who are at the same place.
            jax.distributed.shutdown()
            self._at_abort(None)
        return status

    def fail(self, status: int, message: str, *, label: str = "error: ") -> int:
        """Ends with an error of this process, or of all; ends the others, with the same status and without a message.

        Where several fail at the same time, one of them tells, the first if it is among them. With several processes
        this does not return: they cannot be left in order while some of them wait for others in the middle of a step.

        Args:
          status: exit status.
          message: line for stderr.
          label: what stands before it.

        Returns:
          The status.
        """
        if self.is_alone:
            print(f"{label}{message}", file=sys.stderr, flush=True)
            return status
        # The watching thread ends this process meanwhile if another one tells.
        time.sleep(0 if is_first() else FAILURE_SECONDS)
        self._ended.set()
        try:
            _service().client.key_value_set(FAILURE, str(status))
        except Exception as error:
            if "ALREADY_EXISTS" in str(error):
                # Another one was faster, and tells.
                self._leave_with_others(status)
        origin = "" if is_first() else f"process {index()}: "
        print(f"{label}{origin}{message}", file=sys.stderr, flush=True)
        self._leave_with_others(status)

    def end_if_lost(self, error: BaseException) -> None:
        """Ends this process if an error came about because another one is gone: there is nothing to wait for then.

        Args:
          error: what showed it.
        """
        if self.is_alone or not is_lost_contact(error):
            return
        # If that one ended with an error of its own, it has told, and the watching thread ends this one too.
        time.sleep(2 * POLL_SECONDS)
        leave(1, f"{' '.join(str(error).split())[:300]}\n{self._lost_message()}")

    def _lost_message(self) -> str:
        return (
            f"error: process {index()} of {count()} lost contact with another process; what was saved is kept, "
            f"the same command on all hosts goes on from {self.goes_on_from()}"
        )

    def _look_for_failure(self) -> None:
        """Ends this process when another one says that it failed."""
        client = _service().client
        while not self._ended.wait(POLL_SECONDS):
            try:
                status = int(client.key_value_try_get(FAILURE))
            except Exception:
                # There is none; or the service is gone, which ends the process in its own way.
                continue
            if not self._ended.is_set():
                self._leave_with_others(status)

    def _leave_with_others(self, status: int) -> NoReturn:
        """Ends the process when all know why: the service ends with the first one."""
        # The first one may be gone before this one has left the barrier: that is no lost contact.
        self._at_abort(lambda: (status, None))
        with contextlib.suppress(Exception):
            _service().client.wait_at_barrier("bnn_jax/failed", int(ACKNOWLEDGE_SECONDS * 1000))
        leave(status)

    def _at_abort(self, ending: Callable[[], tuple[int, str | None]] | None) -> None:
        """Makes an abort of the process end it with a status and a line; None: as usual.

        jaxlib ends a process by ``abort`` when its service finds another one dead or cannot be reached, in a thread of
        its own and without a hook. Python's own handlers would run too late: when the C function returns, the process
        is gone.
        """
        handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
        handler = handler_type() if ending is None else handler_type(lambda _: leave(*ending()))
        libc = ctypes.CDLL(None)
        libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, handler_type)
        libc.signal(signal.SIGABRT, handler)
        # C keeps no reference.
        self._abort_handler = handler


def is_lost_contact(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, tells of a broken connection."""
    while error is not None:
        if not isinstance(error, UserError) and CONNECTION_PHRASES.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(status: int, message: str | None = None) -> NoReturn:
    """Ends the process at once: an orderly end would wait for the others, or for a compiler."""
    if sys.stderr.isatty():
        # A progress bar had hidden the cursor.
        sys.stderr.write("\x1b[?25h")
    if message is not None:
        print(message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
