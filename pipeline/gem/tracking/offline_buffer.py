"""The runs that a server does not have completely: a folder for each run that is open, was killed,
or is not sent.

Imports no tracker. .gem/untracked/<server>/<run>/ of the project holds run.json and copies of
artifacts, from the opening of a run until the server has all of it. Logging an update twice has no
further effect, so a process may be killed at any moment.
"""

import json
import os
import shutil
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import filelock

from pipeline.gem.common.files import sha256_of, write_json
from pipeline.gem.common.logs import without_passwords
from pipeline.gem.common.processes import file_lock
from pipeline.gem.tracking.addresses import at_root, project_root

FOLDER = ".gem/untracked"
RUNNING, FINISHED, KILLED, FAILED = "RUNNING", "FINISHED", "KILLED", "FAILED"  # of MLflow
REJECTED = ".rejected"
_KEY = "key-"  # prefix of run keys; MLflow's own ids are hexadecimal


def new_run_key() -> str:
    """Identifies a run before the server gives it an id. Keys sort by time, parents first."""
    return f"{_KEY}{time.time_ns()}-{uuid.uuid4().hex[:8]}"


def is_run_key(run: str) -> bool:
    return run.startswith(_KEY)


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

    def __post_init__(self) -> None:
        for name in ("metrics", "datasets", "artifacts"):  # lists in JSON
            setattr(self, name, [tuple(item) for item in getattr(self, name)])

    def extend(self, later: "RunUpdate") -> None:
        """Adds an update. A resumed fit logs its earlier epochs again: their points stay."""
        self.params |= later.params
        self.tags |= later.tags
        known = {(name, step) for name, _, _, step in self.metrics if step}
        self.metrics += [point for point in later.metrics if (point[0], point[3]) not in known]
        self.datasets += [data for data in later.datasets if data not in self.datasets]
        self.artifacts += [file for file in later.artifacts if file not in self.artifacts]
        self.status = later.status or self.status
        self.end_time = later.end_time or self.end_time


@dataclass(frozen=True)
class RunStart:
    """What creates a run. `parent` is an MLflow id or a run key; `time` is in ms since 1970."""

    key: str
    name: str
    parent: str | None
    time: int
    tags: dict[str, str]
    identity: str | None = None  # of what the run records: a killed run is continued by it
    model: tuple[str, str, str] | None = None  # hash, predictor, stage: the model's run, if any
    otherwise: RunUpdate | None = None  # logged only if there is no run of the model


