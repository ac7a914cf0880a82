"""The MLflow server or local store: its address, its experiment, its outages.

Local by default (mlflow.db and mlruns/ in the project, MLflow's own names); any server through
MLFLOW_TRACKING_URI. Requests raise ServerDownError while a server or a store does not work.
"""

import logging
import os
import sqlite3
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import mlflow
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils as mlflow_database

from pipeline.gem.common.errors import GemError, InputError
from pipeline.gem.common.logs import without_passwords
from pipeline.gem.common.machine_errors import BUGS
from pipeline.gem.common.processes import file_lock
from pipeline.gem.tracking.addresses import (
    at_root,
    database_url,
    environment_address,
    server_address,
)
from pipeline.gem.tracking.local_store import LocalStore, deleted_experiment

log = logging.getLogger(__name__)

VARIABLE, LOCAL_STORE = "MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"
BUDGET_S = 5.0  # of failed requests in a process; then it sends nothing any more
RETRY_INTERVAL_S = 10.0  # after a failed request, or 60 times as long as it took
LOCK_TIMEOUT_S = 30.0  # for another process of this project, which registers a model for seconds
# With MLflow's own timeouts a hanging server would block a training for many minutes; these add up
# to eleven seconds.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PGCONNECT_TIMEOUT": "5",
}
_OUTAGE_CODES = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED")
_LONGEST_REASON = 140  # characters
_OUTAGES = (OSError, sqlite3.Error, sqlalchemy.exc.SQLAlchemyError)  # requests' are OSErrors

mlflow_database.MAX_RETRY_COUNT = 1  # not ten attempts in 100 s
for name in ("mlflow.store.db.utils", "mlflow.store.tracking", "mlflow.utils.rest_utils"):
    logging.getLogger(name).setLevel(logging.CRITICAL)  # it logs tracebacks; errors say the same

_experiment = _experiment_id = ""
_store: LocalStore | None = None  # of a local address
_next_attempt = _lost_s = 0.0  # time.monotonic; seconds of failed requests
_has_warned = False


class ServerDownError(Exception):
    """The tracking server or store does not work now."""


class RejectedError(ServerDownError):
    """A request that will fail again: the server does not take it, or its code has a bug."""


def open_experiment(name: str) -> None:
    """Selects the server of the environment, and an experiment.

    Raises:
        InputError: an address, a store or an experiment that somebody has to correct first.
        ServerDownError: the server is down; a warning says so.
    """
    global _experiment, _experiment_id, _next_attempt, _lost_s, _has_warned
    _experiment, _experiment_id = name, ""
    _next_attempt, _lost_s, _has_warned = 0.0, 0.0, False
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    _set_address(environment_address(VARIABLE, LOCAL_STORE))
    with outages(first_request=True):
        _open_experiment()


def _set_address(text: str) -> None:
    global _store
    _store, kind = None, text.partition(":")[0].lower()
    if kind in ("http", "https"):
        text = server_address(text, VARIABLE)
    elif kind == "sqlite":
        _store = LocalStore(Path(database_url(text, VARIABLE).database))
        text = _store.address
    elif kind in ("postgresql", "postgres"):
        url = database_url(text, VARIABLE).set(drivername="postgresql+psycopg")
        text = url.render_as_string(hide_password=False)
    mlflow.set_tracking_uri(text)


@contextmanager
def outages(first_request: bool = False) -> Iterator[None]:
    """Raises ServerDownError instead of whatever MLflow and its libraries raise, and warns once;
    for a while after a failure, and once BUDGET_S is spent, also instead of another attempt.

    `first_request`: no work is lost yet. InputError for an error that waiting does not end; a bug
    as it is.
    """
    global _next_attempt, _lost_s, _has_warned
    if time.monotonic() < _next_attempt or _lost_s > BUDGET_S:
        raise ServerDownError("no attempt so soon after a failure")
    start = time.monotonic()
    try:
        if _store and _experiment_id:
            _store.require_usable()
        yield
    except (GemError, ServerDownError):
        raise
    except Exception as error:
        temporary = _is_temporary(error)
        if first_request and isinstance(error, BUGS):
            raise
        if first_request and not temporary:
            raise InputError(
                f"{VARIABLE}: cannot open {shown_address()} ({reason(error)}); correct the address"
            ) from None
        seconds = time.monotonic() - start
        _lost_s += seconds
        _next_attempt = time.monotonic() + max(RETRY_INTERVAL_S, 60 * seconds)
        _warn_once(error, _fault(error))
        raise (ServerDownError if temporary else RejectedError)(reason(error)) from error


