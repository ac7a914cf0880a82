"""The stages end to end on a tiny cohort, as a user runs them: `dvc repro`, then MLflow, then a second time."""

import json
import re

import mlflow
import numpy as np
import pandas as pd
import pytest
from support.repository import Repository
from support.settings import TINY

from pipeline.gem.common import yaml_file
from pipeline.gem.common.files import sha256
from pipeline.gem.evaluation.metrics import METRICS
from pipeline.gem.evaluation.predictors import PREDICTORS


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Repository:
    """After one `dvc repro` of everything."""
    repository = Repository(tmp_path_factory.mktemp("run") / "repository", TINY)
    repository.dvc("repro")
    return repository


@pytest.fixture(scope="module")
def client(repository) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{repository.folder}/mlflow.db")


@pytest.fixture(scope="module")
def runs(client) -> list:
    experiment = client.get_experiment_by_name("gem")
    return client.search_runs([experiment.experiment_id], max_results=100)


def by_name(runs, name: str):
    found = [run for run in runs if run.info.run_name == name]
    assert len(found) == 1, f"{name}: {len(found)} runs"
    return found[0]


def test_a_second_repro_does_nothing(repository):
    said = repository.dvc("repro").stdout
    assert "Data and pipelines are up to date" in said
    assert "Running stage" not in said


def test_a_changed_table_of_a_person_makes_prepare_run_again(repository):
    table = repository.folder / "data/tables/genes.txt"
    assert "prepare" not in repository.dvc("status", "prepare").stdout
    table.write_text("gene")
    assert re.search(
        r"prepare:\s+changed deps:\s+modified:\s+data/tables",
        repository.dvc("status", "prepare").stdout,
    )
    table.unlink()


def test_every_output_named_in_the_contract_is_there(repository):
    for directory in ("experiments/default", "experiments/latent_kl"):
        for name in (
            "model.pt",
            "history.csv",
            "report.json",
            "seeds/seeds.json",
            "figures/learning.png",
        ):
            assert (repository.folder / directory / name).stat().st_size > 0
    for name in (
        "best.yaml",
        "trials.csv",
        "importance.csv",
        "confirmed.csv",
        *(
            f"figures/{name}.png"
            for name in ("history", "slices", "contours", "importance", "confirmed")
        ),
    ):
        assert (repository.folder / "experiments/latent_kl" / name).stat().st_size > 0
    for name in (
        "metrics.json",
        "metrics.csv",
        "comparisons.csv",
        "figures/mse.png",
        "figures/skill.png",
    ):
        assert (repository.folder / "experiments/evaluation" / name).stat().st_size > 0


def test_metrics_json_and_csv_say_the_same_for_every_split_predictor_and_metric(repository):
    folder = repository.folder / "experiments/evaluation"
    nested, table = (
        json.loads((folder / "metrics.json").read_text()),
        pd.read_csv(folder / "metrics.csv"),
    )
    assert list(table.columns) == [
        "split",
        "predictor",
        "metric",
        "value",
        "low",
        "high",
        "conditions",
        "reason",
    ]
    assert set(nested) == {"test_random", "test_combination", "test_perturbation", "test_study"}
    for split, predictors in nested.items():
        assert list(predictors) == list(PREDICTORS)
        for predictor, metrics in predictors.items():
            assert list(metrics) == list(METRICS)
            for metric, value in metrics.items():
                row = table[
                    (table["split"] == split)
                    & (table["predictor"] == predictor)
                    & (table["metric"] == metric)
                ].iloc[0]
                if value is None:
                    assert np.isnan(row["value"])
                    assert row["reason"]
                else:
                    # Few conditions have no interval, and say so; a share of a gap may lie outside its own.
                    assert (
                        row["low"] <= row["value"] <= row["high"]
                        or metric.startswith("skill")
                        or "interval" in str(row["reason"])
                    )
                    assert row["value"] == pytest.approx(value)


def test_the_ideal_predictor_is_not_beaten_on_any_split(repository):
    """Each by what it knows: a reference tells of a new study what metadata cannot; a replicate speaks for some samples only."""
    nested = json.loads((repository.folder / "experiments/evaluation/metrics.json").read_text())
    for split, predictors in nested.items():
        errors = {
            name: metrics["mse"] for name, metrics in predictors.items() if name != "replicate"
        }
        assert (
            errors["oracle_omniscient"] <= errors["oracle_reference"] <= errors["oracle_metadata"]
        ), split
        for name, error in errors.items():
            if not name.startswith("oracle"):
                ideal = "oracle_reference" if name.endswith("_reference") else "oracle_metadata"
                assert error >= errors[ideal], (split, name)


