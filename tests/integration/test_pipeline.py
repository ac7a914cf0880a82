"""The stages end to end on a tiny cohort: `dvc repro`, then MLflow, then a second `dvc repro`."""

import json
import os
import re
import subprocess
import sys

import mlflow
import numpy as np
import pandas as pd
import pytest
from support.fork_server import forked_stages
from support.repository import Repository
from support.settings import TINY

from pipeline import evaluate
from pipeline.gem.common import yaml_file
from pipeline.gem.common.files import sha256
from pipeline.gem.evaluation.catalogue import PREDICTORS
from pipeline.gem.evaluation.metrics import METRICS

MODEL_FILES = ("model.safetensors", "history.csv", "report.json", "seeds/seeds.json")
SEARCH_FILES = ("best.yaml", "trials.csv", "importance.csv", "confirmed.csv")
SEARCH_FIGURES = ("history", "slices", "importance", "confirmed")  # contours need 4 trials
EVALUATION_FILES = ("report.html", "metrics.json", "metrics.csv", "comparisons.csv", "seeds.csv",
                    "conditions.csv", "calibration.csv", "error_decomposition.csv", "latents.csv",
                    "figures/mse.png", "figures/skill.png")  # fmt: skip
COLUMNS = ["split", "predictor", "metric", "value", "low", "high", "conditions", "reason"]


@pytest.fixture(scope="module")
def repository(finished, tmp_path_factory) -> Repository:
    """After one `dvc repro` of all stages."""
    return Repository.copy_of(finished, tmp_path_factory.mktemp("run") / "repository")


@pytest.fixture(scope="module")
def client(repository) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")


def runs_of(client: mlflow.MlflowClient) -> list:
    experiment = client.get_experiment_by_name("gem")
    return client.search_runs([experiment.experiment_id], max_results=100)


@pytest.fixture(scope="module")
def runs(client) -> list:
    return runs_of(client)


@pytest.fixture(scope="module")
def scores(repository) -> dict:
    return json.loads((repository.folder / "experiments/evaluation/metrics.json").read_text())


def by_name(runs, name: str):
    (run,) = (run for run in runs if run.info.run_name == name)
    return run


def test_a_second_repro_runs_nothing(repository):
    output = repository.dvc("repro").stdout
    assert "Data and pipelines are up to date" in output
    assert "Running stage" not in output


def test_after_the_results_are_committed_nothing_differs(repository):
    repository.commit("results")
    repository.dvc("repro")
    assert repository.git("status", "--short") == ""
    assert repository.dvc("status").stdout.strip() == "Data and pipelines are up to date."


def test_no_output_holds_the_commit_or_the_folder(repository, finished):
    """Otherwise dvc.lock could never agree with the commit that contains it."""
    commit = repository.git("rev-parse", "HEAD~1").strip()
    for path in (repository.folder / "experiments").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert commit[:7].encode() not in content and str(finished).encode() not in content, (
                path
            )


def test_a_changed_table_of_a_person_makes_prepare_run_again(repository):
    table = repository.folder / "data/tables/genes.txt"
    assert "prepare" not in repository.dvc("status", "prepare").stdout
    table.write_text("gene")
    status = repository.dvc("status", "prepare").stdout
    assert re.search(r"prepare:\s+changed deps:\s+modified:\s+data/tables", status)
    table.unlink()


def test_a_change_of_prediction_code_concerns_registration_alone(repository):
    module = repository.folder / "pipeline/gem/prediction/mlflow_model.py"
    text = module.read_text()
    module.write_text(text + "\n# changed\n")
    changed = re.findall(r"^(\w+):", repository.dvc("status").stdout, flags=re.MULTILINE)
    module.write_text(text)
    assert changed == ["register"]


def test_every_file_of_the_contract_exists(repository):
    files = [f"{model}/{name}" for model in ("default", "latent_kl") for name in MODEL_FILES]
    files += [f"latent_kl/{name}" for name in SEARCH_FILES]
    files += [f"latent_kl/figures/{name}.png" for name in SEARCH_FIGURES]
    files += [f"evaluation/{name}" for name in EVALUATION_FILES]
    for name in ("default/figures/learning.png", *files):
        assert (repository.folder / "experiments" / name).stat().st_size > 0, name


def test_metrics_json_and_csv_hold_the_same_values(repository, scores):
    table = pd.read_csv(repository.folder / "experiments/evaluation/metrics.csv")
    assert list(table.columns) == COLUMNS
    assert set(scores) == {"test_random", "test_combination", "test_perturbation", "test_study"}
    rows = table.set_index(["split", "predictor", "metric"])
    assert rows.index.is_unique
    for split, predictors in scores.items():
        assert list(predictors) == list(PREDICTORS)
        for predictor, metrics in predictors.items():
            assert list(metrics) == list(METRICS)
            for metric, value in metrics.items():
                row = rows.loc[(split, predictor, metric)]
                if value is None:
                    assert np.isnan(row["value"]) and row["reason"]
                    continue
                assert row["value"] == pytest.approx(value)
                # A ratio may lie outside its own interval; few conditions have none.
                if not metric.startswith("skill") and "interval" not in str(row["reason"]):
                    assert row["low"] <= row["value"] <= row["high"]


