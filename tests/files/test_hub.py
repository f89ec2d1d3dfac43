"""Weights of the hub arrive whole, or there is one line that says why not; a loopback server plays the hub."""

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import COMMIT, Repository, Server
from tracing import NEEDS_SPACE, trace

from gpt.errors import UserError
from gpt.files import hub

NAME = "someone/tiny"
CONTENT = bytes(range(256)) * 8_000  # 2 MB
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": dict(zip("abc", [SHARDS[0], *SHARDS], strict=True))}).encode()
SMALL = {"config.json": b'{"model_type": "gpt2"}', "vocab.json": b"{}", "merges.txt": b"", "README.md": b"no"}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with one repository, an empty cache, and little patience."""
    from huggingface_hub import constants

    with Server() as server:
        server.repositories[NAME] = Repository({**SMALL, "model.safetensors": CONTENT, "tf_model.h5": b"no"})
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's attempts
        yield server


@pytest.fixture
def repository(server):
    return server.repositories[NAME]


def fetch(tmp_path, name=NAME, revision=COMMIT, **options):
    return hub.fetch(name, revision, tmp_path / "by_hand", **options)


def problem(tmp_path, *arguments, code=5, **options):
    """The error's line."""
    with pytest.raises(UserError) as caught:
        fetch(tmp_path, *arguments, **options)
    assert caught.value.code == code, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)


def blob(tmp_path, content=CONTENT):
    return tmp_path / "cache" / "models--someone--tiny" / "blobs" / hashlib.sha256(content).hexdigest()


def away(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def test_weights_configuration_and_tokenizer_arrive_and_nothing_else(server, tmp_path):
    folder = fetch(tmp_path)
    assert folder.name == COMMIT
    assert {path.name for path in folder.iterdir()} == {"config.json", "vocab.json", "merges.txt", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert (folder / "config.json").read_bytes() == SMALL["config.json"]


def test_the_hub_is_told_nothing_about_the_machine(server, tmp_path):
    import torch  # what the library tells about where it can

    fetch(tmp_path)
    agents = {headers["user-agent"] for _, headers in server.received}
    assert any("hf_hub/" in agent for agent in agents), agents
    assert torch.__version__ and not any("torch" in agent for agent in agents)
    assert all(address.split()[1] == "/" or NAME in address for address, _ in server.received)
    assert not server.requests("xet-read-token")  # hf_xet, which sends telemetry of its own


def test_other_programs_find_them_in_the_cache_too(server, tmp_path):
    from huggingface_hub import hf_hub_download, scan_cache_dir

    folder = fetch(tmp_path)
    path = hf_hub_download(
        NAME, "model.safetensors", revision=COMMIT, cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert Path(path) == folder / "model.safetensors"
    scanned = scan_cache_dir(tmp_path / "cache")
    assert not scanned.warnings and [repository.repo_id for repository in scanned.repos] == [NAME]


def test_what_is_in_the_cache_needs_no_network_and_is_not_asked_for_again(server, tmp_path, monkeypatch):
    folder = fetch(tmp_path)
    server.received.clear()
    assert fetch(tmp_path) == folder and not server.received
    away(monkeypatch)
    assert fetch(tmp_path) == folder


def test_a_branch_is_looked_up_each_time_and_its_commit_is_logged(server, repository, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        assert fetch(tmp_path, revision=None).name == COMMIT
        assert f"main is commit {COMMIT}; init.revision={COMMIT} keeps to it" in caplog.text
        repository.commit, repository.files["model.safetensors"] = "1" * 40, b"new"
        assert (fetch(tmp_path, revision=None) / "model.safetensors").read_bytes() == b"new"
        away(monkeypatch)
        assert fetch(tmp_path, revision=None).name == "1" * 40
    assert f"Connection refused; using commit {'1' * 40} from the cache" in caplog.text


def test_shards_are_those_that_the_index_names(server, repository, tmp_path, monkeypatch):
    repository.files = {**SMALL, "model.safetensors.index.json": INDEX, SHARDS[0]: b"one", SHARDS[1]: b"two"}
    repository.files |= {"model-old.safetensors": b"no", "pytorch_model.bin": b"no"}
    folder = fetch(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "vocab.json", "merges.txt", "model.safetensors.index.json", *SHARDS
    }  # fmt: skip
    away(monkeypatch)
    assert fetch(tmp_path) == folder
    (folder / SHARDS[1]).unlink()
    assert "Connection refused" in problem(tmp_path)


def test_pickles_are_fetched_only_where_there_is_nothing_else(server, repository, tmp_path):
    repository.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    assert (fetch(tmp_path) / "pytorch_model.bin").read_bytes() == b"pickle"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"config.json": b"{}", "tf_model.h5": b"x"}, "someone/tiny has no model.safetensors or pytorch_model.bin"),
        ({"model.safetensors": b"x"}, "someone/tiny has no config.json"),
        ({"config.json": b"{}", "model.safetensors.index.json": INDEX, SHARDS[0]: b"1"}, f"has no {SHARDS[1]}"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"["}, "index.json damaged (not an index"),
        ({"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../x.bin"}}'}, "not an index"),
    ],
)
def test_a_repository_without_weights_that_can_be_read_is_named_as_such(server, repository, tmp_path, files, expected):
    repository.files = files
    assert expected in problem(tmp_path, code=3)
    assert server.requests("safetensors?") == []


