"""Atomic writes, canonical JSON and digests: how every output reaches the disk."""

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from filelock import FileLock, Timeout

from layersense.errors import LayersenseError

logger = logging.getLogger(__name__)

_STALE_SECONDS = 24 * 3600
BROKEN_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises of bytes that are no JSON of a type: some is Python's own."""


class Versioned(Protocol):
    """A record that says by which schema it was written."""

    schema_version: int


Record = TypeVar("Record", bound=Versioned)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it into place when the block succeeds.

    Nothing half-written is ever seen under ``path``: on an exception the temporary file is
    removed and an earlier ``path`` stays as it was. Parent folders are made. What a process that
    was killed left behind a day ago or more is cleared away.

    Raises:
        LayersenseError: the disk is full, read-only or not writable.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=".part"
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LayersenseError(
            f"{target}: cannot be written ({error.strerror or error}); "
            "free disk space or choose a writable folder"
        ) from error


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write ``data`` (text is UTF-8) to ``path`` in one step; see :func:`atomic_path`."""
    content = data.encode() if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def canonical_json(value: Any) -> str:
    """Return ``value`` as compact JSON with sorted keys: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically.

    Raises:
        ValueError: ``value`` holds NaN or infinity, which JSON cannot express.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(path, text + "\n")


def read_record(
    path: str | Path, kind: type[Record], version: int, what: str, target: str, redo: str
) -> Record:
    """Read a JSON file that layersense wrote.

    Args:
        path: the file.
        kind: what it holds.
        version: its schema version that this layersense reads.
        what: what it is, for errors: ``score file``.
        target: of Snakemake, which makes a missing one.
        redo: what to do after an unreadable one was deleted: ``score again``.

    Raises:
        LayersenseError: it is missing, not JSON, or not of this schema.
    """
    try:
        record = msgspec.json.decode(Path(path).read_bytes(), type=kind)
    except FileNotFoundError as error:
        raise LayersenseError(
            f"{path}: there is no such {what}; run `snakemake {target}`"
        ) from error
    except OSError as error:
        raise LayersenseError(
            f"{path}: cannot be read ({error.strerror}); make it readable"
        ) from error
    except BROKEN_JSON as error:
        raise LayersenseError(
            f"{path}: is not a {what} of layersense ({error}); delete it and {redo} if the "
            "workflow wrote it, else name the right file"
        ) from error
    if record.schema_version != version:
        raise LayersenseError(
            f"{path}: has schema version {record.schema_version}, this layersense reads "
            f"{version}; delete it and {redo}"
        )
    return record


def write_record(path: str | Path, record: msgspec.Struct) -> None:
    """Write a record as indented JSON, atomically."""
    atomic_write(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def digest_json(value: Any) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: str | Path) -> None:
    """Refuse a folder in which nothing can be written; one that is not there is fine.

    Raises:
        LayersenseError: it is on a read-only file system, or belongs to somebody else.
    """
    if Path(folder).exists() and not os.access(folder, os.W_OK):
        raise LayersenseError(
            f"{Path(folder).resolve()}: nothing can be written there; make it writable, or link "
            f"{folder} to a folder that is"
        )


def has_locks(folder: str | Path) -> bool:
    """Return whether kernel locks work in ``folder``; some network file systems have none.

    Raises:
        OSError: no file can be made there.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
                return False
            raise
    return True


@contextmanager
def exclusive(lock_file: Path, waiting: str, without: str) -> Iterator[bool]:
    """Let one process at a time run the block; the kernel frees the lock even after SIGKILL.

    Yields whether another process held it first.

    The lock file is never deleted, or two processes could hold two files of one name.

    Args:
        lock_file: the file; its folder is made.
        waiting: what is logged while another process holds it.
        without: what is logged where the file system has no locks, and the block runs all the same.

    Raises:
        LayersenseError: the file cannot be written.
    """
    waited = False
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        locks = has_locks(lock_file.parent)
        lock = FileLock(lock_file)
        if locks:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("%s: %s", lock_file, waiting)
                waited = True
                lock.acquire()
    except OSError as error:
        raise LayersenseError(
            f"{lock_file}: cannot be written ({error.strerror or error}); make the folder "
            "writable, or move it to where there is space and link it"
        ) from error
    if not locks:
        logger.warning("%s: this file system has no locks, so %s", lock_file.parent, without)
    try:
        yield waited
    finally:
        lock.release()


def _remove_stale(target: Path) -> None:
    for old in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                old.unlink()


def _sync_folder(folder: Path) -> None:
    """Let the renaming itself survive a power cut, where the file system can promise that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
