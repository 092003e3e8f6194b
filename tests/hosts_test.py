"""Processes find each other, decide together, and end together whatever happens to one of them."""

import signal

import pytest

from bnn_jax import hosts
from bnn_jax.errors import UserError
from tests.integration.launching import Finished, free_port, start


def run(*deeds: str, only: int | None = None, connect_seconds: int = 60) -> list[Finished]:
    """Starts a process for each deed, or only one of them, and waits."""
    arguments = (str(len(deeds)), str(free_port()), str(connect_seconds), *deeds)
    indices = range(len(deeds)) if only is None else [only]
    processes = [start(str(index), *arguments, program="tests/distributed_program.py") for index in indices]
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Finished(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


# ---- flags


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a:1",), "--num_processes, --process_id: missing"),
        ((None, 2, 0), "--coordinator: missing"),
        (("a", 2, 0), "--coordinator=a: accepted is HOST:PORT"),
        (("a:b", 2, 0), "--coordinator=a:b: accepted is HOST:PORT"),
        (("a:70000", 2, 0), "--coordinator=a:70000: accepted is HOST:PORT"),
        (("a:1", 0, 0), "--num_processes=0: accepted are whole numbers from 1"),
        (("a:1", 2, 2), "--process_id=2: accepted are 0 to 1 with --num_processes=2"),
        (("a:1", 2, -1), "--process_id=-1: accepted are 0 to 1"),
        ((None, None, None, 0), "--heartbeat_seconds=0: accepted are whole numbers from 1"),
        ((None, None, None, 100, 0), "--connect_seconds=0: accepted are whole numbers from 1"),
    ],
)
def test_flags_that_cannot_be_are_refused(values, message):
    with pytest.raises(UserError) as refused:
        hosts.Peers(*values)
    assert message in str(refused.value) and "\n" not in str(refused.value)


# ---- launchers

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "8"}, "SLURM"),
        # An interactive shell, or a batch script without srun.
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        # Any pod, such as one of a notebook.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_a_launcher_of_several_tasks_is_recognised(environment, name):
    assert hosts.launcher(environment) == name


@pytest.mark.parametrize(("installed", "name"), [(True, "Kubernetes"), (False, None)])
def test_a_pod_of_an_indexed_job_is_recognised_where_jax_can_ask_the_cluster(monkeypatch, installed, name):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda _: object() if installed else None)
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    assert hosts.launcher(environment) == name


@pytest.mark.parametrize(
    "environment",
    [
        {**SLURM, "SLURM_NTASKS": "8"},
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_jax_recognises_the_same_launchers(monkeypatch, environment):
    # No public name of jax tells; if it looks for other variables one day, ours must follow.
    clusters = pytest.importorskip("jax._src.clusters")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    present = [
        kind.name
        for kind in clusters.ClusterEnv._cluster_types
        if kind.name in ("slurm", "ompi") and kind.is_env_present()
    ]
    assert len(present) == 1


# ---- one process


def test_on_one_process_nothing_is_shared():
    assert hosts.is_first() and hosts.count() == 1
    value = {"a": (1, 2)}
    assert hosts.from_first("it", lambda: value) is value
    assert hosts.values_of_first(value) is value
    hosts.same_everywhere("value", value)


def test_on_one_process_an_error_is_printed_and_its_status_returned(capsys):
    group = hosts.Group()
    assert group.fail(2, "nothing works") == 2
    assert capsys.readouterr().err == "error: nothing works\n"
    assert group.finish(143, "stopped") == 143
    assert capsys.readouterr().err == "stopped\n"


def test_on_one_process_a_broken_connection_is_an_error_like_any_other():
    # It would end this process.
    hosts.Group().end_if_lost(RuntimeError("Gloo AllReduce failed: Connection closed by peer"))


# ---- two processes


def told(*processes: Finished) -> list[list[str]]:
    """What the programs themselves say on stderr; while a connection ends, jaxlib may log lines of its own there."""
    return [
        [line for line in process.stderr.splitlines() if line.startswith(("error: ", "stopped"))]
        for process in processes
    ]


def test_two_processes_decide_and_end_together():
    first, second = run("stop", "stop")
    assert (first.code, second.code) == (143, 143), first.stderr + second.stderr
    assert first.stdout.splitlines()[-1] == "[0, 'both'] 0 2 True"
    assert second.stdout.splitlines()[-1] == "[0, 'both'] 1 2 False"
    assert told(first, second) == [["stopped"], []]


def test_of_two_processes_that_fail_together_one_tells():
    first, second = run("fail", "fail")
    assert (first.code, second.code) == (2, 2), first.stderr + second.stderr
    # The first one, unless it is so late that the other one did not wait for it.
    lines = [*told(first)[0], *told(second)[0]]
    assert lines in (["error: nothing works 2"], ["error: process 1: nothing works 2"])


def test_an_error_of_one_of_two_processes_ends_both():
    first, second = run("work", "fail")
    assert (first.code, second.code) == (2, 2)
    assert told(first, second) == [[], ["error: process 1: nothing works 1"]]


def test_when_one_of_two_processes_is_killed_the_other_ends():
    first, second = run("die", "work")
    assert (first.code, second.code) == (-signal.SIGKILL, 1)
    # Before it are lines of jaxlib.
    assert second.stderr.splitlines()[-1] == (
        "error: process 1 of 2 lost contact with another process; what was saved is kept, "
        "the same command on all hosts goes on from the last checkpoint"
    )


def test_of_two_processes_one_that_waits_for_the_first_in_vain_says_so():
    [second] = run("stop", "stop", only=1, connect_seconds=1)
    assert second.code == 2
    assert second.stderr.splitlines()[-1].startswith("error: process 1: not all processes met at 127.0.0.1:")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllReduce failed: [tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2"), True),
        (RuntimeError("UNAVAILABLE: failed to connect to all addresses"), True),
        (RuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
        (ValueError("a skip connection of 16 channels on 32"), False),
        (UserError("data/nccl.zip: no such file"), False),
    ],
)
def test_a_broken_connection_is_told_from_other_errors(error, lost):
    assert hosts.is_lost_contact(error) == lost


def test_a_broken_connection_behind_another_error_is_seen():
    error = RuntimeError("the step failed")
    error.__cause__ = ValueError("Gloo AllReduce failed")
    assert hosts.is_lost_contact(error)
