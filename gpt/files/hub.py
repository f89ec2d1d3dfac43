"""Downloads weights of the Hugging Face hub once, resumes after an interruption, and never uses them unchecked.

They lie in the hub's cache, in its layout (https://huggingface.co/docs/huggingface_hub/guides/manage-cache), so that
other programs find them too. The transfer is here because huggingface_hub 2 starts an interrupted file again from its
first byte, and waits for minutes for a hub that is silent.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from gpt.errors import CHECKPOINT, ENVIRONMENT, UserError, unusable
from gpt.files import atomic
from gpt.files.directory import in_bytes

log = logging.getLogger(__name__)

TIMEOUT = 5  # seconds; whoever has no network should know soon
SILENCE = 10  # seconds without a byte after which a connection counts as lost
ATTEMPTS, PAUSE = 3, 1  # connections without a new byte, and the seconds between two of them
CONFIG = "config.json"
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
KINDS = ("model.safetensors", "pytorch_model.bin")  # of weights, the best first; those in shards have an index
SHARD = re.compile(r"[\w.-]{1,200}\.(safetensors|bin)", re.ASCII)  # a name, not a path to elsewhere
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")  # names a large file; small ones have git's hash, as long as that of a commit
PINNED = {  # of openai-community: commits
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
WEIGHTS = {  # the sha256 of model.safetensors in each of these
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    "gpt2-large": "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
}


class File(NamedTuple):
    """A file of a repository, as the hub describes it."""

    name: str
    size: int
    digest: str


def fetch(name: str, revision: str | None, by_hand: Path, check: Callable[[Path], None] = lambda config: None) -> Path:
    """The directory with config.json, weights and tokenizer files of `name`: one of PINNED or <owner>/<repository>.
    What somebody has put into `by_hand` comes first, then the cache, then the hub. `check` gets the path of config.json
    before anything large is downloaded. Raises UserError: 2 for what is no name, 3 for weights that are damaged or
    missing, 5 for what the network or the disk refuses."""
    if (by_hand / CONFIG).is_file():
        log.info(f"{name}: using what is in {by_hand}")
        check(by_hand / CONFIG)
        weights, expected = by_hand / KINDS[0], WEIGHTS.get(name)
        if expected and weights.is_file() and (digest := _sha256(weights)) != expected:  # which may be meant
            log.warning(f"{weights} is not {name} as it was published (sha256 {digest}, not {expected})")
        return by_hand
    repository = _Repository(name, revision, by_hand)
    found = repository.cached()
    if found is None or not repository.is_fixed:
        try:
            commit, files = repository.describe()
        except UserError as error:
            if found is None:
                raise
            log.warning(f"{error.what}; using commit {found.name} from the cache")
        else:
            found = repository.download(commit, files, check)
    check(found / CONFIG)
    _verify(found, repository.expected)
    return found


def why_unreachable() -> str | None:
    """Why the hub does not answer, None when it does. Proxies of the environment are used."""
    import http.client  # 0.02 s at every start
    import urllib.request

    shown = without_credentials(endpoint())
    try:
        urllib.request.urlopen(urllib.request.Request(shown, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return None  # an answer
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{shown}: {getattr(error, 'reason', error)}"
    return None


def endpoint() -> str:
    """The address of the hub, with whatever credentials somebody has put into it."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def without_credentials(text: str) -> str:
    """`text` without users, passwords and signatures of the URLs in it, and without tokens."""
    text = re.sub(r"//[^/\s]*@", "//", text)
    text = re.sub(r"(//[^\s?]*)\?\S*", r"\1", text)
    return re.sub(r"Bearer\b.*", "Bearer ...", text)


