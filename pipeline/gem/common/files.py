"""Files and folders that are complete or absent: written beside their place, then renamed.

Nothing is written through a link (DVC's cache may be links), and nothing is removed before its
successor is complete. A process that is killed leaves a `.*.tmp`: the next writer removes it, or
puts it back if it is an old folder without a successor.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipeline.gem.common.machine_errors import NO_SPACE, error_number

if TYPE_CHECKING:
    import pandas as pd  # takes a second, and most processes need it later or never


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content`; a reader, or a crash, sees the old file or the new one."""
    with atomic_replacement(path, len(content)) as temporary:
        temporary.write_bytes(content)


@contextmanager
def folder_replacement(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which replaces the folder `path` with all its content at the
    end; after a failure `path` is as before."""
    with atomic_replacement(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def atomic_replacement(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary path to write to, which replaces `path` at the end.

    For files that are too large for `write_atomically`. The file keeps the mode of a file that
    it replaces, unless that is a link. `size` in bytes, if it is known before. A process replaces
    a path once at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, because the name of the file may have the greatest length.
    prefix = f".{path.name[:40]}.{zlib.crc32(os.fsencode(path.name)):08x}."
    for stray in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        process, _, kind = stray.name.removeprefix(prefix).removesuffix(".tmp").partition(".")
        if _is_other_process(process):
            continue
        if kind == "old" and not os.path.lexists(path):
            os.rename(stray, path)  # its process ended before the new folder was in its place
        else:
            _remove(stray)
    temporary = path.parent / f"{prefix}{os.getpid()}.tmp"
    try:
        yield temporary
        written = [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]
        for part in written:
            _synchronise(part)
        _rename(temporary, path)
    except BaseException as error:
        needed = f"{_megabytes(size or _size(temporary))}{'' if size else ' or more'}"
        _remove(temporary)
        number = error_number(error)
        if number not in NO_SPACE:
            raise
        free = _megabytes(shutil.disk_usage(path.parent).free)
        what = f"{os.strerror(number)}: needed {needed}, {free} free in {path.parent}"
        raise OSError(number, what, str(path)) from error
    _synchronise(path.parent)


def _rename(new: Path, path: Path) -> None:
    """Puts a file or folder in its place. Folders cannot replace each other in one step."""
    if not new.is_dir():
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
            new.chmod(path.stat().st_mode & 0o777)
        os.replace(new, path)
        return
    old = new.with_suffix(".old.tmp")
    if path.is_symlink() or path.exists():
        try:
            os.rename(path, old)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _remove(path)  # a folder of the image of a container cannot be renamed
    try:
        os.rename(new, path)
    except BaseException:
        if old.exists():
            os.rename(old, path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_other_process(process: str) -> bool:
    """Whether the text is the id of another running process.

    A file with the id of this one is of an earlier process: containers use ids again.
    """
    try:
        return (
            process.isdecimal() and int(process) != os.getpid() and psutil.pid_exists(int(process))
        )
    except OverflowError:
        return False


def _synchronise(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    parts = [*path.rglob("*")] if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def write_json(path: Path, value: object) -> None:
    """Writes strict JSON. ValueError for a number that is not finite."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("utf-8"))


def write_table(path: Path, table: "pd.DataFrame") -> None:
    """Writes a table without its index, as Parquet or CSV by the suffix of the path."""
    if path.suffix == ".csv":
        content = table.to_csv(index=False, lineterminator="\n").encode("utf-8")
    else:
        content = table.to_parquet(index=False)
    write_atomically(path, content)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(*parts: object) -> str:
    """A hash of plain values, independent of the order of dictionaries."""
    content = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()
