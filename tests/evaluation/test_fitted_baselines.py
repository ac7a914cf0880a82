"""Which samples the baselines of an evaluation are fitted to, and which choose their penalties."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge
from support.encoding import dense
from support.settings import at_source

from pipeline.gem.common.config import GROUPS, Params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.sources import open_source
from pipeline.gem.data.splits import TEST_CONTROL, TESTS, TRAIN, VALIDATIONS, VISIBLE
from pipeline.gem.evaluation.baselines.bilinear import Bilinear, perturbation_features
from pipeline.gem.evaluation.baselines.profiles import Profiles
from pipeline.gem.evaluation.baselines.ridge import RIDGE_PENALTIES
from pipeline.gem.evaluation.baselines.selection import Selection
from pipeline.gem.evaluation.baselines.simple import (
    Additive,
    AdditiveNearest,
    MatchedMean,
    PerturbedMean,
    training_mean,
)
from pipeline.gem.evaluation.evaluation_split import EvaluationSplits
from pipeline.gem.evaluation.predictors import Predictors
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.simulation.write import write_source

SELECTION = ["validation_combination"]
SPLITS = ("test_random", "test_combination", "test_study")


def prepare(params: Params, folder: Path) -> Cohort:
    """The cohort of `params`, from a source of its own."""
    params = params.override(at_source(folder / "source"))
    write_source(params.synthesize, folder / "source")
    write_cohort(open_source(params.data), params.data, params.splits, folder / "cohort")
    return Cohort(folder / "cohort")


@pytest.fixture(scope="module")
def splits(params, tmp_path_factory) -> EvaluationSplits:
    """Of few counts: a choice of penalties on samples of the fit would be another one."""
    changed = params.override({"synthesize.depth": 3000})
    return EvaluationSplits(prepare(changed, tmp_path_factory.mktemp("few")), params.evaluate)


@pytest.fixture(scope="module")
def predictors(splits) -> Predictors:
    return Predictors(splits, {})


@pytest.fixture(scope="module")
def profiles_of(splits) -> Callable[[Sequence[str]], Profiles]:
    cohort = splits.cohort
    return lambda splits: Profiles.of(
        cohort.declared, cohort.rows(splits), [cohort.expression(splits)]
    )


def test_visible_are_all_samples_but_those_of_the_test(splits):
    samples, visible = splits.cohort.samples, splits.visible.samples
    assert set(visible["split"]) == set(VISIBLE)
    others = samples[~samples["sample_id"].isin(visible["sample_id"])]
    assert set(others["split"]) <= {*TESTS, TEST_CONTROL}
    new = set(visible["study"]) - set(samples["study"][samples["split"] == TRAIN])
    assert new, "a level that training lacks"


@pytest.mark.parametrize("name", SPLITS)
def test_simple_baselines_are_fitted_to_training_and_validation_samples(
    splits, predictors, profiles_of, name
):
    split = splits.split(name)
    fits = {
        "training_mean": lambda of: training_mean(of, len(split.samples)),
        "perturbed_mean": lambda of: PerturbedMean(of).predict(split.samples),
        "matched_mean": lambda of: MatchedMean(of).predict(split.samples),
        "no_change": lambda of: Additive(of).no_change(split.samples),
        "additive": lambda of: Additive(of).predict(split.samples),
        "additive_nearest": lambda of: AdditiveNearest(of).predict(split.samples),
    }
    for baseline, predict in fits.items():
        values = predictors.by_name[baseline](split)[0].values
        np.testing.assert_allclose(values, predict(profiles_of(VISIBLE)), atol=1e-9)
        assert np.abs(values - predict(profiles_of([TRAIN]))).max() > 0.01, baseline


def test_ridge_has_the_penalty_of_training_and_coefficients_of_all_visible_samples(
    splits, predictors
):
    cohort = splits.cohort
    encoder = MetadataEncoder.fit(cohort.rows(VISIBLE), cohort.declared.covariates.identities())

    def design(samples) -> np.ndarray:
        encoded = dense(encoder, samples, unknown="missing")
        return np.concatenate([encoded[group] for group in GROUPS], axis=1).astype(float)

    def fit(splits: Sequence[str], penalty: float) -> SklearnRidge:
        expression = cohort.expression(splits).astype(float)
        return SklearnRidge(alpha=penalty).fit(design(cohort.rows(splits)), expression)

    def best_penalty(splits: Sequence[str]) -> float:
        held_out, observed = design(cohort.rows(SELECTION)), cohort.expression(SELECTION)
        errors = [
            np.mean((fit(splits, penalty).predict(held_out) - observed) ** 2)
            for penalty in RIDGE_PENALTIES
        ]
        return RIDGE_PENALTIES[np.argmin(errors)]

    penalty = best_penalty([TRAIN])
    assert penalty != best_penalty(VISIBLE), "a choice on samples of the fit is another one"
    assert splits.visible.selection.ridge_penalty == penalty
    for name in SPLITS:
        split = splits.split(name)
        values, rows = predictors.by_name["ridge"](split)[0].values, design(split.samples)
        np.testing.assert_allclose(values, fit(VISIBLE, penalty).predict(rows), atol=1e-7)
        assert np.abs(values - fit([TRAIN], penalty).predict(rows)).max() > 0.01


def test_bilinear_has_the_complexities_of_training_and_is_fitted_to_all_visible_samples(
    splits, predictors, profiles_of
):
    features, held_out = perturbation_features(splits.cohort), profiles_of(SELECTION)
    train, visible = profiles_of([TRAIN]), profiles_of(VISIBLE)
    chosen = Bilinear.fit(train, features, held_out).complexities
    assert chosen != Bilinear.fit(visible, features, held_out).complexities
    assert splits.visible.selection.bilinear == chosen
    of_all, of_train = (
        Bilinear.fit(profiles, features, complexities=chosen) for profiles in (visible, train)
    )
    for name in SPLITS:
        split = splits.split(name)
        values = predictors.by_name["bilinear"](split)[0].values
        np.testing.assert_allclose(values, of_all.predict(split.samples), atol=1e-7)
        assert np.abs(values - of_train.predict(split.samples)).max() > 0.01


def test_without_validation_splits_baselines_are_fitted_to_training_with_defaults(params, tmp_path):
    shares = ("validation", "validation_combination", "perturbation", "study")
    changed = params.override({f"splits.{name}": 0.0 for name in shares})
    cohort = prepare(changed, tmp_path)
    assert not any(map(cohort.has, VALIDATIONS))
    splits = EvaluationSplits(cohort, changed.evaluate)
    assert splits.visible.selection == Selection()
    train = Profiles.of(cohort.declared, cohort.rows([TRAIN]), [cohort.expression([TRAIN])])
    split = splits.split("test_random")
    predictions = Predictors(splits, {})(split)
    for name, fitted in (
        ("additive", Additive(train)),
        ("bilinear", Bilinear.fit(train, perturbation_features(cohort))),
    ):
        expected = fitted.predict(split.samples)
        np.testing.assert_allclose(predictions[name][0].values, expected, atol=1e-9)
    assert np.isfinite(predictions["ridge"][0].values).all()
