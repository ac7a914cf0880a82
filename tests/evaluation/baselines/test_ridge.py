"""Ridge regression against scikit-learn, and its two solvers against each other."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array, hstack
from sklearn.linear_model import Ridge as SklearnRidge
from support.encoding import dense

from pipeline.gem.common.config import GROUPS, Covariates, Data
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.evaluation.baselines import ridge
from pipeline.gem.evaluation.baselines.ridge import (
    RIDGE_PENALTIES,
    ClosedForm,
    ConjugateGradients,
    Design,
    NormalEquations,
    Ridge,
    best_penalty,
)

GENES = 4


@pytest.fixture(scope="module")
def data(dosed) -> Data:
    """`dosed` with an age."""
    covariates = dosed.covariates.model_dump()
    covariates["biological"]["age_years"] = {"kind": "numeric", "scale": "linear"}
    return dosed.model_copy(update={"covariates": Covariates.model_validate(covariates)})


@pytest.fixture(scope="module")
def encoder(samples, data) -> MetadataEncoder:
    return MetadataEncoder.fit(samples, data.covariates)


@pytest.fixture(scope="module")
def expression(samples) -> np.ndarray:
    shift = samples["perturbation"].map({"control": 0.0, "x": 1.0, "y": -2.0}).to_numpy()
    noise = np.random.default_rng(1).normal(0, 0.5, (80, GENES))
    return (6 + shift[:, None] * np.arange(GENES) + noise).astype(np.float32)


def equations(design: csr_array, expression: np.ndarray) -> NormalEquations:
    """In three blocks."""
    blocks = np.array_split(expression, 3)
    return NormalEquations.of(lambda rows: design[rows], design.shape[1], blocks)


def fit(encoder, samples, expression, selection) -> Ridge:
    design = Design(encoder, samples).rows(slice(None))
    sums = equations(design, expression)
    if selection is None:
        return Ridge.fit(encoder, sums)
    return Ridge.fit(encoder, sums, best_penalty(encoder, sums, *selection))


def sklearn_ridge(encoder, penalty: float, samples, expression, query) -> np.ndarray:
    def design(rows: pd.DataFrame) -> np.ndarray:
        encoded = dense(encoder, rows, unknown="missing")
        return np.concatenate([encoded[group] for group in GROUPS], axis=1).astype(float)

    fitted = SklearnRidge(alpha=penalty).fit(design(samples), expression.astype(float))
    return fitted.predict(design(query))


@pytest.mark.parametrize("penalty", RIDGE_PENALTIES)
def test_ridge_selects_the_penalty_that_predicts_the_selection_split_as_scikit_learn_does(
    encoder, samples, expression, penalty
):
    expected = sklearn_ridge(encoder, penalty, samples, expression, samples)
    fitted = fit(encoder, samples, expression, (samples, expected))
    assert fitted.penalty == pytest.approx(penalty)
    np.testing.assert_allclose(fitted.predict(samples), expected, rtol=1e-7, atol=1e-7)


def test_ridge_selects_the_penalty_with_the_least_error(encoder, samples, expression):
    train, held_out = slice(0, 50), slice(50, 80)
    errors = {}
    for penalty in RIDGE_PENALTIES:
        query = samples.iloc[held_out]
        predicted = sklearn_ridge(encoder, penalty, samples.iloc[train], expression[train], query)
        errors[penalty] = np.mean((predicted - expression[held_out]) ** 2)
    selection = samples.iloc[held_out], expression[held_out]
    fitted = fit(encoder, samples.iloc[train], expression[train], selection)
    assert fitted.penalty == min(errors, key=errors.get)
    error = np.mean((fitted.predict(selection[0]) - selection[1]) ** 2)
    assert error == pytest.approx(min(errors.values()), rel=1e-7)


def test_ridge_without_a_selection_split_has_penalty_one(encoder, samples, expression):
    fitted = fit(encoder, samples, expression, None)
    expected = sklearn_ridge(encoder, 1.0, samples, expression, samples)
    assert fitted.penalty == 1.0
    np.testing.assert_allclose(fitted.predict(samples), expected, rtol=1e-7, atol=1e-7)


@pytest.fixture
def wide(rng) -> tuple[csr_array, np.ndarray]:
    """(design of four factors with 230 levels and a number, expression of 70 genes)"""
    factors = [csr_array(np.eye(levels)[rng.integers(0, levels, 400)]) for levels in (150, 70, 10)]
    design = hstack([*factors, csr_array(rng.normal(size=(400, 1)))], format="csr")
    effects = rng.normal(size=(design.shape[1], 70))
    return design, (design @ effects + rng.normal(size=(400, 70)) + 5).astype(np.float32)


@pytest.mark.parametrize("penalty", [0.01, 1.0, 1000.0])
def test_conjugate_gradients_solve_the_system_of_the_closed_form(wide, penalty):
    design, expression = wide
    solved, expected = (
        solver(equations(design, expression)).solve(penalty)
        for solver in (ConjugateGradients, ClosedForm)
    )
    assert solved.shape == expected.shape == (231, 70)
    centred = design.toarray() - design.mean(axis=0)
    np.testing.assert_allclose(centred @ solved, centred @ expected, rtol=0, atol=1e-4)


def test_both_solvers_select_the_same_penalty(wide):
    design, expression = wide
    train, others = slice(0, 300), slice(300, 400)
    penalties = [
        solver(equations(design[train], expression[train])).best_penalty(
            design[others], expression[others]
        )
        for solver in (ConjugateGradients, ClosedForm)
    ]
    assert penalties[0] == penalties[1] and RIDGE_PENALTIES[0] < penalties[0] < RIDGE_PENALTIES[-1]


def test_a_wide_ridge_predicts_as_a_narrow_one(encoder, samples, expression, monkeypatch):
    selection = samples.iloc[50:80], expression[50:80]
    narrow = fit(encoder, samples.iloc[:50], expression[:50], selection)
    monkeypatch.setattr(ridge, "CLOSED_FORM_COLUMNS", 0)
    wide = fit(encoder, samples.iloc[:50], expression[:50], selection)
    assert wide.penalty == narrow.penalty
    np.testing.assert_allclose(wide.predict(samples), narrow.predict(samples), atol=2e-5)


def test_ridge_treats_an_unknown_level_as_missing(encoder, samples, expression):
    fitted, query = fit(encoder, samples, expression, None), samples.head(5)
    unknown, missing = (fitted.predict(query.assign(study=study)) for study in ("unknown", None))
    np.testing.assert_array_equal(unknown, missing)


def test_ridge_beats_the_training_mean_on_held_out_samples_of_the_cohort(cohort):
    train, observed = cohort.expression(["train"]), cohort.expression(["test_random"])
    encoder = MetadataEncoder.fit(cohort.rows(["train"]), cohort.declared.covariates)
    fitted = fit(encoder, cohort.rows(["train"]), train, None)
    predictions = fitted.predict(cohort.rows(["test_random"])), train.mean(axis=0)
    errors = [np.mean((predicted - observed) ** 2) for predicted in predictions]
    assert errors[0] < 0.8 * errors[1]
