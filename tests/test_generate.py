"""generate.py, in this process where an error or a text is looked at, as a command where the command line matters."""

import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, adamw_config, model_config
from test_answers import Screen

import generate
from gpt import optim, tokenizer
from gpt.config import arguments
from gpt.config.data import DISCLAIMER
from gpt.config.schema import GenerateConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import checkpoint, model_file
from gpt.runs.checkpoint import Identity

BYTES = tokenizer.load("bytes")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
MODEL = model_config(context_length=64, tie_weights=False)
QUESTION = 'What is (are) Asthma, the doctor\'s "a = b" ?'


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(MODEL, BYTES.n_vocab)


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory) -> Path:
    """A run of two checkpoints, the first of which is the better one, with last_model.pt as of the second."""
    run_dir = tmp_path_factory.mktemp("run")
    identity = Identity(MODEL, BYTES.n_vocab, "bytes", "plain")
    for step, is_best in [(3, True), (6, False)]:
        progress = Progress(step=step, best=2.0, best_step=step if is_best else 3)
        checkpoint.publish(run_dir, model, optim.build(model, adamw_config()), progress, identity, {}, keep=2)
    model_file.save_model(run_dir / "last_model.pt", model, identity, step=6)
    return run_dir


def settings(path: Path, **changes) -> GenerateConfig:
    defaults = {"prompt": None, "input": "", "prompts": None, "template": None, "max_new_tokens": 8, "temperature": 1.0}
    more = {"export": None, "top_k": None, "top_p": None, "num_samples": 1, "seed": 0, "device": "cpu", "threads": None}
    more |= {"stop": [], "stats": False}
    more |= {"batch_size": 1, "output": None, "lookup": None}
    more["model"] = {"n_head": None, "gelu": None}
    more["precision"] = "float32"
    return GenerateConfig(**{"checkpoint": str(path), **defaults, **more, **changes})


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python generate.py ...` from another directory."""
    return subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), *arguments],
        cwd="/", env=ENVIRONMENT | environment, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def test_a_text_that_a_full_disk_refuses_is_an_error_and_one_that_a_reader_has_left_is_none(run_dir):
    command = f'"{sys.executable}" "{ROOT}/generate.py" checkpoint="{run_dir}" prompt=Hello'

    def done(rest: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command + rest], env=ENVIRONMENT, capture_output=True, text=True
        )

    full = done(" > /dev/full")
    assert full.returncode == 5 and full.stderr.endswith("error: stdout is not written (No space left on device)\n")
    assert done(" | true").returncode == 0


def always(char: str, path: Path) -> Path:
    """A model that has learned to say one character, for ever."""
    model = GPT(MODEL, BYTES.n_vocab)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[BYTES.encode(char)] = 100.0
    model_file.save_model(path, model, Identity(MODEL, BYTES.n_vocab, "bytes", None), step=1)
    return path


class TestTheCommand:
    def test_a_checkpoint_and_a_prompt_are_enough_from_any_directory_and_for_any_punctuation(self, run_dir):
        done = run(f"checkpoint={run_dir}", f"prompt={QUESTION}", PYTHONIOENCODING="ascii", LC_ALL="C")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() and "prompt:" not in done.stdout
        heading, _, prompt, note, _ = done.stderr.split("\n")
        assert heading.startswith(f"{run_dir}/checkpoints/step_00000003: step 3, template plain, temperature 0.8")
        assert prompt == f"prompt: {QUESTION}"
        assert note.startswith("note: ") and "must not guide clinical decisions" in note

    def test_lines_of_standard_input_are_prompts_and_a_pipe_gets_the_texts_alone(self, run_dir):
        command = [sys.executable, str(ROOT / "generate.py"), f"checkpoint={run_dir}", "max_new_tokens=4"]
        command += ["stats=true", "stop=[###]"]
        done = subprocess.run(
            command, input=b"\xef\xbb\xbfCroup\n\nM\xc3\xa9ni\xc3\xa8re\r\n", capture_output=True, cwd="/"
        )
        assert done.returncode == 0 and "prompt: Croup\n\nprompt: M\xe9ni\xe8re\n" in done.stderr.decode(), done
        assert done.stdout.count(b"\n") > 1 and b"prompt" not in done.stdout
        assert re.search(r"\nstatistics: [\d.]+ tokens/s, .* GB/s\n", done.stderr.decode())
        assert b"statistics" not in done.stdout

    def test_a_reader_that_stops_reading_is_no_error(self, run_dir):
        command = f"{sys.executable} {ROOT}/generate.py checkpoint={run_dir} prompt=Croup num_samples=9 | head -1"
        done = subprocess.run(command, shell=True, cwd="/", env=ENVIRONMENT, capture_output=True, text=True)
        assert done.stdout.count("\n") == 1
        assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "code", "line"),
        [
            ([], 2, "error: missing key checkpoint; "),
            (["prompt=hello", "top_q=1"], 2, "error: missing key checkpoint; unknown key top_q, did you mean top_p?"),
            (["checkpoint=/nowhere", "prompt=hello"], 3, "error: no such file or directory (/nowhere)"),
        ],
    )
    def test_an_error_is_one_line_with_its_exit_code(self, arguments, code, line):
        done = run(*arguments)
        assert done.returncode == code
        assert done.stdout == ""
        assert done.stderr.startswith(line)
        assert done.stderr.count("\n") == 1

    def test_help_explains_itself_without_loading_torch(self):
        command = [sys.executable, "-X", "importtime", str(ROOT / "generate.py"), "--help"]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0
        assert "| torch" not in done.stderr
        assert 'python generate.py checkpoint=outputs/runs/mine prompt="What are the symptoms' in done.stdout
        assert "must not guide clinical decisions" in done.stdout
        assert "max_new_tokens: " in done.stdout


class TestPrecision:
    @pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
    def test_text_is_the_same_each_time_and_the_heading_says_the_precision(self, name, run_dir, capsys):
        generate.generate(settings(run_dir, prompt="Croup", precision=name))
        once = capsys.readouterr()
        assert once.err.splitlines()[0].endswith(f", seed 0, {name}") and once.out.strip()
        generate.generate(settings(run_dir, prompt="Croup", precision=name))
        assert capsys.readouterr() == once

    def test_what_is_exported_in_int8_writes_what_the_checkpoint_does_in_int8(self, run_dir, tmp_path, capsys):
        generate.generate(settings(run_dir, export=str(tmp_path / "small"), precision="int8"))
        assert capsys.readouterr().out == f"{tmp_path}/small\n"
        texts = []
        for path, name in ((run_dir, "int8"), (tmp_path / "small", None)):
            generate.generate(settings(path, prompt="Croup", precision=name))
            done = capsys.readouterr()
            texts.append(done.out)
            assert ", int8\n" in done.err
        assert texts[0] == texts[1]


class TestText:
    def test_too_large_a_batch_is_one_line_with_what_to_do(self, run_dir, monkeypatch):
        def too_much(*shape):
            return torch.empty(2**60)  # as the keys of many rows

        monkeypatch.setattr(torch.Tensor, "new_zeros", too_much)
        with pytest.raises(UserError, match=r"out of memory: .*; lower batch_size") as error:
            generate.generate(settings(run_dir, prompt="Croup", num_samples=2, batch_size=2))
        assert error.value.code == 5 and "\n" not in str(error.value)

    def test_samples_are_numbered_and_come_out_the_same_each_time(self, run_dir, capsys):
        generate.generate(settings(run_dir, prompt="Croup", num_samples=2))
        once = capsys.readouterr()
        assert [line for line in once.err.split("\n") if "sample" in line] == ["sample 1 of 2:", "sample 2 of 2:"]
        generate.generate(settings(run_dir, prompt="Croup", num_samples=2))
        assert capsys.readouterr() == once

    def test_every_prompt_of_a_file_gets_the_text_that_it_gets_alone(self, run_dir, tmp_path, capsys):
        file = tmp_path / "prompts.txt"
        file.write_text("Croup\r\n\nWhat is Asthma ?\n")
        generate.generate(settings(run_dir, prompts=str(file)))
        together = capsys.readouterr()
        assert "prompt: Croup\n\nprompt: What is Asthma ?\n" in together.err
        alone = []
        for prompt in ["Croup", "What is Asthma ?"]:
            generate.generate(settings(run_dir, prompt=prompt))
            alone.append(capsys.readouterr().out)
        assert together.out == "\n".join(alone)

    def test_records_bring_their_own_input_and_it_enters_the_template(self, run_dir, tmp_path, capsys):
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"instruction": "Sort.", "input": "b, a"}\n{"instruction": "Croup", "output": "ignored"}\n')
        generate.generate(settings(run_dir, prompts=str(file)))
        from_file = capsys.readouterr()
        assert "prompt: Sort.\ninput: b, a\n" in from_file.err
        generate.generate(settings(run_dir, prompt="Sort.\nb, a"))  # what the plain template makes of it
        assert from_file.out.startswith(capsys.readouterr().out + "\n")

    @pytest.mark.parametrize(
        "name, content",
        [
            ("p.JSONL", '{"instruction": "Sort.", "input": "b, a"}\n{"instruction": "Croup", "input": null}\n'),
            ("p.json", '[{"instruction": "Sort.", "input": "b, a"},\n {"instruction": "Croup"}]'),
            ("p.csv", 'instruction,input\nSort.,"b, a"\nCroup,\n'),
            ("p.csv", '"prompt";"input"\nSort.;"b, a"\nCroup;\n'),
            ("p.tsv", "n\tquestion\tinput\n1\tSort.\tb, a\n2\tCroup\t\n"),
            ("prompts.txt", '{"instruction": "Sort.", "input": "b, a"}\n{"instruction": "Croup"}\n'),
            ("p.json", '{"data": [{"prompt": "Sort.", "input": "b, a"}, {"prompt": "Croup"}]}'),
        ],
    )
    def test_records_may_come_in_each_format_of_data(self, run_dir, tmp_path, capsys, name, content):
        (tmp_path / name).write_text(content)
        generate.generate(settings(run_dir, prompts=str(tmp_path / name)))
        out = capsys.readouterr().err
        assert "prompt: Sort.\ninput: b, a\n" in out and "prompt: Croup\n" in out and out.count("input: ") == 1

    def test_the_last_model_and_a_checkpoint_directory_work_like_a_run_directory(self, run_dir, capsys):
        texts = []
        for path in [run_dir, run_dir / "checkpoints" / "step_00000006", run_dir / "last_model.pt"]:
            generate.generate(settings(path, prompt="Croup"))
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] == texts[2]

    def test_another_template_than_the_checkpoints_own_can_be_chosen(self, run_dir, capsys):
        generate.generate(settings(run_dir / "last_model.pt", prompt="Croup", template="alpaca"))
        assert "template alpaca" in capsys.readouterr().err

    def test_control_characters_of_model_and_prompt_are_shown_not_sent_to_the_terminal(self, tmp_path, capsys):
        generate.generate(settings(always("\x1b", tmp_path / "esc.pt"), prompt="a\x07b\u202e", max_new_tokens=2))
        printed = capsys.readouterr()
        assert "prompt: a\\x07b\\u202e\n" in printed.err and printed.out == "\\x1b\\x1b\n"

    def test_line_ends_in_the_text_stay(self, tmp_path, capsys):
        generate.generate(settings(always("\n", tmp_path / "lines.pt"), prompt="a", max_new_tokens=3))
        assert capsys.readouterr().out == "\n\n\n\n"

    @pytest.mark.parametrize(
        ("card", "note"), [({"notice": "Be careful\x1b."}, "note: Be careful\\x1b.\n"), ({"notice": None}, ""),
                           ({}, f"note: {DISCLAIMER}\n")],
    )  # fmt: skip
    def test_the_notice_of_the_data_follows_and_where_none_is_known_the_general_one(
        self, model, tmp_path, capsys, card, note
    ):
        identity = Identity(MODEL, BYTES.n_vocab, "bytes", None)
        optimizer = optim.build(model, adamw_config())
        checkpoint.publish(tmp_path, model, optimizer, Progress(step=3), identity, {"data": {"card": card}}, keep=1)
        generate.generate(settings(tmp_path, prompt="Once upon a time"))
        assert capsys.readouterr().err.partition("prompt: Once upon a time\n")[2] == note


class TestErrors:
    def fails(self, code: int, message: str, path: Path, **changes) -> None:
        with pytest.raises(UserError, match=message) as error:
            generate.generate(settings(path, **changes))
        assert error.value.code == code
        assert "\n" not in str(error.value)

    def test_prompt_and_prompts_together(self, run_dir):
        self.fails(2, "prompt and prompts are both given", run_dir, prompt="a", prompts="b.txt")

    @pytest.mark.parametrize("batch_size", [2, "auto"])
    def test_guessed_tokens_in_a_batch(self, run_dir, batch_size):
        message = f"lookup is for one text at a time .batch_size={batch_size}.; leave out one"
        self.fails(2, message, run_dir, prompt="a", lookup=4, batch_size=batch_size)

    def test_an_output_that_cannot_be_written_before_the_checkpoint_is_looked_at(self, tmp_path):
        output = str(tmp_path / "nowhere" / "a.jsonl")
        self.fails(5, "cannot be written: No such file", tmp_path / "no_checkpoint", prompt="a", output=output)

    @pytest.mark.parametrize("prompt", ["", " \n"])
    def test_an_empty_prompt(self, run_dir, prompt):
        self.fails(2, "the prompt is empty", run_dir, prompt=prompt)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("empty.txt", b"\n \n", "the prompt is empty"),
            ("latin.txt", b"Croup\nM\xe9ni\xe8re", "latin.txt:2: not UTF-8 at byte 7"),
            ("broken.jsonl", b'{"instruction": "a"}\n{"instr', "broken.jsonl:2: invalid JSON"),
            (
                "other.jsonl",
                b'{"text": "a"}\n',
                "other.jsonl:1: no column instruction or prompt or question among text",
            ),
            ("number.jsonl", b'{"instruction": "a", "input": 3}\n', "number.jsonl:1: instruction"),
            ("surrogate.jsonl", b'{"instruction": "\\ud800"}\n', "surrogate.jsonl:1: .*lone surrogate"),
            ("nothing.jsonl", b"", "is empty"),
            ("list.csv", b"What is Croup ?\nWhy ?\n", "list.csv:1: no column instruction .*name a column instruction"),
            ("sheet.xlsx", b"PK\x03\x04", "sheet.xlsx is a spreadsheet; save it as CSV"),
        ],
    )
    def test_a_file_of_prompts_that_cannot_be_used(self, run_dir, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        self.fails(2, message, run_dir, prompts=str(tmp_path / name))

    def test_a_file_of_prompts_that_is_not_there(self, run_dir, tmp_path):
        self.fails(2, f"no such file .{tmp_path}/prompts.txt", run_dir, prompts=str(tmp_path / "prompts.txt"))

    def test_an_input_for_a_model_of_plain_text(self, tmp_path):
        self.fails(2, "an input needs a template", always("a", tmp_path / "a.pt"), prompt="Sort.", input="b, a")

    def test_several_samples_or_an_input_without_a_template_in_a_conversation(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "stdin", Screen())
        monkeypatch.setattr(sys, "stdout", Screen())
        path = always("a", tmp_path / "a.pt")
        self.fails(2, r"one answer to each turn .num_samples=2.; give a prompt", path, num_samples=2)
        self.fails(2, "an input needs a template", path, input="b, a")

    def test_a_device_that_is_not_there(self, run_dir):
        self.fails(5, "device=cuda:99 is not available", run_dir, prompt="a", device="cuda:99")

    def test_a_path_where_nothing_is(self, tmp_path):
        self.fails(3, "no such file or directory", tmp_path / "nothing", prompt="a")

    def test_a_directory_and_a_file_that_are_no_checkpoints(self, tmp_path):
        self.fails(3, "an empty directory", tmp_path, prompt="a")
        (tmp_path / "notes.txt").write_text("not a model")
        self.fails(3, "not a", tmp_path / "notes.txt", prompt="a")

    def test_a_hostile_pickle_is_refused_and_not_executed(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "executed",))

        (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))
        torch.save({"format": 1, "model": Hostile(), "weights": {}}, tmp_path / "hostile_zip.pt")
        for name in ["hostile.pt", "hostile_zip.pt"]:
            self.fails(3, name, tmp_path / name, prompt="a")
        assert not (tmp_path / "executed").exists()

    def test_a_prompt_longer_than_the_context_is_a_warning_with_both_counts(self, run_dir, capsys, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)  # console.setup() turns it off
        generate.generate(settings(run_dir / "last_model.pt", prompt="x" * 100))
        assert caplog.messages == ["the prompt has 101 tokens, the context 64: only its last 56 are used"]


class TestFreeTextOnTheCommandLine:
    @pytest.mark.parametrize(
        "text",
        ["What are the symptoms of Glaucoma?", "Hello, I am", "What's this?", "a=b", "a: b", "What is (are) Asthma ?",
         "'tis", "5", "true", "[1, 2]", "{a: b}", "naïve 漢字!", '"quoted" word', "${seed}", r"a\${b", r"\\${b} \ '",
         "two\nlines", " space ", "ends in \\", "'a' or 'b'", "", "~/x (1)/y,z"],
        ids=ascii,
    )  # fmt: skip
    def test_what_is_typed_after_prompt_is_what_the_model_reads(self, text):
        assert self.composed(f"prompt={text}") == text

    @pytest.mark.parametrize("typed", ["'What, exactly?'", '"What, exactly?"'])
    def test_quotes_of_hydra_are_still_understood(self, typed):
        assert self.composed(f"prompt={typed}") == "What, exactly?"

    def test_null_is_no_prompt(self):
        assert self.composed("prompt=null") is None

    def test_other_keys_keep_hydras_grammar(self):
        assert arguments.taken_as_typed("temperature=0,1", may_be_several=True) == ["temperature=0,1"]

    def composed(self, argument: str) -> str | None:
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf

        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            quoted = arguments.taken_as_typed(argument, may_be_several=False)
            return OmegaConf.to_container(compose("generate", overrides=quoted), resolve=True)["prompt"]
