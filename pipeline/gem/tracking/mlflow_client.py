"""The requests that runs make, and what is sent later if a server misses it.

Requests raise ServerDownError while a server or a store does not work.
"""

import json
import logging
import time
from contextlib import suppress

import mlflow
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException

from pipeline.gem.tracking.connection import (
    RejectedError,
    ServerDownError,
    address,
    attempt_again,
    experiment_id,
    open_experiment,
    outages,
    reason,
    set_recovered,
)
from pipeline.gem.tracking.offline_buffer import (
    KILLED,
    RUNNING,
    BufferedRun,
    RunStart,
    RunUpdate,
    is_run_key,
    saved_runs,
)

log = logging.getLogger(__name__)

RUN_KEY_TAG, PARENT_TAG = "gem.run_key", "mlflow.parentRunId"
MODEL_TAG, STAGE_TAG, PREDICTOR_TAG = "model.sha256", "stage", "predictor"


def connect(experiment: str) -> None:
    """Selects server and experiment, and sends saved runs; warns if the server is down.

    InputError for an address, a store or an experiment that somebody has to correct first.
    """
    try:
        open_experiment(experiment)
    except ServerDownError:
        return
    send_saved()


# requests of runs


def find_runs(tag: str, value: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """The experiment's runs with a tag, newest first."""
    query, order = f"tags.`{tag}` = '{value}'", ["start_time DESC"]
    with outages():
        experiments = [experiment_id()]
        return list(mlflow.MlflowClient().search_runs(experiments, query, view, order_by=order))


def find_model_run(model_sha256: str, predictor: str, stage: str) -> str | None:
    """The run that has a model's scores as `predictor` already, else the newest run of `stage`
    that made the model, else None. ServerDownError if the server does not answer.

    A search whose baseline wins makes the default model again: the two runs share the hash.
    """
    runs = find_runs(MODEL_TAG, model_sha256)
    scored = [run for run in runs if run.data.tags.get(PREDICTOR_TAG) == predictor]
    unscored = [run for run in runs if PREDICTOR_TAG not in run.data.tags]
    trained = [run for run in unscored if run.data.tags.get(STAGE_TAG) == stage]
    matches = scored + trained
    return matches[0].info.run_id if matches else None


def find_run(run: str) -> Run | None:
    """The run with this id or key, also if it is deleted."""
    if is_run_key(run):
        return next(iter(find_runs(RUN_KEY_TAG, run, ViewType.ALL)), None)
    with outages():
        try:
            return mlflow.get_run(run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None


def server_run_id(run: str) -> str | None:
    """MLflow's id of a run, from its id or key. None if the server does not have it, or it is
    deleted."""
    found = find_run(run)
    return found.info.run_id if found and not is_deleted(found) else None


def is_deleted(run: Run) -> bool:
    return run.info.lifecycle_stage != "active"


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
    if start.otherwise:
        send(run.info.run_id, start.otherwise, start.otherwise.metrics)
    return run.info.run_id


def send(run_id: str, update: RunUpdate, points: list[tuple[str, float, int, int]]) -> None:
    """Logs an update. MLflow stores equal params, tags, points and files once."""
    client = mlflow.MlflowClient()
    with outages():
        client.log_batch(
            run_id,
            metrics=[Metric(*point) for point in points],
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


def _missing_points(buffered: BufferedRun, run_id: str) -> list[tuple[str, float, int, int]]:
    """The points that the server does not have: of a curve by step, of a result (step 0) by
    value."""
    points = buffered.update().metrics
    if not points or not buffered.may_repeat:
        return points
    client, steps = mlflow.MlflowClient(), buffered.known_steps
    with outages():
        if buffered.known_metrics is None:
            buffered.known_metrics = client.get_run(run_id).data.metrics
        for name in {name for name, _, _, step in points if step} - set(steps):
            curve = buffered.known_metrics.get(name) is not None
            history = client.get_metric_history(run_id, name) if curve else ()
            steps[name] = {point.step for point in history}
    return [
        (name, value, time_ms, step)
        for name, value, time_ms, step in points
        if not (step in steps[name] if step else buffered.known_metrics.get(name) == value)
    ]


def _dataset_input(name: str, digest: str, context: str) -> DatasetInput:
    source = json.dumps({"tags": {"name": name}})
    digest = digest[:36]  # of MLflow's column
    dataset = Dataset(name, digest, source_type="code", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


# buffered runs


def flush(buffered: BufferedRun) -> bool:
    """Sends what the server has missed of a run. False if it is down, or lacks the run's parent,
    which another process has not sent yet. RejectedError if it does not take the update."""
    try:
        run_id = buffered.id or _find_or_create(buffered)
        if run_id is None:
            buffered.set_failed()
            return False
        send(run_id, buffered.update(), _missing_points(buffered, run_id))
    except ServerDownError as error:
        buffered.set_failed()
        if isinstance(error, RejectedError):
            raise
        return False
    if buffered.may_repeat:
        set_recovered()
    buffered.set_sent(run_id)
    return True


def _find_or_create(buffered: BufferedRun) -> str | None:
    start, run_id = buffered.start, None
    if buffered.may_repeat and (found := find_run(buffered.run)):
        if is_deleted(found):
            raise RejectedError("the run is deleted")
        run_id = found.info.run_id
    if run_id is None and start and start.model:
        run_id = find_model_run(*start.model)
        buffered.may_repeat = True
    if run_id is None and start:
        run_id = create_run(start)
    return run_id


def send_saved() -> None:
    """Sends what earlier runs left behind, the oldest run first, and ends killed runs."""
    for buffered in saved_runs(address()):
        try:
            if _load(buffered):
                _send_saved(buffered)
        except OSError as error:
            log.warning("%s: %s; the next stage sends it", buffered.folder, reason(error))
        finally:
            buffered.release()


def _load(buffered: BufferedRun) -> bool:
    """Whether a saved run is read. Sets a damaged one aside."""
    try:
        return buffered.load()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        message = "%s cannot be read (%r); it is kept as %s"
        log.warning(message, buffered.folder, error, buffered.set_aside())
        return False


def _send_saved(buffered: BufferedRun) -> None:
    dead, unsent = buffered.status == RUNNING, not buffered.is_complete
    if not dead and not unsent:
        return
    try:
        if dead:
            buffered.status = KILLED
        # Another machine may have continued a run, to its end.
        if unsent or _is_running(buffered.run):
            if dead:
                buffered.log(RunUpdate(status=KILLED, end_time=int(time.time() * 1000)))
            if flush(buffered) and unsent:
                log.info("tracking: MLflow now has all of run %s", buffered.run)
        buffered.close(stopped=buffered.status == KILLED)
    except RejectedError as error:
        attempt_again()
        with suppress(ServerDownError):
            if _is_experiment_active(buffered.run):
                message = "MLflow cannot take the buffered part of run %s (%s); it is kept in %s"
                log.warning(message, buffered.run, error, buffered.set_aside())
    except ServerDownError:
        return


def _is_running(run: str) -> bool:
    found = find_run(run)
    return found is not None and not is_deleted(found) and found.info.status == RUNNING


def _is_experiment_active(run: str) -> bool:
    """False if somebody has deleted the experiment of a run: it takes runs once it is restored."""
    found = find_run(run)
    number = found.info.experiment_id if found else experiment_id()
    with outages():
        return mlflow.MlflowClient().get_experiment(number).lifecycle_stage == "active"
