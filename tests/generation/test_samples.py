"""The samples of prompts: the same texts in a pipe and on a terminal, where Ctrl-C ends one of them."""

import os
import signal
import sys

import pytest
import torch
from conftest import model_config
from test_answers import Screen
from test_generate import settings

from gpt import sampling, tokenizer
from gpt.errors import Interrupted, UserError
from gpt.generation import samples
from gpt.model import GPT
from gpt.prompts import format_prompt
from gpt.runs import interrupt
from gpt.terminal.console import escape

BYTES = tokenizer.load("bytes")
PROMPTS = [("Croup", ""), ("Asthma", "mild")]


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(model_config(context_length=64, tie_weights=False), BYTES.n_vocab).eval()


@pytest.fixture
def ended_at_once(handlers):
    interrupt.end_at_once()


def write(model, prompts=PROMPTS, **changes) -> None:
    samples.write(settings("unused", **changes), prompts, "plain", model, BYTES)


def whole(model, prompt: tuple[str, str], **changes) -> list[str]:
    """The samples of a prompt as `sampling.generate` gives them."""
    cfg = settings("unused", **changes)
    ids, draws = BYTES.encode(format_prompt("plain", *prompt)), sampling.Draws.of(cfg, BYTES.eos)
    drawn = sampling.generate(model, ids, draws, num_samples=cfg.num_samples, seed=cfg.seed)
    return [BYTES.decode(ids) for ids in drawn]


def shown(texts: list[str]) -> str:
    return "\n".join(f"{escape(text, keep_newlines=True)}\n" for text in texts)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_each_sample_is_that_of_generate_with_an_empty_line_before_the_next(model, is_terminal, monkeypatch, capsys):
    texts = [text for prompt in PROMPTS for text in whole(model, prompt, num_samples=2)]
    if is_terminal:
        monkeypatch.setattr(sys, "stdout", screen := Screen())
    write(model, num_samples=2)
    assert (screen.getvalue() if is_terminal else capsys.readouterr().out) == shown(texts)


def test_a_stop_string_ends_each_text_and_is_no_part_of_it(model, capsys):
    text = whole(model, PROMPTS[0], max_new_tokens=30)[0]
    stop = text[5:7]
    write(model, PROMPTS[:1], max_new_tokens=30, stop=["never in it", stop])
    assert capsys.readouterr().out == shown([text[: text.index(stop)]])


class Pressed(Screen):
    """A terminal at which Ctrl-C is pressed when it has received so many characters, for each number once."""

    def __init__(self, *at: int) -> None:
        super().__init__()
        self.at = list(at)

    def write(self, text: str) -> int:
        n = super().write(text)
        if self.at and len(self.getvalue()) >= self.at[0]:
            del self.at[0]
            os.kill(os.getpid(), signal.SIGINT)
        return n


def test_on_a_terminal_ctrl_c_ends_a_sample_and_the_others_follow(model, monkeypatch, ended_at_once):
    monkeypatch.setattr(sys, "stdout", screen := Pressed(3))
    write(model, num_samples=2, max_new_tokens=20)
    texts = [text for prompt in PROMPTS for text in whole(model, prompt, num_samples=2, max_new_tokens=20)]
    first, others = screen.getvalue().split("\n\n", 1)
    assert shown(texts[:1]).startswith(first) and 3 <= len(first) < len(shown(texts[:1])) / 2
    assert others == shown(texts[1:])


def test_of_the_last_sample_and_a_second_time_at_once_it_ends_the_process(model, monkeypatch, ended_at_once):
    monkeypatch.setattr(interrupt, "AT_ONCE", 60.0)  # a busy machine may be slow
    for pressed, n_prompts in ((Pressed(3), 1), (Pressed(3, 4), 2)):
        monkeypatch.setattr(sys, "stdout", pressed)
        interrupt.end_at_once()
        with pytest.raises(Interrupted, match="SIGINT"):
            write(model, PROMPTS[:n_prompts], max_new_tokens=20)
        assert pressed.getvalue().endswith("\n")


def test_in_a_pipe_it_ends_the_process(model, capsys, ended_at_once):
    passes = []

    def press(*_) -> None:
        passes.append(1)
        if len(passes) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    hook = model.h[0].register_forward_pre_hook(press)
    with pytest.raises(Interrupted):
        write(model)
    hook.remove()
    assert capsys.readouterr().out == ""


def test_numbers_that_are_not_finite_are_a_numerical_stop_and_a_pipe_gets_none_of_that_text(model, capsys):
    broken = GPT(model.config, BYTES.n_vocab).eval()
    torch.nn.init.constant_(broken.ln_f.weight, torch.nan)
    with pytest.raises(UserError, match="not finite") as error:
        write(broken)
    assert error.value.code == 4 and capsys.readouterr().out == ""


def test_the_speed_is_one_line_on_stderr(model, capsys):
    write(model, stats=True)
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("statistics: ") and " tokens/s, " in err.splitlines()[-1]
    write(model)
    assert capsys.readouterr().out == out
