"""What an MLflow server has missed of a run: one JSON file and copies of artifacts per run.

Imports no tracker. The files are kept under .gem/untracked/ until the server has all of the run.
Logging an update twice has no further effect, so a sender may be killed at any moment.
"""

import json
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

import filelock

from pipeline.gem.common.files import sha256_of, write_json

FOLDER = Path(".gem/untracked")
_KEY = "key-"  # prefix of run keys; MLflow's own ids are hexadecimal


def new_run_key() -> str:
    """Identifies a run before the server gives it an id. Keys sort by time, parents first."""
    return f"{_KEY}{time.time_ns()}-{uuid.uuid4().hex[:8]}"


def is_run_key(run: str) -> bool:
    return run.startswith(_KEY)


@dataclass(frozen=True)
class RunStart:
    """What creates a run. `parent` is an MLflow id or a run key; `time` is in ms since 1970."""

    key: str
    name: str
    parent: str | None
    time: int
    tags: dict[str, str]


@dataclass
class RunUpdate:
    """A part of what is logged to a run."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # time (ms), step
    datasets: list[tuple[str, str, str]] = field(default_factory=list)  # name, digest, context
    artifacts: list[tuple[str, str | None]] = field(default_factory=list)  # file, artifact folder
    status: str | None = None
    end_time: int | None = None  # ms since 1970

    def extend(self, later: "RunUpdate") -> None:
        self.params |= later.params
        self.tags |= later.tags
        self.metrics += later.metrics
        self.datasets += later.datasets
        self.artifacts += later.artifacts
        self.status = later.status or self.status
        self.end_time = later.end_time or self.end_time


class BufferedRun:
    """A run and what its server has not received yet. A process that has saved it holds its lock.

    `run` is MLflow's id, or the run key until the server has the run.
    """

    def __init__(self, server: str, run: str, start: RunStart | None = None):
        self.run, self.start, self.update = run, start, RunUpdate()
        self.is_new = start is not None  # no request has tried to create the run
        self.folder = _server_folder(server) / run
        self._file = self.folder / "run.json"
        self._lock = filelock.FileLock(self.folder.with_suffix(".lock"))

    @property
    def is_saved(self) -> bool:
        return self._file.exists()

    def load(self, timeout: float = -1) -> bool:
        """Locks the run and reads what is saved. False if another process holds it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout)
        except filelock.Timeout:
            return False
        if self.is_saved:
            content, unsaved = json.loads(self._file.read_bytes()), self.update
            self.run = content["run"]
            self.start = content["start"] and RunStart(**content["start"])
            self.update = RunUpdate(**content["update"])
            self.update.extend(unsaved)
        return True

    def save(self) -> None:
        """Writes the run, with copies of its artifacts as they are now."""
        if not self._lock.is_locked:
            self.load()
        self.folder.mkdir(exist_ok=True)
        artifacts = self.update.artifacts
        self.update.artifacts = [(self._copy(Path(file)), folder) for file, folder in artifacts]
        start = self.start and asdict(self.start)
        content = {"run": self.run, "start": start, "update": asdict(self.update)}
        write_json(self._file, content)

    def _copy(self, file: Path) -> str:
        if self.folder in file.parents:
            return str(file)
        # A folder for every copy: names of artifacts may repeat.
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        return str(shutil.copy(file, folder / file.name))

    def clear(self) -> None:
        """After the server has received everything."""
        self.update = RunUpdate()
        shutil.rmtree(self.folder, ignore_errors=True)

    def set_aside(self) -> Path:
        """Keeps a run that the server rejects, but does not send it again."""
        return self.folder.rename(self.folder.with_suffix(".rejected"))

    def release(self) -> None:
        self._lock.release()


def saved_runs(server: str) -> list[BufferedRun]:
    """All runs of which a server has missed something, the oldest first."""
    folders = [path.parent for path in _server_folder(server).glob("*/run.json")]
    names = sorted(folder.name for folder in folders if folder.suffix != ".rejected")
    return [BufferedRun(server, name) for name in names]


def _server_folder(server: str) -> Path:
    # Hashed, because an address may hold a password.
    return FOLDER / sha256_of(server)[:12]
