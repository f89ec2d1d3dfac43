"""A conversation as a person has it: what is typed, commands, keys, and a terminal."""

import json
import os
import signal
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, model_config
from pseudo_terminal import CTRL_C, CTRL_D, ENTER, Terminal
from test_conversation import alone, writing
from test_generate import settings

import generate
from gpt import tokenizer
from gpt.config import launch
from gpt.errors import Interrupted
from gpt.generation import dialogue
from gpt.generation.conversation import Conversation
from gpt.model import GPT
from gpt.runs import interrupt, model_file
from gpt.runs.checkpoint import Identity
from gpt.terminal import console

BYTES = tokenizer.load("bytes")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(model_config(context_length=64, tie_weights=False), BYTES.n_vocab).double().eval()


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Lines are not broken, unless a test wants it."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(autouse=True)
def ended_at_once(handlers):
    interrupt.end_at_once()


def opened(model, template="plain", **changes) -> Conversation:
    return Conversation(model, BYTES, template, settings("unused", **{"max_new_tokens": 6, **changes}))


def typing(*lines: str | BaseException):
    """A person who types these lines, or presses the key that raises an exception, and then Ctrl-D."""
    left = [*lines, EOFError()]

    def read(prompt: str) -> str:
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def said(capsys, conversation: Conversation, *lines: str | BaseException) -> tuple[str, list[str]]:
    """stdout, and the remarks after the first one."""
    dialogue.talk(conversation, typing(*lines))
    out, err = capsys.readouterr()
    assert err.startswith(dialogue.HINT)
    return out, err.removeprefix(dialogue.HINT).strip("\n").splitlines()


class TestWhatIsTyped:
    @pytest.mark.parametrize(
        ("lines", "text"),
        [
            (["one"], "one"),
            (["one\\", "two\\", "three"], "one\ntwo\nthree"),
            (['"""one', "", "two", '"""'], "one\n\ntwo"),
            (['"""one"""'], "one"),
            (['"""', "one \\", 'two"""  '], "one \\\ntwo"),
            (["pasted\nblock"], "pasted\nblock"),
        ],
    )
    def test_a_turn_is_a_line_or_several_that_belong_together(self, lines, text):
        read = typing(*lines)
        assert dialogue.read_turn(read) == text
        with pytest.raises(EOFError):
            read("")

    def test_each_text_is_answered_and_the_end_of_the_input_ends_it(self, model, capsys):
        conversation = opened(model)
        out, remarks = said(capsys, conversation, "Croup ?", "", "  ", " Why ? ")
        assert [turn.written for turn in conversation.turns] == ["Croup ?", "Why ?"] and remarks == []
        texts = [console.escape(turn.text, keep_newlines=True) for turn in conversation.turns]
        assert out == "".join(f"{text}\n\n" for text in texts) + "\n"
        assert conversation.turns[0].text == alone(model, "Croup ?\n", max_new_tokens=6)

    def test_one_text_goes_on_where_enter_is_pressed(self, model, capsys):
        conversation = opened(model, None)
        said(capsys, conversation, "", "Once ", "")
        assert [turn.written for turn in conversation.turns] == ["Once ", ""]

    def test_control_characters_are_answered_and_those_of_an_answer_are_shown(self, capsys):
        conversation = Conversation(
            writing("\x1b\x07", after=6), BYTES, "plain", settings("unused", max_new_tokens=2, temperature=0.0)
        )
        assert said(capsys, conversation, "\x1b[2J\0")[0].startswith("\\x1b\\x07\n")

    def test_a_line_that_is_not_utf_8_is_dropped(self, model, capsys):
        wrong = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        _, remarks = said(capsys, conversation := opened(model), wrong, "a")
        assert remarks == ["that is not UTF-8, and is dropped"] and len(conversation.turns) == 1

    @pytest.mark.parametrize("error", [EOFError(), OSError(5, "Input/output error")])
    def test_a_terminal_that_is_gone_is_the_end_of_the_input(self, model, capsys, error):
        assert said(capsys, opened(model), error, "not read") == ("\n", [])


