"""Which rank has failed, and that it is said once."""

import pytest
from group import lines

pytestmark = pytest.mark.exhaustive  # tests/test_parallel_runs.py kills ranks in every run of the tests

DIES = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: a run handles it
from gpt.machine import group_faults
from gpt.machine.ranks import COUNTS
ranks.total([1], COUNTS)
ranks.total([1], COUNTS)
try:
    if ranks.rank == 1:
        {deed}
    ranks.total([1], COUNTS)
except Exception as error:
    code, text = group_faults.settle(error, 1, str(error))
    print("answer", ranks.rank, code, text, flush=True)
    os._exit(code)
"""


def test_a_rank_that_was_killed_is_named_by_one_line_of_the_others(tmp_path):
    code, output = lines(tmp_path, 3, DIES.format(deed="os.kill(os.getpid(), 9)"))
    answers = sorted(line for line in output.splitlines() if line.startswith("answer"))
    assert code == 1 and len(answers) == 2, output
    assert answers[0].startswith("answer 0 5 rank 1 has ended (pid ") and answers[1] == "answer 2 5 ", output


def test_the_error_of_a_rank_is_said_by_the_first(tmp_path):
    code, output = lines(tmp_path, 2, DIES.format(deed="raise ValueError('my own')"))
    answers = [line for line in output.splitlines() if line.startswith("answer 0")]
    assert code == 1 and answers == ["answer 0 1 rank 1: my own"], output