def test_no_predictor_beats_the_oracle_with_the_same_information(scores):
    for split, predictors in scores.items():
        errors = {name: metrics["mse"] for name, metrics in predictors.items()}
        del errors["replicate"]  # exists for some samples only
        oracles = [errors[f"oracle_{name}"] for name in ("omniscient", "reference", "metadata")]
        assert oracles == sorted(oracles), split
        for name, error in errors.items():
            if not name.startswith("oracle"):
                ideal = "oracle_reference" if name.endswith("_reference") else "oracle_metadata"
                assert error >= errors[ideal], (split, name)


def test_runs_of_train_tune_and_evaluate_have_the_same_parameters_and_metrics(runs):
    default, winner = by_name(runs, "default"), by_name(runs, "latent_kl winner")
    trials = [run for run in runs if run.info.run_name.startswith("latent_kl trial")]
    assert len(trials) == 3
    assert {run.data.tags["stage"] for run in (default, winner, *trials)} == {"train", "tune"}
    names = set(default.data.params)
    assert {"model.latent.biological", "train.kl_weight.technical"} <= names
    assert all(names <= set(run.data.params) for run in (winner, *trials))
    metrics = {
        "validation/predictive_log_likelihood",
        "train/loss",
        "best/predictive_log_likelihood",
    }
    assert all(metrics <= set(run.data.metrics) for run in (default, winner))
    assert all("log10.train.kl_weight.technical" in run.data.params for run in trials)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}


def test_a_search_is_a_parent_run_with_a_child_per_trial(runs):
    parent = by_name(runs, "latent_kl")
    trials = [run for run in runs if run.info.run_name.startswith("latent_kl trial")]
    children = (by_name(runs, "latent_kl winner"), *trials)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    metrics = parent.data.metrics
    assert metrics["trials/complete"] + metrics["trials/pruned"] == 3
    assert metrics["epochs/trained"] + metrics["epochs/pruned"] == 3 * 3
    confirmed = [run for run in runs if run.info.run_name.startswith("latent_kl confirmation")]
    candidates = {run.data.params["confirmed_trial"] for run in confirmed}
    assert len(confirmed) == 4 and {"0", parent.data.tags["best.trial"]} <= candidates
    best = parent.data.tags["best.trial"]
    fits = [run for run in confirmed if run.data.params["confirmed_trial"] == best]
    scores = [run.data.metrics["best/predictive_log_likelihood"] for run in fits]
    assert metrics["confirmed/mean"] == pytest.approx(np.mean(scores))
    assert "fresh seed" in parent.data.tags["result"]


def test_epochs_are_the_steps_of_the_metrics(client, runs):
    run_id = by_name(runs, "default").info.run_id
    steps = [metric.step for metric in client.get_metric_history(run_id, "validation/mse")]
    assert steps == list(range(1, TINY["train.epochs"] + 1))


@pytest.mark.parametrize(
    ("name", "predictor", "directory"),
    [("default", "gem", "default"), ("latent_kl winner", "gem_tuned", "latent_kl")],
)
def test_evaluate_adds_the_scores_to_the_run_that_trained_the_model(
    repository, runs, scores, name, predictor, directory
):
    run, model = by_name(runs, name), f"experiments/{directory}/model.safetensors"
    assert run.data.tags["model.sha256"] == sha256(repository.folder / model)
    for metric, key in (("mse", predictor), ("reference_mse", f"{predictor}_reference")):
        expected = scores["test_random"][key]["mse"]
        assert run.data.metrics[f"test_random/{metric}"] == pytest.approx(expected)


def test_baselines_and_oracles_have_runs_of_their_own(runs):
    assert by_name(runs, "ridge").data.metrics["test_random/skill"] == 0
    assert by_name(runs, "oracle_metadata").data.metrics["test_random/skill"] == 1


def test_every_run_carries_the_hash_of_the_data_and_the_commit(repository, runs):
    lock = yaml_file.read(repository.folder / "dvc.lock").values
    digest = lock["stages"]["prepare"]["outs"][0]["md5"]
    commits = repository.git("rev-list", "HEAD").split()
    for name in ("default", "latent_kl winner", "latent_kl trial=0", "evaluate"):
        run = by_name(runs, name)
        assert [data.dataset.digest for data in run.inputs.dataset_inputs] == [digest]
        assert run.data.tags["git.commit"] in commits
        assert run.data.tags["git.dirty"] == "false"


def test_every_trained_model_is_registered_and_the_champion_is_the_best(repository, client):
    versions = client.search_model_versions("name = 'gem'")
    by_model = {version.tags["model.sha256"]: version for version in versions}
    values = {}
    for directory in ("default", "latent_kl"):
        folder = repository.folder / "experiments" / directory
        report = json.loads((folder / "report.json").read_text())
        # One version for both where the baseline of the search wins.
        version = by_model[sha256(folder / "model.safetensors")]
        values[version.version] = report["validation"]["predictive_log_likelihood"]
        assert float(version.tags["predictive_log_likelihood"]) == values[version.version]
    assert len(by_model) == len(versions) == len(values)
    champion = client.get_model_version_by_alias("gem", "champion").version
    assert values[champion] == max(values.values())


