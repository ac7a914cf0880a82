"""MLflow: the only place that knows it. Runs of train, tune and evaluate in one experiment, comparable in one table; models
in its registry (what it loads of them is `served`).

Local by default (mlflow.db and mlruns/ in the repository's root, MLflow's own names); any server through
MLFLOW_TRACKING_URI. Numbers come in from outside: nothing here computes one.
"""

import hashlib
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import filelock
import pandas as pd

# Before the import: MLflow decides about telemetry when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, RunStatus, RunTag
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from pipeline.gem import yamlfile
from pipeline.gem.errors import GemError

# What a store that does not answer raises: requests' errors are OSErrors.
UNREACHABLE = (mlflow.exceptions.MlflowException, OSError)
LOCAL_STORE = "sqlite:///mlflow.db"
MODEL_TAG, STAGE_TAG, PREDICTOR_TAG = "model.sha256", "stage", "predictor"
_LONGEST_PARAMETER = 6000   # MLflow cuts longer ones silently
_BEHIND_RESULTS = ("pipeline", "params.yaml", "requirements.lock")  # a change here may change a result


def connect(experiment: str) -> None:
    """Points MLflow at its store and experiment. The first process makes the local database, the others wait."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", LOCAL_STORE)
    mlflow.set_tracking_uri(uri)
    with alone() if uri.startswith("sqlite") else nullcontext():
        found = mlflow.set_experiment(experiment)
        # Where another machine makes the experiment in the same moment, MLflow returns it but leaves "Default" active.
        mlflow.set_experiment(experiment_id=found.experiment_id)


@contextmanager
def alone() -> Iterator[None]:
    """No other process of this repository is inside at the same time."""
    Path(".gem").mkdir(exist_ok=True)
    with filelock.FileLock(".gem/mlflow.lock"):
        yield


class Run:
    """An open run."""

    def __init__(self, run_id: str):
        self.id = run_id

    def params(self, values: Mapping[str, object]) -> None:
        """Flat parameters under the same names in every stage."""
        mlflow.log_params({name: _short(name, value) for name, value in values.items()})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        mlflow.log_metrics({name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}, step=step)

    def tags(self, values: Mapping[str, object]) -> None:
        mlflow.set_tags({name: str(value) for name, value in values.items()})

    def dataset(self, name: str, digest: str, context: str) -> None:
        """The data by its DVC hash: equal data, equal digest, in every run."""
        mlflow.log_input(MetaDataset(source=CodeDatasetSource(tags={"name": name}), name=name, digest=digest[:36]), context=context)

    def artifacts(self, paths: list[Path], folder: str | None = None) -> None:
        for path in paths:
            mlflow.log_artifact(str(path), folder)


def _short(name: str, value: object) -> object:
    text = str(value)
    if len(text) > _LONGEST_PARAMETER:
        raise GemError(f"{name} has {len(text)} characters; MLflow keeps {_LONGEST_PARAMETER}: shorten it")
    return value


@contextmanager
def run(
    name: str, stage: str, *, parent: str | None = None, resume: str | None = None, killed_by: tuple[type[BaseException], ...] = ()
) -> Iterator[Run]:
    """A run that ends FINISHED, KILLED (an exception of `killed_by`) or FAILED (any other); exceptions pass through."""
    tags = {STAGE_TAG: stage, **code_tags(), **{key: os.environ[key] for key in ("DVC_STAGE", "DVC_EXP_NAME") if key in os.environ}}
    nested = mlflow.active_run() is not None
    opened = mlflow.start_run(run_id=resume, nested=nested) if resume else mlflow.start_run(run_name=name, nested=nested, parent_run_id=parent, tags=tags)
    status = RunStatus.to_string(RunStatus.FAILED)
    try:
        yield Run(opened.info.run_id)
        status = RunStatus.to_string(RunStatus.FINISHED)
    except killed_by:
        status = RunStatus.to_string(RunStatus.KILLED)
        raise
    finally:
        mlflow.end_run(status)


def exists(run_id: str) -> bool:
    """Whether the store still has the run."""
    try:
        return mlflow.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.exceptions.MlflowException:
        return False


def close(run_id: str) -> None:
    """Ends a run whose process died as KILLED; one that ended by itself stays as it is."""
    if exists(run_id) and mlflow.get_run(run_id).info.status == RunStatus.to_string(RunStatus.RUNNING):
        mlflow.MlflowClient().set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))


def complete(run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Adds to a finished run without opening it again: its status and duration stay those of its own work."""
    client = mlflow.MlflowClient()
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(name, float(value), now, 0) for name, value in metrics.items() if math.isfinite(value)],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )


