"""The processes of one job: torchrun starts them, and all end when one of them does."""

import threading
import time

import pytest

from gpt.sweeps.local_group import LocalGroup, Outcome, Shape

SHAPE = Shape(n_processes=1, max_restarts=0, variables={"OMP_NUM_THREADS": "1"})


def test_a_group_that_is_asked_to_end_before_it_starts_does_not_start(tmp_path):
    group = LocalGroup()
    group.end()
    assert group.run(b"", SHAPE, tmp_path / "job" / "log") is None
    assert (tmp_path / "job" / "log").read_bytes() == b""


@pytest.mark.exhaustive
def test_processes_that_cannot_begin_end_the_group_and_leave_their_words_in_the_log(tmp_path):
    assert LocalGroup().run(b"damaged", SHAPE, tmp_path / "log") == Outcome(1, None)
    assert "exitcode  : 1" in (tmp_path / "log").read_text()


@pytest.mark.exhaustive
def test_a_group_that_is_asked_to_end_while_it_starts_ends_at_once(tmp_path):
    group, outcomes = LocalGroup(), []
    thread = threading.Thread(target=lambda: outcomes.append(group.run(b"", SHAPE, tmp_path / "log")))
    thread.start()
    while group._process is None:
        time.sleep(0.01)
    started = time.monotonic()
    group.end()
    thread.join()
    assert outcomes[0].code != 0 and time.monotonic() - started < 20