def test_figures_are_artifacts_of_the_runs(client, runs):
    def figures(run: str) -> set[str]:
        artifacts = client.list_artifacts(by_name(runs, run).info.run_id, "figures")
        return {artifact.path.removeprefix("figures/") for artifact in artifacts}

    assert "learning.png" in figures("default")
    assert {"slices.png", "importance.png"} <= figures("latent_kl")
    assert {"mse.png", "delta_pearson.png"} <= figures("evaluate")


def test_trial_zero_is_the_baseline(repository):
    trials = pd.read_csv(repository.folder / "experiments/latent_kl/trials.csv")
    definition = yaml_file.read(repository.folder / "experiments/searches/latent_kl.yaml").values
    baseline, first = definition["baseline"], trials[trials["trial"] == 0].iloc[0]
    assert first["model.latent.technical"] == baseline["model"]["latent"]["technical"]
    weight = baseline["train"]["kl_weight"]["perturbation"]
    assert first["train.kl_weight.perturbation"] == weight


def test_the_results_are_shown_as_a_table(repository):
    output = repository.stage("pipeline.results")
    for word in ("test_combination", "ridge", "gem_tuned", "oracle_metadata", "skill"):
        assert word in output
    assert "\nsearch latent_kl: " in output


def test_evaluate_opens_runs_for_models_that_the_store_does_not_know(repository, monkeypatch):
    """As after `dvc pull` on another machine."""
    monkeypatch.setattr(evaluate, "draw_figures", lambda *_: None)  # they are there, and slow
    store = f"sqlite:///{repository.folder}/elsewhere.db"
    repository.stage("pipeline.evaluate", MLFLOW_TRACKING_URI=store)
    runs = runs_of(mlflow.MlflowClient(store))
    best = yaml_file.read(repository.folder / "experiments/latent_kl/best.yaml").values
    tuned, default = by_name(runs, "gem_tuned").data, by_name(runs, "gem").data
    latents, weights = best["model"]["latent"], best["train"]["kl_weight"]
    assert tuned.params["model.latent.technical"] == str(latents["technical"])
    assert tuned.params["train.kl_weight.biological"] == str(weights["biological"])
    assert default.params["model.latent.technical"] == str(TINY["model.latent.technical"])
    assert {"test_random/mse", "test_random/reference_mse"} <= set(default.metrics)


def test_two_stages_run_side_by_side_and_a_raised_budget_continues_the_search(
    repository, client, tmp_path
):
    """`--single-item` keeps DVC from locking the stages before them."""
    table = repository.folder / "experiments/latent_kl/trials.csv"
    before = pd.read_csv(table)
    repository.stage("pipeline.configure", "--set", "tune.trials=5")
    environment = repository.environment(f"sqlite:///{repository.folder}/mlflow.db")
    environment["PATH"] = f"{tmp_path / 'python' / 'bin'}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--single-item"]
    with forked_stages(tmp_path / "python", "pipeline.train", "pipeline.tune"):
        processes = [
            subprocess.Popen([*command, stage], cwd=repository.folder, env=environment,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for stage in ("train", "tune")
        ]  # fmt: skip
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert repository.dvc("status", "train", "tune").stdout.strip().endswith("up to date.")
    after = pd.read_csv(table)
    same = [table.drop(columns="win_rate") for table in (after.iloc[:3], before)]
    pd.testing.assert_frame_equal(*same)
    points = after[[name for name in after if "." in name]]
    assert len(after) == len(points.drop_duplicates()) == 5
    metrics = by_name(runs_of(client), "latent_kl").data.metrics
    assert metrics["trials/complete"] + metrics["trials/pruned"] == 5


def test_a_promotion_writes_the_winner_and_trains_no_trial(repository, client):
    """The last test of the module: it changes the settings of the model."""
    folder = repository.folder
    text = (folder / "params.yaml").read_text()
    output = repository.stage("pipeline.configure", "--promote", "latent_kl")
    best = yaml_file.read(folder / "experiments/latent_kl/best.yaml").values
    promoted = yaml_file.read(folder / "params.yaml").values
    assert promoted["model"]["latent"] == best["model"]["latent"]
    assert promoted["train"]["kl_weight"] == best["train"]["kl_weight"]
    lines = zip((folder / "params.yaml").read_text().splitlines(), text.splitlines(), strict=True)
    changed = [line for line, previous in lines if line != previous]
    assert len(changed) <= 6
    assert all(f"+{line}" in output for line in changed)

    results = {
        name: (folder / "experiments/latent_kl" / name).read_bytes() for name in SEARCH_FILES
    }
    number = len(runs_of(client))
    repository.stage("pipeline.tune", "--search", "latent_kl")
    assert len(runs_of(client)) == number
    for name, content in results.items():
        assert (folder / "experiments/latent_kl" / name).read_bytes() == content, name
