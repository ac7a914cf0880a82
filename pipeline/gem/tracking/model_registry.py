"""Trained models in MLflow's model registry: each model and state of the prediction code is a
version that predicts without this repository; the alias champion marks the best."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from pipeline.gem.common.code_version import ROOT, import_closure, requirements
from pipeline.gem.common.errors import InputError
from pipeline.gem.common.files import sha256, sha256_of
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.model_file import MODEL_FILE
from pipeline.gem.prediction import mlflow_model
from pipeline.gem.tracking import connection
from pipeline.gem.tracking.connection import ServerDownError
from pipeline.gem.tracking.mlflow_client import MODEL_TAG, find_model_run

log = logging.getLogger(__name__)

REPORT = "report.json"  # of a model directory
NAME, CHAMPION = "gem", "champion"
DEFAULT = "default"  # the model directory that decides which scores are comparable
CODE_TAG = "code.sha256"  # of the prediction code and the packages that it needs
SCORE_TAG, SPLIT_TAG = "predictive_log_likelihood", "selection_split"  # nats per sample
# Scores compare only between equal values of these tags; the words explain a difference.
COMPARABILITY_TAGS = {
    "data.sha256": "other data",
    "model.observation": "another observation model",
    "train.predictive_draws": "another number of draws",
}


@dataclass(frozen=True)
class Version:
    """A version of the registered model."""

    number: int
    tags: Mapping[str, str]


def register_models(folder: Path) -> dict[str, dict[str, object]]:
    """Registers folder/*/model.safetensors with the current prediction code, where a model is
    not registered with it yet, and moves the champion alias.

    Returns by model directory the hashes of model and code, and whether all is done: not if the
    server is down.
    """
    files = import_closure(mlflow_model.__name__)
    code = {file: sha256(ROOT / file) for file in files}
    code_sha256 = sha256_of(requirements(files), code)
    directories = [path.parent for path in folder.glob(f"*/{MODEL_FILE}")]
    directories.sort(key=lambda path: (path.name != DEFAULT, path.name))
    tags = {path: _tags(path) | {CODE_TAG: code_sha256} for path in directories}
    done = False
    with suppress(ServerDownError), connection.outages(), connection.exclusive_store():
        _register(tags, files)
        done = True
    hashes = {"code_sha256": code_sha256, "registered": done}
    return {str(path): {"model_sha256": tags[path][MODEL_TAG]} | hashes for path in directories}


def _tags(directory: Path) -> dict[str, str]:
    """Tags of a model's version, from the files of its directory."""
    path = directory / REPORT
    try:
        report = json.loads(path.read_bytes())
        tags = {
            MODEL_TAG: sha256(directory / MODEL_FILE),
            "label": directory.name,
            "data.sha256": report["data_sha256"],
            "model.observation": report["observation"],
            "train.predictive_draws": str(report["predictive_draws"]),
            SPLIT_TAG: report["selection_split"] or "none",
        }
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: {error!r}; train the model of {directory} again") from None
    score = report["validation"].get("predictive_log_likelihood")
    return tags if score is None else tags | {SCORE_TAG: repr(float(score))}


def _register(tags: dict[Path, dict[str, str]], files: list[str]) -> None:
    known, current = versions(), []
    for directory, of_model in tags.items():
        matches = [version for version in reversed(known) if _is_same(version, of_model)]
        version = next((version for version in matches if _is_intact(version)), None)
        if version is None:
            version = _add_version(directory, of_model, files)
            if not _is_intact(version):
                raise OSError(f"version {version.number} of {NAME} is not as it was written")
            log.info("%s: registered as version %d of %s", directory, version.number, NAME)
        known = [other for other in known if other not in (*matches, version)] + [version]
        current.append(version)
    if not current:
        return
    previous = champion_version(known)
    best = choose_champion(known, current, previous)
    while best not in current and not _is_intact(best):
        known.remove(best)
        best = choose_champion(known, current, previous)
    if best != previous:
        client = mlflow.MlflowClient()
        client.set_registered_model_alias(NAME, CHAMPION, str(best.number))
    log.info("register: %s", champion_message(best, previous))


def _is_same(version: Version, tags: Mapping[str, str]) -> bool:
    return all(version.tags.get(tag) == tags[tag] for tag in (MODEL_TAG, CODE_TAG))


