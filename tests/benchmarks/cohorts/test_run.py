"""The whole benchmark on a tiny .h5ad: processes, resuming, MLflow, files."""

import json
import sys
from dataclasses import replace

import mlflow
import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT, TINY

from benchmarks.cohorts import run
from benchmarks.cohorts.__main__ import main
from benchmarks.cohorts.controls import matched_controls
from benchmarks.cohorts.declarations import read_task, with_settings
from benchmarks.cohorts.fold_run import HeldOut, run_fold
from benchmarks.cohorts.folds import draw_folds
from benchmarks.cohorts.run import FoldJob, code_sha256, score_table
from benchmarks.cohorts.table import SIMPLE
from pipeline.gem.common.code_version import import_closure
from pipeline.gem.common.config import read_params
from pipeline.gem.common.errors import InputError
from pipeline.gem.common.files import write_json
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.data.splits import role_of
from pipeline.gem.evaluation.catalogue import GEM, REFERENCE_SUFFIX

SMALL = TINY | {"train.epochs": 2, "tracking.experiment": "gem"}


def benchmark(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cohorts", *map(str, arguments)])
    main()


@pytest.mark.slow
def test_two_folds_are_run_once_tracked_and_compared(project, cohorts, monkeypatch, capsys):
    arguments = (cohorts, "tiny", "--name", "try", "--workers", 1)
    benchmark(monkeypatch, *arguments)
    output = project / "experiments/cohorts/try"
    folds = pd.read_csv(output / "folds.csv")
    assert folds["fold"].nunique() == 2 and set(folds["scale"]) == {"means"}
    expected = {*SIMPLE, GEM, GEM + REFERENCE_SUFFIX, "half"}
    assert set(folds["predictor"]) == expected
    assert np.isfinite(folds["mse"]).all() and folds["pearson"].notna().sum() > len(expected)
    # Drugs have one effect in all donors, which the simple predictors find.
    mse = folds.groupby("predictor")["mse"].mean()
    assert mse["additive"] < 0.2 * mse["no_change"] and mse["half"] < mse["no_change"]
    assert "| tiny | 2 |" in capsys.readouterr().out
    assert (output / "figure.png").exists() and (output / "table.md").exists()
    _check_runs("try")

    # A second run with the same settings trains nothing.
    results = {path: path.stat().st_mtime_ns for path in run.WORK.rglob("*.json")}
    benchmark(monkeypatch, *arguments[:2], "--name", "again", "--workers", 1)
    assert {path: path.stat().st_mtime_ns for path in run.WORK.rglob("*.json")} == results
    again = pd.read_csv(project / "experiments/cohorts/again/folds.csv")
    pd.testing.assert_frame_equal(again, folds)

    # After a loss of one result only this fold is run again, with the same scores.
    lost = next(iter(results))
    before = json.loads(lost.read_text())["rows"]
    lost.unlink()
    benchmark(monkeypatch, *arguments)
    assert json.loads(lost.read_text())["rows"] == before
    kept = {path: path.stat().st_mtime_ns for path in run.WORK.rglob("*.json") if path != lost}
    assert kept.items() <= results.items()


def _check_runs(name: str) -> None:
    """A parent, and below it a child per fold, with the same metrics."""
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (parent,) = [each for each in runs if each.info.run_name == f"{name}/tiny"]
    children = [
        each for each in runs if each.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert len(children) == 2 and {each.info.status for each in runs} == {"FINISHED"}
    values = [child.data.metrics["means/gem/mse"] for child in children]
    assert parent.data.metrics["means/gem/mse"] == pytest.approx(np.mean(values))
    assert parent.data.params["train.epochs"] == "2"


@pytest.mark.slow
def test_cells_are_compared_as_means_and_as_sums(project, cohorts, monkeypatch):
    path = cohorts / "tiny.yaml"
    path.write_text(path.read_text() + "cells: sums\n")
    settings = ("--set", "train.epochs=1", "--folds", 1, "--workers", 1)
    benchmark(monkeypatch, cohorts, "tiny", *settings)
    folds = pd.read_csv(project / "experiments/cohorts/default/folds.csv")
    by_scale = folds.groupby("scale")["predictor"].apply(set)
    assert by_scale["sums"] == by_scale["means"]
    # With much the same depth in all samples the sums tell what the means tell, with less noise.
    mse = folds.pivot(index="predictor", columns="scale", values="mse")
    for name in ("additive", "no_change", "ridge"):
        assert mse.loc[name, "sums"] == pytest.approx(mse.loc[name, "means"], rel=0.4, abs=0.02)


@pytest.mark.slow
def test_donors_and_studies_are_held_out_whole(cohorts, tmp_path):
    path = cohorts / "tiny.yaml"
    declared = path.read_text()
    jobs = []
    for line in ("levels\ncolumn: donor", "levels\ncolumn: batch", "studies"):
        text = declared.replace("hold_out: pairs", f"hold_out: {line}")
        if line == "studies":
            text = text.replace("data:\n", "data:\n  study_column: batch\n")
        path.write_text(text)
        task = read_task("tiny", cohorts, with_settings(read_params(ROOT / "params.yaml"), SMALL))
        task = replace(task, name=line.split()[-1])
        (fold, *_) = draw_folds(
            open_source(task.params.data).samples, task.declaration, task.params
        )
        folder = tmp_path / task.name
        rows = run_fold(fold, task.params, False, folder, lambda: None)
        write_json(folder / "result.json", {"rows": rows})
        jobs.append(FoldJob(task, fold, folder / "result.json"))
        held_out = Cohort(folder / "cohort").rows([fold.split])
        assert len(held_out) == (12 if task.name == "donor" else 18)
        assert set(held_out[line.split()[-1] if "column" in line else "batch"]) == {fold.name}
    table = score_table(jobs).set_index(["cohort", "predictor"])
    assert np.isfinite(table["mse"]).all() and table["pearson"].dtype == float
    # A new donor, who is the context, has no control outside the test to take an effect from.
    assert table.loc["donor", "pearson"].isna().all()
    assert GEM + REFERENCE_SUFFIX not in table.loc["donor"].index
    for name in ("batch", "studies"):  # two drugs with one effect in all batches
        assert table.loc[(name, "additive"), "pearson"] > 0.9
        assert np.isfinite(table.loc[(name, GEM + REFERENCE_SUFFIX), "pearson"])


def test_an_invalid_call_is_refused_before_anything_runs(project, cohorts, monkeypatch):
    for arguments, message in (
        (("--workers", 0), "--workers 0: expected 1 or more"),
        (("--name", "a/b"), "expected the name of a folder"),
        (("absent", "other"), "no cohort absent"),
        (("--set", "train.epochs=x"), "train.epochs"),
    ):
        with pytest.raises(InputError, match=message):
            benchmark(monkeypatch, cohorts, *arguments)
    assert not run.WORK.exists()


def test_the_hash_of_the_code_covers_every_module_that_a_fold_imports():
    closure = {file for module in run.STAGES for file in import_closure(module)}
    for name in run.OWN:
        text = (ROOT / f"benchmarks/cohorts/{name}.py").read_text()
        for line in text.splitlines():
            if line.startswith("from benchmarks.cohorts."):
                # What a declaration says is in the identity of the cohort.
                assert line.split()[1].rpartition(".")[2] in (*run.OWN, "declarations"), line
            if line.startswith("from pipeline.gem."):
                module = line.split()[1].replace(".", "/")
                assert f"{module}.py" in closure or f"{module}/__init__.py" in closure, line
    assert code_sha256() == code_sha256()


def test_controls_match_by_context_and_where_they_have_it_by_time(samples, params):
    data = params.data.model_validate(
        params.data.model_dump(mode="json")
        | {
            "covariates": {
                "technical": {},
                "biological": {"donor": {"kind": "categorical"}},
                "perturbation": {
                    "perturbation": {"kind": "categorical"},
                    "perturbation_time": {"kind": "numeric", "scale": "log"},
                },
            },
            "context_columns": ["donor"],
        }
    )
    query = samples[samples["donor"] == "donor 1"].iloc[[4]]
    assert query["perturbation_time"].item() == "1 day"
    (found,) = matched_controls(query, samples, data)
    assert len(found) == 2
    rows = samples.iloc[found]
    assert set(rows["donor"]) == {"donor 1"} and set(rows["perturbation_time"]) == {"1 day"}
    (other,) = matched_controls(query.assign(perturbation_time="2 days"), samples, data)
    assert len(other) == 4  # no control at this time: all of the context
    (none,) = matched_controls(query.assign(donor="donor 9"), samples, data)
    assert not len(none)


def test_the_effect_of_a_condition_is_from_controls_outside_the_test(cohort, params):
    from pipeline.gem.evaluation.evaluation_split import EvaluationSplits

    split = EvaluationSplits(cohort, params.evaluate).split("test_combination")
    held_out = HeldOut(cohort, split)
    rows = np.concatenate(list(held_out.conditions.values()))
    assert split.treated[rows].all() and len(rows) == split.treated.sum()
    visible = held_out.visible
    assert set(visible["split"].map(role_of)) == {"train", "validation"}
    for name, controls in held_out.controls.items():
        assert (visible.iloc[controls]["perturbation"] == "control").all()
        assert len(controls), name