def find_model_run(model_sha256: str, predictor: str, stage: str) -> str | None:
    """The run that already carries a model's scores as `predictor`, else the newest of `stage` that made it, else None.

    A search whose baseline wins makes the default model again: the hash alone does not tell the two runs apart.
    """
    found = mlflow.search_runs(filter_string=f"tags.`{MODEL_TAG}` = '{model_sha256}'", order_by=["start_time DESC"], output_format="list")
    scored = [run for run in found if run.data.tags.get(PREDICTOR_TAG) == predictor]
    made = [run for run in found if PREDICTOR_TAG not in run.data.tags and run.data.tags.get(STAGE_TAG) == stage]
    return (scored + made)[0].info.run_id if scored or made else None


@dataclass(frozen=True)
class Packed:
    """A model as MLflow keeps it: all that it needs to predict elsewhere."""

    loader: str                        # module with `_load_pyfunc`
    file: Path
    code: Path                         # folder of the package that holds the loader
    requirements: list[str]            # of pip, pinned
    inputs: list[str]                  # columns, all optional, of any values: a query holds what one has
    outputs: Mapping[str, type | None] # columns in their order; None: of any values, and not always there
    parameters: Mapping[str, object]   # by name: the default; lists of text, or plain values
    example: pd.DataFrame

    def signature(self) -> ModelSignature:
        columns = ((_column(name, None) for name in self.inputs), (_column(name, kind) for name, kind in self.outputs.items()))
        return ModelSignature(*(Schema([*one]) for one in columns), ParamSchema([_parameter(name, value) for name, value in self.parameters.items()]))


_TYPES = {bool: DataType.boolean, int: DataType.long, str: DataType.string}


def _column(name: str, kind: type | None) -> ColSpec:
    # Declared as text, an optional column would still refuse numbers, and cells that are all empty.
    return ColSpec(AnyType(), name, required=False) if kind is None else ColSpec(_TYPES[kind], name)


def _parameter(name: str, default: object) -> ParamSpec:
    return ParamSpec(name, DataType.string, default, (-1,)) if isinstance(default, list) else ParamSpec(name, _TYPES[type(default)], default)


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    number: int
    tags: Mapping[str, str]


def versions(name: str) -> list[Version]:
    """All versions of a registered model, the oldest first."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    return sorted((Version(int(one.version), dict(one.tags)) for one in found), key=lambda one: one.number)


def add_version(name: str, packed: Packed, tags: Mapping[str, str], run_id: str | None) -> Version:
    """Logs a model to its run and registers it; its name is made where it is new."""
    logged = Model.log(
        None, name=name, flavor=_Untried, flavor_name="pyfunc", run_id=run_id, loader_module=packed.loader, data_path=str(packed.file),
        code_paths=[str(packed.code)], pip_requirements=packed.requirements, signature=packed.signature(),
        input_example=(packed.example, dict(packed.parameters)), validate_serving_input=False,
    )  # fmt: skip
    made = mlflow.register_model(logged.model_uri, name, await_registration_for=0, tags=dict(tags))
    return Version(int(made.version), dict(tags))


class _Untried:
    """MLflow's pyfunc whose example is not tried out when it is logged: that takes long, and leaves the copied code on sys.path."""

    @staticmethod
    def save_model(validate_serving_input: bool, **how) -> None:
        mlflow.pyfunc.save_model(**how)


def alias(name: str, label: str) -> int | None:
    """The version of a registered model that has an alias."""
    found = mlflow.MlflowClient().get_registered_model(name).aliases.get(label)
    return None if found is None else int(found)


def set_alias(name: str, label: str, version: Version) -> None:
    mlflow.MlflowClient().set_registered_model_alias(name, label, str(version.number))


def data_digest(folder: str, fallback: str) -> str:
    """DVC's hash of a folder from dvc.lock; where DVC never wrote it, the start of `fallback`."""
    lock = Path("dvc.lock")
    if lock.exists():
        for stage in yamlfile.read(lock).values.get("stages", {}).values():
            for output in stage.get("outs", []):
                if output["path"] == folder:
                    return output["md5"]
    return fallback[:32]


def code_tags() -> dict[str, str]:
    """The commit and whether what decides results differs from it; nothing where there is no git."""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        difference = _git("diff", "HEAD", "--", *_BEHIND_RESULTS)
    except (OSError, subprocess.CalledProcessError):
        return {}
    tags = {"git.commit": commit, "git.dirty": str(bool(difference)).lower()}
    if difference:
        tags["git.diff_sha256"] = hashlib.sha256(difference.encode()).hexdigest()
    return tags


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=30).stdout