def test_another_family_is_refused_before_its_weights_are_downloaded(server, tmp_path):
    def check(config):
        raise UserError(f"{json.loads(config.read_bytes())['model_type']}: not this one", code=3)

    assert problem(tmp_path, check=check, code=3) == "gpt2: not this one"
    assert server.requests("model.safetensors") == []


def test_a_download_that_breaks_off_is_one_line_and_the_next_one_is_whole(server, tmp_path):
    server.cut_at = 500_000
    assert "someone/tiny cannot be had: RemoteProtocolError: " in problem(tmp_path)
    assert not blob(tmp_path).exists()
    server.cut_at = None
    assert (fetch(tmp_path) / "model.safetensors").read_bytes() == CONTENT


def test_a_connection_that_is_lost_is_taken_up_where_it_was_lost(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    server.lengths = iter([150_000, 150_000])
    assert (fetch(tmp_path) / "model.safetensors").read_bytes() == CONTENT
    ranges = [headers.get("range") for headers in server.requests("s1gned")]
    assert ranges == [None, "bytes=150000-", "bytes=300000-"]


def test_a_process_that_is_killed_in_the_middle_leaves_nothing_that_is_taken_for_the_file(server, tmp_path):
    def kill(operation):
        return "kill" if operation.name == "write" and blob(tmp_path).name in operation.path else None

    assert trace(lambda: fetch(tmp_path), tmp_path, kill).code == -9
    assert not blob(tmp_path).exists()
    assert (fetch(tmp_path) / "model.safetensors").read_bytes() == CONTENT


def test_processes_that_want_the_same_file_at_once_download_it_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch(tmp_path), range(4)))
    assert len(folders) == 1 and len(server.requests("safetensors?")) == 1


def test_a_bit_that_flips_on_the_way_is_seen_and_nothing_of_the_file_stays(server, tmp_path):
    server.damaged = True
    line = problem(tmp_path, code=3)
    assert "model.safetensors damaged (sha256 differs: " in line and "it is deleted; try again" in line
    assert hashlib.sha256(CONTENT).hexdigest() in line
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert not any(name.startswith(blob(tmp_path).name) for name in left) and "model.safetensors" not in left
    server.damaged = False
    assert (fetch(tmp_path) / "model.safetensors").read_bytes() == CONTENT


def test_weights_that_change_in_the_cache_are_refused_and_the_file_to_delete_is_named(server, tmp_path):
    fetch(tmp_path)
    damaged = bytearray(CONTENT)
    damaged[1_000_000] ^= 4
    blob(tmp_path).write_bytes(damaged)
    line = problem(tmp_path, code=3)
    assert f"delete {blob(tmp_path)} and try again" in line
    blob(tmp_path).unlink()
    assert (fetch(tmp_path) / "model.safetensors").read_bytes() == CONTENT


def test_the_librarys_links_through_its_shared_store_are_no_damage(server, tmp_path):
    """Version 2 may keep files once for all repositories, under a hash of another kind."""
    folder = fetch(tmp_path)
    store = tmp_path / "cache" / "blobs" / "ab" / ("ab" * 32)
    store.parent.mkdir(parents=True)
    blob(tmp_path).rename(store)
    blob(tmp_path).symlink_to(store)
    assert fetch(tmp_path) == folder


