"""The Optuna database: .gem/optuna.db, or the SQLite file or PostgreSQL of OPTUNA_STORAGE."""

import secrets
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import filelock
import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL

from pipeline.gem.common.errors import InputError, examples
from pipeline.gem.common.logs import without_passwords
from pipeline.gem.common.machine_errors import SQLITE_ADVICE, sqlite_code
from pipeline.gem.common.processes import file_lock
from pipeline.gem.tracking.addresses import database_url, environment_address

STORAGE_VARIABLE = "OPTUNA_STORAGE"
LOCAL_STORAGE = "sqlite:///.gem/optuna.db"

_OPEN_TIMEOUT_S = 10  # for a server that does not answer, and a file that another program locks
_TIMEOUT_S = 30  # for a database that other workers write to
_LOCK_TIMEOUT_S = 300  # for workers that start a trial; a proposal may take seconds
# The keys of PostgreSQL's advisory locks: one of the database, one per worker.
_ADVISORY_LOCK = 0x67656D
# A server notices within a minute that the machine of a worker is gone.
_KEEP_ALIVE = """
SELECT set_config(name, value, false) FROM pg_settings JOIN (VALUES
('tcp_keepalives_idle', '30'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3'),
('idle_session_timeout', '0')) AS wanted (name, value) USING (name)"""
_RUNNING_WORKERS = """
SELECT objid FROM pg_locks JOIN pg_database ON pg_database.oid = database
WHERE locktype = 'advisory' AND granted AND classid = :key AND datname = current_database()"""

_TABLES = {"studies", "trials", "trial_params", "trial_user_attributes", "trial_values"}
_DATABASE_ERRORS = (
    sqlalchemy.exc.SQLAlchemyError,
    sqlite3.Error,
    optuna.exceptions.StorageInternalError,
)
# A part of the reason of a server: what to do.
_SERVER_ADVICE = {
    "password": "correct the user or the password",
    "does not exist": "create it, or correct the address",
    "permission denied": "give the user the right to create tables and to write",
}

# The search reports each trial in one line; Optuna would add tracebacks.
optuna.logging.set_verbosity(optuna.logging.ERROR)
# Some samplers are still marked experimental; the version is pinned.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def storage_url() -> URL:
    """The URL of the database, with its driver.

    Raises:
        InputError: not a URL, or a database that processes cannot share.
    """
    url = database_url(environment_address(STORAGE_VARIABLE, LOCAL_STORAGE), STORAGE_VARIABLE)
    match url.get_backend_name():
        case "sqlite" if not url.query:
            return url.set(drivername="sqlite")
        case "postgresql" | "postgres":
            return url.set(drivername="postgresql+psycopg")
    raise InputError(
        f"{STORAGE_VARIABLE} is {_shown(url)}: expected sqlite:///FILE without options (one "
        "machine) or postgresql://USER@HOST/DATABASE (several machines)"
    )


def _shown(url: URL) -> str:
    return without_passwords(url.render_as_string(hide_password=True))


