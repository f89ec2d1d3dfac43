"""Downloads weights of the Hugging Face hub with huggingface_hub, and never uses them unchecked.

Transfer, cache, proxies and tokens are that library's, and so are its variables: HF_HOME, HF_ENDPOINT, HF_TOKEN, ...
(https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables). It takes up a connection that is
lost where it was lost; a file that its process has not finished begins again.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from gpt.errors import CHECKPOINT, ENVIRONMENT, UserError, one_line, unusable
from gpt.files.atomic import sha256, why_refused
from gpt.files.directory import in_bytes
from gpt.files.hub_names import PINNED, WEIGHTS

log = logging.getLogger(__name__)

TIMEOUT = 5  # seconds; the library waits for minutes, and whoever has no network should know soon
CONFIG = "config.json"
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
KINDS = ("model.safetensors", "pytorch_model.bin")  # of weights, the best first; those in shards have an index
SHARD = re.compile(r"[\w.-]{1,200}\.(safetensors|bin)", re.ASCII)  # a name, not a path to elsewhere
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")  # names a large file; small ones have git's hash, as long as that of a commit


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
    snapshot = cached = repository.cached()
    if cached is None or not repository.is_fixed:
        try:
            commit, files = repository.describe()
        except UserError as error:
            if cached is None:
                raise
            log.warning(f"{error.what}; using commit {cached.name} from the cache")
        else:
            if cached is None or cached.name != commit:
                snapshot = repository.download(commit, files, check)
    check(snapshot / CONFIG)
    repository.verify(snapshot, is_new=snapshot != cached)
    return snapshot


def why_unreachable() -> str | None:
    """Why the hub does not answer, None when it does. Proxies of the environment are used."""
    import http.client  # 0.02 s at every start
    import urllib.request

    address = without_credentials(endpoint())
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return None  # an answer
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{address}: {getattr(error, 'reason', error)}"
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
    """What an exception of a library says, after its type."""
    return one_line(f"{type(error).__name__}: {without_credentials(str(error))}".removesuffix(": "), 200)


def quiet_library() -> Any:
    """The HfApi of huggingface_hub (0.4 s), which from now on shows no addresses in log lines, sends no telemetry, and
    does without hf_xet: that sends telemetry of its own, and waits minutes for a server that is not there."""
    from huggingface_hub import HfApi, constants  # loading it sets the level of its log lines

    constants.HF_HUB_DISABLE_TELEMETRY = constants.HF_HUB_DISABLE_XET = True
    for name in ("huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return HfApi


class _Repository:
    """A revision of a repository, and its place in the cache. `by_hand` is where its files could be put instead."""

    def __init__(self, name: str, revision: str | None, by_hand: Path) -> None:
        from huggingface_hub import constants  # 0.03 s; the rest of the library takes 0.4

        self.name, self.by_hand = f"openai-community/{name}" if name in PINNED else name, by_hand
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.name):
            raise UserError(f"{name} is neither one of {', '.join(PINNED)} nor <owner>/<repository>", "init.from")
        self.revision = revision or PINNED.get(name, "main")
        self.is_fixed = COMMIT.fullmatch(self.revision) is not None  # a branch may move
        self.expected = WEIGHTS[name] if self.revision == PINNED.get(name) else None  # sha256 of model.safetensors
        self.cache, self.is_offline = Path(constants.HF_HUB_CACHE), constants.HF_HUB_OFFLINE
        self.folder = self.cache / f"models--{self.name.replace('/', '--')}"

    @cached_property
    def api(self) -> Any:
        """The library, which is loaded only when the cache does not do."""
        return quiet_library()(endpoint=endpoint())

    def cached(self) -> Path | None:
        """The directory of the revision if all of it is there."""
        with suppress(OSError, ValueError):  # no such revision, or a name that can be none
            commit = self.revision if self.is_fixed else (self.folder / "refs" / self.revision).read_text().strip()
            snapshot = self.folder / "snapshots" / commit
            weights = _weights_in(snapshot)
            if weights and (weights[0] == KINDS[0] or not self.expected):
                return snapshot
        return None

    def describe(self) -> tuple[str, dict[str, Any]]:
        """The commit that the revision stands for, and the library's RepoSibling of each file. Raises UserError (5)."""
        reason = "HF_HUB_OFFLINE is set" if self.is_offline else why_unreachable()
        if reason:
            raise self.error(reason)
        try:
            info = self.api.model_info(self.name, revision=self.revision, files_metadata=True, timeout=2 * TIMEOUT)
            files = {file.rfilename: file for file in info.siblings or [] if isinstance(file.size, int)}
        except Exception as error:  # any library below may raise whatever it likes
            raise self.refusal(error) from None
        commit = self.revision if self.is_fixed else str(info.sha)
        if not COMMIT.fullmatch(commit):
            raise self.error(f"{without_credentials(endpoint())} does not answer as the hub does")
        if not self.is_fixed:
            log.info(f"{self.name}: {self.revision} is commit {commit}; init.revision={commit} keeps to it")
        return commit, files

    def download(self, commit: str, files: dict[str, Any], check: Callable[[Path], None]) -> Path:
        """Everything that is not in the cache yet, small files first. Raises UserError."""
        if CONFIG in files:
            check(self.get(CONFIG, commit))
        weights = weights_among(files, lambda index: self.get(index, commit))
        needed = KINDS[:1] if self.expected else weights or [" or ".join(KINDS)]
        missing = [name for name in (CONFIG, *needed) if name not in files]
        if missing:
            raise UserError(f"{self.name} has no {', no '.join(missing)}", "init.from", code=CHECKPOINT)
        wanted = [name for name in (*TOKENIZER, *weights) if name in files]
        self.check_space([files[name] for name in wanted])
        for name in wanted:
            path = self.get(name, commit)
        if not self.is_fixed:
            self.get(CONFIG, self.revision)  # so that the library notes the branch's commit, now that all is there
        return path.parent

    def get(self, name: str, revision: str) -> Path:
        """A file in the cache, downloaded if need be. Raises UserError (5)."""
        try:
            return Path(self.api.hf_hub_download(self.name, name, revision=revision))
        except Exception as error:
            reason = why_refused(error)
            is_of_the_disk = reason == "disk full" or (isinstance(error, OSError) and error.errno)
            raise (self.cannot_write(reason) if is_of_the_disk else self.refusal(error)) from None

    def verify(self, snapshot: Path, is_new: bool) -> None:
        """Raises UserError (3) if weights are not what they were: large files in the cache are links to what is named
        after its sha256. What has just been downloaded is deleted then."""
        for path in [snapshot / name for name in _weights_in(snapshot)]:
            blob = Path(os.readlink(path)).name if path.is_symlink() else ""
            expected = self.expected if self.expected and path.name == KINDS[0] else blob
            if SHA256.fullmatch(expected) and (digest := _sha256(path)) != expected:
                what, damaged = f"{path.name} damaged (sha256 differs: {digest}, not {expected})", path.resolve()
                if is_new:
                    damaged.unlink()
                remedy = "it is deleted; try again" if is_new else f"delete {damaged} and try again"
                raise UserError(what, str(snapshot), remedy, CHECKPOINT)

    def check_space(self, files: list[Any]) -> None:
        """Raises UserError (5) when the disk has no room for what is still to come: the library would go on."""
        blobs = [self.folder / "blobs" / str(file.lfs.sha256 if file.lfs else file.blob_id) for file in files]
        needed = sum(file.size for file, blob in zip(files, blobs, strict=True) if not blob.is_file())
        free = shutil.disk_usage(self.cache).free
        if needed > free:
            raise self.cannot_write(f"it needs {in_bytes(needed)}, {in_bytes(free)} free")
        if needed > 10**6:
            log.info(f"downloading {self.name} ({in_bytes(needed)}) to {self.cache}")

    def cannot_write(self, reason: str) -> UserError:
        """The error for a disk that is full or refuses."""
        remedy = "make room, or let HF_HOME name a folder on another disk"
        return UserError(f"cannot download {self.name}: {reason}", str(self.cache), remedy, ENVIRONMENT)

    def refusal(self, error: Any) -> UserError:
        """The error for what the library raises when the network or the hub refuses."""
        response = getattr(error, "response", None)
        if response is None and isinstance(error, FileNotFoundError) and error.__cause__:  # LocalEntryNotFoundError
            return self.refusal(error.__cause__)
        if response is None:
            return self.error(described(error))
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


