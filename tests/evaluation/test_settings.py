"""What evaluate.py reads is checked before torch is loaded."""

import subprocess
import sys

import pytest
from conftest import ROOT
from made_run import settings
from pydantic import ValidationError


def test_settings_and_kinds_do_without_torch():
    program = "import sys; from gpt.evaluation import settings; print('torch' in sys.modules, 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


def test_only_what_is_chosen_is_evaluated():
    assert settings("choice").chosen.keys() == {"choice"}


@pytest.mark.parametrize(
    "change", [{"part": "all"}, {"batch_size": 0}, {"resamples": 10}, {"name": "a/b"}, {"name": 101 * "x"}]
)
def test_wrong_values_are_refused(change):
    with pytest.raises(ValidationError):
        settings("loss", **change)
