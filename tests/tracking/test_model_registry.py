"""The model registry in a real MLflow store: versions, their code, the champion."""

import ast
import json
import math
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest

from pipeline.gem.common.code_version import ROOT, import_closure
from pipeline.gem.common.errors import InputError
from pipeline.gem.common.files import sha256, write_json
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.tracking import connection
from pipeline.gem.tracking.model_registry import (
    CHAMPION,
    CODE_TAG,
    NAME,
    SCORE_TAG,
    Version,
    champion_message,
    choose_champion,
    register_models,
    versions,
)
from pipeline.gem.tracking.runs import MODEL_TAG, Run

EXPERIMENTS = Path("experiments")


def version_of(number: int, score: float | None, model: int = 0, **tags: str) -> Version:
    comparable = {
        "data.sha256": "a",
        "model.observation": "normal",
        "train.predictive_draws": "16",
        "selection_split": "validation_random",
    }
    tags = comparable | {MODEL_TAG: f"model {model or number}"} | tags
    return Version(number, tags if score is None else tags | {SCORE_TAG: repr(score)})


OLD = [version_of(1, -9.0), version_of(2, -8.0), version_of(3, -8.0)]
OTHER_DATA = {"data.sha256": "b"}


@pytest.mark.parametrize(
    ("new", "previous", "champion"),
    [
        (version_of(4, -7.0), 2, 4),  # better
        (version_of(4, -8.5), 2, 2),  # worse
        (version_of(4, -8.0), 2, 2),  # equal
        (version_of(4, -8.0), 3, 3),
        (version_of(4, -9.5), None, 2),  # no champion yet: the best, of equals the oldest
        (version_of(4, -8.0, model=2), 2, 4),  # the model of the champion, with newer code
        (version_of(4, -8.0, model=3), 2, 2),
        (version_of(4, -99.0, **OTHER_DATA), 2, 4),  # scores on other data do not compare
        (version_of(4, -99.0, **{"model.observation": "multinomial"}), 2, 4),
        (version_of(4, -99.0, **{"train.predictive_draws": "4"}), 2, 4),
        (version_of(4, None, **OTHER_DATA), 2, 4),  # without a score: the current model
    ],
)
def test_the_champion_is_the_best_version_comparable_with_the_current_one(new, previous, champion):
    before = None if previous is None else OLD[previous - 1]
    assert choose_champion([*OLD, new], [new], before).number == champion


def test_the_first_current_model_decides_which_scores_compare():
    winner = version_of(4, -1.0, **OTHER_DATA)
    assert choose_champion([*OLD, winner], [OLD[0], winner], winner).number == 2
    assert choose_champion([*OLD, winner], [winner, OLD[0]], OLD[1]).number == 4


def test_a_model_is_represented_by_the_version_with_the_current_code():
    newer = version_of(4, -8.0, model=2)
    assert choose_champion([*OLD, newer], [OLD[1]], newer).number == 2


@pytest.mark.parametrize(
    ("champion", "previous", "message"),
    [
        (OLD[1], OLD[1], "champion is version 2 (-8.0 nats on validation_random)"),
        (
            OLD[1],
            OLD[0],
            "champion is version 2 (-8.0 nats on validation_random); before: version 1 (-9",
        ),
        (
            version_of(4, 1.0, **OTHER_DATA, **{"model.observation": "multinomial"}),
            OLD[1],
            "version 2 does not compare: other data, another observation model",
        ),
        (version_of(4, -8.0, model=2), OLD[1], "the model of version 2 with other code"),
        (version_of(1, None), None, "is version 1 (no validation split)"),
    ],
)
def test_the_message_explains_the_champion(champion, previous, message):
    assert message in champion_message(champion, previous)


@pytest.fixture
def default(store, model_directory) -> Path:
    """experiments/default with a trained model, and the run that trained it."""
    directory = EXPERIMENTS / "default"
    shutil.copytree(model_directory, directory)
    with Run.open("default", "train") as run:
        run.set_tags({MODEL_TAG: sha256(directory / "model.safetensors")})
    return directory


def copy_with_score(directory: Path, name: str, score: float) -> Path:
    """A model directory of other bytes, whose report has another score."""
    copy = directory.parent / name
    shutil.copytree(directory, copy)
    gem = TrainedGEM.load(directory)
    temperatures = dict.fromkeys(gem.temperatures, 1.0 + len(name))
    replace(gem, temperatures=temperatures).save(copy / "model.safetensors")
    report = json.loads((directory / "report.json").read_bytes())
    report["validation"]["predictive_log_likelihood"] = score
    write_json(copy / "report.json", report)
    return copy


