"""Runs of train, tune and evaluate in one MLflow experiment, comparable in one table.

Numbers come in from outside: nothing here computes one. While the server does not answer, a run is written to the outbox.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.gem.common.errors import GemError
from pipeline.gem.common.provenance import code_tags
from pipeline.gem.tracking import mlflow_client, offline_buffer
from pipeline.gem.tracking.offline_buffer import OfflineRun

MODEL_TAG, STAGE_TAG, PREDICTOR_TAG = "model.sha256", "stage", "predictor"
_LONGEST_PARAMETER = 6000  # MLflow cuts longer ones silently


class Run:
    """An open run. `id` is the server's name of it, or ours where it does not know it yet."""

    def __init__(self, run_id: str, journal: OfflineRun | None = None):
        self.id, self._journal = run_id, journal

    def params(self, values: Mapping[str, object]) -> None:
        """Flat parameters under the same names in every stage."""
        self._tell("params", values={name: _short(name, value) for name, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        finite = {
            name: float(value)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }
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
                return mlflow_client.send(self.id, event)
            except mlflow_client.UNREACHABLE as error:
                if not mlflow_client.is_down(error):
                    raise
                mlflow_client.warn(error)
                self._journal = OfflineRun(mlflow_client.address(), self.id).open()
        if what == "artifact":
            event["path"] = str(self._journal.keep(Path(event["path"])))
        self._journal.append(event)

    def _leave(self) -> None:
        if self._journal:
            self._journal.close()


def _short(name: str, value: object) -> str:
    text = str(value)
    if len(text) > _LONGEST_PARAMETER:
        raise GemError(
            f"{name} has {len(text)} characters; MLflow keeps {_LONGEST_PARAMETER}: shorten it"
        )
    return text


def _now() -> int:
    return int(time.time() * 1000)


@contextmanager
def run(
    name: str,
    stage: str,
    *,
    parent: str | None = None,
    resume: str | None = None,
    killed_by: tuple[type[BaseException], ...] = (),
) -> Iterator[Run]:
    """A run that ends FINISHED, KILLED (an exception of `killed_by`) or FAILED (any other); exceptions pass through."""
    reachable = mlflow_client.send_waiting()
    opened = _resume(resume, reachable) if resume else _start(name, stage, parent, reachable)
    status = mlflow_client.FAILED
    try:
        yield opened
        status = mlflow_client.FINISHED
    except killed_by:
        status = mlflow_client.KILLED
        raise
    finally:
        opened._tell("end", status=status)
        opened._leave()


def _start(name: str, stage: str, parent: str | None, reachable: bool) -> Run:
    key = offline_buffer.new_key()
    tags = {
        STAGE_TAG: stage,
        mlflow_client.KEY_TAG: key,
        **code_tags(),
        **{one: os.environ[one] for one in ("DVC_STAGE", "DVC_EXP_NAME") if one in os.environ},
    }
    start = {
        "what": "start",
        "time": _now(),
        "name": name,
        "parent": parent,
        "tags": mlflow_client.with_context(tags),
    }
    if reachable and not mlflow_client.unknown_parent(start):
        try:
            return Run(mlflow_client.create(start))
        except mlflow_client.UNREACHABLE as error:
            if not mlflow_client.is_down(error):
                raise
            mlflow_client.warn(error)
    journal = OfflineRun(mlflow_client.address(), key).open()
    journal.append(start)
    return Run(key, journal)


def _resume(run_id: str, reachable: bool) -> Run:
    known = offline_buffer.server_name(mlflow_client.address(), run_id)
    opened = Run(known or run_id)
    if known is None or not reachable:
        opened._journal = OfflineRun(mlflow_client.address(), opened.id).open()
    opened._tell("status", status=mlflow_client.RUNNING)
    return opened


def server_name(run_id: str) -> str:
    """How the server names a run. ConnectionError where it does not know it yet."""
    known = offline_buffer.server_name(mlflow_client.address(), run_id)
    if known is None:
        raise ConnectionError("it does not know yet the run that made it")
    return known


def exists(run_id: str) -> bool:
    """Whether the store still has the run, or will have it. One that does not answer has lost nothing yet."""
    known = offline_buffer.server_name(mlflow_client.address(), run_id)
    if known is None:
        return OfflineRun(mlflow_client.address(), run_id).exists
    try:
        return mlflow_client.is_active(known)
    except mlflow_client.UNREACHABLE as error:
        return mlflow_client.is_down(error)


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
    known = offline_buffer.server_name(mlflow_client.address(), run_id)
    told = Run(
        known or run_id, None if known else OfflineRun(mlflow_client.address(), run_id).open()
    )
    told._tell(what, **details)
    told._leave()


def find_model_run(model_sha256: str, predictor: str, stage: str) -> str | None:
    """The run that already carries a model's scores as `predictor`, else the newest of `stage` that made it, else None.

    A search whose baseline wins makes the default model again: the hash alone does not tell the two runs apart.
    """
    found = mlflow_client.runs_with(MODEL_TAG, model_sha256)
    scored = [run for run in found if run.data.tags.get(PREDICTOR_TAG) == predictor]
    made = [
        run
        for run in found
        if PREDICTOR_TAG not in run.data.tags and run.data.tags.get(STAGE_TAG) == stage
    ]
    return (scored + made)[0].info.run_id if scored or made else None
