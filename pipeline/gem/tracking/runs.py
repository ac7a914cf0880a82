"""Runs of train, tune and evaluate in one MLflow experiment, comparable in one table.

While the server does not answer, a run is saved in the offline buffer.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.gem.common import provenance
from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import GemError, StoppedError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.tracking import connection, mlflow_client
from pipeline.gem.tracking.connection import RejectedError, ServerDownError, address, reason
from pipeline.gem.tracking.mlflow_client import MODEL_TAG, PREDICTOR_TAG, STAGE_TAG
from pipeline.gem.tracking.offline_buffer import (
    FAILED,
    FINISHED,
    FOLDER,
    KILLED,
    RUNNING,
    BufferedRun,
    RunStart,
    RunUpdate,
    is_run_key,
    new_run_key,
    unfinished_run,
)

log = logging.getLogger(__name__)

COHORT = Path("data/cohort")
FIT_SECTIONS = ("model", "train")  # of params.yaml: they describe a fit
_DVC_VARIABLES = ("DVC_STAGE", "DVC_EXP_NAME")
_MAX_PARAMETER = 6000  # characters; MLflow cuts longer parameters silently


class Run:
    """An open MLflow run. As a context manager it ends FINISHED, KILLED (an exception of
    `killed_by`) or FAILED (any other); exceptions pass through. Logging raises nothing: what the
    server misses is saved."""

    def __init__(self, buffered: BufferedRun, killed_by: tuple[type[BaseException], ...] = ()):
        self._buffered, self._killed_by = buffered, (*killed_by, KeyboardInterrupt)
        self._is_unsaved = False  # a warning says so

    @property
    def id(self) -> str:
        """MLflow's id, or the run's key until the server has the run."""
        return self._buffered.run

    @classmethod
    def open(
        cls,
        name: str,
        stage: str,
        *,
        parent: str | None = None,
        identity: str | None = None,
        key: str | None = None,
        killed_by: tuple[type[BaseException], ...] = (),
    ) -> "Run":
        """Creates a run, below the run `parent` if one is named; or opens one again: the killed run
        of this project with the same `identity`, or the run of any machine with the `key`."""
        mlflow_client.send_saved()
        server, buffered = address(), None
        if identity:
            buffered = _continued(server, identity)
        if buffered is None:
            tags = _start_tags(stage)
            start = RunStart(key or new_run_key(), name, parent, _now(), tags, identity)
            buffered = BufferedRun(server, start.key, start)
            buffered.may_repeat = key is not None
        return cls(buffered, killed_by)._begin()

    @classmethod
    def resume(cls, run: str, *, killed_by: tuple[type[BaseException], ...] = ()) -> "Run":
        """Opens a run again, by MLflow's id or by its key."""
        mlflow_client.send_saved()
        return cls(BufferedRun(address(), run), killed_by)._begin()

    def _begin(self) -> "Run":
        """Saves the run before the server has it, so that the next stage ends it if this process
        is killed."""
        if self._buffered.may_repeat:
            self._buffered.log(RunUpdate(status=RUNNING))
        self._buffered.status = RUNNING
        self._write(self._buffered.save)
        self.log(RunUpdate())
        return self

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        status = FINISHED
        if kind is not None:
            status = KILLED if issubclass(kind, self._killed_by) else FAILED
        connection.attempt_again()
        self.log(RunUpdate(status=status, end_time=_now()))
        stopped = kind is not None and issubclass(kind, (StoppedError, KeyboardInterrupt))
        self._write(lambda: self._buffered.close(stopped))

    def log_params(self, values: Mapping[str, object]) -> None:
        """Flat parameters, under the same names in every stage."""
        self.log(RunUpdate(params=_texts(values)))

    def log_metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Leaves out None and values that are not finite, which MLflow would change."""
        self.log(RunUpdate(metrics=_points(values, step)))

    def set_tags(self, values: Mapping[str, object]) -> None:
        self.log(RunUpdate(tags={name: str(value) for name, value in values.items()}))

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """The data by its DVC hash: equal data have an equal digest in every run."""
        self.log(RunUpdate(datasets=[(name, digest, context)]))

    def log_artifacts(self, paths: list[Path], folder: str | None = None) -> None:
        self.log(RunUpdate(artifacts=[(str(path), folder) for path in paths]))

    def log(self, update: RunUpdate) -> None:
        """Sends an update, with everything that the server has missed, or saves it."""
        self._buffered.log(update)
        try:
            sent = mlflow_client.flush(self._buffered)
        except RejectedError:
            sent = False
        if not sent:
            self._write(self._buffered.save)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._is_unsaved:
                self._is_unsaved = True
                log.warning(
                    "%s cannot be written (%s): what MLflow misses of this run is kept in memory, "
                    "and lost if the stage ends before MLflow has it",
                    FOLDER,
                    reason(error),
                )


def _continued(server: str, identity: str) -> BufferedRun | None:
    """The killed run of this identity, unless somebody has deleted it."""
    buffered = unfinished_run(server, identity)
    if buffered:
        with suppress(ServerDownError):
            found = mlflow_client.find_run(buffered.run)
            if found and mlflow_client.is_deleted(found):
                buffered.clear()
                buffered.release()
                return None
    return buffered


def _log_once(buffered: BufferedRun, update: RunUpdate) -> None:
    """Logs to a run without opening it again."""
    run = Run(buffered)
    if buffered.is_saved:
        buffered.load()
    run.log(update)
    run._write(buffered.close)


def _start_tags(stage: str) -> dict[str, str]:
    """The stage, the code, and MLflow's own tags for its columns user, source and version."""
    code = provenance.code_tags()
    tags = {
        STAGE_TAG: stage,
        "mlflow.user": psutil.Process().username(),
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        **code,
    }
    if "git.commit" in code:
        tags["mlflow.source.git.commit"] = code["git.commit"]
    dvc = {name: os.environ[name] for name in _DVC_VARIABLES if name in os.environ}
    return tags | dvc


