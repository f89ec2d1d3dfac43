"""The terminal as a person or a pipe sees it: where it matters, a process of its own on a real pseudo-terminal."""

import contextlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.terminal import console

ROOT = Path(__file__).resolve().parents[2]

RUN = f"""
import logging, sys
sys.path.insert(0, {str(ROOT)!r})
from gpt.terminal import console, output
output.survive_closed_output()
console.setup()
with console.ProgressBar(total_steps=300, first_step=0) as bar:
    for step in range(0, 301, 10):
        bar.update({{"step": step, "train/loss": 5.1234, "lr": 1e-3, "tokens_per_second": 2345.1}})
    logging.getLogger("gpt.test").warning("careful")
    bar.update({{"step": 300, "val/loss": 5.1, "val/bpb": 1.95}})
    console.show_samples([{{"prompt": "What\\nis it?", "text": "caf\\u00e9 \\u2026 \\x1b[31m\\u202e"}}])
console.say("the end")
console.error("first\\n  second")
output.flush_and_exit(3)
"""


def run(shell: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs RUN, which is $RUN in the shell command."""
    env = os.environ | {"RUN": RUN, "PYTHON": sys.executable} | environment
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", r"\x1b[31m"),
        ("bell\x07 del\x7f c1\x9b nul\0", r"bell\x07 del\x7f c1\x9b nul\x00"),
        ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
        ("two\nlines\r\tend\u2028", r"two\nlines\r\tend\u2028"),
        ("\U000e0041 \ud800", r"\U000e0041 \ud800"),
        ("naïve — 漢字 العربية \U0001f600 \\x", "naïve — 漢字 العربية \U0001f600 \\x"),
    ],
)
def test_what_could_harm_or_deceive_a_terminal_is_shown_as_its_code(text, shown):
    assert console.escape(text) == shown


def test_newlines_and_tabs_are_kept_on_request():
    assert console.escape("a\n\tb\r\x1b", keep_newlines=True) == "a\n\tb\\r\\x1b"


def test_info_is_plain_and_a_warning_says_so(logger, capsys):
    console.setup()
    console.setup()
    logging.getLogger("gpt.any").info("read %d rows", 3)
    logging.getLogger("gpt.any").warning("strange \x1b name")
    console.error("broken (here);\n mend it")
    assert capsys.readouterr() == (
        "read 3 rows\n",
        "warning: strange \\x1b name\nerror: broken (here); mend it\n",
    )


def test_a_quiet_process_shows_warnings_errors_and_what_is_announced_and_logs_it_all(logger, tmp_path, capsys):
    console.setup()
    console.setup(quiet=True)
    with console.log_to(tmp_path / "train.log"), console.ProgressBar(total_steps=2, first_step=0) as bar:
        console.say("a line")
        console.announce("job 1: seed=1 \x1b")
        console.describe(model="tiny")
        bar.update({"step": 1, "train/loss": 5.0})
        bar.update({"step": 2, "val/loss": 4.0})
        logging.getLogger("gpt.any").warning("hot")
        console.error("broken")
    assert capsys.readouterr() == ("job 1: seed=1 \\x1b\n", "warning: hot\nerror: broken\n")
    logged = [line.split(" ", 2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert logged == [
        "a line", "job 1: seed=1 \\x1b", "model  tiny", "step 1/2  train/loss 5.000", "step 2/2  val/loss 4.000",
        "warning: hot",
    ]  # fmt: skip
    console.setup()
    console.say("loud again")
    console.announce("and this")
    assert capsys.readouterr().out == "loud again\nand this\n"


def test_the_log_file_of_a_run_gets_its_lines_and_no_others(logger, tmp_path, capsys):
    console.setup()
    console.say("before")
    with console.log_to(tmp_path / "run" / "train.log"):
        console.say("inside é\ud800")
        logging.getLogger("gpt.any").warning("hot")
    console.say("after")
    lines = (tmp_path / "run" / "train.log").read_text(encoding="utf-8").splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in lines] == [
        "inside é\\ud800",
        "warning: hot",
    ]
    assert capsys.readouterr().out.splitlines() == ["before", "inside é\\ud800", "after"]


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null/train.log"])
def test_a_log_file_that_cannot_be_written_is_one_warning(logger, path, capsys):
    console.setup()
    with console.log_to(Path(path)):
        console.say("one")
        console.say("two")
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert re.fullmatch(r"warning: log file /dev/.*\n", err)


def test_a_traceback_is_saved_and_where_it_cannot_be_in_a_temporary_file(tmp_path):
    def fail():
        raise ValueError("why \ud800")

    with pytest.raises(ValueError) as caught:
        fail()
    wanted = tmp_path / "errors" / "1.txt"
    assert console.save_traceback(caught.value, wanted) == wanted
    elsewhere = console.save_traceback(caught.value, Path("/dev/null/1.txt"))
    assert elsewhere.read_text() == wanted.read_text()
    assert "in fail" in wanted.read_text() and "ValueError: why" in wanted.read_text()
    elsewhere.unlink()


def test_a_pipe_gets_one_plain_line_for_each_row():
    done = run('"$PYTHON" -c "$RUN"')
    lines = done.stdout.splitlines()
    assert lines[12] == "step 120/300  train/loss 5.123  lr 1.0e-03  2,345 tokens/s"
    assert lines[31:] == [
        "step 300/300  val/loss 5.100  val/bpb 1.950",
        "sample: What is it?",
        r"    café … \x1b[31m\u202e",
        "the end",
    ]
    assert done.stderr == "warning: careful\nerror: first second\n"
    assert done.returncode == 3


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_stops_nothing(unbuffered):
    done = run('"$PYTHON" -c "$RUN" | head -1; echo "code ${PIPESTATUS[0]}"', PYTHONUNBUFFERED=unbuffered)
    assert done.stdout == "step 0/300  train/loss 5.123  lr 1.0e-03  2,345 tokens/s\ncode 3\n"
    assert done.stderr == "warning: careful\nerror: first second\n"


@pytest.mark.parametrize("output", [">/dev/full", ">&-", "2>&- >&-"])
def test_a_full_or_closed_output_stops_nothing(output):
    done = run(f'"$PYTHON" -c "$RUN" {output}')
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_characters_that_the_encoding_lacks_are_escaped():
    done = run('"$PYTHON" -c "$RUN"', PYTHONIOENCODING="ascii", LC_ALL="C")
    assert r"    caf\xe9 \u2026 \x1b[31m\u202e" in done.stdout.splitlines()
    assert done.returncode == 3


def on_terminal(columns: int) -> str:
    """What a terminal of that width receives."""
    ours, theirs = os.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    env |= {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", RUN], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    received = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side has closed
        while data := os.read(ours, 65536):
            received += data
    os.close(ours)
    assert process.wait(60) == 3
    return received.decode()


@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_gets_a_bar_that_log_lines_do_not_tear(columns):
    received = on_terminal(columns)
    assert "\x1b[33mwarning:\x1b[0m careful" in received
    assert "\x1b[31merror:\x1b[0m first second" in received
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received)
    lines = [line.split("\r")[-1] for line in plain.replace("\r\n", "\n").split("\n")]
    assert "warning: careful" in lines
    assert "    café … \\x1b[31m\\u202e" in lines
    bars = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("step") and "━" in line]
    assert bars and "300/300" in bars[-1]
    assert all(len(line) <= columns for line in bars)
    assert ("train/loss 5.123  lr 1.0e-03  2,345 tokens/s" in bars[-1]) == (columns == 100)


def test_a_table_is_aligned_and_fits_the_terminal(monkeypatch):
    rows = [
        {"job": "0", "optimizer.lr": "1e-4", "status": "completed", "val/loss": 4.56789, "tokens": 614400},
        {"job": "1", "optimizer.lr": "1e-3", "status": "failed", "val/loss": None, "tokens": None},
    ]
    columns = ["job", "optimizer.lr", "status", "val/loss", "tokens"]
    monkeypatch.setenv("COLUMNS", "80")
    assert console.table(rows, columns).splitlines() == [
        "job  optimizer.lr  status     val/loss   tokens",
        "0    1e-4          completed     4.568  614,400",
        "1    1e-3          failed",
    ]
    monkeypatch.setenv("COLUMNS", "40")
    narrow = console.table(rows, columns)
    assert max(map(len, narrow.splitlines())) <= 40 and "4.568" in narrow  # names are shortened, numbers are not
    assert console.table([], ["a", "b"]) == "a  b"


def test_in_a_narrow_terminal_names_are_short_and_what_matters_least_is_left_out_before_words_are_cut(monkeypatch):
    rows = [
        {"optimizer.lr": 0.001, "model.context_length": 64, "status": "completed", "val/loss": 7.0, "tokens": 12800}
    ]
    columns = [*rows[0], "tokens/s"]
    monkeypatch.setenv("COLUMNS", "60")
    assert console.table(rows, columns, ["tokens/s", "tokens"]).splitlines() == [
        "   lr  context_length  status     val/loss  tokens  tokens/s",
        "0.001              64  completed     7.000  12,800",
    ]
    monkeypatch.setenv("COLUMNS", "45")
    assert console.table(rows, columns, ["tokens/s", "tokens"]).splitlines()[0].split()[-1] == "val/loss"
    assert console.short_names(["optimizer.lr", "a.name", "b.name"]) == {
        "optimizer.lr": "lr", "a.name": "a.name", "b.name": "b.name"
    }  # fmt: skip


def test_sentences_break_between_words_and_not_at_all_in_a_pipe(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert console.wrapped("model.context_length=64 is the best of-all").splitlines() == [
        "model.context_length=64", "is the best of-all"
    ]  # fmt: skip
    monkeypatch.delenv("COLUMNS")
    assert console.wrapped("a word " * 100).count("\n") == 0


@pytest.mark.parametrize("columns", range(1, 40))
def test_a_table_is_never_wider_than_the_terminal_unless_a_single_number_is(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [{"a number": 123, "text": "a long text", "seeds": 2, "n": 7}, {"text": "b"}]
    lines = console.table(rows, ["a number", "text", "seeds", "n"]).splitlines()
    assert max(map(len, lines)) <= max(columns, 3) and lines[1].split()[0] == "123"


@pytest.mark.parametrize(
    ("number", "cell"),
    [
        (10_000, "10,000"), (10**15, "1,000,000,000,000,000"), (9999.5, "1e+04"), (12_345.6, "12,346"),
        (-12_345.6, "-12,346"), (2.0**52, "4,503,599,627,370,496"), (2.0**53, "9.007e+15"), (1e300, "1e+300"),
        (-1e300, "-1e+300"), (float("inf"), "inf"), (float("nan"), "nan"), (True, "True"), (None, ""),
    ],
)  # fmt: skip
def test_numbers_of_a_table_are_short_and_their_digits_mean_something(number, cell):
    assert console.table([{"a": number}], ["a"]).split("\n")[1] == cell
