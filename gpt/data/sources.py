"""Finds raw data, in files or on the Hugging Face hub."""

import contextlib
import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.config.data import DataConfig
from gpt.data.rows import Row
from gpt.errors import ENVIRONMENT, UserError
from gpt.files import atomic, paths
from gpt.files.hub import described, quiet_library, why_unreachable

log = logging.getLogger(__name__)

HUB_SPLITS = {"validation": "val", "val": "val", "test": "test"}  # the publisher's name -> ours


@dataclass(frozen=True)
class Source:
    """Raw files, in order, or a data set of the hub. `wanted` is where a file would have been taken from; `left_out`,
    what lies beside texts in their folder."""

    files: list[Path] = field(default_factory=list)
    base: Path = Path()  # names of files are relative to it
    hub: str | None = None
    wanted: Path | None = None
    left_out: list[str] = field(default_factory=list)

    def label(self) -> str:
        """What a log line calls it."""
        if self.hub:
            return f"the hub's {self.hub}"
        return self.files[0].name if len(self.files) == 1 else f"{len(self.files)} files in {self.base.name}/"

    def identity(self) -> list[dict[str, Any]]:
        """Name, size and sha256 of every file: what makes it this data and no other."""
        return [self.described(path, sha256(path)) for path in self.files]

    def described(self, path: Path, sha256: str) -> dict[str, Any]:
        """A file's part of the identity."""
        return {"file": path.relative_to(self.base).as_posix(), "bytes": path.stat().st_size, "sha256": sha256}


def sha256(path: Path) -> str:
    with reading(path):
        return atomic.sha256(path)


def path_is_typed(overrides: Iterable[str], run_dir: str | None) -> bool:
    """Whether data.path is on the command line: then it is that file and no other that is wanted. A run that has
    checkpoints in `run_dir` goes on with its prepared data, whatever has become of the file."""
    is_typed = any(text.lstrip("+").startswith("data.path=") for text in overrides)
    return is_typed and not (run_dir and any(Path(run_dir, "checkpoints").glob("step_*")))


def find(cfg: DataConfig, root: Path, is_typed: bool = False) -> Source:
    """What is in files if there are any, else the hub, but not in place of a path that was typed. Raises UserError
    when there is neither."""
    source = local(cfg, root)
    if source:
        return source
    if cfg.path is None:
        if cfg.hub is None:
            raise UserError(f"data={cfg.name} needs a file", remedy="data.path=<file> says which one")
        return Source(hub=cfg.hub)
    wanted = path_of(cfg, root)
    missing = f"no text file at {wanted}" if cfg.kind == "text" else f"{wanted} does not exist"
    if cfg.hub is None or is_typed:
        raise UserError(missing, "data.path", paths.elsewhere(wanted))
    log.warning(f"{missing}; trying the hub: {cfg.hub}")
    return Source(hub=cfg.hub, wanted=wanted)


def local(cfg: DataConfig, root: Path) -> Source | None:
    """The files that data.path names, relative to `root`; None when nothing is there."""
    if cfg.path is None:
        return None
    path = path_of(cfg, root)
    with reading(path):
        return _texts(path) if cfg.kind == "text" else _table(path)


def path_of(cfg: DataConfig, root: Path) -> Path:
    return root / Path(cfg.path or "").expanduser()


def _table(path: Path) -> Source | None:
    if path.is_dir():
        raise UserError(f"{path} is a folder", "data.path", "a file is needed")
    if not path.exists():
        return None
    if not path.is_file():
        raise UserError(f"{path} is not an ordinary file", "data.path", "an ordinary file is needed")
    return Source([path], path.parent)


def _texts(path: Path) -> Source | None:
    """One file, every .txt or .txt.gz in a folder and below, or what a pattern such as books/*.txt finds."""
    if path.exists() and not path.is_dir():
        return _table(path)
    if not path.is_dir() and not glob.has_magic(str(path)):
        return None
    matches = path.rglob("*") if path.is_dir() else map(Path, glob.glob(paths.glob_pattern(path), recursive=True))
    files, left_out = sorted(match for match in matches if match.is_file()), []
    if path.is_dir():
        left_out = [file.relative_to(path).as_posix() for file in files if not _is_text(file)]
        files = list(filter(_is_text, files))
    base = Path(os.path.commonpath([file.parent for file in files])) if files else path
    left_out = [name for name in left_out if not name.startswith(".") and "/." not in name]  # .DS_Store, .git
    return Source(files, base, left_out=left_out) if files else None


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith((".txt", ".txt.gz"))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the file system refuses becomes a UserError (5)."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(
            f"cannot read {path}", getattr(error, "strerror", None) or str(error), code=ENVIRONMENT
        ) from error


def hub_rows(source: Source) -> tuple[str | None, Iterator[Row]]:
    """The revision and the rows of a data set of the hub. Raises UserError (5) when it cannot be had."""
    name = source.hub or ""
    is_local = Path(name).is_dir()  # a copy of the data set's repository
    reason = None if is_local else why_unreachable()
    try:
        dataset = _load(name, offline=reason is not None)  # a copy in the cache will do
    except Exception as error:  # any library below `datasets` may raise whatever it likes
        by_hand = f"put the file at {source.wanted} (data.path)" if source.wanted else "data.path=<file> takes a file"
        reason = reason or described(error)
        raise UserError(
            f"the hub's data set {name} cannot be had: {reason}",
            remedy=f"{by_hand}, and data=sample needs nothing",
            code=ENVIRONMENT,
        ) from None
    return _revision(dataset), _rows(name, dataset)


def _load(name: str, offline: bool) -> Any:
    import datasets  # 1.7 s
    import huggingface_hub

    modules = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    quiet_library()
    try:
        for module in modules:  # else the library tries six times, which takes 23 s
            module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or offline
        return datasets.load_dataset(name)
    finally:  # the network may be back when the next job of a sweep asks
        for module, was in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was


def _revision(dataset: Any) -> str | None:
    """The commit that the rows come from, as far as the library tells."""
    urls = " ".join(str(url) for part in dataset.values() for url in part.info.download_checksums or {})
    commit = re.search(r"@([0-9a-f]{40})/", urls)
    return commit[1] if commit else None


def _rows(name: str, dataset: Any) -> Iterator[Row]:
    for split, part in dataset.items():
        line = 0
        for batch in part.iter(batch_size=1000):
            for cells in zip(*batch.values(), strict=True):
                line += 1
                yield Row(f"{name}/{split}", line, dict(zip(batch, cells, strict=True)), HUB_SPLITS.get(split))
