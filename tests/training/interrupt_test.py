import os
import signal
import threading
import time

import pytest

from bnn_jax import hosts
from bnn_jax.training import interrupt
from bnn_jax.training.interrupt import SIGNALS, Agreement, StopRequest
from tests.integration.launching import Finished, launch_program


@pytest.fixture(autouse=True)
def usual_interrupt():
    """Ctrl-C's own handler: a shell starts its background jobs, and nohup all its own, with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_sets_the_flag(number):
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_number == number


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_acts_as_usual(number):
    usual = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop
        assert signal.getsignal(number) == usual


def test_the_second_interrupt_ends_the_process_as_ctrl_c_does():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            # The handler runs between two instructions; the signal ends the sleep.
            time.sleep(10)


def test_the_handlers_are_those_from_before_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_error_inside_restores_the_handlers_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_the_flag_stays_false():
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_on_one_process_all_agree_at_once():
    with StopRequest() as stop:
        assert not stop.agreed() and not stop.agreed(at_once=True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() and stop.signal_number == signal.SIGTERM


def test_on_one_process_the_largest_number_is_ones_own():
    assert [Agreement().largest(number) for number in (0, 3)] == [0, 3]


def test_on_several_processes_the_answer_comes_two_calls_later_and_once(monkeypatch):
    # The maximum over the devices of this process, as if they were those of several.
    monkeypatch.setattr(interrupt.hosts, "count", lambda: 2)
    agreement = Agreement()
    assert [agreement.largest(number) for number in (0, 15, 15, 15, 0, 0, 0)] == [0, 0, 0, 15, 0, 0, 0]


def test_on_several_processes_the_answer_can_be_waited_for(monkeypatch):
    monkeypatch.setattr(interrupt.hosts, "count", lambda: 2)
    stop = StopRequest()
    assert not stop.agreed(at_once=True)
    stop.signal_number = signal.SIGINT
    assert stop.agreed(at_once=True) and stop.signal_number == signal.SIGINT


def compiling(seconds: float) -> Finished:
    """A process that gets a SIGTERM while it compiles, and waits so long for the compiler."""
    program = "tests/training/compiling_program.py"
    return launch_program(str(seconds), program=program, JAX_ENABLE_COMPILATION_CACHE="false")


def test_a_stop_does_not_wait_for_the_compiler():
    finished = compiling(0.1)
    assert (finished.code, finished.stdout) == (143, "")
    assert finished.stderr == "stopped while compiling; the same command goes on from step 3 of stage w1a1\n"


def test_a_program_that_compiles_in_time_hears_of_the_stop():
    assert compiling(100) == Finished(0, "compiled True\n", "")


def test_a_group_that_watches_leaves_nothing_behind():
    threads = threading.active_count()
    with StopRequest(hosts.Group()):
        assert threading.active_count() == threads + 1
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1
