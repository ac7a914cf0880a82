"""MLflow: runs of train, tune and evaluate in one experiment, comparable in one table. Its registry of models is `registry`.

Local by default (mlflow.db and mlruns/ in the repository's root, MLflow's own names); any server through
MLFLOW_TRACKING_URI. Numbers come in from outside: nothing here computes one. What a server that does not answer misses
is kept in the outbox and sent when it answers again: by the next run, stage, or `python -m pipeline.register`.
"""

import math
import os
import re
import sys
import time
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
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunStatus, RunTag
from mlflow.tracking.context import registry as context

from pipeline.gem import outbox
from pipeline.gem.errors import GemError, InputError
from pipeline.gem.outbox import Event, Journal
from pipeline.gem.provenance import code_tags

# What a store that does not answer raises: requests' errors are OSErrors.
UNREACHABLE = (mlflow.exceptions.MlflowException, OSError)
LOCAL_STORE = "sqlite:///mlflow.db"
MODEL_TAG, STAGE_TAG, PREDICTOR_TAG = "model.sha256", "stage", "predictor"
_KEY_TAG, _PARENT_TAG = "gem.key", "mlflow.parentRunId"
_LONGEST_PARAMETER = 6000   # MLflow cuts longer ones silently
_DOWN = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")   # of MLflow's error codes
_experiment = ""
_ids: dict[str, str] = {}   # of the experiment, by store


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
            raise InputError(f"MLFLOW_TRACKING_URI: {_shown()} cannot be opened ({_reason(error)}); mend the address") from None
        _warn(error)


def _open_experiment() -> str:
    with alone() if _store().startswith("sqlite") else nullcontext():
        found = mlflow.set_experiment(_experiment)
        # Where another machine makes the experiment in the same moment, MLflow returns it but leaves "Default" active.
        mlflow.set_experiment(experiment_id=found.experiment_id)
    _ids[_store()] = found.experiment_id
    return found.experiment_id


def _experiment_id() -> str:
    return _ids.get(_store()) or _open_experiment()


@contextmanager
def alone() -> Iterator[None]:
    """No other process of this repository is inside at the same time."""
    Path(".gem").mkdir(exist_ok=True)
    with filelock.FileLock(".gem/mlflow.lock"):
        yield


# a server that does not answer


def is_down(error: BaseException) -> bool:
    """Whether it says that a server does not answer, or cannot now. A store that is a file here is never down."""
    if not _store().startswith("http"):
        return False
    return isinstance(error, requests.RequestException) or getattr(error, "error_code", None) in _DOWN


def send_waiting() -> bool:
    """Tells the server what it has missed, the oldest run first; False where it still does not answer."""
    for journal in outbox.waiting(_store()):
        with journal.if_free() as mine:
            if not mine:
                continue
            try:
                _send_all(journal)
            except UNREACHABLE as error:
                if is_down(error):
                    return False
                print(f"warning: MLflow refuses what it has missed of a run ({_reason(error)}): it stays in {journal.refused()}", file=sys.stderr)
    return True


def unsent() -> int:
    """How many runs the store has missed something of."""
    return len(outbox.waiting(_store()))


def _send_all(journal: Journal) -> None:
    events, run_id = journal.events(), outbox.server_name(_store(), journal.run)
    if run_id is None:
        if not events or _unknown_parent(events[0]):
            return
        run_id = _sent_before(journal.run) or _create(events[0])
    for event in events:
        _send(run_id, event)
    journal.sent(run_id)
    print(f"tracking: sent what {_shown()} had missed of run {run_id}", flush=True)


def _unknown_parent(start: Event) -> bool:
    return bool(start["parent"]) and outbox.server_name(_store(), start["parent"]) is None


def _sent_before(key: str) -> str | None:
    """The run of a request that was carried out, though its answer never came."""
    found = mlflow.search_runs([_experiment_id()], f"tags.`{_KEY_TAG}` = '{key}'", output_format="list")
    return found[0].info.run_id if found else None


def _create(start: Event) -> str:
    parent = {_PARENT_TAG: outbox.server_name(_store(), start["parent"])} if start["parent"] else {}
    made = mlflow.MlflowClient().create_run(_experiment_id(), start_time=start["time"], tags=start["tags"] | parent, run_name=start["name"])
    return made.info.run_id


def _send(run_id: str, event: Event) -> None:
    """Each may be sent again: MLflow keeps one value of a name, and of a name, time and step."""
    client, values = mlflow.MlflowClient(), event.get("values")
    match event["what"]:
        case "status":
            client.update_run(run_id, status=event["status"])
        case "params":
            client.log_batch(run_id, params=[Param(name, str(value)) for name, value in values.items()])
        case "metrics":
            client.log_batch(run_id, metrics=[Metric(name, value, event["time"], event["step"]) for name, value in values.items()])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in values.items()])
        case "dataset":
            data = MetaDataset(source=CodeDatasetSource(tags={"name": event["name"]}), name=event["name"], digest=event["digest"])
            client.log_inputs(run_id, [DatasetInput(data._to_mlflow_entity(), [InputTag("mlflow.data.context", event["context"])])])
        case "artifact":
            client.log_artifact(run_id, event["path"], event["folder"])
        case "end":
            client.set_terminated(run_id, event["status"], event["time"])
        case "lost":
            if client.get_run(run_id).info.status == RunStatus.to_string(RunStatus.RUNNING):
                client.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED), event["time"])


def _store() -> str:
    return mlflow.get_tracking_uri()


def _shown() -> str:
    return re.sub(r"//.*@", "//***@", _store())


