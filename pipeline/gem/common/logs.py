"""How the stages write log messages: one bare line each, results to stdout, warnings to stderr."""

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


def set_handler(level: int = logging.INFO) -> None:
    """Sends the log messages of the package to the terminal. Only `exit_with`, the entry
    of every verb, calls it."""
    logger = logging.getLogger("pipeline")
    logger.setLevel(level)
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        handler = _Handler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