def described(error: Exception) -> str:
    """An exception of a library in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_credentials(": ".join([type(error).__name__, *lines[:1]]))


class _Repository:
    """A revision of a repository, and its place in the cache. `by_hand` is where its files could be put instead."""

    def __init__(self, name: str, revision: str | None, by_hand: Path) -> None:
        self.name, self.by_hand = f"openai-community/{name}" if name in PINNED else name, by_hand
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.name):
            raise UserError(f"{name} is neither one of {', '.join(PINNED)} nor <owner>/<repository>", "init.from")
        self.revision = revision or PINNED.get(name, "main")
        self.is_fixed = COMMIT.fullmatch(self.revision) is not None  # a branch may move
        self.expected = WEIGHTS[name] if self.revision == PINNED.get(name) else None  # sha256 of model.safetensors
        self.hub = _library()
        self.cache = Path(self.hub.constants.HF_HUB_CACHE)
        self.folder = self.cache / f"models--{self.name.replace('/', '--')}"

    def cached(self) -> Path | None:
        """The directory of the revision if all of it is there."""
        with contextlib.suppress(OSError, ValueError):  # no such revision, or a name that can be none
            commit = self.revision if self.is_fixed else (self.folder / "refs" / self.revision).read_text().strip()
            snapshot = self.folder / "snapshots" / commit
            weights = _weights_in(snapshot)
            if weights and (weights[0] == KINDS[0] or not self.expected):
                return snapshot
        return None

    def describe(self) -> tuple[str, dict[str, File]]:
        """The commit that the revision stands for, and its files by name. Raises UserError (5)."""
        reason = "HF_HUB_OFFLINE is set" if self.hub.constants.HF_HUB_OFFLINE else why_unreachable()
        if reason:
            raise self.error(reason)
        try:
            api = self.hub.HfApi(endpoint=endpoint())
            info = api.model_info(self.name, revision=self.revision, files_metadata=True, timeout=SILENCE)
        except Exception as error:  # any library below may raise whatever it likes
            answer = getattr(error, "response", None)
            raise (self.error(described(error)) if answer is None else self.refusal(answer)) from None
        commit = self.revision if self.is_fixed else info.sha or ""
        if not COMMIT.fullmatch(commit):
            raise self.error(f"{without_credentials(endpoint())} does not answer as the hub does")
        files = {}
        for file in info.siblings or []:
            digest = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
            if isinstance(file.size, int) and (COMMIT.fullmatch(digest) or SHA256.fullmatch(digest)):
                files[file.rfilename] = File(file.rfilename, file.size, digest)
        return commit, files

    def download(self, commit: str, files: dict[str, File], check: Callable[[Path], None]) -> Path:
        """Everything that is not in the cache yet, small files first. Raises UserError."""
        snapshot = self.folder / "snapshots" / commit
        try:
            if CONFIG in files:
                check(self.get(files[CONFIG], snapshot))
            weights = _weights(files, lambda index: self.get(files[index], snapshot))
            missing = [name for name in (CONFIG, *(weights or [" or ".join(KINDS)])) if name not in files]
            if missing:
                raise UserError(f"{self.name} has no {', no '.join(missing)}", "init.from", code=CHECKPOINT)
            digest, where = files[weights[0]].digest, without_credentials(endpoint())
            if self.expected and digest != self.expected:
                raise _differs(f"{self.name}/{weights[0]}", digest, self.expected, where)
            wanted = [files[n] for n in (*TOKENIZER, *weights) if n in files and not (snapshot / n).is_file()]
            self.check_space(wanted)
            for file in wanted:
                self.get(file, snapshot)
            if not self.is_fixed:
                log.info(f"{self.name}: {self.revision} is commit {commit}; init.revision={commit} keeps to it")
                reference = self.folder / "refs" / self.revision
                reference.parent.mkdir(parents=True, exist_ok=True)
                atomic.write(reference, commit)
        except OSError as error:
            raise self.cannot_write(atomic.why_refused(error)) from None
        return snapshot

    def get(self, file: File, snapshot: Path) -> Path:
        """The file in the snapshot, downloaded if need be. Nothing gets its name before its content is verified."""
        path, blob = snapshot / file.name, self.folder / "blobs" / file.digest
        if path.is_file():
            return path
        lock = self.cache / ".locks" / self.folder.name / f"{file.digest}.lock"
        for folder in (path.parent, blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with self.hub.utils.WeakFileLock(lock):  # as the library does
            if not blob.is_file():
                part = blob.with_suffix(".incomplete")
                self.transfer(file, part, snapshot.name)
                if SHA256.fullmatch(file.digest) and (digest := _sha256(part)) != file.digest:
                    part.unlink()
                    raise _differs(file.name, digest, file.digest, self.name, "it is deleted; try again")
                atomic.sync(part)
                os.replace(part, blob)
            if not path.is_file():  # made meanwhile by another process
                path.unlink(missing_ok=True)  # a link to what somebody has deleted
                path.symlink_to(os.path.relpath(blob, path.parent))
        return path

    def transfer(self, file: File, part: Path, commit: str) -> None:
        """Appends to `part` what it lacks. Raises UserError (5) when nothing more comes, and OSError of the disk."""
        address = f"{endpoint()}/{self.name}/resolve/{commit}/{quote(file.name)}"
        part.touch()
        failures, most, size = 0, 0, part.stat().st_size
        if file.size > 10**6:
            rest = f", {in_bytes(size)} of it are there" if size else ""
            log.info(f"downloading {self.name}/{file.name} ({in_bytes(file.size)}{rest}) to {self.cache}")
        while size < file.size:
            try:
                reason = self.receive(address, file, part, size)
            except (OSError, UserError):
                raise
            except Exception as error:  # of the connection
                reason = described(error)
            most, size = max(most, size), part.stat().st_size  # less than before, if the server began again
            failures = 0 if size > most else failures + 1
            if failures == ATTEMPTS:
                kept = f", {in_bytes(size)} of {in_bytes(file.size)} are kept" if size else ""
                raise self.error(f"{file.name}: {reason}{kept}", "try again, it goes on there" if size else "")
            time.sleep(PAUSE if size < file.size else 0)
        if size > file.size:
            part.unlink()
            raise self.error(f"{file.name}: more than the {file.size:,} bytes that were announced")

    def receive(self, address: str, file: File, part: Path, start: int) -> str:
        """One request for what comes after `start`. Returns why the answer ended, should it be too short."""
        headers = self.hub.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        with self.hub.get_session().stream("GET", address, headers=headers, timeout=SILENCE) as response:
            if response.status_code in (408, 429) or response.status_code >= 500:
                return f"HTTP {response.status_code}"
            if response.status_code not in (200, 206):
                raise self.refusal(response)
            goes_on = response.status_code == 206
            bar = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1, "disable": None}  # on a terminal only
            progress = self.hub.utils.tqdm(desc=file.name, total=file.size, initial=start if goes_on else 0, **bar)
            with progress, open(part, "ab" if goes_on else "wb") as output:
                for piece in response.iter_bytes():
                    output.write(piece)
                    progress.update(len(piece))
                    if output.tell() > file.size:  # who knows how much more
                        break
        return "the connection was closed"

    def check_space(self, files: list[File]) -> None:
        """Raises UserError (5) when the disk has no room for what is still to come of these files."""
        blobs = [self.folder / "blobs" / file.digest for file in files]
        there = [path for blob in blobs for path in (blob, blob.with_suffix(".incomplete")) if path.is_file()]
        needed = sum(file.size for file in files) - sum(path.stat().st_size for path in there)
        free = shutil.disk_usage(self.cache).free
        if needed > free:
            raise self.cannot_write(f"it needs {in_bytes(needed)}, {in_bytes(free)} free")

    def cannot_write(self, reason: str) -> UserError:
        """The error for a disk that is full or refuses."""
        remedy = "make room, or let HF_HOME name a folder on another disk"
        return UserError(f"cannot download {self.name}: {reason}", str(self.cache), remedy, ENVIRONMENT)

    def refusal(self, response: Any) -> UserError:
        """The error for an answer that is none."""
        status, code = response.status_code, response.headers.get("X-Error-Code")
        if code == "RevisionNotFound":
            return self.error(f"it has no revision {self.revision}", "set init.revision")
        if code == "GatedRepo" or status == 403:
            remedy = f"ask at {without_credentials(endpoint())}/{self.name} and log in with `hf auth login`"
            return self.error(f"access has to be granted (HTTP {status})", remedy)
        if code == "RepoNotFound" or status == 401:
            return self.error(f"no such repository, or a private one (HTTP {status})", "log in with `hf auth login`")
        return self.error(f"HTTP {status} at {without_credentials(str(response.url))}")

    def error(self, reason: str, remedy: str = "") -> UserError:
        """The error for weights that cannot be had. `remedy`: what to try before other weights."""
        by_hand = f"put {CONFIG} and {KINDS[0]} into {self.by_hand}"
        remedy = f"{remedy}, or {by_hand}" if remedy else f"{by_hand}, or give a directory of your own"
        return UserError(f"{self.name} cannot be had: {reason}", remedy=remedy, code=ENVIRONMENT)


def _library() -> Any:
    """huggingface_hub (0.4 s), without telemetry and without log lines of its own: they show addresses in full."""
    import huggingface_hub.constants
    import huggingface_hub.utils

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    for name in ("huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return huggingface_hub


def shards_in(index: Any) -> list[str]:
    """The files that the content of an index of shards names, all of the directory that it is in. Raises ValueError."""
    files = index.get("weight_map") if isinstance(index, dict) else None
    names = files.values() if isinstance(files, dict) else ()
    if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise ValueError("no weight_map")
    return sorted(set(names))


def _weights(names: Collection[str], index: Callable[[str], Path]) -> list[str]:
    """A repository's files that are the weights; shards after their index, at `index(name)`. Raises UserError (3)."""
    for kind in KINDS:
        listing = f"{kind}.index.json"
        if kind in names:
            return [kind]
        if listing in names:
            path = index(listing)
            try:
                shards = shards_in(json.loads(path.read_bytes()))
            except (ValueError, RecursionError) as error:
                raise unusable(path, "not an index of shards") from error
            return [listing, *shards]
    return []


