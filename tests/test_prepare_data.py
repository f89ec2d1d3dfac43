"""The script as people start it: from anywhere, with mistakes, into pipes."""

import os
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import yaml
from conftest import ROOT

from gpt.config.data import InstructionDataConfig, TextDataConfig


def run(*arguments, cwd="/", **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare_data.py"), *arguments],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_the_sample_is_prepared_from_any_directory_and_the_last_line_is_where(tmp_path):
    done = run(f"data.prepared_dir={tmp_path}/made", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "preparing data=sample from sample.csv"
    assert "         288  with an answer" in done.stdout.splitlines()
    assert "         val  0.0% of the questions occur in train" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/made"
    assert sorted(os.listdir(tmp_path)) == ["made"]


def test_help_gives_purpose_examples_and_every_data_set():
    start = time.monotonic()
    done = run("--help")
    assert time.monotonic() - start < 5  # 0.8 s on a quiet machine
    assert done.returncode == 0
    assert "data card" in done.stdout and "python prepare_data.py data=medquad" in done.stdout
    for path in (ROOT / "conf" / "data").glob("*.yaml"):
        assert f"\n  {path.stem} " in done.stdout


@pytest.mark.parametrize(
    "arguments, code, parts",
    [
        (["data=medquad", "data.path=gone/medquad.csv"], 2, ["gone/medquad.csv does not exist (data.path)"]),
        (["data=helpsteer"], 5, ["the hub's data set nvidia/HelpSteer cannot be had", "data=sample"]),
        (["data=alpaca"], 2, ["data.path=<file>"]),
        (["data.split=rndom", "data.max_tokns=5"], 2, ["data.split=rndom", "did you mean data.max_tokens"]),
        (["data.prepared_dir=/proc/made"], 5, ["cannot write /proc/made"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_an_exit_code(tmp_path, arguments, code, parts):
    directory = f"data.prepared_dir={tmp_path}/made"  # a later argument wins
    done = run(directory, *arguments, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == code and len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ") and all(part in errors[0] for part in parts)


def test_control_characters_of_a_file_are_shown_not_sent_to_the_terminal(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"question,\x1b[31manswer\nq,a\n")
    done = run(f"data.path={tmp_path}/a.csv", f"data.prepared_dir={tmp_path}/made")
    assert done.returncode == 2
    assert "\x1b" not in done.stderr and r"question, \x1b[31manswer; data.columns.answer=" in done.stderr


def test_a_reader_who_leaves_and_an_ascii_terminal_do_no_harm(tmp_path):
    command = f"{sys.executable} {ROOT}/prepare_data.py data.prepared_dir={tmp_path}/made | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "made" / "meta.json").exists()


def test_every_data_set_sets_every_key_and_explains_most():
    for path in (ROOT / "conf" / "data").glob("*.yaml"):
        text = path.read_text()
        kind = TextDataConfig if path.stem == "text" else InstructionDataConfig
        assert set(yaml.safe_load(text)) == {field.name for field in fields(kind)} - {"name"}, path.name
        assert text.startswith("# ")