class BufferedRun:
    """A run, and what its server has not received yet.

    `run` is MLflow's id, or the run key. The process that has the run open holds its lock.
    """

    def __init__(self, server: str, run: str, start: RunStart | None = None):
        self.run, self.start = run, start
        self.record, self.unsent = RunUpdate(), RunUpdate()
        self.id: str | None = None  # MLflow's, once the server has confirmed it
        self.is_complete = True  # the server has all but `unsent`; False after a failed request
        self.may_repeat = start is None  # the server may have the run, and a part of the update
        self.known_metrics: dict[str, float] | None = None  # on the server, latest values
        self.known_steps: dict[str, set[int]] = {}
        self.status: str | None = None  # RUNNING in a saved run: its process died
        self.folder = _server_folder(server) / run

    @cached_property
    def _lock(self) -> filelock.BaseFileLock:
        return file_lock(Path(f"{self.folder}.lock"))

    @property
    def _file(self) -> Path:
        return self.folder / "run.json"

    @property
    def is_saved(self) -> bool:
        return self._file.exists()

    def log(self, update: RunUpdate) -> None:
        self.record.extend(update)
        self.unsent.extend(update)
        self.status = update.status or self.status

    def update(self) -> RunUpdate:
        """What to send: after a failure everything, because the store may be another one."""
        return self.unsent if self.is_complete else self.record

    def set_sent(self, run_id: str) -> None:
        self.run = self.id = run_id
        self.unsent, self.is_complete = RunUpdate(), True

    def set_failed(self) -> None:
        self.id, self.is_complete, self.may_repeat = None, False, True
        self.known_metrics, self.known_steps = None, {}

    def load(self) -> bool:
        """Locks the run and reads what is saved. False if another process has it open."""
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        if self.is_saved:
            content, later = json.loads(self._file.read_bytes()), self.record
            self.run, self.status = content["run"], self.status or content["status"]
            self.start = _start(content["start"]) or self.start
            self.record = RunUpdate(**content["update"])
            self.record.extend(later)
            self.is_complete = self.is_complete and content["complete"]
        return True

    def save(self) -> None:
        """Writes the run, with copies of its artifacts as they are now."""
        if not self._lock.is_locked and not self.load():
            # Another process has the run open: this part gets a folder of its own.
            self.folder = self.folder.with_name(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
            self._lock = file_lock(Path(f"{self.folder}.lock"))
            self.load()
        self.folder.mkdir(exist_ok=True)
        if not self.is_complete:
            files = self.record.artifacts
            self.record.artifacts = [(self._copy(Path(file)), folder) for file, folder in files]
        content = {
            "run": self.run,
            "start": self.start and asdict(self.start),
            "status": self.status,
            "complete": self.is_complete,
            "update": asdict(RunUpdate() if self.is_complete else self.record),
        }
        write_json(self._file, content)

    def _copy(self, file: Path) -> str:
        if self.folder in file.parents:
            return str(file)
        # A folder for every copy: names of artifacts may repeat.
        return str(shutil.copy(file, Path(tempfile.mkdtemp(dir=self.folder)) / file.name))

    def close(self, stopped: bool = False) -> None:
        """Keeps what is unsent, and a stopped run that has an identity; ends the lock."""
        if self.start and not stopped:
            self.start = replace(self.start, identity=None)
        if not self.is_complete or (self.start and self.start.identity):
            self.save()
        elif self._lock.is_locked:
            self.clear()
        self.release()

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def set_aside(self) -> Path:
        """Keeps a run that the server rejects, but does not send it again."""
        path = Path(f"{self.folder}{REJECTED}")
        if path.exists():
            path = Path(f"{self.folder}-{uuid.uuid4().hex[:8]}{REJECTED}")
        return self.folder.rename(path)

    def release(self) -> None:
        if "_lock" in vars(self):
            self._lock.release()


def _start(content: dict | None) -> RunStart | None:
    if content is None:
        return None
    otherwise = content["otherwise"] and RunUpdate(**content["otherwise"])
    return RunStart(**content | {"otherwise": otherwise})


def saved_runs(server: str) -> list[BufferedRun]:
    """All runs that are open, killed or not sent, the oldest first."""
    folders = [path.parent for path in _server_folder(server).glob("*/run.json")]
    names = sorted(folder.name for folder in folders if folder.suffix != REJECTED)
    return [BufferedRun(server, name) for name in names]


def unsent_runs(server: str) -> list[Path]:
    """The folders of runs of which a server misses something, or which it rejected."""
    files = sorted(_server_folder(server).glob("*/run.json"))
    return [file.parent for file in files if not _is_complete(file)]


def _is_complete(file: Path) -> bool:
    try:
        return json.loads(file.read_bytes())["complete"]
    except (ValueError, KeyError, TypeError):
        return False


def unfinished_run(server: str, identity: str) -> BufferedRun | None:
    """The killed run of this identity, locked."""
    for buffered in saved_runs(server):
        if buffered.load():
            if buffered.start and buffered.start.identity == identity:
                return buffered
            buffered.release()
    return None


def _server_folder(server: str) -> Path:
    """Named by a hash, because an address may hold a password. A store in the project has a name
    that does not change when the project is moved."""
    path = server.removeprefix("sqlite:///")
    if path != server:
        server = os.path.relpath(path, project_root())
    return at_root(FOLDER) / sha256_of(without_passwords(server))[:12]
