"""What a tracking server that did not answer is still to be told: a file of events for every run, kept until it is sent.

Knows no tracker. Every event may be sent twice without another effect, so that a sender that dies is no loss.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from pipeline.gem.common.files import sha256_of, write_atomically

FOLDER = Path(".gem/untracked")
_UNSENT = "unsent-"  # begins the name of a run that its server does not know yet

Event = dict[str, object]


def new_key() -> str:
    """A name for a run; names sort by time, so that a parent is sent before its children."""
    return f"{_UNSENT}{time.time_ns()}-{uuid.uuid4().hex[:8]}"


def is_key(run: str) -> bool:
    """Whether a run is named by us, not by its server."""
    return run.startswith(_UNSENT)


class OfflineRun:
    """The events of one run for one store. Who writes or sends it has it `open`, and nobody else."""

    def __init__(self, store: str, run: str):
        self.run = run
        self._path = _folder(store) / f"{run}.jsonl"
        self._files = self._path.with_suffix(".files")
        self._lock = filelock.FileLock(self._path.with_suffix(".lock"))

    @property
    def exists(self) -> bool:
        return self._path.exists()

    def open(self) -> "OfflineRun":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        return self

    def close(self) -> None:
        self._lock.release()

    @contextmanager
    def if_free(self) -> Iterator[bool]:
        """Opens it for the block where nobody else has it open."""
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            yield False
            return
        try:
            yield self.exists
        finally:
            self._lock.release()

    def append(self, event: Event) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event, allow_nan=False) + "\n")

    def keep(self, path: Path) -> Path:
        """A copy of a file as it is now."""
        self._files.mkdir(parents=True, exist_ok=True)
        folder = self._files / str(len(list(self._files.iterdir())))
        folder.mkdir()
        return Path(shutil.copy(path, folder / path.name))

    def events(self) -> list[Event]:
        """All but a last one that was being written when its process died."""
        return [
            json.loads(line)
            for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n")
        ]

    def sent(self, run_id: str) -> None:
        """Strikes it out; under which name the server knows the run is kept."""
        if is_key(self.run):
            write_atomically(self._path.with_suffix(".sent"), run_id.encode())
        self._path.unlink()
        shutil.rmtree(self._files, ignore_errors=True)

    def refused(self) -> Path:
        """Sets it aside: the server will never take it."""
        return self._path.rename(self._path.with_suffix(".refused"))


def waiting(store: str) -> list[OfflineRun]:
    """Of all runs that a store has missed something of, the oldest first."""
    return [OfflineRun(store, path.stem) for path in sorted(_folder(store).glob("*.jsonl"))]


def server_name(store: str, run: str) -> str | None:
    """How the store itself names a run; None where it was not told of it yet."""
    if not is_key(run):
        return run
    known = _folder(store) / f"{run}.sent"
    return known.read_text() if known.exists() else None


def _folder(store: str) -> Path:
    # An address may hold a password.
    return FOLDER / sha256_of(store)[:12]
