"""An independent judge: Arc Institute's cell-eval2 and scanpy's Welch test, in an environment of their own.

`make test` creates that environment from tests/cell_eval/requirements.lock; see tests/cell_eval/score.py.
"""

import json
import os
import subprocess

import numpy as np
import pytest
from support.settings import ROOT

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
SCORE = ROOT / "tests" / "cell_eval" / "score.py"

GENES, CONTROLS, REPLICATES = 120, 20, 15
# What the prediction of each drug is: its own effect, less or more of it, another drug's, its mirror image, nothing at all.
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


@pytest.fixture(scope="module")
def screen() -> dict[str, np.ndarray]:
    """Observed and predicted samples, by condition; the drug `null` has no effect, `unmoved` is predicted to be the control."""
    rng = np.random.default_rng(
        0
    )  # a seed with which no gene of the null drug is a false discovery
    level, noise = (
        rng.uniform(5, 7, GENES),
        rng.gamma(9, 0.02, GENES),
    )  # cell-eval2 refuses negative log-CPM
    effects = rng.normal(0, 0.5, (len(DRUGS), GENES)) * (rng.random((len(DRUGS), GENES)) < 0.3)
    effects[list(DRUGS).index("null")] = 0
    controls = rng.normal(level, noise, (2, CONTROLS, GENES))
    observed = [
        controls[0],
        *(rng.normal(level + effect, noise, (REPLICATES, GENES)) for effect in effects),
    ]
    predicted = [
        controls[1],
        *(
            rng.normal(level + share * effects[which], noise, (REPLICATES, GENES))
            for which, share in DRUGS.values()
        ),
    ]
    predicted[NAMES.index("unmoved")] = controls[1]
    return {
        "observed": np.concatenate(observed).astype(np.float32),
        "predicted": np.concatenate(predicted).astype(np.float32),
        "observed_condition": np.repeat(NAMES, [len(side) for side in observed]),
        "predicted_condition": np.repeat(NAMES, [len(side) for side in predicted]),
    }


@pytest.fixture(scope="module")
def judged(screen, tmp_path_factory) -> dict[str, dict]:
    """What cell-eval2 says of the screen."""
    if not PYTHON.exists():
        pytest.fail(
            f"{PYTHON} is missing: run the tests with `make test`, which creates this environment from tests/cell_eval/requirements.lock"
        )
    path = tmp_path_factory.mktemp("cell_eval") / "screen.npz"
    np.savez(path, **screen)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    done = subprocess.run(
        [PYTHON, SCORE, path], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def condition_means(values: np.ndarray, condition: np.ndarray) -> np.ndarray:
    return np.stack(
        [
            values[condition == index].mean(axis=0, dtype=np.float64)
            for index in range(condition.max() + 1)
        ]
    )


@pytest.fixture(scope="module")
def means(screen) -> tuple[np.ndarray, np.ndarray]:
    """(1 + drugs, G) observed and predicted means, the control first."""
    return tuple(
        condition_means(screen[side], rank_in_names(screen[f"{side}_condition"]))
        for side in ("observed", "predicted")
    )


@pytest.fixture(scope="module")
def changes(means) -> tuple[np.ndarray, np.ndarray]:
    """(drugs, G) observed and predicted changes, each from its own controls."""
    return tuple(side[1:] - side[0] for side in means)


@pytest.fixture(scope="module")
def differential(screen) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Our differential genes and changes of every drug, observed and predicted."""
    return {
        side: {
            drug: differential_genes(
                *(screen[side][screen[f"{side}_condition"] == name] for name in (drug, "control"))
            )
            for drug in DRUGS
        }
        for side in ("observed", "predicted")
    }


def rank_in_names(labels: np.ndarray) -> np.ndarray:
    """(N,) index in NAMES of each label."""
    return np.array([NAMES.index(label) for label in labels])


def of_drugs(values: dict[str, float]) -> np.ndarray:
    """(drugs,) values in our order; NaN where cell-eval2 gives none."""
    return np.array([values.get(drug, np.nan) for drug in DRUGS])


def test_errors_of_condition_means_are_those_of_cell_eval(judged, means, changes):
    scores = judged["metrics"]
    for (observed, predicted), space in (
        (tuple(side[1:] for side in means), "expr"),
        (changes, "delta"),
    ):
        np.testing.assert_allclose(
            squared_error(observed, predicted), of_drugs(scores[f"{space}_mse"]), rtol=1e-9
        )
        np.testing.assert_allclose(
            absolute_error(observed, predicted), of_drugs(scores[f"{space}_mae"]), rtol=1e-9
        )


def test_delta_pearson_is_that_of_cell_eval_but_for_a_prediction_of_nothing(judged, changes):
    ours, theirs = delta_pearson(*changes), of_drugs(judged["metrics"]["delta_pearson"])
    moved = np.array(list(DRUGS)) != "unmoved"
    np.testing.assert_allclose(ours[moved], theirs[moved], atol=1e-9)
    assert ours[moved].min() < -0.5
    # No correlation is defined there: cell-eval2 charges the worst, we leave it to the caller.
    assert np.isnan(ours[~moved]).all()
    assert theirs[~moved] == -1


def test_discrimination_is_that_of_cell_eval_ties_included(judged, changes):
    ours = discrimination(*changes)
    np.testing.assert_allclose(ours, of_drugs(judged["metrics"]["pds_cosine"]), atol=1e-12)
    found = dict(zip(DRUGS, ours, strict=True))
    assert (found["own"], found["weak"], found["unmoved"], found["mirrored"]) == (1, 1, 0.5, 0)


def test_differential_genes_are_those_of_scanpy(judged, differential):
    for drug in DRUGS:
        np.testing.assert_array_equal(
            differential["observed"][drug][0], judged["significant"][drug], err_msg=drug
        )
    assert sum(significant.sum() for significant, _ in differential["observed"].values()) > 100


def test_de_direction_is_that_of_cell_eval_but_for_a_prediction_of_nothing(judged, differential):
    ours = {
        drug: de_direction(*differential["observed"][drug], differential["predicted"][drug][1])
        for drug in DRUGS
    }
    theirs = judged["metrics"]["de_wilcoxon_direction_match"]
    for drug in set(DRUGS) - {"unmoved", "null"}:
        assert ours[drug] == pytest.approx(theirs[drug], abs=1e-12), drug
    # A change of exactly 0 is a coin's guess to us, a mistake to them.
    assert (ours["unmoved"], theirs["unmoved"]) == (0.5, 0.0)
    assert np.isnan(ours["null"])


def test_de_jaccard_is_that_of_cell_eval_but_for_two_empty_sets(judged, differential):
    ours = {
        drug: de_jaccard(differential["observed"][drug][0], differential["predicted"][drug][0])
        for drug in DRUGS
    }
    theirs = judged["metrics"]["de_wilcoxon_sig_jaccard"]
    for drug in set(DRUGS) - {"null"}:
        assert ours[drug] == pytest.approx(theirs[drug], abs=1e-12), drug
    assert 0 < ours["weak"] < ours["own"]
    # Nothing to find and nothing said: perfect to them, no value to us.
    assert np.isnan(ours["null"])
    assert theirs["null"] == 1