def test_pinned_weights_are_asked_for_by_commit_and_other_weights_are_refused(server, tmp_path):
    repository = Repository({**SMALL, "model.safetensors": CONTENT}, commit=hub.PINNED["gpt2"])
    server.repositories["openai-community/gpt2"] = repository
    line = problem(tmp_path, "gpt2", None, code=3)
    assert f"differs: {hashlib.sha256(CONTENT).hexdigest()}, not {hub.WEIGHTS['gpt2']}" in line
    assert server.requests(f"/api/models/openai-community/gpt2/revision/{hub.PINNED['gpt2']}")
    assert server.requests(f"/openai-community/gpt2/resolve/{hub.PINNED['gpt2']}/model.safetensors")
    repository.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    assert "openai-community/gpt2 has no model.safetensors" in problem(tmp_path, "gpt2", None, code=3)
    assert server.requests("pytorch_model.bin") == []


def test_pickles_of_a_pinned_name_in_the_cache_do_not_take_the_place_of_its_safetensors(server, tmp_path):
    snapshot = tmp_path / "cache" / "models--openai-community--gpt2" / "snapshots" / hub.PINNED["gpt2"]
    snapshot.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (snapshot / name).write_bytes(b"{}")
    assert "no such repository" in problem(tmp_path, "gpt2", None)
    assert server.requests("gpt2")


def test_every_pinned_name_has_a_commit_and_a_hash():
    assert hub.PINNED.keys() == hub.WEIGHTS.keys()
    assert all(hub.COMMIT.fullmatch(commit) for commit in hub.PINNED.values())
    assert all(hub.SHA256.fullmatch(digest) for digest in hub.WEIGHTS.values())


def test_what_was_put_there_by_hand_comes_first(server, tmp_path, caplog):
    folder = tmp_path / "by_hand"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    seen = []
    with caplog.at_level(logging.INFO):
        assert fetch(tmp_path, check=seen.append) == folder
    assert seen == [folder / "config.json"] and server.received == []
    assert f"{NAME}: using what is in {folder}" in caplog.text
    (folder / "model.safetensors").write_bytes(b"fine-tuned")
    caplog.clear()
    assert fetch(tmp_path, "gpt2", None) == folder and server.received == []
    digest = hashlib.sha256(b"fine-tuned").hexdigest()
    assert f"is not gpt2 as it was published (sha256 {digest}, not {hub.WEIGHTS['gpt2']})" in caplog.text


def test_without_a_network_one_line_says_at_once_where_to_put_the_files(server, tmp_path, monkeypatch):
    away(monkeypatch)
    start = time.monotonic()
    line = problem(tmp_path, "gpt2", None)
    assert time.monotonic() - start < 5
    assert line == (
        "openai-community/gpt2 cannot be had: http://127.0.0.1:9: [Errno 111] Connection refused; put config.json and "
        f"model.safetensors into {tmp_path}/by_hand, or give a directory of your own"
    )


