"""Signals: at once where nothing can be lost, after the current micro-batch where something can."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from gpt.errors import Interrupted
from gpt.machine.ranks import Ranks
from gpt.runs import interrupt

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_at_once_with_the_shells_code(number, code):
    interrupt.end_at_once()
    with pytest.raises(Interrupted, match=f"interrupted by {number.name}") as caught:
        os.kill(os.getpid(), number)
    assert caught.value.code == code


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_deferred_signal_waits_to_be_asked_for_and_handlers_come_back(number):
    interrupt.end_at_once()
    with interrupt.deferred() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and stop.signal == number
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), number)


def test_a_signal_that_comes_too_late_to_stop_a_run_is_known_afterwards():
    with pytest.raises(Interrupted), interrupt.deferred() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        raise Interrupted(stop.signal)
    assert interrupt.late is None  # the run has stopped
    with interrupt.deferred():
        os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.late == signal.SIGINT


def test_another_reason_to_stop_is_no_signal():
    with interrupt.deferred(lambda: True) as stop:
        assert stop() and stop.signal is None


def test_ctrl_c_ends_one_answer_and_a_second_one_at_once_the_process(monkeypatch):
    monkeypatch.setattr(interrupt, "AT_ONCE", 60.0)  # a busy machine may be slow
    interrupt.end_at_once()
    with interrupt.AnswerEnd() as is_ended:
        assert not is_ended()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_ended()
        is_ended.reset()  # the next answer
        assert not is_ended()
        with pytest.raises(Interrupted, match="interrupted by SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_each_of_two_answers_where_time_is_between(monkeypatch):
    interrupt.end_at_once()
    monkeypatch.setattr(interrupt, "AT_ONCE", 0.0)
    is_ended = interrupt.AnswerEnd()
    for _ in range(2):
        with is_ended:
            os.kill(os.getpid(), signal.SIGINT)
            assert is_ended()
    with is_ended:
        assert not is_ended()
    with pytest.raises(Interrupted), is_ended:  # twice within an answer that does not end
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is interrupt._exit  # the third one


def test_another_signal_ends_the_process_while_an_answer_is_given_and_handlers_come_back():
    interrupt.end_at_once()
    with interrupt.AnswerEnd(), pytest.raises(Interrupted, match="interrupted by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    interrupt.end_at_once()
    with interrupt.AnswerEnd():
        pass
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_thread_can_be_asked_to_stop_but_gets_no_signals():
    def body():
        with interrupt.deferred(lambda: True) as stop:
            results.append(stop())

    results = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert results == [True]


def test_a_second_signal_exits_at_once_whatever_hangs():
    code = (
        "import time\nfrom gpt.runs import interrupt\n"
        "with interrupt.deferred():\n    print('ready', flush=True)\n    time.sleep(60)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 143


class Pair(Ranks):
    """Two ranks, of which the other one has been sent a signal, or none."""

    count = 2

    def __init__(self, other=0):
        self.other = other

    def watch(self, wish):
        self.own = wish

    def wish(self, own):
        return max(own(), self.other)


def test_a_signal_to_any_rank_stops_all_of_them_and_is_the_reason_in_each():
    with interrupt.deferred(ranks=Pair(other=signal.SIGTERM)) as stop:
        assert stop() and stop.signal == signal.SIGTERM and stop.received is None
    assert interrupt.late is None
    with interrupt.deferred(also=lambda: True, ranks=Pair()) as stop:
        assert stop() and stop.signal is None and stop.wish() == 1


def test_a_signal_that_a_cluster_and_torchrun_both_send_is_one(monkeypatch):
    with interrupt.deferred(ranks=(ranks := Pair())) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # in one process this one would exit
        assert stop.received == signal.SIGTERM == ranks.own()
        ended = []
        monkeypatch.setattr(interrupt, "_exit", lambda number, frame: ended.append(number))
        stop._time -= interrupt.AGAIN
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT]