class TestCommands:
    def test_quit_ends_it(self, model, capsys):
        assert said(capsys, opened(model), "/quit", "not read") == ("", [])

    @pytest.mark.parametrize("columns", ["30", "80"])
    def test_help_names_each_command_and_fits_the_terminal(self, model, capsys, monkeypatch, columns):
        monkeypatch.setenv("COLUMNS", columns)
        dialogue.talk(opened(model), typing("/help"))
        lines = capsys.readouterr().err.splitlines()
        assert all(any(line.startswith(f"{name} ") for line in lines) for name in dialogue.COMMANDS)
        assert max(map(len, lines)) <= int(columns)

    def test_reset_forgets_turns_and_the_first_answer_comes_again(self, model, capsys):
        conversation = opened(model)
        _, remarks = said(capsys, conversation, "a", "b", "/reset", "a")
        assert remarks == ["all turns are forgotten"] and len(conversation.turns) == 1
        assert conversation.turns[0].text == alone(model, "a\n", max_new_tokens=6)

    def test_system_is_what_the_model_reads_first(self, model, capsys):
        conversation = opened(model)
        _, remarks = said(capsys, conversation, "/system Be kind.", "a", "/system", "b")
        assert remarks == [f"the conversation begins with {what}" for what in ("that", "the header of the template")]
        assert conversation.turns[0].text == alone(model, "Be kind.\n\na\n", max_new_tokens=6)
        assert said(capsys, opened(model, None), "/system x")[1][0].startswith("a model of plain text")

    def test_temperature_holds_from_the_next_answer_on(self, model, capsys):
        conversation = opened(model)
        _, remarks = said(
            capsys, conversation, "/temperature 0", "a", "/temperature", "/temperature -1", "/temperature nan"
        )
        assert conversation.turns[0].text == alone(model, "a\n", max_new_tokens=6, temperature=0.0)
        needed = ["a number from 0 on is needed, such as /temperature 0.8", "temperature 0"]
        assert remarks == ["temperature 0", *needed * 3]

    def test_save_writes_a_new_file_relative_to_where_the_user_is(self, model, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        conversation = opened(model)
        _, remarks = said(
            capsys, conversation, "a", "/save", "/save x.jsonl", "/save x.jsonl", "/save no/x", "/save a\0b"
        )
        assert json.loads((tmp_path / "x.jsonl").read_text()) == conversation.record()
        assert remarks[1:4] == [
            f"saved: {tmp_path}/x.jsonl", f"there is a {tmp_path}/x.jsonl already; choose another name",
            "not saved: No such file or directory (no/x)",
        ]  # fmt: skip
        assert remarks[4] == "not saved: a path has no NUL byte (a\\x00b)"
        assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]

    def test_another_word_is_no_command_and_two_slashes_begin_a_text(self, model, capsys):
        conversation = opened(model)
        _, remarks = said(capsys, conversation, "/sytem x", "//help")
        assert remarks == ["unknown command /sytem; /help lists them, and // begins a text with /"]
        assert conversation.turns[0].written == "/help"


class TestWhatIsSaid:
    def test_turns_that_leave_the_context(self, model, capsys):
        _, remarks = said(capsys, opened(model, max_new_tokens=30), "a" * 20, "b" * 20)
        assert remarks == ["note: the context of 64 tokens has no room for the oldest turn, which is left out"]
        _, remarks = said(capsys, opened(model, None, max_new_tokens=30), "a" * 40)
        assert remarks == ["note: the context of 64 tokens has no room for the first 6 tokens, which are left out"]

    def test_an_answer_that_goes_beyond_the_context(self, model, capsys):
        _, remarks = said(capsys, conversation := opened(model, max_new_tokens=70, seed=1), "a")
        assert len(conversation.turns[0].ids) == 70
        assert " ".join(remarks).startswith("note: the answer went beyond the context of 64 tokens")

    def test_the_speed_of_each_answer(self, model, capsys):
        _, remarks = said(capsys, opened(model, stats=True), "a")
        assert remarks[0].startswith("statistics: ") and "tokens/s" in remarks[0]


