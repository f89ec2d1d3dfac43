"""What is secret in the environment of a run stays there: it is in no file that the run writes, nothing that it prints
and nothing that W&B receives, but for the key in the header that is made for it."""

import base64
import gzip
import json
import re
import subprocess
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from wandb_server import ROOT, Child, Children, Server, children, command

SECRETS = {
    "WANDB_API_KEY": "c0ffee11" * 5,
    "HF_TOKEN": "hf_CanaryOfTheHubCanaryOfTheHub42",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYCANARYKEY",
    "HTTPS_PROXY": "canary-of-the-proxy",
    "HF_ENDPOINT": "canary-of-the-endpoint",
    "DB_PASSWORD": "canary of the \"database\"",
    "SECRET_SEED": "4027160893551284736",
}  # fmt: skip
# Settings of "train online" that come from the environment: a text and, because it changes the losses, the seed.
INTERPOLATED = {"data.hub": "${oc.env:DB_PASSWORD}", "seed": "${oc.decode:${oc.env:SECRET_SEED}}"}
ENVIRONMENT = SECRETS | {
    "HTTPS_PROXY": f"http://user:{SECRETS['HTTPS_PROXY']}@127.0.0.1:9",
    "HF_ENDPOINT": f"http://user:{SECRETS['HF_ENDPOINT']}@127.0.0.1:9",
}
# W&B by itself sends these: a token of the cluster's scheduler, and from the folder that a run is started in the URL of
# the git remote and the changes that are not committed.
ALSO_SECRET = {"SLURM_JWT": "canary-of-slurm", "remote": "ghp_CanaryOfTheRemote", "changes": "canary-of-the-changes"}
SMALL = [
    "debug=fast", "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.context_length=64", "device=cpu",
    "data.tokenizer=bytes", "train.tokens_per_step=128", "train.max_steps=2", "train.eval_tokens=128",
    "sample.max_new_tokens=4",
]  # fmt: skip
SCRIPT = """
import runpy, sys
sys.argv = list(arguments)
runpy.run_path(arguments[0], run_name="__main__")
"""
MODULES = """
torch._dynamo matplotlib.pyplot matplotlib.backends.backend_agg pandas hydra wandb.sdk.launch.inputs.internal
gpt.config.launch gpt.data.preparation gpt.terminal.figures gpt.loop gpt.runs.model_card gpt.runs.model_file
gpt.runs.resume gpt.sampling gpt.runs.saver gpt.runs.run_log
"""
BUGGY = "train with a proxy that is away and a bug"
BUG = """
from gpt.runs import wandb_run
from gpt.terminal import figures
wandb_run.INIT_TIMEOUT, figures.loss_curve = 1, None
"""


