"""Progress of long work, as lines that read well in a terminal and in a log."""

import time


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 1 h 02 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """Says how far a task is and how long it will take, at most every `interval` seconds."""

    def __init__(self, task: str, total: int, unit: str, interval: float = 5.0):
        self.task, self.total, self.unit, self.interval = task, total, unit, interval
        self.finished = 0
        self.started = self.said = time.monotonic()

    def advance(self, amount: int) -> None:
        self.finished += amount
        now = time.monotonic()
        if now - self.said >= self.interval and self.finished < self.total:
            self.said = now
            rate = self.finished / (now - self.started)
            left = duration((self.total - self.finished) / rate)
            print(
                f"{self.task}: {self.finished:,} of {self.total:,} {self.unit}, {rate:,.0f} {self.unit}/s, {left} left",
                flush=True,
            )

    def done(self, result: str) -> None:
        print(f"{self.task}: {result}, {time.monotonic() - self.started:.1f} s", flush=True)