def _points(values: Mapping[str, float | None], step: int) -> list[tuple[str, float, int, int]]:
    time_ms = _now()
    return [
        (name, float(value), time_ms, step)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: _text(name, value) for name, value in values.items()}


def _text(name: str, value: object) -> str:
    text = str(value)
    if len(text) > _MAX_PARAMETER:
        raise GemError(
            f"parameter {name} has {len(text)} characters, more than the {_MAX_PARAMETER} that "
            "MLflow keeps; shorten it"
        )
    return text


def _now() -> int:
    return int(time.time() * 1000)


def exists(run: str) -> bool:
    """Whether the server has a run, or will have it."""
    with suppress(ServerDownError):
        if mlflow_client.server_run_id(run):
            return True
    return BufferedRun(address(), run).is_saved


def kept_key(key: str | None, keep: Callable[[str], None]) -> str:
    """The key of a run that any process may open: `key`, or a new one if there is none or somebody
    deleted the run. `keep` stores a new key before its run exists, so that a process that is killed
    leaves no run that the next one does not find."""
    if key is None or _is_lost(key):
        key = new_run_key()
        keep(key)
    return key


def _is_lost(run: str) -> bool:
    """Whether a run cannot be opened again: it is deleted, or the server does not have its id. An
    unreachable server counts as having it."""
    with suppress(ServerDownError):
        found = mlflow_client.find_run(run)
        return mlflow_client.is_deleted(found) if found else not is_run_key(run)
    return False


def log_results(run: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Adds to a finished run; its status and duration stay those of its own work."""
    update = RunUpdate(metrics=_points(metrics, 0), tags=dict(tags))
    _log_once(BufferedRun(address(), run), update)


def log_scores(
    model: tuple[str, str, str],
    params: Params,
    cohort: Cohort,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> None:
    """Adds the scores of a model (hash, predictor, stage) to the run that trained it.

    A model restored from DVC's cache may have been trained elsewhere, with another MLflow: then to
    a run of its own.
    """
    model_sha256, predictor, _ = model
    own = RunUpdate(
        params=_texts(params.flat(*FIT_SECTIONS)),
        datasets=[_dataset(cohort, "training")],
        status=FINISHED,
        end_time=_now(),
    )
    start = RunStart(
        new_run_key(), predictor, None, _now(), _start_tags("evaluate"), model=model, otherwise=own
    )
    own_tags = {MODEL_TAG: model_sha256, PREDICTOR_TAG: predictor}
    update = RunUpdate(metrics=_points(metrics, 0), tags=own_tags | tags)
    _log_once(BufferedRun(address(), start.key, start), update)


def log_settings(run: Run, params: Params, cohort: Cohort) -> None:
    """Logs the flat parameters of a fit and the hash of its data."""
    run.log_params(params.flat(*FIT_SECTIONS))
    run.log_dataset(*_dataset(cohort, "training"))


def _dataset(cohort: Cohort, context: str) -> tuple[str, str, str]:
    digest = provenance.data_digest(str(COHORT), cohort.train_validation_sha256)
    return "cohort", digest, context
