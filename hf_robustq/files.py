"""Files that stay whole: written beside their place and renamed, one writer at a time; read with what is wrong said."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the JSON files here."""

DEPTH = 100
"""More brackets inside each other than any file here has."""

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "name a folder that you may write to"),
    errno.EFBIG: "raise the limit on the size of files",
}
"""By the system's number for what went wrong."""


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """A file of its own to write in the same folder, which replaces `path` once it is whole.

    On any error, an interrupt included, it is removed and `path` stays as it was. Raises `OSError`, in one line, where
    the disk is full or closed.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with disk(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def write_text(text: str, path: str | Path) -> None:
    """The old file stays whole until the new one is."""
    with written(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(values: Any, path: str | Path, indent: int | None = 1) -> None:
    """The same of JSON."""
    write_text(json.dumps(values, indent=indent), path)


@contextmanager
def disk(folder: str | Path, name: str = "its files") -> Iterator[None]:
    """A full or closed disk as one `OSError` that names the folder, whichever library wrote."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _code(str(error))
        where = getattr(error, "filename", None)
        elsewhere = where and Path(folder) not in (Path(str(where)), *Path(str(where)).parents)
        if code not in REMEDIES or elsewhere:
            raise
        why = os.strerror(code).lower()
        raise OSError(f"cannot write {name} into {folder}: {why}: {REMEDIES[code]}") from error


def _code(text: str) -> int | None:
    """Of an error of Rust or PyTorch, which have the system's number in their text, or none."""
    if "PytorchStreamWriter failed" in text or "inline_container.cc" in text:
        return errno.ENOSPC
    return next((code for code in REMEDIES if f"(os error {code})" in text), None)


@contextmanager
def locked(path: str | Path, wait: float = 60) -> Iterator[None]:
    """Only one process at a time; the system opens the lock of one that ended. Its file, `.NAME.lock`, stays.

    Raises `ValueError` after `wait` seconds. On a file system without locks a warning says that there is none.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    with disk(path.parent, path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock", timeout=wait)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"another command writes {path}: wait for it, or name another --out") from None
        except NotImplementedError:
            logger.warning("%s is on a file system without locks: let one command at a time write to it", path.parent)
            lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def read_json(path: str | Path) -> Any:
    """Raises `ValueError`, in one line, for a file that is no JSON, or of a later version of this package."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        _check_text(values)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {os.strerror(error.errno or 0).lower()}") from None
    except RecursionError:
        raise ValueError(f"{path} is damaged, or no JSON: too many brackets") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON: {error}") from None
    version = values.get("version", VERSION) if isinstance(values, dict) else 0
    if version != VERSION and isinstance(version, int) and version > VERSION:
        raise ValueError(f"{path} was written by a later version of hf_robustq: update it")
    return values


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The same of a mapping."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no mapping")
    return values


def read_model(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a model's folder. Raises `ValueError` for a damaged one, or a damaged index."""
    folder = Path(folder)
    values = read_mapping(folder / "config.json")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        about = read_mapping(index)
        shards = about.get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and len(name) < 200 for name in shards.values()
        ):
            raise ValueError(f"{index} is damaged: weight_map must name the file of each weight: save the model again")
        for shard in sorted(set(shards.values())):
            if not (folder / shard).is_file():
                raise ValueError(f"{folder} has no {shard}, which {index.name} names: copy or save the model again")
        if not isinstance(about.get("metadata"), dict):
            raise ValueError(f"{index} is damaged: metadata must be a mapping: save the model again")
    return values


def _check_text(value: Any, depth: int = DEPTH) -> None:
    """Raise `ValueError` for half a character, or for too many brackets."""
    if depth == 0:
        raise ValueError("too many brackets")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        for one in value:
            _check_text(one, depth - 1)
    elif isinstance(value, dict):
        for key, one in value.items():
            key.encode()
            _check_text(one, depth - 1)


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """Around what reads a model's folder: whatever is raised becomes one `ValueError` that names its `config.json`."""
    if (Path(name) / "config.json").exists():
        read_model(name)
    try:
        yield
    except Exception as error:
        own = isinstance(error, (ValueError, OSError)) and str(name) in str(error)
        if own or not Path(name).exists():
            raise
        lines = (line.strip() for line in str(error).splitlines())
        why = " ".join(filter(None, lines))[:300] or type(error).__name__
        raise ValueError(f"{name} cannot be loaded as its config.json says: {why}") from error
