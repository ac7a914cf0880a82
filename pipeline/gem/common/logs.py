"""The log handler of the commands: bare lines, results on stdout and warnings on stderr."""

import logging
import sys


class _Handler(logging.StreamHandler):
    """Writes INFO to the current stdout, and WARNING and above to the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        # Looked up for every record: a forked process may have replaced both streams.
        self.stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        super().emit(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + record.getMessage()


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