def champion_number() -> int:
    return int(mlflow.MlflowClient().get_model_version_by_alias(NAME, CHAMPION).version)


def test_each_model_has_one_version_and_the_best_is_champion(default, caplog):
    caplog.set_level("INFO")
    registered = register_models(EXPERIMENTS)
    assert register_models(EXPERIMENTS) == registered
    (only,) = versions()
    assert registered == {
        "experiments/default": {
            "model_sha256": only.tags[MODEL_TAG],
            "code_sha256": only.tags[CODE_TAG],
            "registered": True,
        }
    }
    logged = mlflow.MlflowClient().get_model_version(NAME, "1")
    assert mlflow.get_run(logged.run_id).info.run_name == "default"
    score = float(only.tags[SCORE_TAG])
    copy_with_score(default, "worse", score - 1)
    register_models(EXPERIMENTS)
    assert len(versions()) == 2 and champion_number() == 1
    copy_with_score(default, "better", score + 1)
    registered = register_models(EXPERIMENTS)
    assert len(versions()) == 3 and champion_number() == 3
    assert [Path(name).name for name in registered] == ["default", "better", "worse"]
    assert "champion is version 3" in caplog.text


def test_a_model_without_a_run_is_registered_too(store, model_directory):
    """As restored from DVC's cache."""
    shutil.copytree(model_directory, EXPERIMENTS / "default")
    register_models(EXPERIMENTS)
    assert len(versions()) == 1 and champion_number() == 1


def test_a_model_directory_without_its_report_is_refused(default):
    (default / "report.json").unlink()
    with pytest.raises(InputError, match=r"experiments/default/report\.json"):
        register_models(EXPERIMENTS)


def test_a_server_that_is_down_leaves_models_unregistered(default, monkeypatch):
    with monkeypatch.context() as outage:
        outage.setattr(connection, "_next_attempt", math.inf)
        assert not register_models(EXPERIMENTS)["experiments/default"]["registered"]
    assert versions() == []


def packages_of(files: list[str]) -> set[str]:
    """Packages that the files import anywhere, also within functions."""
    nodes = [node for file in files for node in ast.walk(ast.parse((ROOT / file).read_text()))]
    imports = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imports += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in imports}


def test_a_version_holds_exactly_the_code_of_prediction_and_pins_its_packages(default):
    register_models(EXPERIMENTS)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@{CHAMPION}"))
    code = [path.relative_to(folder / "code").as_posix() for path in folder.rglob("code/**/*.py")]
    assert sorted(code) == import_closure("pipeline.gem.prediction.mlflow_model")
    assert all("pipeline/gem/" in file or file.endswith("__init__.py") for file in code), "no verb"
    pinned = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert {"torch", "numpy", "pandas", "pyarrow", "pydantic", "scipy", "mlflow"} <= set(pinned)
    assert pinned == {name: version(name).split("+")[0] for name in pinned}
    unpinned = packages_of(code) - sys.stdlib_module_names - {"pipeline", "ruamel"} - set(pinned)
    assert unpinned <= {"anndata", "h5py", "hdf5plugin"}, (
        "only for .h5ad, which no request can name"
    )
    model = folder / "data" / "model.safetensors"
    assert model.read_bytes() == (default / "model.safetensors").read_bytes()


def test_the_signature_has_optional_columns_and_the_parameters_of_prediction(default):
    register_models(EXPERIMENTS)
    model = mlflow.models.get_model_info(f"models:/{NAME}@{CHAMPION}")
    gem, columns = TrainedGEM.load(default), model.signature.inputs.to_dict()
    names = [column["name"] for column in columns]
    assert names == [*gem.metadata.names, "sample_id", "reference_counts"]
    assert not any(column["required"] for column in columns)
    defaults = {parameter.name: parameter.default for parameter in model.signature.params}
    assert defaults["mode"] == "mean" and defaults["total_count"] == 1_000_000
    assert list(defaults["conditioning"]) == ["technical", "biological"]
    outputs = model.signature.outputs.to_dict()
    required = [column["name"] for column in outputs if column["required"]]
    assert required == ["extrapolated", *gem.genes]


def test_the_input_example_is_a_valid_query(default, monkeypatch):
    register_models(EXPERIMENTS)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which MLflow adds the packed code
    folder = mlflow.artifacts.download_artifacts(f"models:/{NAME}@{CHAMPION}")
    example = mlflow.models.Model.load(folder).load_input_example(folder)
    predictions = mlflow.pyfunc.load_model(folder).predict(example)
    assert len(predictions) == len(example) == 1 and not predictions["extrapolated"].isna().any()
