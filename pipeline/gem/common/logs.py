"""Lines for people, printable and without passwords: results on stdout, warnings on stderr."""

import logging
import os
import re
import sys
from typing import TextIO
from urllib.parse import unquote

LINE_LENGTH = 300  # characters of a message at most
_WORD_LENGTH = 40  # characters that stay of a long value
# Characters that Unicode calls printable and that show nothing.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)

_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "OPTUNA_STORAGE")
_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")
_USER = re.compile(r"(?<=://)[^\s@/]*:\S*(?=@)")  # user:password, up to the last @
_QUERY = re.compile(
    r"(?i)(?<=[?&])([^\s=&]*(?:password|passwd|pwd|token|secret|key)[^\s=&]*=)[^&\s'\"]+"
)
_SHORTEST = 4  # characters of a password that is replaced wherever it stands


def printable(text: object, length: int = LINE_LENGTH) -> str:
    """One line of at most `length` visible characters.

    Control, invisible and bidirectional characters become escapes, passwords become ***. A text
    that is too long loses the middle of its longest words, then its own middle: the end says what
    to do.
    """
    line = "".join(map(_visible, without_passwords(str(text).strip())))
    while len(line) > length:
        word = max(line.split(" "), key=len)
        if len(word) <= _WORD_LENGTH:
            return _without_middle(line, length)
        kept = max(_WORD_LENGTH, len(word) - (len(line) - length))
        line = line.replace(word, _without_middle(word, kept))
    return line


def without_passwords(text: str) -> str:
    """`text` with *** for the passwords of addresses: of those in `text`, and of those in the
    environment also where they stand alone."""
    text = _QUERY.sub(r"\1***", _USER.sub("***", text))
    for secret in _environment_passwords():
        text = text.replace(secret, "***")
    return text


def _environment_passwords() -> set[str]:
    addresses = [os.environ.get(name, "") for name in _ADDRESSES]
    secrets = {os.environ.get(name, "") for name in _SECRETS}
    for address in addresses:
        secrets |= {found[0].partition(":")[2] for found in _USER.finditer(address)}
        secrets |= {found[0].partition("=")[2] for found in _QUERY.finditer(address)}
    secrets |= {unquote(secret) for secret in secrets}
    return {secret for secret in secrets if len(secret) >= _SHORTEST}


def _visible(character: str) -> str:
    if character.isprintable() and not INVISIBLE.match(character):
        return character
    return character.encode("unicode_escape").decode()


def _without_middle(text: str, length: int) -> str:
    head = (length - 3) * 3 // 5
    return f"{text[:head]}...{text[len(text) - (length - 3 - head) :]}"


class _Handler(logging.StreamHandler):
    """Writes INFO to the current stdout, and WARNING and above to the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        # Looked up for every record: a forked process may have replaced both streams.
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A closed pipe or a full disk behind the stream ends the output, not the work."""
        if isinstance(sys.exc_info()[1], OSError):
            mute(self.stream)
        else:
            super().handleError(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return printable(prefix + record.getMessage())


def mute(stream: TextIO) -> None:
    """Sends all further output of a standard stream nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def set_handler() -> None:
    """Sends log messages of the package to the terminal.

    Called by `exit_with`, the entry of every command; a program that imports the package
    configures logging itself.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal may lack characters of the labels.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # A verb that runs as `python -m` is named __main__.
    for name in ("pipeline", "benchmarks", "__main__"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _Handler) for handler in logger.handlers):
            handler = _Handler()
            handler.setFormatter(_Formatter())
            logger.addHandler(handler)
