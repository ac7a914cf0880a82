"""The comparison of settings on a tiny .h5ad: inner folds, parts of GEM, resuming, files."""

import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT, TINY

from benchmarks.cohorts.declarations import read_task, with_settings
from benchmarks.cohorts.folds import inner_folds
from benchmarks.settings import inner_run
from benchmarks.settings.__main__ import SETTINGS, main, read_settings
from pipeline.gem.common import yaml_file
from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import InputError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source

DEFAULTS = read_params(ROOT / "params.yaml")


@pytest.fixture(autouse=True)
def settings_file(project):
    (project / "settings.yaml").write_text(
        "longer: {train.epochs: 4}\nlost: {train.lost: 1}\nother: {splits.seed: 1}\n"
    )


def call(monkeypatch, *arguments: object) -> None:
    arguments = [*arguments, "--settings", "settings.yaml", "--workers", 1]
    monkeypatch.setattr(sys, "argv", ["settings", *map(str, arguments)])
    main()


@pytest.mark.slow
def test_a_setting_is_compared_with_the_defaults(project, cohorts, monkeypatch, capsys):
    arguments = (cohorts, "tiny", "--only", "longer", "--name", "try", "--genes", 60)
    call(monkeypatch, *arguments)
    folds = pd.read_csv("experiments/settings/try/folds.csv")
    keys = ["setting", "fold", "predictor"]
    assert len(folds) == 2 * 2 * 3 and not folds[keys].duplicated().any()
    assert np.isfinite(folds["mse"]).all()
    by_part = folds.pivot(index=["setting", "fold"], columns="predictor", values="mse")
    # Both settings have the same mixed model; the network differs.
    assert by_part["mixed_model"].groupby("fold").nunique().eq(1).all()
    assert by_part["network"].groupby("fold").nunique().eq(2).all()
    assert "| longer |" in capsys.readouterr().out
    assert Path("experiments/settings/try/figure.png").exists()
    runs = mlflow.search_runs(experiment_names=[DEFAULTS.tracking.experiment])
    runs = runs[runs["tags.benchmark"] == "try"].set_index("tags.setting")
    assert set(runs.index) == {"default", "longer"} and set(runs["status"]) == {"FINISHED"}
    assert runs["params.train.epochs"].to_dict() == {"default": "2", "longer": "4"}
    expected = by_part.loc["longer", "gem"].mean()
    assert runs.loc["longer", "metrics.gem/tiny/mse"] == pytest.approx(expected)

    # A second call with the same settings trains nothing.
    results = {path: path.stat().st_mtime_ns for path in inner_run.WORK.rglob("*.json")}
    assert len(results) == 4
    call(monkeypatch, *arguments)
    assert {path: path.stat().st_mtime_ns for path in inner_run.WORK.rglob("*.json")} == results


def test_wrong_settings_are_refused_before_anything_runs(project, cohorts, monkeypatch):
    with pytest.raises(
        InputError, match=r"lost: train\.lost.*\n.*other: splits\.seed: expected a key of"
    ):
        call(monkeypatch, cohorts, "tiny")
    with pytest.raises(InputError, match=r"--only longr: .*longer"):
        call(monkeypatch, cohorts, "tiny", "--only", "longr")
    (project / "settings.yaml").write_text("train.epochs: 3\n")
    with pytest.raises(InputError, match="expected names of settings"):
        call(monkeypatch, cohorts, "tiny")
    (project / "settings.yaml").write_text("default: {train.epochs: 3}\n")
    with pytest.raises(InputError, match="rename it"):
        call(monkeypatch, cohorts, "tiny")
    with pytest.raises(InputError) as error:
        call(monkeypatch, cohorts, "tiny", "--folds", 0, "--genes", -1, "--name", "a/b")
    assert len(error.value.problems) == 3
    assert not Path(".gem").exists() and not Path("experiments").exists()


def test_the_file_has_every_setting_that_changes_a_fit_and_nothing_else():
    settings = read_settings(SETTINGS, None, DEFAULTS)
    assert settings.pop("default") == {}
    for name, changes in settings.items():
        before, after = DEFAULTS.flat("model", "train"), with_settings(DEFAULTS, changes)
        assert after.flat("model", "train") != before, name
    changed = {key for changes in settings.values() for key in changes}
    known = {key for section in ("model", "train") for key in keys_of(section)}
    # Where and how a fit runs; the mixed model is scored beside every setting.
    run = {"seeds", "device", "memory_share", "precision", "threads", "predictive_draws"}
    others = {f"train.{name}" for name in run} | {"model.mixed_model"}
    others |= {"train.metadata_dropout.technical"}  # makes new studies worse (docs/research.md)
    assert known - changed == others


def keys_of(section: str) -> set[str]:
    values = DEFAULTS.model_dump(mode="json", include={section})
    return set(yaml_file.flatten(values))


@pytest.mark.slow
def test_an_inner_fold_sees_neither_its_own_condition_nor_the_excluded_one(
    cohorts, tmp_path, monkeypatch
):
    params = with_settings(DEFAULTS, TINY | {"train.epochs": 2})
    task = read_task("tiny", cohorts, params)
    seen = []

    def train(cohort: Cohort, *_):
        seen.append(cohort)
        raise InterruptedError

    monkeypatch.setattr(inner_run, "train", train)
    folds = inner_folds(open_source(task.params.data).samples, task.declaration, task.params)
    for number, fold in enumerate(folds):
        job = inner_run._job("default", {}, task, fold, number + 1, None)
        (own,), (excluded,) = job.fold.mappings, job.fold.excluded
        assert own != excluded and job.params.train.seeds == (number + 1,)
        with pytest.raises(InterruptedError):
            inner_run.run_inner_fold(job, tmp_path / str(number), lambda: None)
        visible = seen[-1].rows(["train", "validation_combination"])
        for mapping in (own, excluded):
            assert not (visible[list(mapping)] == pd.Series(mapping)).all(axis=1).any()
