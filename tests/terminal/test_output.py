"""What becomes of a process whose output is refused: a process of its own, on real files and pipes."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

RUN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from gpt.errors import UserError
from gpt.terminal import output
output.survive_closed_output()
try:
    for number in range(10_000):
        print("line", number)
    output.check_output()
except UserError as error:
    print(error, file=sys.stderr)
    output.flush_and_exit(error.code)
print("the end", file=sys.stderr)
output.flush_and_exit(3)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("| head -1", "the end"),
        (">&-", "the end"),
        ("2>&- >&-", ""),
        (">/dev/full", "stdout is not written (No space left on device)"),
    ],
)
def test_nothing_raises_and_who_asks_learns_what_a_full_disk_has_refused(rest, said, unbuffered):
    env = os.environ | {"RUN": RUN, "PYTHON": sys.executable, "PYTHONUNBUFFERED": unbuffered}
    command = f'"$PYTHON" -c "$RUN" {rest}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, env=env)
    assert done.stderr.strip() == said and done.returncode == (5 if "full" in rest else 3)