class TestCtrlC:
    def test_at_the_prompt_it_drops_the_line_and_a_second_one_at_once_ends_the_process(
        self, model, capsys, monkeypatch
    ):
        monkeypatch.setattr(interrupt, "AT_ONCE", 60.0)
        with pytest.raises(Interrupted):
            dialogue.talk(opened(model), typing(Interrupted(signal.SIGINT), Interrupted(signal.SIGINT), "not read"))
        monkeypatch.setattr(interrupt, "AT_ONCE", 0.0)
        conversation = opened(model)
        dialogue.talk(conversation, typing(Interrupted(signal.SIGINT), "a", Interrupted(signal.SIGINT), "b"))
        assert len(conversation.turns) == 2 and "Ctrl-C again at once ends" in capsys.readouterr().err

    def test_another_signal_ends_the_process(self, model):
        with pytest.raises(Interrupted, match="SIGTERM"):
            dialogue.talk(opened(model), typing(Interrupted(signal.SIGTERM), "not read"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The file of a model that writes the letter a, for ever."""
    model = GPT(model_config(context_length=4096, tie_weights=False), BYTES.n_vocab)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[BYTES.encode("a")] = 100.0
    path = tmp_path_factory.mktemp("model") / "a.pt"
    model_file.save_model(path, model, Identity(model.config, BYTES.n_vocab, "bytes", "alpaca"), step=1)
    return path


def opened_in_terminal(path, columns: int = 80, at_once: float = 0.3, **changes) -> Terminal:
    """What `python generate.py` does in a terminal, without Hydra; with so many seconds between two Ctrl-C at once."""

    def command() -> None:
        sys.argv = ["generate.py"]
        interrupt.AT_ONCE = at_once
        cfg = settings(path, **{"max_new_tokens": 3000, **changes})
        launch.launch(lambda: generate.generate(cfg), "generate")

    return Terminal(command, columns)


class TestInATerminal:
    def test_keys_edit_lines_and_end_answers_in_a_narrow_one(self, endless, tmp_path):
        terminal = opened_in_terminal(endless, columns=30)
        heading = terminal.wait_for("\n> ")
        assert heading.count("must not guide") == 1
        assert max(map(len, heading.partition("\nnote: ")[2].splitlines())) <= 30
        terminal.press(f"hellx\x7fo{ENTER}")
        terminal.wait_for("aaaa")
        terminal.press(CTRL_C)
        terminal.wait_for("\n> ")
        terminal.press(f"\x1b[200~two\nlines\x1b[201~{ENTER}")  # what a terminal makes of a paste
        terminal.wait_for("aaaa")
        time.sleep(0.4)
        terminal.press(CTRL_C)
        terminal.wait_for("\n> ")
        terminal.press("\x1b[A\x1b[A")  # the line before the last one again
        terminal.wait_for("hello")
        time.sleep(0.4)
        terminal.press(CTRL_C)
        assert "\nCtrl-C again at once" in terminal.wait_for("\n> ")
        terminal.press(f"/save {tmp_path}/x{ENTER}")
        terminal.wait_for("saved: ")
        terminal.wait_for("\n> ")
        terminal.press(CTRL_D)
        code, text = terminal.end()
        assert code == 0 and text.strip() == ""
        terminal.close()
        messages = json.loads((tmp_path / "x").read_text())["messages"]
        assert [message["content"] for message in messages[::2]] == ["hello", "two\nlines"]
        assert all(set(message["content"]) == {"a"} for message in messages[1::2])

    def test_two_ctrl_c_at_once_end_the_process(self, endless):
        terminal = opened_in_terminal(endless, at_once=60.0)
        terminal.wait_for("\n> ")
        terminal.press(f"a{ENTER}")
        terminal.wait_for("aaaa")
        terminal.press(CTRL_C)
        terminal.wait_for("\n> ")
        terminal.press(CTRL_C)
        code, text = terminal.end()
        assert code in (130, -signal.SIGINT) and "error: interrupted by SIGINT" in text and "Traceback" not in text
        terminal.close()

    @pytest.mark.parametrize("when", ["at the prompt", "in an answer"])
    def test_a_signal_to_end_ends_the_process_and_leaves_the_terminal_as_it_was(self, endless, when):
        terminal = opened_in_terminal(endless)
        terminal.wait_for("\n> ")
        if when == "in an answer":
            terminal.press(f"a{ENTER}")
            terminal.wait_for("aaaa")
        terminal.send(signal.SIGTERM)
        code, text = terminal.end()
        assert code == 143 and text.endswith("\nerror: interrupted by SIGTERM\n")
        flags = termios.ECHO | termios.ICANON
        assert termios.tcgetattr(terminal.keyboard)[3] & flags == flags
        terminal.close()

    @pytest.mark.parametrize("when", ["at the prompt", "in an answer"])
    def test_a_window_that_is_closed_ends_the_process(self, endless, when):
        terminal = opened_in_terminal(endless)
        terminal.wait_for("\n> ")
        if when == "in an answer":
            terminal.press(f"a{ENTER}")
            terminal.wait_for("aaaa")
        terminal.close()
        assert terminal.wait() == -signal.SIGHUP

    def test_without_the_signal_a_window_that_is_closed_is_the_end_of_the_input(self, endless):
        def command() -> None:
            sys.argv = ["generate.py"]
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
            launch.launch(lambda: generate.generate(settings(endless, max_new_tokens=50)), "generate")

        terminal = Terminal(command)
        terminal.wait_for("\n> ")
        terminal.press(f"a{ENTER}")
        terminal.close()
        assert terminal.wait() == 0

    def test_python_without_readline_has_the_lines_of_the_terminal(self, endless):
        def command() -> None:
            sys.argv = ["generate.py"]
            sys.modules["readline"] = None
            launch.launch(lambda: generate.generate(settings(endless, max_new_tokens=5)), "generate")

        terminal = Terminal(command)
        terminal.wait_for("\n> ")
        terminal.press(f"one\\{ENTER}")
        terminal.wait_for("\n. ")
        terminal.press(f"two{ENTER}")
        assert terminal.wait_for("\n> ") == "two\naaaaa\n\n> "
        terminal.press(CTRL_D)
        assert terminal.end()[0] == 0
        terminal.close()

    def test_numbers_that_are_not_finite_end_it_with_code_4(self, tmp_path):
        model = GPT(model_config(tie_weights=False), BYTES.n_vocab)
        with torch.no_grad():
            model.ln_f.bias.fill_(1e30)
            model.lm_head.weight.fill_(1e30)  # finite, and their product is not
        path = tmp_path / "inf.pt"
        model_file.save_model(path, model, Identity(model.config, BYTES.n_vocab, "bytes", None), step=1)
        terminal = opened_in_terminal(path)
        terminal.wait_for("\n> ")
        terminal.press(f"a{ENTER}")
        code, text = terminal.end()
        assert code == 4 and "error: the model's logits are not finite" in text
        terminal.close()


@pytest.mark.exhaustive
def test_the_command_opens_a_conversation_in_a_terminal(endless):
    command = [sys.executable, str(ROOT / "generate.py"), f"checkpoint={endless}", "max_new_tokens=5", "stats=true"]
    terminal = Terminal(lambda: os.execv(sys.executable, command))
    terminal.wait_for("\n> ")
    terminal.press(f"hello{ENTER}")
    assert " tokens/s" in terminal.wait_for("\n> ")
    terminal.press(f"/quit{ENTER}")
    assert terminal.end()[0] == 0
    terminal.close()
