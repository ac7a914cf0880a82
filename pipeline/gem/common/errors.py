"""Errors for people: one line each on standard error, an exit code, never a traceback for a user's mistake.

Exit codes: 0 done, 2 bad input, 3 diverged or no usable trial, 4 integrity, 75 stopped and resumable.
"""

import difflib
import sys
from collections.abc import Callable, Iterable

from pipeline.gem.common.logs import set_handler


class GemError(Exception):
    """A problem the user can mend. `problems` holds one line per problem, all of them at once."""

    exit_code = 2
    label = "error"

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class InputError(GemError):
    """Wrong parameters, files or tables."""


class DivergedError(GemError):
    """Training left the finite numbers, or no trial of a search was usable."""

    exit_code = 3


class IntegrityError(GemError):
    """A file is not what its manifest or its format promises."""

    exit_code = 4


class StoppedError(GemError):
    """Told to stop; the message says how to go on."""

    exit_code = 75
    label = "stopped"


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """A suffix for a message about an unknown name: the closest known one, else the known ones."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; known: {listed}" if names else ""


def examples(values: Iterable[object], limit: int = 5) -> str:
    """The first few of `values`, for a message."""
    values = list(values)
    return ", ".join(str(value) for value in values[:limit]) + (
        f", ... ({len(values)} in all)" if len(values) > limit else ""
    )


def exit_with(main: Callable[[], None], quiet: tuple[type[GemError], ...] = ()) -> None:
    """Runs a stage; a GemError becomes its lines on standard error (none for `quiet` ones) and its exit code."""
    set_handler()
    try:
        main()
    except GemError as error:
        for problem in () if isinstance(error, quiet) else error.problems:
            print(f"{error.label}: {problem}", file=sys.stderr)
        sys.exit(error.exit_code)