class StudyStorage:
    """The open database.

    Raises:
        InputError: the database cannot be used. The message does not contain the password.
    """

    def __init__(self) -> None:
        self.url = storage_url()
        self.address = _shown(self.url)
        is_sqlite = self.url.get_backend_name() == "sqlite"
        self._file = Path(self.url.database) if is_sqlite else None
        # Two processes that create the schema at once would break it.
        with self.errors(), self.lock():
            if self._file:
                self._check_file()
            self._check_schema()
            if self._file:
                # A property of the file: readers and writers do not wait for each other.
                self._execute("PRAGMA journal_mode = WAL")
            self.storage = self._open()

    def close(self) -> None:
        """Closes the connections, for example before a fork."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raises an InputError of one line instead of an error of the database."""
        try:
            yield
        except _DATABASE_ERRORS as error:
            cause = error.__cause__ or error  # Optuna hides the reason
            cause = getattr(cause, "orig", None) or cause
            lines = [line.strip() for line in str(cause).splitlines()] or [type(cause).__name__]
            raise self._unusable(f"cannot be used ({lines[0][:120]})", _advice(cause)) from None

    def _unusable(self, problem: str, advice: str) -> InputError:
        return InputError(f"{STORAGE_VARIABLE}: {self.address} {problem}; {advice}")

    def _open(self, skip_table_creation: bool = False) -> RDBStorage:
        url = self.url.render_as_string(hide_password=False)
        engine = {"connect_args": {"timeout": _TIMEOUT_S}}
        if not self._file:
            connection = {"connect_timeout": _OPEN_TIMEOUT_S}
            engine = {"connect_args": connection, "pool_pre_ping": True}
        return RDBStorage(
            url,
            engine_kwargs=engine,
            skip_compatibility_check=True,  # `_check_schema` reports both releases
            skip_table_creation=skip_table_creation,
        )

    def _check_file(self) -> None:
        """Raises an error for a file that is damaged, or that cannot be written now."""
        if self._file.exists() and not self._file.is_file():
            raise self._unusable("is not a file", SQLITE_ADVICE[sqlite3.SQLITE_NOTADB])
        if (problem := self._execute("PRAGMA quick_check(1)")) != "ok":
            advice = SQLITE_ADVICE[sqlite3.SQLITE_CORRUPT]
            raise self._unusable(f"is damaged ({problem})", advice)
        self._execute("BEGIN IMMEDIATE")

    def _execute(self, statement: str) -> object:
        """The first value that a statement of SQLite returns."""
        with closing(sqlite3.connect(self._file, timeout=_OPEN_TIMEOUT_S)) as connection:
            row = connection.execute(statement).fetchone()
            return row and row[0]

    def _check_schema(self) -> None:
        """Refuses a database of another program or of another release of Optuna, before Optuna
        adds its tables to it."""
        with temporary_engine(self._engine()) as engine:
            tables = set(sqlalchemy.inspect(engine).get_table_names())
            if "version_info" not in tables:
                # A database of PostgreSQL may hold anything that does not use the same library.
                foreign = tables if self._file else tables & {"alembic_version"}
                if foreign:
                    raise self._unusable(
                        f"belongs to another program (tables {examples(sorted(foreign), 3)})",
                        "name another database",
                    )
                return
        # Optuna creates alembic_version last, and would create tables that were dropped again.
        if "alembic_version" in tables and not tables >= _TABLES:
            missing = ", ".join(sorted(_TABLES - tables))
            advice = SQLITE_ADVICE[sqlite3.SQLITE_CORRUPT]
            raise self._unusable(f"lacks the tables {missing}", advice)
        storage = self._open(skip_table_creation=True)
        with temporary_engine(storage.engine) as engine, engine.connect() as connection:
            query = sqlalchemy.text("SELECT library_version FROM version_info")
            release = connection.execute(query).scalar()
            storage.remove_session()
            version = storage.get_current_version()
            if version == storage.get_head_version():
                return
            advice = "use that release, or name another database"
            if version in storage.get_all_versions():
                advice = f"run: optuna storage upgrade --storage '{self.address}'"
        raise self._unusable(
            f"was made by Optuna {release}, and this is {optuna.__version__}",
            f"{advice} (or move the file aside: then the search starts again)",
        )

    def _engine(self) -> sqlalchemy.Engine:
        """Of connections that close after each use."""
        options = {} if self._file else {"connect_timeout": _OPEN_TIMEOUT_S}
        return sqlalchemy.create_engine(
            self.url,
            poolclass=sqlalchemy.pool.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args=options,
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Admits one process at a time. The lock is released when its holder dies."""
        if self._file:
            try:
                lock = file_lock(Path(f"{self._file}.lock"), _LOCK_TIMEOUT_S).acquire()
            except filelock.Timeout:
                raise self._unusable(
                    f"is held by another process for {_LOCK_TIMEOUT_S} s", "end that process"
                ) from None
            with lock:
                yield
            return
        with self._engine().connect() as connection:
            connection.execute(sqlalchemy.text(f"SET lock_timeout = '{_LOCK_TIMEOUT_S}s'"))
            statement = sqlalchemy.text("SELECT pg_advisory_lock(:key)")
            connection.execute(statement, {"key": _ADVISORY_LOCK})
            yield  # closing the connection releases the lock

    @contextmanager
    def worker(self) -> Iterator[str]:
        """The name of a worker, which is among `running_workers` until the end of this context or
        of the process."""
        number = secrets.randbelow(2**31)
        if self._file:
            path = self._workers_folder / str(number)
            with file_lock(path):
                yield str(number)
                path.unlink(missing_ok=True)
            return
        with self._engine().connect() as connection:
            connection.execute(sqlalchemy.text(_KEEP_ALIVE))
            statement = sqlalchemy.text("SELECT pg_advisory_lock(:key, :number)")
            connection.execute(statement, {"key": _ADVISORY_LOCK, "number": number})
            yield str(number)

    @property
    def _workers_folder(self) -> Path:
        return self._file.with_name(f"{self._file.name}.workers")

    def running_workers(self) -> set[str]:
        """The names of all workers that run a trial. The caller holds the lock."""
        if not self._file:
            with self._engine().connect() as connection:
                query = sqlalchemy.text(_RUNNING_WORKERS)
                rows = connection.execute(query, {"key": _ADVISORY_LOCK})
                return {str(number) for (number,) in rows}
        # The name of a lock on a file system without locks has a suffix.
        paths = {path.with_suffix("") for path in self._workers_folder.glob("*")}
        return {path.name for path in paths if _is_held(path)}


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock of a file; removes the file otherwise."""
    try:
        with file_lock(path, timeout=0):
            path.unlink(missing_ok=True)
    except filelock.Timeout:
        return True
    return False


@contextmanager
def temporary_engine(engine: sqlalchemy.Engine) -> Iterator[sqlalchemy.Engine]:
    try:
        yield engine
    finally:
        engine.dispose()


def _advice(error: BaseException) -> str:
    if isinstance(error, sqlite3.Error):
        return SQLITE_ADVICE.get(sqlite_code(error), SQLITE_ADVICE[sqlite3.SQLITE_CORRUPT])
    reason = str(error).lower()
    known = (advice for part, advice in _SERVER_ADVICE.items() if part in reason)
    return next(known, "start the server, or correct the address")
