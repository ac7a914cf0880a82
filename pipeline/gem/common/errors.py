"""Errors for users: one line each on standard error and an exit code, without a traceback.

Exit codes: 0 done, 2 invalid input, 3 diverged or no usable trial, 4 damaged file, 75 stopped and
resumable.
"""

import difflib
import sys
from collections.abc import Callable, Iterable

from pipeline.gem.common.logs import set_handler, without_passwords


class GemError(Exception):
    """Problems that the user can solve; `problems` has one line for each."""

    exit_code = 2
    label = "error"

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


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
    """The end of a message about an unknown name: the closest known name, else the known names."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; known: {listed}" if names else ""


def examples(values: Iterable[object], limit: int = 5) -> str:
    """The first of `values`, for a message."""
    values = list(values)
    text = ", ".join(map(str, values[:limit]))
    return text if len(values) <= limit else f"{text}, ... ({len(values)} in all)"


def exit_with(main: Callable[[], None], quiet: tuple[type[GemError], ...] = ()) -> None:
    """Runs a command; a GemError becomes an exit code and, unless `quiet`, lines on stderr."""
    set_handler()
    try:
        main()
    except GemError as error:
        for problem in () if isinstance(error, quiet) else error.problems:
            print(without_passwords(f"{error.label}: {problem}"), file=sys.stderr)
        sys.exit(error.exit_code)
