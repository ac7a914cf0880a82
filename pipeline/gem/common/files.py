"""Files that are complete or absent: atomic writes, checksums, strict JSON."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content`; a reader, or a crash, sees the old file or the new one. Keeps the mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_replacement(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` at the end; removed on failure.

    For files that are too large for `write_atomically`. Removes what a killed process left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stray in path.parent.glob(f".{path.name}.*.tmp"):
        if not _is_running(stray.name.removeprefix(f".{path.name}.").removesuffix(".tmp")):
            stray.unlink(missing_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _is_running(process: str) -> bool:
    """Whether the text is the id of a running process."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Writes strict JSON. ValueError for a number that is not finite."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("utf-8"))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(*parts: object) -> str:
    """A hash of plain values, independent of the order of dictionaries."""
    content = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()