def _is_intact(version: Version) -> bool:
    """Whether the files of a version are those that were registered, by their hashes."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            uri = f"models:/{NAME}/{version.number}"
            package = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
            mlflow.models.Model.load(package)
            model = sha256(package / "data" / MODEL_FILE)
            code = {
                path.relative_to(package / "code").as_posix(): sha256(path)
                for path in sorted((package / "code").rglob("*.py"))
            }
            packages = (package / "requirements.txt").read_text().split()
    except (MlflowException, OSError) as error:
        versions()  # raises if the server is down
        log.warning("%s: its files cannot be read (%s)", uri, connection.reason(error))
        return False
    if (model, sha256_of(packages, code)) == (version.tags[MODEL_TAG], version.tags[CODE_TAG]):
        return True
    log.warning("%s: its files are not those that were registered", uri)
    return False


def versions() -> list[Version]:
    """All versions of the registered model, the oldest first."""
    found = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
    unsorted = [Version(int(version.version), dict(version.tags)) for version in found]
    return sorted(unsorted, key=lambda version: version.number)


def champion_version(known: list[Version]) -> Version | None:
    """The version that has the alias champion."""
    number = mlflow.MlflowClient().get_registered_model(NAME).aliases.get(CHAMPION)
    return next((version for version in known if str(version.number) == str(number)), None)


# the champion


def choose_champion(
    known: list[Version], current: list[Version], previous: Version | None
) -> Version:
    """The best of the versions whose scores compare with the first of `current`, the versions of
    the present models and code; the model of `previous` stays if it is as good. Without a score,
    the first of `current` itself.

    A model with several versions is represented by the current one, else by the newest.
    """
    reference = current[0]
    if SCORE_TAG not in reference.tags:
        return reference
    rivals = {
        version.tags[MODEL_TAG]: version
        for version in [*known, *current]
        if SCORE_TAG in version.tags and not differences(version, reference)
    }
    scores = {model: float(version.tags[SCORE_TAG]) for model, version in rivals.items()}
    best = [model for model, score in scores.items() if score == max(scores.values())]
    if previous and previous.tags.get(MODEL_TAG) in best:
        return rivals[previous.tags[MODEL_TAG]]
    return rivals[best[0]]


def differences(first: Version, second: Version) -> list[str]:
    """Why the scores of two versions do not compare, in words."""
    return [
        words
        for tag, words in COMPARABILITY_TAGS.items()
        if first.tags.get(tag) != second.tags.get(tag)
    ]


def champion_message(best: Version, previous: Version | None) -> str:
    """Which version has the alias, and why it moved."""
    message = f"{CHAMPION} is version {best.number} ({_score_text(best)})"
    if previous is None or previous.number == best.number:
        return message
    if reasons := differences(best, previous):
        return f"{message}; version {previous.number} does not compare: {', '.join(reasons)}"
    if best.tags[MODEL_TAG] == previous.tags[MODEL_TAG]:
        return f"{message}, the model of version {previous.number} with other code"
    return f"{message}; before: version {previous.number} ({_score_text(previous)})"


def _score_text(version: Version) -> str:
    if SCORE_TAG not in version.tags:
        return "no validation split"
    return f"{float(version.tags[SCORE_TAG]):.1f} nats on {version.tags[SPLIT_TAG]}"


# packaging


def _add_version(directory: Path, tags: Mapping[str, str], files: list[str]) -> Version:
    """Logs a model with its prediction code, to the run that trained it if the server has the
    run, and registers it."""
    client = mlflow.MlflowClient()
    names = ("gem", "train") if directory.name == DEFAULT else ("gem_tuned", "tune")
    run_id = find_model_run(tags[MODEL_TAG], *names)
    model = client.create_logged_model(connection.experiment_id(), NAME, source_run_id=run_id)
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    with _package(directory / MODEL_FILE, files) as package:
        client.log_model_artifacts(model.model_id, str(package))
    client.finalize_logged_model(model.model_id, "READY")
    uri = f"models:/{model.model_id}"
    version = mlflow.register_model(uri, NAME, await_registration_for=0, tags=dict(tags))
    return Version(int(version.version), dict(tags))


@contextmanager
def _package(model: Path, files: list[str]) -> Iterator[Path]:
    """A folder with the model and the code behind its prediction, in MLflow's pyfunc format."""
    gem = TrainedGEM.load(model)
    with tempfile.TemporaryDirectory() as folder:
        code, package = Path(folder) / "code", Path(folder) / "model"
        for file in files:
            (code / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, code / file)
        mlflow.pyfunc.save_model(
            package,
            loader_module=mlflow_model.__name__,
            data_path=str(model),
            code_paths=[str(code / files[0].split("/")[0])],
            pip_requirements=requirements(files),
            signature=_signature(gem),
            input_example=(_example(gem), mlflow_model.parameters()),
        )
        yield package


def _example(gem: TrainedGEM) -> pd.DataFrame:
    """A query of one row: the first level of each categorical covariate."""
    return pd.DataFrame([{field.name: field.levels[0] for field in gem.metadata.heads()}])


_TYPES = {bool: DataType.boolean, int: DataType.long, str: DataType.string}


def _signature(gem: TrainedGEM) -> ModelSignature:
    inputs = [_column(name, None) for name in mlflow_model.inputs(gem)]
    outputs = [_column(name, kind) for name, kind in mlflow_model.outputs(gem).items()]
    params = [_parameter(name, value) for name, value in mlflow_model.parameters().items()]
    return ModelSignature(Schema(inputs), Schema(outputs), ParamSchema(params))


def _column(name: str, kind: type | None) -> ColSpec:
    # An optional text column would still refuse numbers, and cells that are all empty.
    return ColSpec(AnyType(), name, required=False) if kind is None else ColSpec(_TYPES[kind], name)


def _parameter(name: str, default: object) -> ParamSpec:
    if isinstance(default, list):
        return ParamSpec(name, DataType.string, default, (-1,))
    return ParamSpec(name, _TYPES[type(default)], default)
