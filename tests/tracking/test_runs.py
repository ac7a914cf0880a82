"""Runs in a real MLflow store (SQLite)."""

import multiprocessing
import shutil
import warnings

import mlflow
import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.errors import GemError
from pipeline.gem.evaluation.catalogue import SHARED_CONTROLS
from pipeline.gem.tracking import mlflow_client, runs
from pipeline.gem.tracking.runs import Run

pytestmark = pytest.mark.usefixtures("store")


def test_the_default_store_has_mlflows_own_name(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow_client.connect("gem")
    with Run.open("default", "train") as run:
        pass
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(run.id).info.run_name == "default"


def test_the_environment_selects_another_store(tmp_path, monkeypatch, migrated_store):
    other = f"sqlite:///{shutil.copy(migrated_store, tmp_path / 'other.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    mlflow_client.connect("gem")
    with Run.open("default", "train") as run:
        pass
    assert mlflow.MlflowClient(other).get_run(run.id).info.run_name == "default"
    assert mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"]) == []


def test_a_run_names_its_biased_metrics(params, cohort):
    from pipeline.evaluate import bias_tag, run_biases, run_metrics

    columns = ["split", "predictor", "metric", "value", "reason"]
    rows = [
        ("test_combination", "gem", "mse", 0.1, ""),
        ("test_combination", "gem", "delta_pearson", 0.5, SHARED_CONTROLS),
        ("test_combination", "gem", "discrimination", np.nan, "fewer than two"),
        ("test_combination", "ridge", "delta_pearson", 0.4, f"a note; {SHARED_CONTROLS}"),
    ]
    scores = pd.DataFrame(rows, columns=columns)
    assert run_biases(scores, "ridge", "x_") == ["test_combination/x_delta_pearson"]
    assert bias_tag([]) == {}
    biased = run_biases(scores, "gem")
    assert set(biased) < set(run_metrics(scores, "gem"))
    mlflow_client.connect("gem")
    model = ("0" * 64, "gem", "train")
    runs.log_scores(model, params, cohort, run_metrics(scores, "gem"), bias_tag(biased))
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.tags["biased"] == "test_combination/delta_pearson"
    assert run.data.metrics["test_combination/delta_pearson"] == 0.5


def test_the_status_of_a_run_follows_from_its_exception():
    with Run.open("finished", "train") as finished:
        pass
    with pytest.raises(ValueError), Run.open("failed", "train") as failed:
        raise ValueError
    with pytest.raises(KeyError), Run.open("pruned", "tune", killed_by=(KeyError,)) as killed:
        raise KeyError
    statuses = [mlflow.get_run(run.id).info.status for run in (finished, failed, killed)]
    assert statuses == ["FINISHED", "FAILED", "KILLED"]


def test_a_run_has_parameters_metrics_tags_data_and_files(tmp_path):
    (tmp_path / "note.txt").write_text("note")
    with Run.open("default", "train") as run:
        run.log_params({"model.hidden": 32})
        run.log_metrics({"loss": 2.0}, step=1)
        run.log_metrics({"loss": 1.0}, step=2)
        run.set_tags({"label": 7})
        run.log_dataset("cohort", "f" * 64, "training")
        run.log_artifacts([tmp_path / "note.txt"], "notes")
    logged = mlflow.get_run(run.id)
    assert logged.data.params == {"model.hidden": "32"}
    history = mlflow.MlflowClient().get_metric_history(run.id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]
    expected = {"label": "7", "stage": "train", "mlflow.source.type": "LOCAL"}
    assert expected.items() <= logged.data.tags.items() and "mlflow.user" in logged.data.tags
    (dataset,) = logged.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("cohort", "f" * 36)
    assert dataset.tags[0].value == "training"
    files = mlflow.artifacts.list_artifacts(run_id=run.id, artifact_path="notes")
    assert [file.path for file in files] == ["notes/note.txt"]


def test_children_are_grouped_under_their_parent_and_a_resumed_run_keeps_its_id():
    with Run.open("parent", "tune") as parent, Run.open("child", "tune", parent=parent.id) as child:
        child.log_metrics({"a": 1.0}, step=1)
    assert mlflow.get_run(child.id).data.tags["mlflow.parentRunId"] == parent.id
    with Run.resume(parent.id) as resumed:
        resumed.log_metrics({"b": 2.0})
    assert resumed.id == parent.id
    assert mlflow.get_run(parent.id).data.metrics == {"b": 2.0}


def test_results_are_added_to_a_finished_run_without_opening_it():
    with Run.open("default", "train") as run:
        pass
    before = mlflow.get_run(run.id).info
    metrics = {"test_random/mse": 0.5, "absent": float("nan")}
    runs.log_results(run.id, metrics, {"predictor": "gem"})
    after = mlflow.get_run(run.id)
    assert (after.info.end_time, after.info.status) == (before.end_time, "FINISHED")
    assert after.data.metrics == {"test_random/mse": 0.5}
    assert after.data.tags["predictor"] == "gem"


def test_metrics_that_are_not_finite_are_left_out():
    values = {"finite": 1.0, "infinite": float("inf"), "nan": float("nan"), "none": None}
    with Run.open("default", "train") as run:
        run.log_metrics(values)
    assert mlflow.get_run(run.id).data.metrics == {"finite": 1.0}


def test_a_parameter_that_mlflow_would_cut_is_refused():
    with pytest.raises(GemError, match="shorten it"), Run.open("default", "train") as run:
        run.log_params({"long": "x" * 7000})


def test_a_models_run_is_found_by_hash_predictor_and_stage():
    assert mlflow_client.find_model_run("f" * 64, "gem", "train") is None
    with Run.open("default", "train") as default:
        default.set_tags({mlflow_client.MODEL_TAG: "f" * 64})
    with Run.open("winner", "tune") as winner:
        winner.set_tags({mlflow_client.MODEL_TAG: "f" * 64})
    assert mlflow_client.find_model_run("f" * 64, "gem", "train") == default.id
    assert mlflow_client.find_model_run("f" * 64, "gem_tuned", "tune") == winner.id
    with Run.open("evaluated", "evaluate") as evaluated:
        evaluated.set_tags({mlflow_client.MODEL_TAG: "e" * 64, mlflow_client.PREDICTOR_TAG: "gem"})
    assert mlflow_client.find_model_run("e" * 64, "gem", "train") == evaluated.id


def test_machines_that_create_the_experiment_at_the_same_moment_share_it(monkeypatch):
    """MLflow looks the name up, finds nothing, and fails to create what another machine did."""
    theirs = mlflow.MlflowClient().create_experiment("shared")
    service = mlflow.tracking._tracking_service.client.TrackingServiceClient
    answers = iter([lambda *_: None, service.get_experiment_by_name])
    monkeypatch.setattr(
        service, "get_experiment_by_name", lambda client, name: next(answers)(client, name)
    )
    mlflow_client.connect("shared")
    with Run.open("default", "train") as run:
        pass
    assert mlflow.get_run(run.id).info.experiment_id == theirs


@pytest.mark.integration
def test_two_processes_may_create_the_store_at_once(tmp_path, monkeypatch):
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    monkeypatch.chdir(fresh)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    def log_a_run() -> None:
        mlflow_client.connect("gem")
        with Run.open("default", "train"):
            pass

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=log_a_run) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = mlflow.MlflowClient(f"sqlite:///{fresh}/mlflow.db")
        experiment = client.get_experiment_by_name("gem")
        assert len(client.search_runs([experiment.experiment_id])) == 2


@pytest.mark.parametrize("address", ["htp://127.0.0.1:5000", "nonsense://x"])
def test_a_wrong_address_is_a_one_line_error(monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    message = f"MLFLOW_TRACKING_URI: cannot open {address}"
    with pytest.raises(GemError, match=message) as caught:
        mlflow_client.connect("gem")
    assert "\n" not in str(caught.value)
