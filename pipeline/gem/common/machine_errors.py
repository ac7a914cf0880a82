"""Failures of the machine as one line: no space, no memory, no permission, no locks, a bad disk.

Libraries report them as errors of their own; `machine_problem` finds the cause behind them.
"""

import errno
import os
import re
import sqlite3
from collections.abc import Iterator

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_RETRY = "then run the same command again"
_ADVICE = (
    ((errno.ENOSPC, errno.EDQUOT), f"free some space, {_RETRY}"),
    ((errno.EFBIG,), "raise the limit of a file's size: ulimit -f unlimited"),
    ((errno.EROFS,), "work in a folder that can be written to"),
    (
        (errno.EACCES, errno.EPERM),
        f"change its owner or mode, or those of its folder, {_RETRY}",
    ),
    (NO_LOCKS, "the file system lacks this function; work in a folder of another one"),
    ((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO), "check the disk or the network drive"),
    ((errno.ENAMETOOLONG,), "use a shorter path"),
    ((errno.EMFILE, errno.ENFILE), "raise the limit of open files: ulimit -n 4096"),
    ((errno.EAGAIN,), "end other programs, or raise the limit of processes: ulimit -u"),
    ((errno.ENOENT,), f"create it, {_RETRY}"),
    (
        (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.EBUSY),
        f"move away what is there, {_RETRY}",
    ),
)
_ADVICE_OF = {number: advice for numbers, advice in _ADVICE for number in numbers}
_SQLITE_NUMBER = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_NOMEM: errno.ENOMEM,
}
# The file of a database that is kept by this project, MLflow's or Optuna's.
SQLITE_ADVICE = {
    sqlite3.SQLITE_FULL: _ADVICE_OF[errno.ENOSPC],
    sqlite3.SQLITE_IOERR: _ADVICE_OF[errno.EIO],
    sqlite3.SQLITE_READONLY: "make it and its folder writable",
    sqlite3.SQLITE_CANTOPEN: "make it a file, and its folder writable",
    sqlite3.SQLITE_BUSY: "another program holds it; end that program",
    sqlite3.SQLITE_NOTADB: "move it aside",
    sqlite3.SQLITE_CORRUPT: "restore a copy, or move it aside: then a new one is made",
}
_NUMBER = re.compile(r"\[[Ee]rrno (\d+)\]|errno = (\d+)")
# How torch and Python say that memory or processes are short: RuntimeErrors without a number.
_TEXTS = {
    "DefaultCPUAllocator": errno.ENOMEM,
    "out of memory": errno.ENOMEM,
    "unable to mmap": errno.ENOMEM,
    "can't start new thread": errno.EAGAIN,
}
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError, ArithmeticError)


def machine_problem(error: BaseException) -> str | None:
    """What, where and what to do, if the machine is the cause of an error; None for a bug."""
    for cause in _causes(error):
        number = error_number(cause)
        if number == errno.ENOMEM:
            detail = next(iter(str(cause).splitlines()), "")
            return f"not enough memory ({detail}); end other programs, or use a larger machine"
        if sqlite_code(cause) in SQLITE_ADVICE:
            advice = SQLITE_ADVICE[sqlite_code(cause)]
            return f"a local database (mlflow.db or .gem/optuna.db): {cause}; {advice}"
        if number in _ADVICE_OF:
            return _line(cause, number)
    return None


def error_number(error: BaseException) -> int | None:
    """The errno behind an error of Python, Arrow, HDF5, SQLite or torch."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, sqlite3.Error):
        return _SQLITE_NUMBER.get(sqlite_code(error))
    if not isinstance(error, (OSError, RuntimeError)):
        return None
    if number := getattr(error, "errno", None):
        return number
    text = str(error)
    if match := _NUMBER.search(text):
        return int(match[1] or match[2])
    return next((number for part, number in _TEXTS.items() if part in text), None)


def sqlite_code(error: BaseException) -> int:
    """The primary result code of an error of SQLite; 0 if it has none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from; nothing of a bug in the handling of an error."""
    while error is not None and not isinstance(error, BUGS):
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _line(error: BaseException, number: int) -> str:
    path = getattr(error, "filename", None)
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if isinstance(path, str) and error.strerror:
        return f"{path}: {error.strerror}; {_ADVICE_OF[number]}"
    return f"{os.strerror(number)}; {_ADVICE_OF[number]}"