def _shards(index: Any) -> list[str]:
    """The files that the content of an index of shards names, all of the directory that it is in. Raises ValueError."""
    files = index.get("weight_map") if isinstance(index, dict) else None
    names = files.values() if isinstance(files, dict) else ()
    if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise ValueError("no weight_map")
    return sorted(set(names))


def index_of(kind: str) -> str:
    """The name of the file that says which shards weights of one of KINDS are in."""
    return f"{kind}.index.json"


def weights_among(names: Collection[str], index: Callable[[str], Path]) -> list[str]:
    """Those of a directory's files that are the weights, as transformers writes them: one file, or an index, which is
    at `index(name)`, and the shards that it names. Raises UserError (3)."""
    for kind in KINDS:
        listing = index_of(kind)
        if kind in names:
            return [kind]
        if listing in names:
            path = index(listing)
            try:
                shards = _shards(json.loads(path.read_bytes()))
            except (OSError, ValueError, RecursionError) as error:
                raise unusable(path, "not an index: no weight_map of tensors to files beside it") from error
            return [listing, *shards]
    return []


def _weights_in(snapshot: Path) -> list[str]:
    """The weights in a directory, as by `weights_among`; empty if not all of them are there. Raises OSError."""
    names = {path.name for path in snapshot.iterdir() if path.is_file()}
    weights = weights_among(names, lambda index: snapshot / index)
    return weights if names.issuperset([CONFIG, *weights]) else []


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise unusable(path, error.strerror or str(error)) from error
