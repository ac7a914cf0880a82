"""The Optuna database: .gem/optuna.db, or the SQLite file or PostgreSQL of OPTUNA_STORAGE."""

import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.processes import file_lock

STORAGE_VARIABLE = "OPTUNA_STORAGE"
LOCAL_STORAGE = "sqlite:///.gem/optuna.db"
HEARTBEAT_VARIABLE = "GEM_HEARTBEAT_SECONDS"
_HEARTBEAT_S = 30
_MISSED_HEARTBEATS = 3  # until a running trial counts as lost
_CONNECTION_TIMEOUT_S = 30
_ADVISORY_LOCK = 0x67656D  # the key of the PostgreSQL lock that all processes share

# The search reports each trial in one line; Optuna would add tracebacks.
optuna.logging.set_verbosity(optuna.logging.ERROR)
# Heartbeats and some samplers are still marked experimental; the version is pinned.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def storage_url() -> URL:
    """The URL of the database, with its driver.

    Raises:
        InputError: not a URL, or a database that processes cannot share.
    """
    text = os.environ.get(STORAGE_VARIABLE, LOCAL_STORAGE)
    try:
        url = make_url(text)
    except sqlalchemy.exc.ArgumentError:
        raise InputError(
            f"{STORAGE_VARIABLE} is not a database URL; expected sqlite:///FILE or "
            "postgresql://USER@HOST/DATABASE"
        ) from None
    address = url.render_as_string(hide_password=True)
    match url.get_backend_name():
        case "sqlite":
            if url.database in (None, "", ":memory:"):
                raise InputError(
                    f"{STORAGE_VARIABLE} is {address}: a database in memory cannot be shared; "
                    f"expected a file, for example {LOCAL_STORAGE}"
                )
            return url
        case "postgresql" | "postgres":
            return url.set(drivername="postgresql+psycopg")
    raise InputError(
        f"{STORAGE_VARIABLE} is {address}: expected sqlite:///FILE (one machine) or "
        "postgresql://USER@HOST/DATABASE (several machines)"
    )


class StudyStorage:
    """The open database.

    Raises:
        InputError: the database cannot be opened. The message does not contain the password.
    """

    def __init__(self) -> None:
        self.url = storage_url()
        self.address = self.url.render_as_string(hide_password=True)
        is_sqlite = self.url.get_backend_name() == "sqlite"
        self._file = Path(self.url.database) if is_sqlite else None
        try:
            # Two processes that create the schema at once would break it.
            with self.lock():
                self.storage = self._open()
        except (sqlalchemy.exc.OperationalError, sqlite3.OperationalError) as error:
            reason = next(iter(str(getattr(error, "orig", error)).splitlines()), "")
            raise InputError(
                f"{STORAGE_VARIABLE}: {self.address} cannot be opened ({reason}); "
                "start the server, or correct the address"
            ) from None

    def _open(self) -> RDBStorage:
        engine_options = {"pool_pre_ping": True}
        if self._file:
            engine_options = {"connect_args": {"timeout": _CONNECTION_TIMEOUT_S}}
            # WAL is a property of the file. Readers and writers do not wait for each other.
            with closing(sqlite3.connect(self._file, timeout=_CONNECTION_TIMEOUT_S)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
        heartbeat = int(os.environ.get(HEARTBEAT_VARIABLE, _HEARTBEAT_S))
        return RDBStorage(
            self.url.render_as_string(hide_password=False),
            engine_kwargs=engine_options,
            heartbeat_interval=heartbeat,
            grace_period=_MISSED_HEARTBEATS * heartbeat,
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Admits one process at a time. The lock is released when its holder dies."""
        if self._file:
            with file_lock(Path(f"{self._file}.lock")):
                yield
            return
        engine = sqlalchemy.create_engine(
            self.url, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            statement = sqlalchemy.text("SELECT pg_advisory_lock(:key)")
            connection.execute(statement, {"key": _ADVISORY_LOCK})
            yield  # closing the connection releases the lock
