"""Where studies live: .gem/optuna.db, or any SQLite file or PostgreSQL server named by OPTUNA_STORAGE; and one lock for all who share it."""

import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import filelock
import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.engine import URL, make_url

from pipeline.gem.common.errors import InputError

VARIABLE = "OPTUNA_STORAGE"
LOCAL = "sqlite:///.gem/optuna.db"
HEARTBEAT_VARIABLE = "GEM_HEARTBEAT_SECONDS"
_HEARTBEAT = 30  # seconds between two signs of life of a running trial
_GRACE = 3  # heartbeats missed until a trial counts as lost
_LOCK_KEY = (
    0x67656D  # of PostgreSQL's advisory lock, shared by everything that claims trials in a database
)

# What a trial came to is said by who runs it, in one line; Optuna would add tracebacks.
optuna.logging.set_verbosity(optuna.logging.ERROR)
# Heartbeats and several samplers have been "experimental" for years; the version is pinned.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def storage_url() -> URL:
    """The database that OPTUNA_STORAGE names, with its driver. InputError for one that cannot be shared safely."""
    text = os.environ.get(VARIABLE, LOCAL)
    try:
        url = make_url(text)
    except sqlalchemy.exc.ArgumentError:
        raise InputError(
            f"{VARIABLE} is no database address; expected sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from None
    shown = url.render_as_string(hide_password=True)
    match url.get_backend_name():
        case "sqlite":
            if url.database in (None, "", ":memory:"):
                raise InputError(
                    f"{VARIABLE} is {shown}: a database in memory is gone with its process; name a file, as in {LOCAL}"
                )
            return url
        case "postgresql" | "postgres":
            return url.set(drivername="postgresql+psycopg")
    raise InputError(
        f"{VARIABLE} is {shown}: expected sqlite:///FILE (one machine) or postgresql://USER@HOST/DATABASE (several)"
    )


class StudyStorage:
    """The opened database. InputError, in one line and without the password, where it cannot be reached."""

    def __init__(self) -> None:
        self.url = storage_url()
        self.address = self.url.render_as_string(hide_password=True)
        beat = int(os.environ.get(HEARTBEAT_VARIABLE, _HEARTBEAT))
        try:
            # The first process makes the schema, the others wait: two at once tear it.
            with self.lock():
                if self._file:
                    with closing(sqlite3.connect(self._file, timeout=30)) as connection:
                        connection.execute(
                            "PRAGMA journal_mode = WAL"
                        )  # stays with the file; readers and writers do not wait for one another
                self.storage = RDBStorage(
                    self.url.render_as_string(hide_password=False),
                    engine_kwargs={"connect_args": {"timeout": 30}}
                    if self._file
                    else {"pool_pre_ping": True},
                    heartbeat_interval=beat,
                    grace_period=_GRACE * beat,
                )
        except (sqlalchemy.exc.OperationalError, sqlite3.OperationalError) as error:
            reason = next(iter(str(getattr(error, "orig", error)).splitlines()), "")
            raise InputError(
                f"{VARIABLE}: {self.address} cannot be opened ({reason}); start the server, or mend the address"
            ) from None

    @property
    def _file(self) -> Path | None:
        return Path(self.url.database) if self.url.get_backend_name() == "sqlite" else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time, among all that share the database; free at once when its holder dies."""
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{self._file}.lock"):
                yield
            return
        engine = sqlalchemy.create_engine(
            self.url, poolclass=sqlalchemy.pool.NullPool, isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK_KEY})
            yield  # closing the connection frees the lock
