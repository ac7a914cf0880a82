"""Runs of train, tune and evaluate in one MLflow experiment, comparable in one table.

While the server does not answer, a run is saved in the offline buffer.
"""

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from pipeline.gem.common import provenance
from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import GemError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.tracking import mlflow_client
from pipeline.gem.tracking.mlflow_client import ServerDownError
from pipeline.gem.tracking.offline_buffer import BufferedRun, RunStart, RunUpdate, new_run_key

COHORT = Path("data/cohort")
FIT_SECTIONS = ("model", "train")  # of params.yaml: they describe a fit
MODEL_TAG, STAGE_TAG, PREDICTOR_TAG = "model.sha256", "stage", "predictor"
_DVC_VARIABLES = ("DVC_STAGE", "DVC_EXP_NAME")
_MAX_PARAMETER = 6000  # characters; MLflow cuts longer parameters silently


class Run:
    """An open MLflow run. As a context manager it ends FINISHED, KILLED (an exception of
    `killed_by`) or FAILED (any other); exceptions pass through."""

    def __init__(self, buffered: BufferedRun, killed_by: tuple[type[BaseException], ...] = ()):
        self._buffered, self._killed_by = buffered, killed_by

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
        killed_by: tuple[type[BaseException], ...] = (),
    ) -> "Run":
        """Creates a run, below the run `parent` if one is named."""
        mlflow_client.send_saved()
        start = RunStart(new_run_key(), name, parent, _now(), _start_tags(stage))
        run = cls(BufferedRun(mlflow_client.address(), start.key, start), killed_by)
        run.log(RunUpdate())
        return run

    @classmethod
    def resume(cls, run: str, *, killed_by: tuple[type[BaseException], ...] = ()) -> "Run":
        """Opens a run again, by MLflow's id or by its key."""
        mlflow_client.send_saved()
        resumed = cls(_buffered_run(run), killed_by)
        resumed.log(RunUpdate(status=mlflow_client.RUNNING))
        return resumed

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        status = mlflow_client.FINISHED
        if kind is not None:
            killed = issubclass(kind, self._killed_by)
            status = mlflow_client.KILLED if killed else mlflow_client.FAILED
        self.log(RunUpdate(status=status, end_time=_now()))
        self.release()

    def log_params(self, values: Mapping[str, object]) -> None:
        """Flat parameters, under the same names in every stage."""
        self.log(RunUpdate(params={name: _text(name, value) for name, value in values.items()}))

    def log_metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Leaves out None and values that are not finite, which MLflow would change."""
        self.log(RunUpdate(metrics=_points(values, step)))

    def set_tags(self, values: Mapping[str, object]) -> None:
        self.log(RunUpdate(tags={name: str(value) for name, value in values.items()}))

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """The data by its DVC hash: equal data have an equal digest in every run."""
        self.log(RunUpdate(datasets=[(name, digest[:36], context)]))

    def log_artifacts(self, paths: list[Path], folder: str | None = None) -> None:
        self.log(RunUpdate(artifacts=[(str(path), folder) for path in paths]))

    def log(self, update: RunUpdate) -> None:
        """Sends an update, with everything that the server has missed, or saves it."""
        self._buffered.update.extend(update)
        if not mlflow_client.flush(self._buffered):
            self._buffered.save()

    def release(self) -> None:
        """Lets other processes send what is saved."""
        self._buffered.release()


def _buffered_run(run: str) -> BufferedRun:
    buffered = BufferedRun(mlflow_client.address(), run)
    if buffered.is_saved:
        buffered.load()
    return buffered


def _log_to(run: str, update: RunUpdate) -> None:
    """Logs to a run without opening it again."""
    attached = Run(_buffered_run(run))
    attached.log(update)
    attached.release()


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
    """Whether the server has a run, or will have it. An unreachable server counts as having it."""
    try:
        run_id = mlflow_client.server_run_id(run)
        if run_id is None:
            return BufferedRun(mlflow_client.address(), run).is_saved
        return mlflow_client.is_active(run_id)
    except ServerDownError:
        return True


def mark_killed(run: str) -> None:
    """Ends a run whose process died."""
    if exists(run):
        _log_to(run, RunUpdate(status=mlflow_client.KILLED, end_time=_now()))


def log_results(run: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Adds to a finished run; its status and duration stay those of its own work."""
    _log_to(run, RunUpdate(metrics=_points(metrics, 0), tags=dict(tags)))


def find_model_run(model_sha256: str, predictor: str, stage: str) -> str | None:
    """The run that has a model's scores as `predictor` already, else the newest run of `stage`
    that made the model, else None. ServerDownError if the server does not answer.

    A search whose baseline wins makes the default model again: the two runs share the hash.
    """
    runs = mlflow_client.find_runs(MODEL_TAG, model_sha256)
    scored = [run for run in runs if run.data.tags.get(PREDICTOR_TAG) == predictor]
    unscored = [run for run in runs if PREDICTOR_TAG not in run.data.tags]
    trained = [run for run in unscored if run.data.tags.get(STAGE_TAG) == stage]
    matches = scored + trained
    return matches[0].info.run_id if matches else None


def log_settings(run: Run, params: Params, cohort: Cohort) -> None:
    """Logs the flat parameters of a fit and the hash of its data."""
    run.log_params(params.flat(*FIT_SECTIONS))
    digest = provenance.data_digest(str(COHORT), cohort.train_validation_sha256)
    run.log_dataset("cohort", digest, "training")
