"""Progress of long tasks as log messages."""

import logging
import time

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 1 h 02 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Logs the progress and the remaining time of a task, at most every `interval` seconds."""

    def __init__(self, task: str, total: int, unit: str, interval: float = 5.0):
        self.task, self.total, self.unit, self.interval = task, total, unit, interval
        self.finished = 0
        self.start = self.last_message = time.monotonic()

    def advance(self, amount: int) -> None:
        self.finished += amount
        now = time.monotonic()
        if now - self.last_message < self.interval or self.finished >= self.total:
            return
        self.last_message = now
        rate = self.finished / (now - self.start)
        left = duration((self.total - self.finished) / rate)
        amounts = f"{self.finished:,} of {self.total:,} {self.unit}"
        logger.info(f"{self.task}: {amounts}, {rate:,.0f} {self.unit}/s, {left} left")

    def done(self, result: str) -> None:
        logger.info(f"{self.task}: {result}, {time.monotonic() - self.start:.1f} s")
