"""Errors for users: one line each on standard error and an exit code, without a traceback.

Exit codes: 0 done, 2 invalid input or a failure of the machine (disk, memory, permission), 3
diverged or no usable trial, 4 damaged file, 75 stopped and resumable; 1 is a bug, with its
traceback.
"""

import difflib
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TextIO

from pipeline.gem.common.logs import mute, printable, set_handler, without_passwords
from pipeline.gem.common.machine_errors import machine_problem

_VALUE_LENGTH = 60  # characters of a value in a message


class GemError(Exception):
    """Problems that the user can solve; `problems` has one printable line for each."""

    exit_code = 2
    label = "error"

    def __init__(self, *problems: str):
        self.problems = tuple(map(printable, problems))
        super().__init__(*self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class InputError(GemError):
    """Invalid parameters, files or tables."""


class DivergedError(GemError):
    """A non-finite number in training, or a search without a usable trial."""

    exit_code = 3


class IntegrityError(GemError):
    """A file contradicts its manifest or its format."""

    exit_code = 4


class StoppedError(GemError):
    """Stopped by a signal; the message names the command that resumes."""

    exit_code = 75
    label = "stopped"


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """The end of a message about an unknown name: the closest known name, else the known names.

    Names that may print alike stand there in ASCII too.
    """
    names = [str(name) for name in known]
    for close in difflib.get_close_matches(str(word), names, n=1, cutoff=0.6):
        suggestion = f"; did you mean {printable(close, _VALUE_LENGTH)}?"
        if not f"{word}{close}".isascii():
            codes = [printable(ascii(str(name)), _VALUE_LENGTH) for name in (close, word)]
            suggestion += f" ({codes[0]}, not {codes[1]})"
        return suggestion
    return f"; known: {examples(names, 12)}" if names else ""


def examples(values: Iterable[object], limit: int = 5) -> str:
    """The first of `values`, for a message."""
    values = list(values)
    text = ", ".join(printable(value, _VALUE_LENGTH) for value in values[:limit])
    return text if len(values) <= limit else f"{text}, ... ({len(values)} in all)"


def exit_with(main: Callable[[], None], quiet: tuple[type[GemError], ...] = ()) -> None:
    """Runs a command; a failure becomes an exit code and lines on stderr.

    A GemError (unless `quiet`), a signal and a failure of the machine are lines without a
    traceback. Another exception is a bug and keeps its traceback.
    """
    set_handler()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
        print(end="", flush=True)
    except GemError as error:
        _exit(error, silent=isinstance(error, quiet))
    except KeyboardInterrupt as error:
        _exit(StoppedError(f"by {str(error) or 'SIGINT'}; run the same command again"))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            mute(sys.stdout)
            sys.exit(128 + signal.SIGPIPE)
        if problem := machine_problem(error):
            _exit(InputError(problem))
        print(without_passwords(traceback.format_exc()), end="", file=sys.stderr)
        print("error: a bug of this program; report it with the lines above", file=sys.stderr)
        sys.exit(1)


def _terminate(*_) -> None:
    """SIGTERM as an exception, so that temporary files are removed."""
    raise KeyboardInterrupt("SIGTERM")


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader, such as `head`, has ended."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _exit(error: GemError, silent: bool = False) -> None:
    try:
        print(end="", flush=True)
    except OSError:  # otherwise Python would try again at its end, with a message and a code
        mute(sys.stdout)
    with suppress(OSError):
        for problem in () if silent else error.problems:
            print(f"{error.label}: {problem}", file=sys.stderr)
    sys.exit(error.exit_code)