def test_runs_of_train_tune_and_evaluate_compare_in_one_table(runs):
    """The same parameters under the same names, the same metrics; a child per trial under one parent."""
    default, winner = by_name(runs, "default"), by_name(runs, "latent_kl winner")
    trials = [run for run in runs if run.info.run_name.startswith("latent_kl trial")]
    assert len(trials) == 3
    assert {run.data.tags["stage"] for run in (default, winner, *trials)} == {"train", "tune"}
    flat = set(default.data.params)
    assert {"model.latent.biological", "train.kl_weight.technical", "train.learning_rate"} <= flat
    assert all(flat <= set(run.data.params) for run in (winner, *trials))
    assert all(
        {"validation/predictive_log_likelihood", "train/loss", "best/predictive_log_likelihood"}
        <= set(run.data.metrics)
        for run in (default, winner)
    )
    parent = by_name(runs, "latent_kl")
    assert {run.data.tags["mlflow.parentRunId"] for run in (winner, *trials)} == {
        parent.info.run_id
    }
    assert parent.data.metrics["trials/complete"] + parent.data.metrics["trials/pruned"] == 3
    assert parent.data.metrics["epochs/spent"] + parent.data.metrics["epochs/spared"] == 3 * 3
    confirmed = [run for run in runs if run.info.run_name.startswith("latent_kl confirm")]
    assert {"0", parent.data.tags["best.trial"]} <= {
        run.data.params["confirmed_trial"] for run in confirmed
    }
    assert len(confirmed) == 2 and parent.data.metrics["confirmed/mean"] == max(
        run.data.metrics["best/predictive_log_likelihood"] for run in confirmed
    )
    assert "fresh seed" in parent.data.tags["verdict"]
    assert all("log10.train.kl_weight.technical" in run.data.params for run in trials)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}


def test_epochs_are_the_steps_of_the_metrics(client, runs):
    steps = [
        metric.step
        for metric in client.get_metric_history(
            by_name(runs, "default").info.run_id, "validation/mse"
        )
    ]
    assert steps == list(range(1, TINY["train.epochs"] + 1))


def test_one_row_tells_the_whole_story_of_a_model(repository, runs):
    """Evaluate adds its metrics to the run that trained the model, found by the model's hash."""
    nested = json.loads((repository.folder / "experiments/evaluation/metrics.json").read_text())
    for name, predictor, directory in (
        ("default", "gem", "default"),
        ("latent_kl winner", "gem_tuned", "latent_kl"),
    ):
        run = by_name(runs, name)
        assert run.data.tags["model.sha256"] == sha256(
            repository.folder / "experiments" / directory / "model.pt"
        )
        assert run.data.metrics["test_random/mse"] == pytest.approx(
            nested["test_random"][predictor]["mse"]
        )
        assert run.data.metrics["test_random/reference_mse"] == pytest.approx(
            nested["test_random"][f"{predictor}_reference"]["mse"]
        )
    assert by_name(runs, "ridge").data.metrics["test_random/skill"] == 0
    assert by_name(runs, "oracle_metadata").data.metrics["test_random/skill"] == 1


def test_every_run_carries_the_data_and_the_code(repository, runs):
    lock = yaml_file.read(repository.folder / "dvc.lock").values
    digest = lock["stages"]["prepare"]["outs"][0]["md5"]
    for name in ("default", "latent_kl winner", "latent_kl trial 0", "evaluate"):
        run = by_name(runs, name)
        assert [dataset.dataset.digest for dataset in run.inputs.dataset_inputs] == [digest]
        assert run.data.tags["git.commit"] == repository.git("rev-parse", "HEAD").strip()
        assert run.data.tags["git.dirty"] == "false"


def test_every_trained_model_is_registered_and_the_champion_is_the_best_of_them(repository, client):
    versions = {
        one.tags["model.sha256"]: one for one in client.search_model_versions("name = 'gem'")
    }
    values = {}
    for directory in ("default", "latent_kl"):
        folder = repository.folder / "experiments" / directory
        version = versions[
            sha256(folder / "model.pt")
        ]  # one for both where the search's baseline wins
        values[version.version] = json.loads((folder / "report.json").read_text())["validation"][
            "predictive_log_likelihood"
        ]
        assert float(version.tags["predictive_log_likelihood"]) == values[version.version]
    assert len(versions) == len(values)
    assert values[client.get_model_version_by_alias("gem", "champion").version] == max(
        values.values()
    )


