"""The MLflow store: where it is, whether it answers, and what it is told. Runs are `tracking`'s, models `registry`'s.

Local by default (mlflow.db and mlruns/ in the repository's root, MLflow's own names); any server through
MLFLOW_TRACKING_URI. What a server that does not answer misses is kept in the outbox and sent when it answers again: by
the next run, stage, or `python -m pipeline.register`.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import filelock

# Before the import: MLflow decides about telemetry when it is imported. By its own defaults a server that hangs would stop a
# training for many minutes; these are half a minute, and who sets them otherwise is heard.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")

import mlflow
import requests
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunStatus, RunTag
from mlflow.tracking.context import registry as context

from pipeline.gem.common.errors import InputError
from pipeline.gem.tracking import offline_buffer
from pipeline.gem.tracking.offline_buffer import Event, OfflineRun

# What a store that does not answer raises: requests' errors are OSErrors.
UNREACHABLE = (mlflow.exceptions.MlflowException, OSError)
LOCAL_STORE = "sqlite:///mlflow.db"
RUNNING, FINISHED, KILLED, FAILED = map(
    RunStatus.to_string, (RunStatus.RUNNING, RunStatus.FINISHED, RunStatus.KILLED, RunStatus.FAILED)
)
KEY_TAG = "gem.key"  # of a run: ours, from before the server gave it an id
_PARENT_TAG = "mlflow.parentRunId"
_DOWN = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
)  # of MLflow's error codes
_experiment = ""
_ids: dict[str, str] = {}  # of the experiment, by store


def connect(experiment: str) -> None:
    """Points MLflow at its store and experiment, and tells it what it has missed. InputError for an address that is none.

    The first process makes the local database, the others wait.
    """
    global _experiment
    _experiment = experiment
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", LOCAL_STORE))
    try:
        _open_experiment()
        send_waiting()
    except UNREACHABLE as error:
        if not is_down(error):
            raise InputError(
                f"MLFLOW_TRACKING_URI: {_shown()} cannot be opened ({_reason(error)}); mend the address"
            ) from None
        warn(error)


def _open_experiment() -> str:
    with alone() if address().startswith("sqlite") else nullcontext():
        found = mlflow.set_experiment(_experiment)
        # Where another machine makes the experiment in the same moment, MLflow returns it but leaves "Default" active.
        mlflow.set_experiment(experiment_id=found.experiment_id)
    _ids[address()] = found.experiment_id
    return found.experiment_id


def _experiment_id() -> str:
    return _ids.get(address()) or _open_experiment()


@contextmanager
def alone() -> Iterator[None]:
    """No other process of this repository is inside at the same time."""
    Path(".gem").mkdir(exist_ok=True)
    with filelock.FileLock(".gem/mlflow.lock"):
        yield


def is_down(error: BaseException) -> bool:
    """Whether it says that a server does not answer, or cannot now. A store that is a file here is never down."""
    if not address().startswith("http"):
        return False
    return (
        isinstance(error, requests.RequestException) or getattr(error, "error_code", None) in _DOWN
    )


def send_waiting() -> bool:
    """Tells the server what it has missed, the oldest run first; False where it still does not answer."""
    for journal in offline_buffer.waiting(address()):
        with journal.if_free() as mine:
            if not mine:
                continue
            try:
                _send_all(journal)
            except UNREACHABLE as error:
                if is_down(error):
                    return False
                print(
                    f"warning: MLflow refuses what it has missed of a run ({_reason(error)}): it stays in {journal.refused()}",
                    file=sys.stderr,
                )
    return True


def unsent() -> int:
    """How many runs the store has missed something of."""
    return len(offline_buffer.waiting(address()))


def _send_all(journal: OfflineRun) -> None:
    events, run_id = journal.events(), offline_buffer.server_name(address(), journal.run)
    if run_id is None:
        if not events or unknown_parent(events[0]):
            return
        run_id = _sent_before(journal.run) or create(events[0])
    for event in events:
        send(run_id, event)
    journal.sent(run_id)
    print(f"tracking: sent what {_shown()} had missed of run {run_id}", flush=True)


def unknown_parent(start: Event) -> bool:
    """Whether the run belongs under one that the store has not been told of yet."""
    return bool(start["parent"]) and offline_buffer.server_name(address(), start["parent"]) is None


def _sent_before(key: str) -> str | None:
    """The run of a request that was carried out, though its answer never came."""
    found = runs_with(KEY_TAG, key)
    return found[0].info.run_id if found else None


def runs_with(tag: str, value: str) -> list[Run]:
    """The runs of the experiment that carry a tag, the newest first."""
    return list(
        mlflow.search_runs(
            [_experiment_id()],
            f"tags.`{tag}` = '{value}'",
            order_by=["start_time DESC"],
            output_format="list",
        )
    )


def is_active(run_id: str) -> bool:
    """False of a run that somebody deleted."""
    return mlflow.get_run(run_id).info.lifecycle_stage == "active"


def with_context(tags: Mapping[str, str]) -> dict[str, str]:
    """And what MLflow says of this process: user, script, commit."""
    return context.resolve_tags(dict(tags))


def create(start: Event) -> str:
    """Opens the run of a start event; the server's name of it."""
    parent = (
        {_PARENT_TAG: offline_buffer.server_name(address(), start["parent"])}
        if start["parent"]
        else {}
    )
    made = mlflow.MlflowClient().create_run(
        _experiment_id(),
        start_time=start["time"],
        tags=start["tags"] | parent,
        run_name=start["name"],
    )
    return made.info.run_id


def send(run_id: str, event: Event) -> None:
    """Tells the store of one event of a run. Each may be sent again: MLflow keeps one value of a name, and of a name, time and step."""
    client, values = mlflow.MlflowClient(), event.get("values")
    match event["what"]:
        case "status":
            client.update_run(run_id, status=event["status"])
        case "params":
            client.log_batch(
                run_id, params=[Param(name, str(value)) for name, value in values.items()]
            )
        case "metrics":
            client.log_batch(
                run_id,
                metrics=[
                    Metric(name, value, event["time"], event["step"])
                    for name, value in values.items()
                ],
            )
        case "tags":
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in values.items()])
        case "dataset":
            data = MetaDataset(
                source=CodeDatasetSource(tags={"name": event["name"]}),
                name=event["name"],
                digest=event["digest"],
            )
            client.log_inputs(
                run_id,
                [
                    DatasetInput(
                        data._to_mlflow_entity(),
                        [InputTag("mlflow.data.context", event["context"])],
                    )
                ],
            )
        case "artifact":
            client.log_artifact(run_id, event["path"], event["folder"])
        case "end":
            client.set_terminated(run_id, event["status"], event["time"])
        case "lost":
            if client.get_run(run_id).info.status == RUNNING:
                client.set_terminated(run_id, KILLED, event["time"])


def address() -> str:
    """Of the store, as MLflow has it."""
    return mlflow.get_tracking_uri()


def _shown() -> str:
    return re.sub(r"//.*@", "//***@", address())


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def warn(error: BaseException) -> None:
    """Says that the store does not answer, and who will tell it."""
    later = "the next stage sends what it misses, or `python -m pipeline.register`"
    print(
        f"warning: MLflow at {_shown()} does not answer ({_reason(error)}): the work goes on, {later}",
        file=sys.stderr,
        flush=True,
    )
