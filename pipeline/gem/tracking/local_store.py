"""The SQLite file of a local MLflow store: what is wrong with it, before MLflow opens it.

MLflow keeps absolute paths of artifacts. In a project that was moved or copied they are corrected,
so that nothing is written to the place where it was before.
"""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import mlflow
from mlflow.store.db import utils as mlflow_database

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.machine_errors import SQLITE_ADVICE, sqlite_code
from pipeline.gem.tracking.addresses import DVC_COPIES, project_root

log = logging.getLogger(__name__)

ARTIFACTS = "mlruns"  # MLflow's own name, in the working directory
LOCK_TIMEOUT_S = 5.0
_MIGRATIONS = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
_PLACES = (  # columns with absolute paths of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_LASTING = (  # errors that waiting does not end
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_CORRUPT,
)


class LocalStore:
    """An SQLite file of MLflow. It is the project's own if it lies in the project."""

    def __init__(self, file: Path):
        self.file = file
        self._identity: tuple[int, int] | None = None

    @property
    def address(self) -> str:
        """For MLflow."""
        return _address(self.file.resolve())

    @property
    def shown_address(self) -> str:
        """Relative within the project."""
        return f"sqlite:///{self._relative()}"

    def _relative(self) -> Path:
        inside = self.file.resolve().is_relative_to(project_root())
        return Path(os.path.relpath(self.file)) if inside else self.file

    def open(self) -> None:
        """Checks the file, and makes it if there is none.

        Raises:
            InputError: no MLflow can use it, or not this one.
            sqlite3.Error, OSError: it cannot be used now: locked, or the disk is full.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self.file.exists() or not self.file.stat().st_size:
                self._create()
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise self._problem(f"cannot be made ({error})", sqlite3.SQLITE_CANTOPEN) from None
        if not self.file.is_file():
            raise self._problem("is no file", sqlite3.SQLITE_NOTADB)
        with self._errors(), closing(self._connect()) as database:
            self._check(database)
        self._identity = _identity(self.file)

    def require_usable(self) -> None:
        """Raises OSError or sqlite3.Error if the file is gone, another one, locked, or damaged:
        MLflow would write to a deleted file without an error, and wait for a lock for 20 s."""
        if _identity(self.file) != self._identity:
            raise FileNotFoundError(f"{self.file} was deleted or replaced")
        with closing(self._connect()) as database:
            _test_writing(database)

    def require_experiment(self, name: str) -> None:
        """InputError if an experiment is deleted, or keeps its files in another project."""
        with self._errors(), closing(self._connect()) as database:
            columns = "experiment_id, lifecycle_stage, artifact_location"
            query = f"SELECT {columns} FROM experiments WHERE name = ?"
            row = database.execute(query, (name,)).fetchone()
        if row is None:
            return
        number, stage, location = row
        if stage != "active":
            raise deleted_experiment(name, str(number), self.shown_address)
        place = _place(location)
        if place and place not in (_text(project_root()), _text(self.file.resolve().parent)):
            raise InputError(
                f"{self._relative()}: the experiment {name} keeps its files in {place}, another "
                "project; set another tracking.experiment in params.yaml, or MLFLOW_TRACKING_URI"
            )

    def correct_places(self) -> None:
        """Replaces the former folder of a project that was moved or copied by the present one: the
        folder of the oldest experiment, which MLflow makes with the store. Places that somebody
        has chosen for other experiments stay."""
        root = project_root()
        if not self.file.resolve().is_relative_to(root):
            return
        with closing(self._connect()) as database, database:
            query = "SELECT artifact_location FROM experiments ORDER BY experiment_id"
            places = [place for (text,) in database.execute(query) if (place := _place(text))]
            # A process that was killed in a temporary copy of DVC leaves the place of the copy.
            old = {place for place in places if place.startswith(f"{_text(root)}/{DVC_COPIES}/")}
            old |= set(places[:1]) - {_text(root)}
            if old:
                database.execute("BEGIN IMMEDIATE")
            for place in sorted(old):
                self._require_artifacts(place, root)
                _replace(database, place, _text(root))
        for place in sorted(old):
            message = "tracking: %s was made in %s; its paths of artifacts are corrected"
            log.info(message, self._relative(), place)

    def correct_place(self, experiment: str) -> None:
        """Moves an experiment that this process has made from the working directory, where MLflow
        puts it, to the project, or beside a store outside of the project."""
        path, root = self.file.resolve(), project_root()
        target = root if path.is_relative_to(root) else path.parent
        with closing(self._connect()) as database, database:
            query = "SELECT artifact_location FROM experiments WHERE name = ?"
            (location,) = database.execute(query, (experiment,)).fetchone()
            if place := _place(location):
                _replace(database, place, _text(target), experiment)

    def _require_artifacts(self, old: str, root: Path) -> None:
        before = Path(unquote(urlsplit(old).path) if old.startswith("file:") else old) / ARTIFACTS
        if before.exists() and not (root / ARTIFACTS).exists():
            raise InputError(
                f"{self._relative()} is a copy from {before.parent}, without its artifacts; copy "
                f"{before} here too, or move {self._relative()} aside"
            )

    def _create(self) -> None:
        """Makes the database under another name: a killed process leaves no half of it."""
        for stray in self.file.parent.glob(f".{self.file.name}.*.new*"):
            stray.unlink()
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}.new")
        try:
            mlflow.MlflowClient(_address(temporary.resolve())).search_experiments()
            os.replace(temporary, self.file)
        finally:
            temporary.unlink(missing_ok=True)

    def _check(self, database: sqlite3.Connection) -> None:
        _test_writing(database)
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise self._problem(f"is damaged ({found})", sqlite3.SQLITE_CORRUPT)
        query = "SELECT name FROM sqlite_master WHERE type = 'table'"
        tables = sorted(name for (name,) in database.execute(query))
        if "experiments" not in tables or "alembic_version" not in tables:
            names = ", ".join(tables[:3])
            words = f"is no database of MLflow (tables: {names})"
            raise self._problem(words, sqlite3.SQLITE_NOTADB)
        (version,) = database.execute("SELECT version_num FROM alembic_version").fetchone() or ("",)
        self._check_version(version)

    def _check_version(self, version: str) -> None:
        current = mlflow_database._get_latest_schema_revision()
        if version == current:
            return
        this = f"MLflow {mlflow.__version__}"
        if list(_MIGRATIONS.glob(f"{version}_*.py")):
            raise InputError(
                f"{self._relative()} was made by an MLflow before {mlflow.__version__} (schema "
                f"{version}); copy it, then run `mlflow db upgrade {self.shown_address}`"
            )
        raise InputError(
            f"{self._relative()} was made by an MLflow that {this} does not know, probably a newer "
            f"one (schema {version}); install that release, or move the file aside"
        )

    def _connect(self) -> sqlite3.Connection:
        address = f"file:{quote(str(self.file.resolve()))}?mode=rw"
        return sqlite3.connect(address, uri=True, timeout=LOCK_TIMEOUT_S, isolation_level=None)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """InputError for what stays wrong until somebody corrects it."""
        try:
            yield
        except sqlite3.Error as error:
            code = sqlite_code(error)
            if code not in _LASTING:
                raise
            raise self._problem(f"cannot be used ({error})", code) from None

    def _problem(self, words: str, code: int) -> InputError:
        advice = SQLITE_ADVICE[code]
        return InputError(
            f"MLflow's store {self._relative()} {words}; {advice}, or set MLFLOW_TRACKING_URI"
        )


def deleted_experiment(name: str, number: str, address: str) -> InputError:
    return InputError(
        f"the experiment {name} is deleted in MLflow: restore it with `MLFLOW_TRACKING_URI="
        f"{address} mlflow experiments restore -x {number}`, or set another tracking.experiment "
        "in params.yaml"
    )


def _address(file: Path) -> str:
    """Absolute, because a relative path names another file in another folder; but MLflow decodes
    an absolute path in part."""
    encoded = re.search(r"[%?#]", str(file))
    return f"sqlite:///{os.path.relpath(file) if encoded else file}"


def _test_writing(database: sqlite3.Connection) -> None:
    database.execute("BEGIN IMMEDIATE")
    database.execute("PRAGMA user_version = 0")  # MLflow's own value; opens the journal
    database.execute("ROLLBACK")


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _place(location: str | None) -> str | None:
    """What stands before mlruns/ID in MLflow's own places of a local store, else None."""
    match = re.fullmatch(rf"((?:file://)?/.*)/{ARTIFACTS}/[^/]+", location or "")
    return match and match[1]


def _text(folder: Path) -> str:
    """A folder as MLflow keeps it: it decodes %41, and cuts a path at # and ?."""
    return folder.as_uri() if re.search(r"[%?#]", str(folder)) else str(folder)


def _replace(
    database: sqlite3.Connection, old: str, new: str, experiment: str | None = None
) -> None:
    """In all paths, or in the place of one experiment."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    before, after = f"{old}/{ARTIFACTS}/", f"{new}/{ARTIFACTS}/"
    for table, column in _PLACES[:1] if experiment else _PLACES:
        if table in tables:
            statement = (
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE substr({column}, 1, ?) = ?"
            )
            values = [after, len(before) + 1, len(before), before]
            if experiment:
                statement, values = f"{statement} AND name = ?", [*values, experiment]
            database.execute(statement, values)
