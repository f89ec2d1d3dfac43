"""Many prompts: the texts do not depend on what is computed beside them, and come in the order of the prompts."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, model_config
from test_generate import ENVIRONMENT, settings
from tracing import trace

from gpt import tokenizer
from gpt.errors import Interrupted, UserError
from gpt.generation import batches, samples
from gpt.model import GPT
from gpt.runs import interrupt, model_file
from gpt.runs.checkpoint import Identity
from gpt.runs.model_file import Loaded
from gpt.terminal.console import escape

BYTES = tokenizer.load("bytes")
PROMPTS = [("Croup", ""), ("Asthma", "mild"), ("What is (are) Glaucoma ?", ""), ("a", ""), ("Gout", ""), ("Flu", "")]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Loaded:
    """In float64, where rounding decides about no token; some of its texts end, and some do not."""
    torch.manual_seed(0)
    model = GPT(model_config(context_length=64, tie_weights=False), BYTES.n_vocab)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    path = tmp_path_factory.mktemp("model") / "last_model.pt"
    model_file.save_model(path, model, Identity(model.config, BYTES.n_vocab, "bytes", "plain"), step=1)
    return Loaded(model.double().eval(), "bytes", "plain", 1, path, (path,))


def write(loaded: Loaded, prompts=PROMPTS, precision="float32", **changes) -> None:
    cfg = settings("unused", **{"batch_size": 4, "max_new_tokens": 12} | changes)
    batches.write(cfg, prompts, "plain", loaded, precision, BYTES)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestText:
    @pytest.mark.parametrize("batch_size", [1, 2, 8, 32])
    @pytest.mark.parametrize(
        "changes", [{}, {"num_samples": 3}, {"temperature": 0.0}, {"stop": ["e", "a"]}, {"max_new_tokens": 90}],
        ids=str,
    )  # fmt: skip
    def test_it_is_what_is_printed_one_after_the_other(self, loaded, capsys, batch_size, changes):
        samples.write(settings("unused", **{"max_new_tokens": 12} | changes), PROMPTS, "plain", loaded.model, BYTES)
        one_by_one = capsys.readouterr()
        write(loaded, batch_size=batch_size, **changes)
        assert capsys.readouterr() == one_by_one
        assert len(set(one_by_one.out.split("\n"))) > 6

    def test_the_statistics_have_tokens_per_second(self, loaded, capsys):
        write(loaded, stats=True)
        *_, line, _ = capsys.readouterr().err.split("\n")
        assert line.startswith("statistics: ") and line.endswith(" tokens/s, prompts included, 4 at a time")

    def test_a_prompt_longer_than_the_context_keeps_its_end_with_a_warning(self, loaded, capsys, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
        write(loaded, [("x" * 100, "")])
        assert caplog.messages == ["the prompt has 101 tokens, the context 64: only its last 52 are used"]

    def test_a_prompt_without_tokens_is_refused(self, loaded):
        with pytest.raises(UserError, match="the prompt is empty"):
            batches.write(settings("unused", batch_size=4), [("", "")], None, loaded, "float32", BYTES)


class TestBatchSize:
    def rows(self, loaded: Loaded, n: int, before=None, columns: int = 64, batch_size="auto") -> int:
        return batches.rows_at_once(settings("unused", batch_size=batch_size), n, columns, loaded.model, before)

    def test_no_more_rows_are_computed_than_there_are_texts(self, loaded, capsys):
        assert [self.rows(loaded, n, batch_size=4096) for n in (1, 2, 5000)] == [1, 2, 4096]
        write(loaded, PROMPTS[:2], batch_size=4096, stats=True)
        assert "prompts included, 2 at a time\n" in capsys.readouterr().err

    def test_auto_is_the_number_of_texts_but_no_more_than_help(self, loaded, capsys):
        assert [self.rows(loaded, n) for n in (1, 5, 1000)] == [1, 5, 64]
        assert capsys.readouterr().err.endswith("batch_size=auto: 64\n")

    def test_auto_is_no_more_than_fits_into_the_free_memory_and_at_least_one(self, loaded):
        of_row = batches.row_bytes(loaded.model, 64)
        free = batches.free_memory.free(torch.device("cpu"))
        columns = 64 * int(free * batches.FREE_SHARE / 5.5 / of_row)  # of rows so long, five fit
        assert 4 <= self.rows(loaded, 100, columns=columns) <= 6
        assert self.rows(loaded, 100, columns=columns * 100) == 1

    def test_the_memory_of_a_row_is_that_of_its_keys_values_and_probabilities(self, loaded):
        config = loaded.model.config
        cache = 64 * config.n_layer * 2 * config.n_embd * 8  # float64
        assert batches.row_bytes(loaded.model, 64) == cache + BYTES.n_vocab * 28

    @pytest.mark.parametrize("batch_size", ["auto", 5])
    def test_answers_that_are_kept_go_on_with_the_number_that_they_began_with(
        self, loaded, tmp_path, capsys, batch_size
    ):
        path = tmp_path / "a.jsonl"
        write(loaded, PROMPTS[:3], batch_size=batch_size, output=str(path))
        write(loaded, batch_size=batch_size, output=str(path))
        assert f"batch_size={batch_size}: 3, as before\n" in capsys.readouterr().err
        assert {row["settings"]["batch_size"] for row in rows(path)} == {3}

    def test_answers_of_more_rows_are_not_gone_on_with_in_fewer(self, loaded, tmp_path):
        path = tmp_path / "a.jsonl"
        write(loaded, PROMPTS[:5], batch_size=5, output=str(path))
        with pytest.raises(UserError, match="has answers with batch_size 5, and not 2"):
            write(loaded, batch_size=2, output=str(path))


class TestOutput:
    def test_each_text_is_a_line_with_what_it_answers_and_what_has_made_it(self, loaded, tmp_path, capsys):
        path = tmp_path / "a.jsonl"
        write(loaded, num_samples=2, output=str(path), max_new_tokens=40)
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err == f"{path}: 12 answers\n"
        lines = rows(path)
        write(loaded, num_samples=2, max_new_tokens=40)
        assert capsys.readouterr().out == "\n\n".join(escape(row["text"], keep_newlines=True) for row in lines) + "\n"
        assert [(row["prompt"], row["input"], row["sample"]) for row in lines] == [
            (prompt, given, sample) for prompt, given in PROMPTS for sample in (1, 2)
        ]
        assert {row["finish_reason"] for row in lines} == {"length", "stop"}
        assert all((row["tokens"] == 40) == (row["finish_reason"] == "length") for row in lines)
        made_with = lines[0]["settings"]
        assert made_with["weights"] and made_with["template"] == "plain" and made_with["batch_size"] == 4
        assert lines[0]["checkpoint"] == "last_model.pt"  # and not whose home it is in

    def test_a_text_that_a_stop_string_ends_has_stopped(self, loaded, tmp_path):
        for n, path in ((1, tmp_path / "one.jsonl"), (4, tmp_path / "four.jsonl")):
            write(loaded, stop=["e", "a", "i"], output=str(path), batch_size=n, max_new_tokens=40)
            assert not any(set(row["text"]) & set("eai") for row in rows(path))
            assert {"stop"} <= {row["finish_reason"] for row in rows(path)}
        one, four = ([row | {"settings": 0} for row in rows(tmp_path / name)] for name in ("one.jsonl", "four.jsonl"))
        assert one == four

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_begun_again_after_any_line_it_becomes_the_same_file(self, loaded, tmp_path, capsys, batch_size):
        path = tmp_path / "a.jsonl"
        write(loaded, num_samples=2, output=str(path), batch_size=batch_size)
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        for n in range(len(lines) + 1):
            path.write_bytes(b"".join(lines[:n]) + (lines[n][:30] if n < 12 else b""))
            write(loaded, num_samples=2, output=str(path), batch_size=batch_size)
            assert path.read_bytes() == whole
        assert f"{path}: 12 of 12 answers are there already\n" in capsys.readouterr().err

    def test_a_run_that_was_moved_is_gone_on_with_and_other_weights_are_refused(self, loaded, tmp_path):
        moved, other = tmp_path / "moved.pt", tmp_path / "other.pt"
        shutil.copy(loaded.path, moved)
        write(loaded, PROMPTS[:2], output=str(tmp_path / "a.jsonl"))
        write(at(loaded, moved), output=str(tmp_path / "a.jsonl"))
        assert len(rows(tmp_path / "a.jsonl")) == 6
        other.write_bytes(loaded.path.read_bytes() + b" ")
        with pytest.raises(UserError, match="has answers with weights") as error:
            write(at(loaded, other), output=str(tmp_path / "a.jsonl"))
        assert error.value.code == 2

    def test_answers_of_weights_in_another_precision_are_not_gone_on_with(self, loaded, tmp_path):
        write(loaded, PROMPTS[:2], output=str(tmp_path / "a.jsonl"))
        with pytest.raises(UserError, match="has answers with precision float32, and not int8") as error:
            write(loaded, precision="int8", output=str(tmp_path / "a.jsonl"))
        assert error.value.code == 2

    def test_answers_of_another_number_of_threads_or_another_torch_are_not_gone_on_with(
        self, loaded, tmp_path, monkeypatch
    ):
        threads, path = torch.get_num_threads(), tmp_path / "a.jsonl"
        write(loaded, PROMPTS[:2], output=str(path))
        try:
            torch.set_num_threads(threads + 1)
            with pytest.raises(UserError, match=f"has answers with threads {threads}, and not {threads + 1}"):
                write(loaded, output=str(path))
        finally:
            torch.set_num_threads(threads)
        monkeypatch.setattr(torch, "__version__", "9.9")
        with pytest.raises(UserError, match=r"has answers with torch .*, and not 9\.9"):
            write(loaded, output=str(path))

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_killed_or_ended_by_a_signal_at_any_line_it_becomes_the_same_file(self, loaded, tmp_path, batch_size):
        path = tmp_path / "a.jsonl"

        def work() -> None:
            interrupt.end_at_once()
            try:
                write(loaded, output=str(path), batch_size=batch_size)
            except Interrupted as interrupted:
                print(interrupted)
                sys.exit(interrupted.code)

        write(loaded, output=str(path), batch_size=batch_size)
        whole = path.read_bytes()
        path.unlink()
        n_operations = len(trace(work, tmp_path).operations)
        assert path.read_bytes() == whole and n_operations >= len(PROMPTS)
        codes = set()
        for number in range(1, n_operations + 1):
            for how in ("kill", "terminate"):
                path.unlink(missing_ok=True)
                ended = trace(work, tmp_path, lambda op, n=number, h=how: h if op.number == n else None)
                codes.add((how, ended.code))
                if ended.code == 143:
                    n_lines = path.read_bytes().count(b"\n") if path.exists() else 0
                    said = f"interrupted by SIGTERM: {path} has {n_lines} of 6 answers, and the same command goes on"
                    assert said in ended.output or "interrupted by SIGTERM\n" in ended.output
                write(loaded, output=str(path), batch_size=batch_size)
                assert path.read_bytes() == whole
        assert codes == {("kill", -9), ("terminate", 143)}


def at(loaded: Loaded, path: Path) -> Loaded:
    return Loaded(loaded.model, loaded.tokenizer_name, loaded.template, loaded.step, path, (path,))


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_command_is_ended_in_the_middle_and_goes_on_to_the_same_file(loaded, tmp_path, number):
    (tmp_path / "prompts.txt").write_text("".join(f"What is disease {n} ?\n" for n in range(300)))

    def start(output: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "generate.py"), f"checkpoint={loaded.path}", "max_new_tokens=40",
                   f"prompts={tmp_path}/prompts.txt", f"output={tmp_path}/{output}", "batch_size=4"]  # fmt: skip
        return subprocess.Popen(command, env=ENVIRONMENT, cwd="/", stderr=subprocess.PIPE, text=True)

    assert start("whole.jsonl").wait(120) == 0
    process, path = start("ended.jsonl"), tmp_path / "ended.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 20:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    n_lines = path.read_bytes().count(b"\n")
    assert 20 <= n_lines < 300
    if number != signal.SIGKILL:
        assert said.endswith(f"{path} has {n_lines} of 300 answers, and the same command goes on\n")
        assert "Traceback" not in said
    assert start("ended.jsonl").wait(120) == 0
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