def forms(secret: str) -> list[bytes]:
    """A secret as it is, in a URL, in JSON, and in the three ways that base64 has for it inside a longer text."""
    encodings = {secret.encode(), urllib.parse.quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()}
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + secret.encode())
        whole = encoded[(0, 2, 3)[offset] : (offset + len(secret)) // 3 * 4]
        encodings |= {whole, whole.replace(b"+", b"-").replace(b"/", b"_")}
    return sorted(encodings)


def texts(path: Path) -> Iterator[bytes]:
    """A file as it is, and what is inside of it: an archive's members, W&B's records."""
    data = path.read_bytes()
    yield data
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from map(archive.read, archive.namelist())
    if path.suffix == ".wandb":
        yield command(f"wandb leet inspect --json {path}").encode()


def contents(folder: Path) -> dict[str, list[bytes]]:
    """The texts of all files in a folder, by the name of the file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): list(texts(path)) for path in files}


def leaks(secret: str, places: dict[str, list[bytes]]) -> list[str]:
    """The names of the places where a secret is."""
    return [name for name, parts in places.items() if any(form in part for form in forms(secret) for part in parts)]


@dataclass
class Work:
    """What ran in an environment full of secrets, and where its files are."""

    folder: Path
    children: dict[str, Child]
    received: list[bytes]  # by the W&B server
    keys: set[str]  # that it was shown


def repository(folder: Path) -> Path:
    """A folder under git with a token in the remote's URL and a change that is not committed."""
    folder.mkdir()
    remote = f"https://{ALSO_SECRET['remote']}:x-oauth-basic@github.com/somebody/something"
    commands = ["init -q", "add .", f"remote add origin {remote}", "-c user.name=a -c user.email=b commit -qm c"]
    (folder / "file.py").write_text("x = 1\n")
    for arguments in commands:
        subprocess.run(["git", *arguments.split()], cwd=folder, check=True)
    (folder / "file.py").write_text(f"x = '{ALSO_SECRET['changes']}'\n")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder, cwd = tmp_path_factory.mktemp("secrets"), repository(tmp_path_factory.mktemp("git") / "repository")
    (folder / "tmp").mkdir()
    environment = ENVIRONMENT | {
        "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "WANDB_DIR": str(folder / "wandb"),
        "SLURM_JOB_ID": "1", "SLURM_JWT": ALSO_SECRET["SLURM_JWT"],
    }  # fmt: skip
    with Server() as server, Children(MODULES) as parent:

        def start(script: str, *arguments: str, before: str = "", **changes: str) -> Child:
            arguments = (str(ROOT / script), f"data.prepared_dir={folder / 'data'}", *arguments)
            if script == "generate.py":
                arguments = (arguments[0], *arguments[2:])
            return parent.start(before + SCRIPT, *arguments, cwd=cwd, **(environment | changes))

        def train(name: str, *arguments: str, **changes: str) -> Child:
            return start("train.py", *SMALL, f"out_dir={folder / name}", *arguments, **changes)

        online = {"WANDB_BASE_URL": server.environment["WANDB_BASE_URL"]}
        interpolated = [f"{key}='{text}'" for key, text in INTERPOLATED.items()]
        away = {"WANDB_BASE_URL": "https://wandb.invalid", "before": BUG}
        runs = {"prepare": start("prepare_data.py", "data.tokenizer=bytes")}
        runs["prepare"].wait()
        runs |= {
            "train online": train("online", "wandb.mode=online", *interpolated, **online),
            "train offline": train("offline", "wandb.mode=offline"),
            BUGGY: train("bug", "wandb.mode=online", **away),
            "prepare from the hub": start("prepare_data.py", "data=helpsteer"),
        }
        runs["train online"].wait()
        runs["generate"] = start("generate.py", f"checkpoint={folder / 'online'}", "prompt=What?", "max_new_tokens=3")
        for child in runs.values():
            child.wait()
        received = [part.encode() for line, headers, _ in server.received for part in (line, headers)]
        received += [body for _, _, body in server.received]
        yield Work(folder, runs, received, server.keys)
        for errors in re.findall(r"the traceback is in (\S+)\)", runs[BUGGY].stderr):
            Path(errors).unlink()


def test_the_work_was_done_with_these_secrets(work):
    codes = {name: child.wait() for name, child in work.children.items()}
    expected = dict.fromkeys(codes, 0) | {BUGGY: 1, "prepare from the hub": 5}
    assert codes == expected, {name: child.stderr for name, child in work.children.items()}
    assert work.keys == {SECRETS["WANDB_API_KEY"]}
    assert "W&B cannot be reached" in work.children[BUGGY].stderr
    assert "http://127.0.0.1:9" in work.children["prepare from the hub"].stderr
    assert any(b'"wandb-history.jsonl"' in part for part in work.received)
    assert len(list(work.folder.rglob("*.wandb"))) >= 3


def test_no_secret_is_in_a_file_on_the_terminal_or_at_wandb(work, record_property):
    (errors,) = re.findall(r"the traceback is in (\S+)\)", work.children[BUGGY].stderr)
    files = contents(work.folder)
    printed = {name: [child.stdout.encode(), child.stderr.encode()] for name, child in work.children.items()}
    places = files | printed | {"traceback": [Path(errors).read_bytes()], "W&B": work.received}
    leaking = {name: leaks(secret, places) for name, secret in (SECRETS | ALSO_SECRET).items()}
    assert not any(leaking.values()), leaking
    record_property("count", f"secrets: 0 of {len(SECRETS)} in the environment and 0 of {len(ALSO_SECRET)} others in "
                    f"{len(files)} files, the output of {len(printed)} commands and {len(work.received)} texts that "
                    "W&B got")  # fmt: skip


def test_a_value_from_the_environment_is_used_and_the_interpolation_is_stored(work):
    """The test above has searched for the value itself."""
    metrics = [work.folder / name / "metrics.jsonl" for name in ("online", "offline")]
    with_seed, without_seed = (json.loads(path.read_text().splitlines()[0])["val/loss"] for path in metrics)
    assert with_seed != without_seed
    run_dir = work.folder / "online"
    checkpoints = list(run_dir.glob("checkpoints/step_*/config.json"))
    files = [path.read_text() for path in [run_dir / "config.yaml", *checkpoints]]
    assert checkpoints
    for stored in [*files, b"".join(work.received).decode(errors="replace")]:
        assert all(text in stored for text in INTERPOLATED.values())


def test_the_commit_is_recorded_without_its_remote(work):
    upserts = [json.loads(part)["variables"] for part in work.received if b'"operationName":"UpsertBucket"' in part]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert {(values["commit"], values["repo"]) for values in upserts if values["commit"]} == {(commit or None, None)}


@pytest.mark.parametrize("secret", (SECRETS | ALSO_SECRET).values(), ids=(SECRETS | ALSO_SECRET).keys())
def test_the_search_finds_a_secret_wherever_it_is_planted(tmp_path, secret):
    (tmp_path / "text").write_text(f"password={secret};")
    (tmp_path / "url").write_text(f"http://user:{urllib.parse.quote(secret, safe='')}@host")
    (tmp_path / "json").write_text(json.dumps({"a": [secret]}))
    for offset in range(3):
        (tmp_path / f"basic{offset}").write_bytes(base64.b64encode(b"api"[:offset] + secret.encode() + b"..."))
    with gzip.open(tmp_path / "log.gz", "wt") as file:
        file.write(secret)
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", "0" * 100 + secret)
    assert leaks(secret, contents(tmp_path)) == sorted(path.name for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 8
    assert leaks(secret[:5] + "?" + secret[6:], contents(tmp_path)) == []


def test_the_search_finds_what_wandb_records_and_sends_when_it_is_left_to_itself(tmp_path):
    code = """
import wandb
settings = wandb.Settings(silent=True, console="off", init_timeout=10, finish_timeout=10)
with wandb.init(project="test", settings=settings) as run:
    run.log({arguments[0]: 1.0})
"""
    cwd, secret = repository(tmp_path / "repository"), SECRETS["DB_PASSWORD"]
    environment = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "SLURM_JWT": ALSO_SECRET["SLURM_JWT"]}
    with Server() as server:
        child = children().start(code, secret, cwd=cwd, **environment, **server.environment)
        assert child.wait() == 0, child.stderr
        bodies = [body for _, _, body in server.received]
    (file,) = tmp_path.glob("wandb/run-*/*.wandb")
    places = contents(file.parent) | {"W&B": bodies}
    for planted in (secret, ALSO_SECRET["SLURM_JWT"], ALSO_SECRET["remote"]):
        assert {"W&B", file.name} <= set(leaks(planted, places)), planted