def _is_temporary(error: BaseException) -> bool:
    if isinstance(error, MlflowException):
        codes = _OUTAGE_CODES if address().startswith("http") else _OUTAGE_CODES[:1]
        return error.error_code in codes
    return isinstance(error, _OUTAGES)


def _fault(error: BaseException) -> str:
    if isinstance(error, BUGS):
        return "fails by a bug of this program or of MLflow; report it"
    if not _is_temporary(error):
        return "rejects a request"
    return "cannot be used" if _store else "does not answer"


def _warn_once(error: BaseException, fault: str) -> None:
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    log.warning(
        "MLflow at %s %s (%s): continuing without it; a later stage logs what it misses, or "
        "`python -m pipeline.register`",
        shown_address(),
        fault,
        reason(error),
    )


def set_recovered() -> None:
    """The next failure is another one, with a warning of its own."""
    global _has_warned
    _has_warned = False


def attempt_again() -> None:
    """Ends the wait after a failed request, but not the budget."""
    global _next_attempt
    _next_attempt = 0.0


def _open_experiment() -> None:
    global _experiment_id
    # Two processes that create the local database at once would crash in its migration.
    with exclusive_store():
        if _store:
            _store.open()
            _store.correct_places()
            _store.require_experiment(_experiment)
        _experiment_id = _find_experiment() or _create_experiment()


def _find_experiment() -> str | None:
    experiment = mlflow.MlflowClient().get_experiment_by_name(_experiment)
    if experiment is None:
        return None
    if experiment.lifecycle_stage != "active":
        raise deleted_experiment(_experiment, experiment.experiment_id, shown_address())
    return experiment.experiment_id


def _create_experiment() -> str:
    try:
        number = mlflow.MlflowClient().create_experiment(_experiment)
    except MlflowException:
        # Another machine has created it at the same moment.
        if number := _find_experiment():
            return number
        raise
    if _store:
        _store.correct_place(_experiment)
    return number


def experiment_id() -> str:
    if not _experiment_id:
        try:
            _open_experiment()
        except InputError as error:  # only a stage that starts may end with it
            raise RuntimeError(str(error)) from None
    return _experiment_id


@contextmanager
def exclusive_store() -> Iterator[None]:
    """Excludes other processes of this project. TimeoutError if one holds the store for
    LOCK_TIMEOUT_S."""
    path = at_root(".gem/mlflow.lock")
    try:
        lock = file_lock(path, LOCK_TIMEOUT_S, reentrant=True).acquire()
    except filelock.Timeout:
        text = f"another process of this project holds {path} for {LOCK_TIMEOUT_S:g} s"
        raise TimeoutError(text) from None
    with lock:
        yield


def address() -> str:
    """MLflow's tracking URI."""
    return mlflow.get_tracking_uri()


def shown_address() -> str:
    return _store.shown_address if _store else without_passwords(address())


def reason(error: BaseException) -> str:
    """The first line of an error, of the system's error behind it if there is one."""
    cause = error
    while following := cause.__cause__ or (not cause.__suppress_context__ and cause.__context__):
        cause = following
    if not isinstance(cause, OSError | sqlite3.Error):
        cause = error
    text = next(iter(str(cause).splitlines()), "") or type(error).__name__
    if isinstance(error, BUGS):
        line = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(line.filename).name}:{line.lineno}"
        text = f"{type(error).__name__}: {error} at {place}"
    return without_passwords(text)[:_LONGEST_REASON]