def _weights_in(snapshot: Path) -> list[str]:
    """The weights in a directory, as by `_weights`; empty if not all of them are there. Raises OSError."""
    names = {path.name for path in snapshot.iterdir() if path.is_file()}
    weights = _weights(names, lambda index: snapshot / index)
    return weights if names.issuperset([CONFIG, *weights]) else []


def _verify(snapshot: Path, expected: str | None) -> None:
    """Raises UserError (3) if weights are not what they were: large files in the cache are links to what is named after
    its sha256. `expected`: that of model.safetensors."""
    for path in [snapshot / name for name in _weights_in(snapshot)]:
        named = Path(os.readlink(path)).name if path.is_symlink() else ""
        digest = expected if expected and path.name == KINDS[0] else named
        if SHA256.fullmatch(digest) and (found := _sha256(path)) != digest:
            raise _differs(path.name, found, digest, str(snapshot), f"delete {path.resolve()} and try again")


def _differs(name: str, found: str, expected: str, where: str, remedy: str = "") -> UserError:
    return UserError(f"{name} damaged (sha256 differs: {found}, not {expected})", where, remedy, CHECKPOINT)


def _sha256(path: Path) -> str:
    try:
        return atomic.sha256(path)
    except OSError as error:
        raise unusable(path, error.strerror or str(error)) from error
