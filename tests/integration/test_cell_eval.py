"""Metrics against Arc Institute's cell-eval2 and scanpy's Welch test, in their own environment.

`make test` creates that environment from tests/cell_eval/requirements.lock.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from support.settings import ROOT

from pipeline import predict
from pipeline.gem.evaluation.differential_expression import (
    de_direction,
    de_jaccard,
    differential_genes,
)
from pipeline.gem.evaluation.metrics import (
    absolute_error,
    delta_pearson,
    discrimination,
    squared_error,
)

PYTHON = ROOT / ".venv-cell-eval" / "bin" / "python"
SCRIPTS = ROOT / "tests" / "cell_eval"

GENES, CONTROLS, REPLICATES = 120, 20, 15
# Prediction of each drug: (drug whose effect it has, multiple of that effect).
DRUGS = {
    "own": (0, 1.0),
    "weak": (1, 0.3),
    "strong": (2, 2.0),
    "other": (0, 1.0),
    "mirrored": (4, -1.0),
    "unmoved": (5, 0.0),
    "null": (6, 1.0),
}
NAMES = ["control", *DRUGS]
SIDES = ("observed", "predicted")


@pytest.fixture(scope="module")
def screen() -> dict[str, np.ndarray]:
    """Observed and predicted samples, and their conditions.

    The drug `null` has no effect. The prediction of `unmoved` is the control.
    """
    rng = np.random.default_rng(0)  # with this seed the null drug has no false discovery
    # cell-eval2 refuses negative log-CPM.
    level, noise = rng.uniform(5, 7, GENES), rng.gamma(9, 0.02, GENES)
    effects = rng.normal(0, 0.5, (len(DRUGS), GENES)) * (rng.random((len(DRUGS), GENES)) < 0.3)
    effects[list(DRUGS).index("null")] = 0
    controls = rng.normal(level, noise, (2, CONTROLS, GENES))

    def samples(effect: np.ndarray) -> np.ndarray:
        return rng.normal(level + effect, noise, (REPLICATES, GENES))

    observed = [controls[0], *(samples(effect) for effect in effects)]
    predicted = [controls[1], *(samples(share * effects[drug]) for drug, share in DRUGS.values())]
    predicted[NAMES.index("unmoved")] = controls[1]
    arrays = {}
    for side, groups in zip(SIDES, (observed, predicted), strict=True):
        arrays[side] = np.concatenate(groups).astype(np.float32)
        arrays[f"{side}_condition"] = np.repeat(NAMES, [len(group) for group in groups])
    return arrays


@pytest.fixture(scope="module")
def cell_eval(screen, tmp_path_factory) -> dict[str, dict]:
    """Scores of the screen by cell-eval2."""
    path = tmp_path_factory.mktemp("cell_eval") / "screen.npz"
    np.savez(path, **screen)
    return run_script("score.py", path)


def run_script(name: str, *arguments: Path) -> dict:
    """Output of a script of tests/cell_eval in its own environment."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run the tests with `make test`")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [PYTHON, SCRIPTS / name, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def groups(screen, side: str) -> dict[str, np.ndarray]:
    """Samples (n, G) by condition."""
    return {name: screen[side][screen[f"{side}_condition"] == name] for name in NAMES}


@pytest.fixture(scope="module")
def means(screen) -> tuple[np.ndarray, np.ndarray]:
    """(1 + drugs, G) observed and predicted means, the control first."""
    return tuple(
        np.stack([rows.mean(axis=0, dtype=np.float64) for rows in groups(screen, side).values()])
        for side in SIDES
    )


@pytest.fixture(scope="module")
def changes(means) -> tuple[np.ndarray, np.ndarray]:
    """(drugs, G) observed and predicted changes, each from its own controls."""
    return tuple(side[1:] - side[0] for side in means)


@pytest.fixture(scope="module")
def differential(screen) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Differential genes and changes of every drug, observed and predicted."""
    tables = {}
    for side in SIDES:
        rows = groups(screen, side)
        tables[side] = {drug: differential_genes(rows[drug], rows["control"]) for drug in DRUGS}
    return tables


def of_drugs(values: dict[str, float]) -> np.ndarray:
    """(drugs,) values in the order of DRUGS; NaN where cell-eval2 gives none."""
    return np.array([values.get(drug, np.nan) for drug in DRUGS])


def test_errors_of_condition_means_equal_those_of_cell_eval(cell_eval, means, changes):
    scores = cell_eval["metrics"]
    for pair, space in ((tuple(side[1:] for side in means), "expr"), (changes, "delta")):
        for error, name in ((squared_error, "mse"), (absolute_error, "mae")):
            expected = of_drugs(scores[f"{space}_{name}"])
            np.testing.assert_allclose(error(*pair), expected, rtol=1e-9)


def test_delta_pearson_equals_that_of_cell_eval_except_for_no_predicted_change(cell_eval, changes):
    ours, theirs = delta_pearson(*changes), of_drugs(cell_eval["metrics"]["delta_pearson"])
    moved = np.array(list(DRUGS)) != "unmoved"
    np.testing.assert_allclose(ours[moved], theirs[moved], atol=1e-9)
    assert ours[moved].min() < -0.5
    # No correlation is defined there: cell-eval2 gives -1, this project leaves it to the caller.
    assert np.isnan(ours[~moved]).all()
    assert theirs[~moved] == -1


def test_discrimination_equals_that_of_cell_eval_with_ties(cell_eval, changes):
    ours = discrimination(*changes)
    np.testing.assert_allclose(ours, of_drugs(cell_eval["metrics"]["pds_cosine"]), atol=1e-12)
    values = dict(zip(DRUGS, ours, strict=True))
    expected = {"own": 1, "weak": 1, "unmoved": 0.5, "mirrored": 0}
    assert {name: values[name] for name in expected} == expected


def test_differential_genes_equal_those_of_scanpy(cell_eval, differential):
    for drug, (significant, _) in differential["observed"].items():
        np.testing.assert_array_equal(significant, cell_eval["significant"][drug], err_msg=drug)
    assert sum(significant.sum() for significant, _ in differential["observed"].values()) > 100


def test_de_direction_equals_that_of_cell_eval_except_for_no_predicted_change(
    cell_eval, differential
):
    observed, predicted = (differential[side] for side in SIDES)
    ours = {drug: de_direction(*observed[drug], predicted[drug][1]) for drug in DRUGS}
    theirs = cell_eval["metrics"]["de_wilcoxon_direction_match"]
    for drug in set(DRUGS) - {"unmoved", "null"}:
        assert ours[drug] == pytest.approx(theirs[drug], abs=1e-12), drug
    # A change of exactly 0 counts as half right here, as wrong there.
    assert (ours["unmoved"], theirs["unmoved"]) == (0.5, 0.0)
    assert np.isnan(ours["null"])


def test_de_jaccard_equals_that_of_cell_eval_except_for_two_empty_sets(cell_eval, differential):
    observed, predicted = (differential[side] for side in SIDES)
    ours = {drug: de_jaccard(observed[drug][0], predicted[drug][0]) for drug in DRUGS}
    theirs = cell_eval["metrics"]["de_wilcoxon_sig_jaccard"]
    for drug in set(DRUGS) - {"null"}:
        assert ours[drug] == pytest.approx(theirs[drug], abs=1e-12), drug
    assert 0 < ours["weak"] < ours["own"]
    # Two empty sets: no value here, perfect there.
    assert np.isnan(ours["null"])
    assert theirs["null"] == 1


def log_cpm_of_groups(counts: np.ndarray, labels: np.ndarray, names: list[str]) -> np.ndarray:
    """(conditions, G) log-CPM of summed counts."""
    sums = np.stack([counts[labels == name].sum(axis=0, dtype=np.float64) for name in names])
    return np.log1p(sums / sums.sum(axis=1, keepdims=True) * 1e6)


@pytest.mark.parametrize("total", [1_000_000, 20])
def test_cell_eval_reads_a_prediction_and_ranks_its_errors_as_this_project_does(
    monkeypatch, tmp_path, model_directory, cohort, total
):
    """A dense matrix, and a sparse one where most counts are zero."""
    rows = cohort.rows(["train"])
    names = ["control", *rows["perturbation"].value_counts().drop("control").index[:3]]
    selected = rows["perturbation"].isin(names).to_numpy()
    rows, counts = rows[selected].reset_index(drop=True), cohort.counts(["train"])[selected]
    query, prediction = tmp_path / "query.parquet", tmp_path / "prediction.h5ad"
    rows[["tissue", "cell_type", "sex", "perturbation"]].to_parquet(query, index=False)
    options = ["--model", model_directory, "--query", query, "--output", prediction]
    command = ["predict", *map(str, options), "--total-count", str(total)]
    monkeypatch.setattr(sys, "argv", command)
    predict.main()

    labels = rows["perturbation"].to_numpy()
    obs = pd.DataFrame({"perturbation": labels}, index=rows.index.astype(str))
    var = pd.DataFrame(index=cohort.genes)
    observed = anndata.AnnData(counts.astype(np.float32), obs=obs, var=var)
    observed.write_h5ad(tmp_path / "observed.h5ad")
    scores = run_script("score_prediction.py", prediction, tmp_path / "observed.h5ad")["expr_mse"]
    predicted = anndata.read_h5ad(prediction).X
    assert hasattr(predicted, "toarray") == (total == 20)
    assert set(names[1:]) <= set(scores) <= set(names)
    assert np.isfinite(list(scores.values())).all()
    if total == 1_000_000:
        difference = log_cpm_of_groups(predicted, labels, names) - log_cpm_of_groups(
            counts, labels, names
        )
        ours = np.square(difference).mean(axis=1)[1:]
        assert np.corrcoef(ours, [scores[name] for name in names[1:]])[0, 1] > 0.9
