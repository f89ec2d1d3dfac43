"""Whatever a model writes and files are called or hold: no control byte and no bidi mark reaches a terminal."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, model_config

from gpt import tokenizer
from gpt.data import rows
from gpt.errors import UserError
from gpt.model import GPT
from gpt.notebook import train_model_simple
from gpt.prompts import format_prompt
from gpt.runs.checkpoint import Identity
from gpt.runs.model_file import save_model
from gpt.terminal import console

BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
CONTROL = [*range(0x20), 0x7F, *range(0x80, 0xA0)]
HARMFUL = {chr(code) for code in CONTROL + BIDI}
TEXT = "".join(chr(code) for code in CONTROL + BIDI if code)  # files with a NUL are refused
CODES = [ord(char) for char in TEXT]


def harmful_in(output: bytes, kept: str = "\n\t") -> list[str]:
    """The characters and bytes of an output that a terminal would obey. Fails for what is not UTF-8."""
    return [ascii(c) for c in output.decode() if c in HARMFUL and c not in kept]


def escapes_in(output: bytes) -> int:
    """How many of these characters an output shows as escapes."""
    return sum(output.count(shown(code).encode()) for code in CONTROL + BIDI)


def shown(code: int) -> str:
    short = {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"}
    return short.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})


def a_model_that_says(ids: list[int], after: int, n_vocab: int) -> GPT:
    """Greedy sampling after a prompt of `after` tokens gives these ids: a position holds the code of the next one."""
    model = GPT(model_config(n_layer=1, n_embd=64, context_length=after + len(ids), tie_weights=False), n_vocab)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.ln_f.weight.fill_(1.0)
        model.lm_head.weight[:] = 0
        codes = torch.randn(len(set(ids)), 64, generator=torch.Generator().manual_seed(0))
        for code, token in zip(codes, dict.fromkeys(ids), strict=True):
            model.lm_head.weight[token] = code
        model.wpe.weight[after - 1 : after - 1 + len(ids)] = model.lm_head.weight[ids]
    return model


def test_all_byte_tokens_of_gpt2_bidi_marks_prompts_and_names_through_generate(tmp_path, record_property):
    tokens = tokenizer.load("gpt2")
    marks = "".join(chr(code) for code in [*range(0x80, 0xA0), *BIDI]).encode()
    ids = [*range(256), *(tokens.encoding.encode_single_token(bytes([byte])) for byte in marks)]
    assert sorted(b"".join(tokens.encoding.decode_single_token_bytes(i) for i in ids[:256])) == list(range(256))
    after = len(tokens.encode(format_prompt("plain", TEXT, TEXT)))
    folder = tmp_path / TEXT
    folder.mkdir()
    model = a_model_that_says(ids, after, tokens.n_vocab)
    save_model(folder / "m.pt", model, Identity(model.config, tokens.n_vocab, "gpt2", "plain"), step=1)
    (folder / "p.jsonl").write_text(json.dumps({"instruction": TEXT, "input": TEXT}))

    done = run("generate.py", f"checkpoint={folder}/m.pt", f"prompts={folder}/p.jsonl", "temperature=0",
               f"max_new_tokens={len(ids)}", "device=cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert harmful_in(done.stdout) == harmful_in(done.stderr) == []
    heading, _, prompt, given, *_ = done.stderr.split(b"\n")
    text = done.stdout
    for line in (heading, prompt, given):
        assert all(shown(code) in line.decode() for code in CODES), line
    assert text.decode() == console.escape(tokens.decode(ids), keep_newlines=True) + "\n"
    assert [code for code in CONTROL + BIDI if shown(code) not in text.decode()] == [0x09, 0x0A]  # these two are kept
    said = f"256 byte tokens, 32 C1 controls and {len(BIDI)} bidi marks from a model, a prompt and a name"
    n_harmful = len(harmful_in(done.stdout) + harmful_in(done.stderr))
    record_property("count", f"terminal: {said}: {escapes_in(done.stdout)} escapes, {n_harmful} control bytes")


def test_rows_and_names_through_prepare_data(tmp_path):
    """Bad rows are listed in warnings, and the directory is the last line."""
    folder = tmp_path / TEXT
    folder.mkdir()
    good = [
        {"question": f"q{i} {TEXT}", "answer": f"a{i} {TEXT}", "source": TEXT, "focus_area": f"{i}"} for i in range(30)
    ]
    bad = [{"question": TEXT, "answer": [TEXT]}, {"question": TEXT, TEXT: 1}, {TEXT: "\0"}, {TEXT: "\ud800"}, TEXT]
    lines = [
        *map(json.dumps, good + bad),
        f'{{"{chr(0x9B)}\u202e": 1, "{chr(0x9B)}\u202e": 1}}',
        "{" + TEXT.replace("\n", ""),
    ]
    (folder / f"{TEXT}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "data.jsonl").symlink_to(folder / f"{TEXT}.jsonl")
    link = tmp_path / "made"
    link.symlink_to(folder, target_is_directory=True)  # Hydra's grammar has no way to spell such a name

    done = run("prepare_data.py", f"data.path={link}/../data.jsonl", f"data.prepared_dir={link}/out",
               "data.on_bad_row=skip")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert harmful_in(done.stderr) == []
    assert b"7 bad rows left out" in done.stderr
    assert rb"key '\x9b\u202e' occurs twice" in done.stderr and escapes_in(done.stderr) > 50
    assert harmful_in(done.stdout) == []
    assert all(shown(code) in done.stdout.decode().splitlines()[-1] for code in CODES)


def test_samples_lists_tables_log_lines_and_errors(capsysbinary, tmp_path, logger):
    console.setup()
    with console.log_to(tmp_path / "train.log"):
        console.show_samples([{"prompt": TEXT, "text": TEXT}])
        console.say(TEXT)
        console.describe(data=TEXT)
        logging.getLogger("gpt.test").warning("careful: %s", TEXT)
        console.error(TEXT)
    print(console.table([{"job": TEXT, TEXT: TEXT, "loss": 1.5}], ["job", TEXT, "loss"]))
    console.say("the end")
    out, err = capsysbinary.readouterr()
    assert out.endswith(b"the end\n")
    assert harmful_in(out) == harmful_in(err) == harmful_in((tmp_path / "train.log").read_bytes()) == []
    assert min(escapes_in(out), escapes_in(err)) > 100


def test_names_that_are_not_utf8_and_errors_about_files(tmp_path, capsysbinary, logger):
    """Each error as it is printed by gpt.config.launch."""
    name = TEXT.replace("\n", "") + os.fsdecode(b"\xff")
    files = {"a": b"", "b": b"q,a\n", "c": b"q,q\n", "d": b"\xff\xfeq", "e": b"q\n\xff", "f": b"q\n\0", "g": b'q\n"',
             "h": TEXT.replace("\r", "").encode() + b",a\nq,a,b\n"}  # fmt: skip
    for start, content in files.items():
        path = tmp_path / f"{start}{name}.csv"
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            list(rows.read(path, rows.BadRows("error")))
        console.error(str(caught.value))
    with pytest.raises(UserError) as caught:
        list(rows.read(tmp_path / name, rows.BadRows("error")))
    console.error(str(caught.value))
    out, err = capsysbinary.readouterr()
    assert harmful_in(err) == [] and out == b""
    assert err.count(b"error: ") == err.count(b"\n") == len(files) + 1
    assert escapes_in(err) >= len(set(CODES) - {0x0A}) * (len(files) + 1)


def test_the_notebooks_loop_prints_its_sample(capsysbinary):
    tokens = tokenizer.load("bytes")
    model = a_model_that_says([*range(50)], len(tokens.encode(TEXT)), tokens.n_vocab)
    train_model_simple(model, [], [], None, "cpu", 1, 1, 1, TEXT, tokens)  # no batch, so no optimizer
    out, err = capsysbinary.readouterr()
    assert harmful_in(out) == [] and err == b""
    assert escapes_in(out) > 100 and out.decode().endswith("+,-./01\n")
