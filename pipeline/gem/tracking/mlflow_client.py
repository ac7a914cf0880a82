"""The MLflow server or local store: its address, its outages, and the requests that runs make.

Local by default (mlflow.db and mlruns/ in the repository's root, MLflow's own names); any server
through MLFLOW_TRACKING_URI. Requests raise ServerDownError while a server does not answer.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import filelock

# Before the import, which reads the telemetry switch. With MLflow's own timeouts a hanging server
# would block a training for many minutes; these add up to half a minute.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")

import mlflow
import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from pipeline.gem.common.errors import InputError
from pipeline.gem.tracking.offline_buffer import (
    BufferedRun,
    RunStart,
    RunUpdate,
    is_run_key,
    saved_runs,
)

log = logging.getLogger(__name__)

LOCAL_STORE = "sqlite:///mlflow.db"
RUNNING, FINISHED, KILLED, FAILED = "RUNNING", "FINISHED", "KILLED", "FAILED"
RUN_KEY_TAG, PARENT_TAG = "gem.run_key", "mlflow.parentRunId"
RETRY_INTERVAL_S = 600.0  # after an outage; an attempt may take half a minute
_OUTAGE_CODES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")

_experiment = ""
_experiment_ids: dict[str, str] = {}  # by server
_next_attempt = 0.0  # time.monotonic


class ServerDownError(Exception):
    """The tracking server does not answer, or cannot handle requests now."""


def connect(experiment: str) -> None:
    """Selects server and experiment, and sends saved runs; warns if the server is down.

    InputError for an address that MLflow cannot open.
    """
    global _experiment, _next_attempt
    _experiment, _next_attempt = experiment, 0.0
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", LOCAL_STORE))
    try:
        with outages():
            _open_experiment()
    except ServerDownError:
        return
    except (MlflowException, OSError) as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI: cannot open {_shown_address()} ({reason(error)}); "
            "correct the address"
        ) from None
    send_saved()


@contextmanager
def outages() -> Iterator[None]:
    """Raises ServerDownError instead of the errors of a server that does not answer, and warns;
    for RETRY_INTERVAL_S also instead of another attempt."""
    global _next_attempt
    if time.monotonic() < _next_attempt:
        raise ServerDownError("no attempt so soon after an outage")
    try:
        yield
    except (MlflowException, OSError) as error:
        # requests' errors are OSErrors. A local store is a file, which is never down.
        down = isinstance(error, requests.RequestException) or (
            isinstance(error, MlflowException) and error.error_code in _OUTAGE_CODES
        )
        if not down or not address().startswith("http"):
            raise
        _next_attempt = time.monotonic() + RETRY_INTERVAL_S
        log.warning(
            "MLflow at %s does not answer (%s): continuing without it; a later stage logs "
            "what it misses, or `python -m pipeline.register`",
            _shown_address(),
            reason(error),
        )
        raise ServerDownError(reason(error)) from error


def _open_experiment() -> str:
    # Two processes that create the local database at once would crash in its migration.
    with exclusive_store() if address().startswith("sqlite") else nullcontext():
        experiment = mlflow.set_experiment(_experiment)
        # If another machine creates the experiment at the same moment, MLflow returns it but
        # leaves "Default" active.
        mlflow.set_experiment(experiment_id=experiment.experiment_id)
    _experiment_ids[address()] = experiment.experiment_id
    return experiment.experiment_id


def experiment_id() -> str:
    return _experiment_ids.get(address()) or _open_experiment()


@contextmanager
def exclusive_store() -> Iterator[None]:
    """Excludes other processes of this repository."""
    Path(".gem").mkdir(exist_ok=True)
    with filelock.FileLock(".gem/mlflow.lock"):
        yield


def address() -> str:
    """MLflow's tracking URI."""
    return mlflow.get_tracking_uri()


def _shown_address() -> str:
    return re.sub(r"//.*@", "//***@", address())


def reason(error: BaseException) -> str:
    """The first line of an error."""
    return next(iter(str(error).splitlines()), type(error).__name__)


# requests of runs


def find_runs(tag: str, value: str) -> list[Run]:
    """The experiment's runs with a tag, newest first; deleted ones left out."""
    query, order = f"tags.`{tag}` = '{value}'", ["start_time DESC"]
    with outages():
        return list(
            mlflow.search_runs([experiment_id()], query, order_by=order, output_format="list")
        )


def server_run_id(run: str) -> str | None:
    """MLflow's id of a run, from its id or key. None if the server does not have the run."""
    if not is_run_key(run):
        return run
    matches = find_runs(RUN_KEY_TAG, run)
    return matches[0].info.run_id if matches else None


def is_active(run_id: str) -> bool:
    """False for a deleted or unknown run."""
    try:
        with outages():
            return mlflow.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


def create_run(start: RunStart) -> str | None:
    """Creates a run and returns its id. None if the server does not have its parent yet."""
    tags = start.tags | {RUN_KEY_TAG: start.key}
    if start.parent:
        parent = server_run_id(start.parent)
        if parent is None:
            return None
        tags[PARENT_TAG] = parent
    with outages():
        run = mlflow.MlflowClient().create_run(
            experiment_id(), start_time=start.time, tags=tags, run_name=start.name
        )
    return run.info.run_id


def send(run_id: str, update: RunUpdate) -> None:
    """Logs an update. MLflow stores equal params, tags, metric points and files once."""
    client = mlflow.MlflowClient()
    with outages():
        client.log_batch(
            run_id,
            metrics=[Metric(*point) for point in update.metrics],
            params=[Param(*item) for item in update.params.items()],
            tags=[RunTag(*item) for item in update.tags.items()],
        )
        if update.datasets:
            client.log_inputs(run_id, [_dataset_input(*data) for data in update.datasets])
        for file, folder in update.artifacts:
            client.log_artifact(run_id, file, folder)
        if update.status == RUNNING:
            client.update_run(run_id, status=RUNNING)
        elif update.status:
            client.set_terminated(run_id, update.status, update.end_time)


def _dataset_input(name: str, digest: str, context: str) -> DatasetInput:
    source = json.dumps({"tags": {"name": name}})
    dataset = Dataset(name, digest, source_type="code", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


# buffered runs


def flush(buffered: BufferedRun) -> bool:
    """Sends what the server has missed of a run. False if it is down, or lacks the run's parent,
    which another process has not sent yet."""
    try:
        run_id = None if buffered.is_new else server_run_id(buffered.run)
        buffered.is_new = False
        if run_id is None and buffered.start:
            run_id = create_run(buffered.start)
        if run_id is None:
            return False
        buffered.run = run_id
        send(run_id, buffered.update)
    except ServerDownError:
        return False
    buffered.clear()
    return True


def send_saved() -> None:
    """Sends what earlier runs left behind, the oldest run first."""
    for buffered in saved_runs(address()):
        if not buffered.load(timeout=0):
            continue
        try:
            if flush(buffered):
                log.info("tracking: MLflow now has all of run %s", buffered.run)
        except (MlflowException, OSError) as error:
            message = "MLflow rejects the buffered part of run %s (%s); it is kept in %s"
            log.warning(message, buffered.run, reason(error), buffered.set_aside())
        finally:
            buffered.release()
