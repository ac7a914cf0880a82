"""The log handler of the commands: bare lines, results on stdout and warnings on stderr.

No line contains a password of an address.
"""

import logging
import os
import re
import sys
from urllib.parse import unquote

_ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "OPTUNA_STORAGE")
_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")
_USER = re.compile(r"(?<=://)[^\s@/]*:\S*(?=@)")  # user:password, up to the last @
_QUERY = re.compile(
    r"(?i)(?<=[?&])([^\s=&]*(?:password|passwd|pwd|token|secret|key)[^\s=&]*=)[^&\s'\"]+"
)
_SHORTEST = 4  # characters of a password that is replaced wherever it stands


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


class _Handler(logging.StreamHandler):
    """Writes INFO to the current stdout, and WARNING and above to the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        # Looked up for every record: a forked process may have replaced both streams.
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        super().emit(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + without_passwords(record.getMessage())


def set_handler() -> None:
    """Sends log messages of the package to the terminal.

    Called by `exit_with`, the entry of every command; a program that imports the package
    configures logging itself.
    """
    for name in ("pipeline", "__main__"):  # a verb that runs as `python -m` is named __main__
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, _Handler) for handler in logger.handlers):
            handler = _Handler()
            handler.setFormatter(_Formatter())
            logger.addHandler(handler)
