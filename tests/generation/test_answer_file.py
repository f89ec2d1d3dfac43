"""A file of answers is gone on with where it ends, and nobody's file is harmed."""

import errno
import json
import os
import resource
import signal

import pytest
from tracing import trace

from gpt.errors import UserError
from gpt.files import jsonl
from gpt.generation import answer_file
from gpt.generation.answer_file import opened

SETTINGS = {"weights": "ab12", "temperature": 0.8, "top_k": None, "stop": ["###"]}
PROMPTS = ("Croup ?", 'M\xe9ni\xe8re "a"\n', "\x1b[31m\u202e")
QUESTIONS = [{"prompt": prompt, "input": "", "sample": sample} for prompt in PROMPTS for sample in (1, 2)]


def about(question: dict) -> dict:
    return {"text": f"{question['prompt']} {question['sample']} NaN", "tokens": 5, "finish_reason": "stop"}


def write_all(path, questions=QUESTIONS, settings=SETTINGS) -> int:
    """Adds what is missing, as generate.py does; returns how many there were."""
    with opened(path) as file:
        n_done = file.go_on(questions, settings)
        for question in questions[n_done:]:
            file.append(question, about(question), settings)
    return n_done


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def test_each_answer_is_a_line_that_anybody_can_read_and_a_terminal_can_show(path):
    assert write_all(path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [question | about(question) | {"settings": SETTINGS} for question in QUESTIONS]
    assert all(32 <= byte < 127 for byte in path.read_bytes().replace(b"\n", b""))
    assert write_all(path) == 6


def test_cut_at_any_third_byte_the_file_is_gone_on_with_after_its_last_whole_line_to_the_same_bytes(path):
    write_all(path)
    whole = path.read_bytes()
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        assert write_all(path) == whole[:end].count(b"\n")
        assert path.read_bytes() == whole


def test_killed_before_any_operation_on_the_file_it_is_gone_on_with(path):
    write_all(path)
    whole = path.read_bytes()
    path.unlink()
    operations = trace(lambda: write_all(path), path.parent).operations
    path.unlink()
    assert len(operations) >= len(QUESTIONS)
    for number in range(1, len(operations) + 1):
        killed = trace(lambda: write_all(path), path.parent, lambda op, n=number: "kill" if op.number == n else None)
        assert killed.code == -9
        write_all(path)
        assert path.read_bytes() == whole, operations[number - 1]
        path.unlink()


def test_more_prompts_at_the_end_are_answered_and_the_first_ones_stay(path):
    write_all(path, QUESTIONS[:2])
    assert write_all(path) == 2
    assert path.read_bytes().count(b"\n") == 6


class TestRefusals:
    def refused(self, path, message: str, code: int = 2, **changes) -> None:
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(UserError, match=message) as error:
            write_all(path, **changes)
        assert error.value.code == code and "\n" not in str(error.value)
        assert before is None or path.read_bytes() == before

    def test_other_settings_are_named_with_both_values(self, path):
        write_all(path, QUESTIONS[:2])
        message = "has answers with temperature 0.8, and not 0 .*:1.; name another output, or the settings of these"
        self.refused(path, message, settings=SETTINGS | {"temperature": 0})
        self.refused(path, "weights ab12, and not cd34", settings=SETTINGS | {"weights": "cd34"})
        self.refused(path, "precision none, and not int8", settings=SETTINGS | {"precision": "int8"})

    def test_other_prompts_are_named_by_their_line(self, path):
        write_all(path)
        self.refused(path, "has another prompt, .*ni.*and not Croup.*answers.jsonl:3", questions=QUESTIONS[:2] * 3)
        self.refused(path, "has another sample, 2 and not 1", questions=QUESTIONS[:1] * 6)
        self.refused(path, "has 6 answers, and 2 are to be given", questions=QUESTIONS[:2])

    @pytest.mark.parametrize(
        "content", [b"notes of mine", b"notes of mine\n", b"\n", b"{}\n", b"[" * 100_000 + b"\n", b'{"prompt": "Other',
                    b'{"prompt": "a", "input": "", "sample": 1, "text": "b", "settings": 3}\n', b"\xff\n"],
        ids=lambda content: str(content[:12]),
    )  # fmt: skip
    def test_a_file_of_something_else_stays_as_it_is(self, path, content):
        path.write_bytes(content)
        self.refused(path, "not an answer that generate.py has written .*answers.jsonl:1.; name another output")

    def test_a_line_of_something_else_after_answers_stays_too(self, path):
        write_all(path)
        path.write_bytes(path.read_bytes() + b"notes")
        self.refused(path, "not an answer .*:7")

    def test_a_folder_or_a_device_is_no_file(self, path):
        path.mkdir()
        self.refused(path, "not a file")
        with pytest.raises(UserError, match="not a file"):
            write_all(path.parent / ".." / ".." / ".." / ".." / ".." / "dev" / "null")

    def test_a_place_without_a_folder_cannot_be_written(self, path):
        self.refused(path / "a.jsonl", "cannot be written: No such file or directory", code=5)

    def test_a_file_that_another_process_writes_is_in_use(self, path):
        with opened(path) as file:
            file.append(QUESTIONS[0], about(QUESTIONS[0]), SETTINGS)
            self.refused(path, "in use by another process", code=6)


def test_a_check_leaves_no_empty_file_and_a_start_that_fails_leaves_none(path):
    answer_file.check(path)
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), opened(path):
        raise ZeroDivisionError
    assert not path.exists()


def test_a_full_disk_is_one_line_and_no_part_of_an_answer_stays(path):
    write_all(path, QUESTIONS[:3])
    kept = path.read_bytes()

    def full(operation):
        return errno.ENOSPC if operation.name == "write" else None

    done = trace(lambda: write_all(path), path.parent, full)
    assert done.code == 5
    assert (
        done.output
        == f"error: answer not written: disk full ({path}); its 3 answers are whole, and the same command goes on\n"
    )
    assert path.read_bytes() == kept
    write_all(path)
    assert path.read_bytes().count(b"\n") == 6


def test_a_disk_that_takes_a_part_of_a_line_gets_it_back(path):
    """Linux writes what fits and refuses the rest: a limit of the process's file size does the same."""
    write_all(path, QUESTIONS[:2])
    kept = path.read_bytes()

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 10, len(kept) + 10))
        write_all(path)

    assert trace(limited, path.parent).code == 5
    assert path.read_bytes() == kept


def test_whole_lines_are_written_at_once(tmp_path):
    """Another process that reads the file sees no half of a line."""
    operations = trace(lambda: write_all(tmp_path / "a.jsonl"), tmp_path).operations
    assert sum(operation.name == "write" for operation in operations) == len(QUESTIONS)
    assert os.path.getsize(tmp_path / "a.jsonl") == sum(
        len(jsonl.as_line(q | about(q) | {"settings": SETTINGS})) for q in QUESTIONS
    )