def test_figures_are_in_the_runs(client, runs):
    def names(run: str, folder: str) -> set[str]:
        return {item.path for item in client.list_artifacts(by_name(runs, run).info.run_id, folder)}

    assert "figures/learning.png" in names("default", "figures")
    assert {"figures/slices.png", "figures/importance.png"} <= names("latent_kl", "figures")
    assert {"figures/mse.png", "figures/delta_pearson.png"} <= names("evaluate", "figures")


def test_trial_zero_is_the_baseline(repository):
    trials = pd.read_csv(repository.folder / "experiments/latent_kl/trials.csv")
    assert len(trials) == 3
    baseline = yaml_file.read(repository.folder / "experiments/searches/latent_kl.yaml").values[
        "baseline"
    ]
    first = trials[trials["trial"] == 0].iloc[0]
    assert first["model.latent.technical"] == baseline["model"]["latent"]["technical"]
    assert first["train.kl_weight.perturbation"] == baseline["train"]["kl_weight"]["perturbation"]


def test_the_results_are_shown_as_a_table(repository):
    said = repository.stage("pipeline.evaluate", "--show")
    for word in ("test_combination", "ridge", "gem_tuned", "oracle_metadata", "skill"):
        assert word in said


def test_where_the_store_lost_its_runs_evaluate_opens_them_anew(repository):
    """As after `dvc pull` on another machine: the models are there, their runs are not."""
    elsewhere = repository.folder / "elsewhere.db"
    repository.stage("pipeline.evaluate", MLFLOW_TRACKING_URI=f"sqlite:///{elsewhere}")
    client = mlflow.MlflowClient(f"sqlite:///{elsewhere}")
    found = {
        run.info.run_name: run
        for run in client.search_runs([client.get_experiment_by_name("gem").experiment_id])
    }
    best = yaml_file.read(repository.folder / "experiments/latent_kl/best.yaml").values
    assert found["gem_tuned"].data.params["model.latent.technical"] == str(
        best["model"]["latent"]["technical"]
    )
    assert found["gem_tuned"].data.params["train.kl_weight.biological"] == str(
        best["train"]["kl_weight"]["biological"]
    )
    assert found["gem"].data.params["model.latent.technical"] == str(TINY["model.latent.technical"])
    assert {"test_random/mse", "test_random/reference_mse"} <= set(found["gem"].data.metrics)


def test_a_raised_budget_continues_the_study_and_promotion_does_not_search_again(
    repository, client
):
    """The last test of the module: it changes the repository."""
    before = pd.read_csv(repository.folder / "experiments/latent_kl/trials.csv")
    repository.stage("pipeline.configure", "--set", "tune.trials=5")
    repository.dvc("repro", "tune")
    after = pd.read_csv(repository.folder / "experiments/latent_kl/trials.csv")
    pd.testing.assert_frame_equal(after.iloc[:3].drop(columns="wins"), before.drop(columns="wins"))
    assert len(after) == 5
    assert len(after.iloc[:, 5:].drop_duplicates()) == 5, "a point was proposed twice"
    parents = [
        run
        for run in client.search_runs([client.get_experiment_by_name("gem").experiment_id])
        if run.info.run_name == "latent_kl"
    ]
    assert len(parents) == 1
    assert (
        parents[0].data.metrics["trials/complete"] + parents[0].data.metrics["trials/pruned"] == 5
    )

    text = (repository.folder / "params.yaml").read_text()
    said = repository.stage("pipeline.configure", "--promote", "latent_kl")
    best = yaml_file.read(repository.folder / "experiments/latent_kl/best.yaml").values
    promoted = yaml_file.read(repository.folder / "params.yaml").values
    assert promoted["model"]["latent"] == best["model"]["latent"]
    assert promoted["train"]["kl_weight"] == best["train"]["kl_weight"]
    changed = [
        line
        for line, was in zip(
            (repository.folder / "params.yaml").read_text().splitlines(),
            text.splitlines(),
            strict=True,
        )
        if line != was
    ]
    assert len(changed) <= 6
    assert all(f"+{line}" in said for line in changed)
    status = repository.dvc("status").stdout
    assert "tune:" not in status
    assert ("train:" in status) == bool(changed)
