"""The place where errors of h5py, anndata, pyarrow and the system become one line about a file."""

import errno
import faulthandler
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipeline.gem.common.capacity import available_memory
from pipeline.gem.common.errors import GemError, InputError
from pipeline.gem.common.machine_errors import error_number

CHUNK_VALUES = 2**23  # counts read at a time
# Limits of a child, and what a byte of the file adds: CPU seconds and bytes of memory.
CHILD_SECONDS, CHILD_MEMORY = 10, 2**30
_BYTES_PER_SECOND, _MEMORY_PER_BYTE = 20 * 2**20, 64
RESTORE = "restore it from a copy, or write it again"
_ADVICE = {
    errno.EAGAIN: "another program has it open for writing: wait until that program has closed it",
    errno.EACCES: "allow this user to read it: chmod +r",
}


@contextmanager
def file_errors(
    where: Path | str,
    advice: str = RESTORE,
    error: type[GemError] = InputError,
    kind: str | None = None,
    errors: tuple[type[Exception], ...] = (Exception,),
) -> Iterator[None]:
    """Turns every failure of a library that reads a file into an `error` about `where`.

    For library calls only: a damaged file makes them raise nearly any exception; where other code
    runs too, `errors` are those to turn. A shortage of memory stays what it is.
    """
    try:
        yield
    except (GemError, MemoryError):
        raise
    except errors as failure:
        number = error_number(failure)
        if number == errno.ENOMEM:
            raise
        advice = _ADVICE.get(number, advice)
        reason = os.strerror(number) if number in _ADVICE else _reason(failure)
        as_kind = f" as {kind}" if kind else ""
        raise error(f"{where}: cannot be read{as_kind} ({reason}); {advice}") from None


def check_regular(path: Path, error: type[GemError] = InputError) -> None:
    """An error for a pipe, a device, a folder: reading one may never end."""
    with file_errors(path, error=error):
        if not path.is_file():
            kind = "absent" if not os.path.lexists(path) else "not a regular file"
            raise error(f"{path}: {kind}; expected a file")


def check_memory(where: str, what: str, size: int) -> None:
    """InputError if `size` bytes exceed the free memory."""
    free = available_memory()
    if size > free:
        raise InputError(
            f"{where}: {what} needs about {size / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are "
            "free; use a smaller file or a larger machine"
        )


def try_in_child(read: Callable[[], object], path: Path) -> None:
    """Runs `read` in a forked child first; InputError as there, or if it crashes or does not end.

    HDF5 runs for ever on some damaged files, and takes any memory that they declare. Any other
    error is left to the caller, which reads the file after this.
    """
    size = path.stat().st_size
    seconds = CHILD_SECONDS + size // _BYTES_PER_SECOND
    memory = psutil.Process().memory_info().vms + CHILD_MEMORY + size * _MEMORY_PER_BYTE
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            faulthandler.disable()
            _limit(resource.RLIMIT_CORE, 0)
            _limit(resource.RLIMIT_CPU, seconds)
            _limit(resource.RLIMIT_AS, memory)
            read()
        except GemError as error:
            os.write(sender, str(error).encode())
        except Exception as error:
            if error_number(error) == errno.ENOMEM:
                problem = f"{path}: declares more than fits in memory: it is damaged; {RESTORE}"
                os.write(sender, problem.encode())
        finally:
            os._exit(0)  # never into the code of the parent
    os.close(sender)
    with open(receiver, encoding="utf-8") as file:
        problems = file.read().splitlines()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        problems = [f"{path}: {_signal_problem(os.WTERMSIG(status))}"]
    if problems:
        raise InputError(*problems)


def _limit(kind: int, value: int) -> None:
    """Lowers a soft limit of this process: at a hard limit of CPU time SIGKILL would come, which
    is the signal of a shortage of memory."""
    soft, hard = resource.getrlimit(kind)
    values = [limit for limit in (value, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min(values), hard))


def _signal_problem(number: int) -> str:
    if number == signal.SIGKILL:
        return (
            "the process that reads it was killed (SIGKILL): it needs more memory than is free; "
            "end other programs, or use a smaller file or a larger machine"
        )
    end = "does not end" if number == signal.SIGXCPU else f"ends by {signal.Signals(number).name}"
    return f"HDF5 {end} while reading it: it is damaged; {RESTORE}"


def _reason(failure: Exception) -> str:
    """The first line of a message that has any."""
    text = str(failure.args[0] if isinstance(failure, KeyError) and failure.args else failure)
    if isinstance(failure, UnicodeError) or "invalid UTF8" in text:
        return "its text is not UTF-8; save it as UTF-8"
    if type(failure).__name__ == "IORegistryError":
        return "an encoding that this anndata does not know"
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(failure).__name__