def test_the_librarys_own_switch_is_respected(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "someone/tiny cannot be had: HF_HUB_OFFLINE is set; put config.json" in problem(tmp_path)
    assert server.received == []


@pytest.mark.parametrize(
    "change, arguments, expected",
    [
        (
            {},
            ("someone/else",),
            "no such repository, or a private one (HTTP 404); log in with `hf auth login`, or put ",
        ),
        ({"token": "t"}, (), "no such repository, or a private one (HTTP 404); log in with `hf auth login`"),
        ({}, (NAME, "v2"), "it has no revision v2; set init.revision, or put "),
        ({}, (NAME, "0" * 40), f"it has no revision {'0' * 40}"),
        ({"gated": True}, (), "access has to be granted (HTTP 403); ask at http://127.0.0.1:"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(server, repository, tmp_path, change, arguments, expected):
    for name, value in change.items():
        setattr(repository, name, value)
    line = problem(tmp_path, *arguments)
    assert " cannot be had: " in line and expected in line and str(tmp_path / "by_hand") in line


def test_a_commit_that_leads_out_of_the_cache_is_none(server, repository, tmp_path):
    repository.commit = "../../../../outside"
    assert "does not answer as the hub does" in problem(tmp_path, NAME, None)
    assert not list(tmp_path.rglob("*outside*"))


def test_what_is_no_hub_is_not_taken_for_a_hub_without_the_repository(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{server.storage}/mirror/")
    assert f"HTTP 404 at {server.storage}/mirror/api/models/{NAME}/revision/{COMMIT}; put config.json" in problem(
        tmp_path
    )


@pytest.mark.parametrize("status", [503, 429, 400])
def test_an_error_of_the_storage_is_one_line(server, tmp_path, status):
    server.status = status
    line = problem(tmp_path)
    assert f"someone/tiny cannot be had: HTTP {status} at {server.storage}/{NAME}/resolve/x/model.safetensors; " in line


def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.silent = True
    assert "someone/tiny cannot be had: ReadTimeout" in problem(tmp_path)


@pytest.mark.parametrize("name", ["gpt5", "a/b/c", "../x/y", "a/..", "", "/etc/passwd"])
def test_what_is_no_name_of_a_repository_is_an_error_of_usage(server, tmp_path, name):
    assert "is neither one of gpt2, " in problem(tmp_path, name, code=2)
    assert server.received == []


def test_a_token_goes_to_the_hub_and_nowhere_else(server, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    repository.token = "hf_s3cret"
    fetch(tmp_path)
    assert any("authorization" in headers for headers in server.requests("/resolve/"))
    signed = server.requests("s1gned")
    assert signed and not any("s3cret" in json.dumps(headers) for headers in signed)


@pytest.mark.parametrize("token", ["hf_s3cret", "hf_s3cret\x01x", "hf_s3crét"])
def test_neither_token_nor_password_nor_signature_is_shown(server, repository, tmp_path, monkeypatch, token, caplog):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_ENDPOINT", server.address.replace("//", "//me:s3cret@"))
    server.cut_at = 1000
    with caplog.at_level(logging.INFO):
        lines = [problem(tmp_path), problem(tmp_path, "someone/else")]
    assert not any(secret in text for text in [*lines, caplog.text] for secret in ("s3cr", "s1gned"))


def test_the_librarys_own_log_lines_which_show_addresses_in_full_are_silent(server, tmp_path):
    server.lengths = iter([1000])  # the library would tell of the second attempt
    command = f"from pathlib import Path; from gpt.files import hub; hub.fetch({NAME!r}, None, Path('by_hand'))"
    environment = os.environ | {"HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(server.requests("s1gned")) == 2


def test_a_password_in_what_a_library_says_is_not_shown():
    text = (
        "HTTPError 404 for url: http://user:s3cret@127.0.0.1:9/api/datasets, see //token@elsewhere/x?a=1&b=2 or a@b.c"
    )
    shown = "HTTPError 404 for url: http://127.0.0.1:9/api/datasets, see //elsewhere/x or a@b.c"
    assert hub.without_credentials(text) == shown
    assert hub.without_credentials("illegal value b'Bearer hf_x y'") == "illegal value b'Bearer ..."


def test_a_disk_without_room_is_known_before_the_download(server, repository, tmp_path):
    repository.claims["model.safetensors"] = {"size": 10**16}
    line = problem(tmp_path)
    assert line.startswith("cannot download someone/tiny: it needs 10000000.0 GB, ")
    assert f"free ({tmp_path}/cache); make room, or let HF_HOME name a folder on another disk" in line
    assert server.requests("model.safetensors") == []


def full_from(place):
    """The disk is full from that operation on, of those that need space."""
    places = itertools.count()

    def decide(operation):
        return errno.ENOSPC if operation.name in NEEDS_SPACE and next(places) >= place else None

    return decide


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_disk_that_is_full_at_any_write_leaves_nothing_half_that_is_used_as_whole(
    server, tmp_path, record_property, monkeypatch, thorough
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    cache, content = tmp_path / "cache", CONTENT[:300_000]
    server.repositories[NAME].files = {**SMALL, "model.safetensors": content}
    fetch(tmp_path)  # in which the library finds out what the file system can do
    shutil.rmtree(cache)
    paths = [op.path for op in trace(lambda: fetch(tmp_path), cache).operations if op.name in NEEDS_SPACE]
    names = (blob(tmp_path, content).name, "model.safetensors")
    places = [place for place, path in enumerate(paths) if thorough or any(name in path for name in names)]
    for place in places:
        shutil.rmtree(cache)
        outcome = trace(lambda: fetch(tmp_path), cache, full_from(place))
        assert outcome.code == 5 and outcome.output.count("\n") == 1, (paths[place], outcome.output)
        assert f"error: cannot download {NAME}: disk full ({cache}); make room, or let HF_HOME" in outcome.output
        assert not (cache / "models--someone--tiny" / "snapshots" / COMMIT / "model.safetensors").exists()
        assert (fetch(tmp_path) / "model.safetensors").read_bytes() == content
    assert len(places) >= 6
    record_property("count", f"ENOSPC at {len(places)} places of a download: {len(places)} times one line, "
                             "and the next download was whole")  # fmt: skip


def test_importing_it_loads_neither_torch_nor_the_hubs_library():
    command = "import sys, gpt.files.hub; print({'torch', 'huggingface_hub', 'datasets', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "set()\n", result