def _reason(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _warn(error: BaseException) -> None:
    later = "the next stage sends what it misses, or `python -m pipeline.register`"
    print(f"warning: MLflow at {_shown()} does not answer ({_reason(error)}): the work goes on, {later}", file=sys.stderr, flush=True)


# runs


class Run:
    """An open run. `id` is the server's name of it, or ours where it does not know it yet."""

    def __init__(self, run_id: str, journal: Journal | None = None):
        self.id, self._journal = run_id, journal

    def params(self, values: Mapping[str, object]) -> None:
        """Flat parameters under the same names in every stage."""
        self._tell("params", values={name: _short(name, value) for name, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        self._tell("metrics", values=finite, step=step or 0)

    def tags(self, values: Mapping[str, object]) -> None:
        self._tell("tags", values={name: str(value) for name, value in values.items()})

    def dataset(self, name: str, digest: str, context: str) -> None:
        """The data by its DVC hash: equal data, equal digest, in every run."""
        self._tell("dataset", name=name, digest=digest[:36], context=context)

    def artifacts(self, paths: list[Path], folder: str | None = None) -> None:
        for path in paths:
            self._tell("artifact", path=str(path), folder=folder)

    def _tell(self, what: str, **details: object) -> None:
        event = {"what": what, "time": _now(), **details}
        if self._journal is None:
            try:
                return _send(self.id, event)
            except UNREACHABLE as error:
                if not is_down(error):
                    raise
                _warn(error)
                self._journal = Journal(_store(), self.id).open()
        if what == "artifact":
            event["path"] = str(self._journal.keep(Path(event["path"])))
        self._journal.append(event)

    def _leave(self) -> None:
        if self._journal:
            self._journal.close()


def _short(name: str, value: object) -> str:
    text = str(value)
    if len(text) > _LONGEST_PARAMETER:
        raise GemError(f"{name} has {len(text)} characters; MLflow keeps {_LONGEST_PARAMETER}: shorten it")
    return text


def _now() -> int:
    return int(time.time() * 1000)


@contextmanager
def run(
    name: str, stage: str, *, parent: str | None = None, resume: str | None = None, killed_by: tuple[type[BaseException], ...] = ()
) -> Iterator[Run]:
    """A run that ends FINISHED, KILLED (an exception of `killed_by`) or FAILED (any other); exceptions pass through."""
    reachable = send_waiting()
    opened = _resume(resume, reachable) if resume else _start(name, stage, parent, reachable)
    status = RunStatus.to_string(RunStatus.FAILED)
    try:
        yield opened
        status = RunStatus.to_string(RunStatus.FINISHED)
    except killed_by:
        status = RunStatus.to_string(RunStatus.KILLED)
        raise
    finally:
        opened._tell("end", status=status)
        opened._leave()


def _start(name: str, stage: str, parent: str | None, reachable: bool) -> Run:
    key = outbox.new_key()
    tags = {STAGE_TAG: stage, _KEY_TAG: key, **code_tags(), **{one: os.environ[one] for one in ("DVC_STAGE", "DVC_EXP_NAME") if one in os.environ}}
    start = {"what": "start", "time": _now(), "name": name, "parent": parent, "tags": context.resolve_tags(tags)}
    if reachable and not _unknown_parent(start):
        try:
            return Run(_create(start))
        except UNREACHABLE as error:
            if not is_down(error):
                raise
            _warn(error)
    journal = Journal(_store(), key).open()
    journal.append(start)
    return Run(key, journal)


def _resume(run_id: str, reachable: bool) -> Run:
    known = outbox.server_name(_store(), run_id)
    opened = Run(known or run_id)
    if known is None or not reachable:
        opened._journal = Journal(_store(), opened.id).open()
    opened._tell("status", status=RunStatus.to_string(RunStatus.RUNNING))
    return opened


def server_name(run_id: str) -> str:
    """How the server names a run. ConnectionError where it does not know it yet."""
    known = outbox.server_name(_store(), run_id)
    if known is None:
        raise ConnectionError("it does not know yet the run that made it")
    return known


def exists(run_id: str) -> bool:
    """Whether the store still has the run, or will have it. One that does not answer has lost nothing yet."""
    known = outbox.server_name(_store(), run_id)
    if known is None:
        return Journal(_store(), run_id).exists
    try:
        return mlflow.get_run(known).info.lifecycle_stage == "active"
    except UNREACHABLE as error:
        return is_down(error)


def close(run_id: str) -> None:
    """Ends a run whose process died as KILLED; one that ended by itself stays as it is."""
    if exists(run_id):
        _tell_once(run_id, "lost")


def complete(run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Adds to a finished run without opening it again: its status and duration stay those of its own work."""
    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    _tell_once(run_id, "metrics", values=finite, step=0)
    _tell_once(run_id, "tags", values=dict(tags))


def _tell_once(run_id: str, what: str, **details: object) -> None:
    known = outbox.server_name(_store(), run_id)
    told = Run(known or run_id, None if known else Journal(_store(), run_id).open())
    told._tell(what, **details)
    told._leave()


def find_model_run(model_sha256: str, predictor: str, stage: str) -> str | None:
    """The run that already carries a model's scores as `predictor`, else the newest of `stage` that made it, else None.

    A search whose baseline wins makes the default model again: the hash alone does not tell the two runs apart.
    """
    found = mlflow.search_runs(filter_string=f"tags.`{MODEL_TAG}` = '{model_sha256}'", order_by=["start_time DESC"], output_format="list")
    scored = [run for run in found if run.data.tags.get(PREDICTOR_TAG) == predictor]
    made = [run for run in found if PREDICTOR_TAG not in run.data.tags and run.data.tags.get(STAGE_TAG) == stage]
    return (scored + made)[0].info.run_id if scored or made else None
