"""The bilinear model against a slow closed form, and on cohorts with known effects."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Data
from pipeline.gem.evaluation.baselines.bilinear import (
    COMPONENTS,
    DEFAULT,
    PENALTIES,
    Bilinear,
    cumulative_errors,
    leading_components,
)
from pipeline.gem.evaluation.baselines.profiles import Profiles
from pipeline.gem.evaluation.baselines.simple import Additive

GENES = 7
DOSE = {"100 nM": 0.1, "1 uM": 1.0, "10 uM": 10.0}
DOSES = (*DOSE, None)
NAMES = [f"p{index}" for index in range(12)]
TRAINED = NAMES[:10]
COLUMNS = ["study", "tissue", "perturbation", "perturbation_dose"]


@pytest.fixture(scope="module")
def data(dosed) -> Data:
    return dosed


def simulate(
    effect, noise: float, seed: int, doses: tuple = DOSES
) -> tuple[pd.DataFrame, np.ndarray]:
    """Two controls and every trained perturbation at every dose, in each study and tissue.

    `effect(perturbation, dose)`: (G,).
    """
    treatments = [("control", None)] * 2 + list(itertools.product(TRAINED, doses))
    origins = list(itertools.product(("a", "b"), ("liver", "lung")))
    samples = pd.DataFrame(
        [(*origin, *treatment) for origin in origins for treatment in treatments], columns=COLUMNS
    )
    levels = {"a": 0.5, "b": -1.0, "liver": 6.0, "lung": 3.0}
    expression = np.random.default_rng(seed).normal(size=(len(samples), GENES)) * noise
    for row, sample in enumerate(samples.itertuples()):
        expression[row] += levels[sample.study] + levels[sample.tissue]
        if sample.perturbation != "control":
            expression[row] += effect(sample.perturbation, sample.perturbation_dose)
    return samples, expression


def query(*treatments: tuple[str | None, str | None]) -> pd.DataFrame:
    """In study a and liver, whose controls are at 6.5."""
    return pd.DataFrame([("a", "liver", *row) for row in treatments], columns=COLUMNS)


@pytest.fixture(scope="module")
def features() -> pd.DataFrame:
    """Three features of each perturbation, of different scales."""
    values = np.random.default_rng(3).normal([1, 0, 50], [1, 0.1, 20], (len(NAMES), 3))
    return pd.DataFrame(values, index=NAMES, columns=["f", "g", "h"])


@pytest.fixture(scope="module")
def train() -> tuple[pd.DataFrame, np.ndarray]:
    """Random effects of ten perturbations; treatments differ in their numbers of samples."""
    rng = np.random.default_rng(4)
    effects = {pair: rng.normal(0, 2, GENES) for pair in itertools.product(NAMES, DOSES)}
    samples, expression = simulate(lambda name, dose: effects[name, dose], 0.5, 5)
    sampled = is_control(samples) | (rng.random(len(samples)) < 0.7)
    return samples[sampled].reset_index(drop=True), expression[sampled]


def profiles(data: Data, samples: pd.DataFrame, expression: np.ndarray) -> Profiles:
    """In two blocks."""
    return Profiles.of(data, samples, np.array_split(expression, 2))


def fit(data: Data, train: tuple, features, selection: tuple | None) -> Bilinear:
    selected = None if selection is None else profiles(data, *selection)
    return Bilinear.fit(profiles(data, *train), features, selected)


def is_control(samples: pd.DataFrame) -> np.ndarray:
    return (samples["perturbation"] == "control").to_numpy()


@pytest.fixture(scope="module")
def selection(train) -> tuple[pd.DataFrame, np.ndarray]:
    """Other samples of the same perturbations."""
    rng = np.random.default_rng(6)
    rows = rng.choice(len(train[0]), 40, replace=False)
    return train[0].iloc[rows], train[1][rows] + rng.normal(size=(40, GENES))


# --- the parts ---


@pytest.mark.parametrize("genes", [5, 300])
def test_components_are_the_singular_vectors_of_the_repeated_values(rng, genes):
    values, numbers = rng.normal(size=(12, genes)), rng.integers(1, 9, 12)
    _, _, vectors = np.linalg.svd(np.repeat(values, numbers, axis=0), full_matrices=False)
    components = leading_components(values, numbers)
    assert components.shape == (genes, min(12, genes))
    matched = np.sum(components * vectors[: components.shape[1]].T, axis=0)
    np.testing.assert_allclose(np.abs(matched), 1, rtol=1e-7)
    np.testing.assert_allclose(components.T @ components, np.eye(len(matched)), atol=1e-7)


def test_the_number_of_components_is_limited_and_zero_for_zeros(rng):
    assert leading_components(rng.normal(size=(200, 100)), np.ones(200)).shape == (100, COMPONENTS)
    assert leading_components(np.zeros((200, 100)), np.ones(200)).shape == (100, 0)


def test_cumulative_errors_are_those_of_truncated_predictions(rng):
    components = np.linalg.qr(rng.normal(size=(GENES, 4)))[0]
    observed, scores = rng.normal(size=(9, GENES)), rng.normal(size=(9, 4))
    weights = rng.integers(1, 5, 9)
    errors = [
        weights @ ((observed - scores[:, :number] @ components[:, :number].T) ** 2).sum(axis=1)
        for number in range(5)
    ]
    errors_by_number = cumulative_errors(scores, observed @ components, weights)
    np.testing.assert_allclose(errors_by_number, np.subtract(errors, errors[0]), atol=1e-10)


# --- the model, against a slow closed form ---


def slow_design(samples, train, table: dict[str, np.ndarray], size: int) -> np.ndarray:
    """p by a loop: standardised log dose, whether there is a dose, features, products."""
    logs = np.array([np.log(DOSE[dose] + 1e-6) for dose in train["perturbation_dose"] if dose])
    rows = []
    for row in samples.itertuples():
        dose = [0.0, 0.0]
        if row.perturbation_dose:
            log = np.log(DOSE[row.perturbation_dose] + 1e-6)
            dose = [(log - logs.mean()) / logs.std(), 1.0]
        features = table.get(row.perturbation, np.zeros(size))
        rows.append([*dose, *features, *np.outer(features, dose).ravel()])
    return np.array(rows)


def slow_map(tables, effects, table: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Predictions of one map for each of `tables` (train, selection, query), whose penalty and
    number of components are the best of all for the second of `effects`."""
    train, size = tables[0], len(next(iter(table.values())))
    exact = train["perturbation"] + train["perturbation_dose"].map(str)
    means = [
        np.sqrt((exact == name).sum()) * effects[0][exact == name].mean(axis=0)
        for name in exact.unique()
    ]
    components = np.linalg.svd(np.stack(means), full_matrices=False)[2].T
    designs = [slow_design(samples, train, table, size) for samples in tables]
    designs = [design - designs[0].mean(axis=0) for design in designs]
    best, least = None, np.inf
    for penalty, number in itertools.product(PENALTIES, range(components.shape[1] + 1)):
        ridge = penalty * len(train) * np.eye(designs[0].shape[1])
        weights = np.linalg.solve(designs[0].T @ designs[0] + ridge, designs[0].T @ effects[0])
        projection = components[:, :number] @ components[:, :number].T
        predictions = [design @ weights @ projection for design in designs]
        error = ((effects[1] - predictions[1]) ** 2).mean()
        if error < least - 1e-12:
            best, least = predictions, error
    return best


def slow_bilinear(data, train, selection, features, rows) -> np.ndarray:
    additive = Additive(profiles(data, *train))
    tables, effects = [], []
    for samples, expression in (train, selection):
        treated = ~is_control(samples)
        tables.append(samples[treated])
        effects.append((expression - additive.no_change(samples))[treated])
    tables, mean = [*tables, rows], effects[0].mean(axis=0)
    effects = [values - mean for values in effects]
    names = sorted(tables[0]["perturbation"].unique())
    trained = features.loc[names].to_numpy()
    standardised = (features - trained.mean(axis=0)) / trained.std(axis=0)
    first = slow_map(
        tables, effects, dict(zip(features.index, standardised.to_numpy(), strict=True))
    )
    effects = [values - own for values, own in zip(effects, first[:2], strict=True)]
    of_name = [(tables[0]["perturbation"] == name).to_numpy() for name in names]
    means = np.stack([effects[0][rows].mean(axis=0) for rows in of_name])
    weighted = np.sqrt([rows.sum() for rows in of_name])[:, None] * means
    _, values, directions = np.linalg.svd(weighted, full_matrices=False)
    scores = means @ directions[values > 1e-5 * values[0]].T
    scores = scores / np.sqrt((scores**2).sum(axis=1).mean())
    second = slow_map(tables, effects, dict(zip(names, scores, strict=True)))
    return additive.no_change(rows) + mean + first[2] + second[2]


def test_bilinear_is_its_definition_by_loops_and_explicit_solutions(
    data, train, selection, features
):
    rows = query(*itertools.product((*NAMES, "unknown"), DOSES))
    predicted = fit(data, train, features, selection).predict(rows)
    expected = slow_bilinear(data, train, selection, features, rows)
    np.testing.assert_allclose(predicted, expected, atol=1e-6)


def test_the_selection_split_does_not_change_the_coefficients(data, train, selection, features):
    selected = fit(data, train, features, selection)
    assert selected.complexities != (DEFAULT, DEFAULT)
    given = Bilinear.fit(profiles(data, *train), features, complexities=selected.complexities)
    for first, second in zip(given.maps, selected.maps, strict=True):
        np.testing.assert_array_equal(first.weights, second.weights)
        np.testing.assert_array_equal(first.components, second.components)


def test_a_selection_split_of_controls_alone_is_ignored(data, train, features):
    control = is_control(train[0])
    controls = train[0][control], train[1][control]
    fitted, without = (fit(data, train, features, rows) for rows in (controls, None))
    assert fitted.complexities == (DEFAULT, DEFAULT)
    np.testing.assert_array_equal(fitted.predict(train[0]), without.predict(train[0]))


# --- cohorts with a known answer ---


@pytest.mark.parametrize("by_dose", [False, True])
def test_effects_linear_in_the_features_are_recovered_for_an_unknown_perturbation(
    data, features, by_dose
):
    rng = np.random.default_rng(8)
    # Two directions, from features divided by their scale; `by_dose`: times the log of the dose.
    weights = rng.normal(size=(3, 2)) @ rng.normal(size=(2, GENES))
    scaled = features / features.std()

    def effect(name: str, dose: str) -> np.ndarray:
        return (scaled.loc[name].to_numpy() @ weights + 2) * (
            1 + 0.3 * by_dose * np.log(DOSE[dose])
        )

    train = simulate(effect, 0.0, 9, doses=tuple(DOSE))
    rows = query(*itertools.product(NAMES[10:], DOSE))
    expected = [6.5 + effect(*row) for row in itertools.product(NAMES[10:], DOSE)]
    errors = [
        np.sqrt(np.mean((fitted.predict(rows) - expected) ** 2))
        for fitted in (fit(data, train, features, train), Additive(profiles(data, *train)))
    ]
    assert errors[0] < 0.005 * errors[1]


def test_without_features_known_perturbations_are_recovered_and_unknown_have_the_mean(data):
    rng = np.random.default_rng(10)
    effects = {name: rng.normal(0, 2, GENES) for name in TRAINED}
    samples, expression = simulate(lambda name, dose: effects[name], 0.0, 11, doses=(None,))
    fitted = fit(data, (samples, expression), None, (samples, expression))
    np.testing.assert_allclose(fitted.predict(samples), expression, atol=0.01)
    unknown = fitted.predict(query(("unknown", None), (None, None)))
    mean = 6.5 + np.mean(list(effects.values()), axis=0)
    np.testing.assert_allclose(unknown, [mean, mean], atol=1e-10)


def test_effects_that_features_do_not_explain_are_learnt_by_the_second_map(data, train, features):
    samples, expression = train
    fitted = fit(data, (samples, expression), features, train)
    first = replace(fitted, maps=fitted.maps[:1])
    errors = [np.mean((model.predict(samples) - expression) ** 2) for model in (fitted, first)]
    assert errors[0] < 0.5 * errors[1]


def test_controls_have_no_change(data, train, selection, features):
    controls = train[0][is_control(train[0])]
    predicted = fit(data, train, features, selection).predict(controls)
    np.testing.assert_array_equal(predicted, Additive(profiles(data, *train)).no_change(controls))


def test_bilinear_beats_no_change_on_held_out_samples_of_the_cohort(cohort, source_folder):
    table = pd.read_parquet(source_folder / "embeddings" / "perturbation.parquet")
    train, (rows, observed) = (
        (cohort.rows([name]), cohort.expression([name])) for name in ("train", "validation")
    )
    features = table.set_index("perturbation")
    fitted = fit(cohort.declared, train, features, (rows, observed))
    predictions = fitted.predict(rows), fitted.additive.no_change(rows)
    errors = [np.mean((predicted - observed) ** 2) for predicted in predictions]
    assert errors[0] < errors[1]


# --- invariances ---


def test_the_order_of_rows_and_features_and_the_units_of_features_do_not_matter(
    data, train, selection, features, rng
):
    samples, expression = train
    expected = fit(data, train, features, selection).predict(samples)
    order, other = rng.permutation(len(samples)), rng.permutation(len(selection[0]))
    shuffled = fit(
        data,
        (samples.iloc[order], expression[order]),
        features.sample(frac=1, random_state=0),
        (selection[0].iloc[other], selection[1][other]),
    )
    np.testing.assert_allclose(shuffled.predict(samples.iloc[order]), expected[order], atol=1e-8)
    other_units = (1000 * features + 7)[["h", "f", "g"]]
    rescaled = fit(data, train, other_units, selection)
    np.testing.assert_allclose(rescaled.predict(samples), expected, atol=1e-8)


def test_features_of_perturbations_without_training_samples_are_not_used(
    data, train, selection, features
):
    changed = features.copy()
    changed.loc[NAMES[10:]] = 1e6
    first, *others = (
        fit(data, train, table, selection).predict(train[0])
        for table in (features, changed, features.loc[TRAINED])
    )
    for predicted in others:
        np.testing.assert_array_equal(predicted, first)


def test_a_fit_is_repeatable_and_leaves_its_inputs_unchanged(data, train, selection, features):
    before = train[1].copy(), selection[1].copy(), features.copy()
    first, second = (fit(data, train, features, selection).predict(train[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(train[1], before[0])
    np.testing.assert_array_equal(selection[1], before[1])
    pd.testing.assert_frame_equal(features, before[2])


# --- unusual cohorts ---


def test_training_without_controls_or_without_treated_samples_is_refused(data, train, features):
    samples, expression = train
    for rows in (is_control(samples), ~is_control(samples)):
        with pytest.raises(ValueError, match="controls and treated"):
            fit(data, (samples[rows], expression[rows]), features, None)


CASES = {
    "no dose column": lambda samples: samples.drop(columns="perturbation_dose"),
    "no doses": lambda samples: samples.assign(perturbation_dose=None),
    "missing contexts": lambda samples: samples.assign(
        tissue=samples["tissue"].replace("liver", None)
    ),
    "one context": lambda samples: samples.assign(tissue="lung", study="a"),
    "one perturbation": lambda samples: samples.assign(
        perturbation=np.where(is_control(samples), "control", "p0")
    ),
    "features missing": lambda samples: samples,
    "constant feature": lambda samples: samples,
}


@pytest.mark.parametrize("with_features", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_unusual_cohorts_get_finite_predictions(
    data, train, selection, features, case, with_features
):
    samples = CASES[case](train[0])
    if case == "features missing":
        features = features.iloc[:4].assign(g=[np.nan, 1.0, 2.0, np.nan])
    if case == "constant feature":
        features = features.assign(g=1.0)
    unknown = query(("unknown", "1 uM"), ("p0", None), (None, None), ("p11", "10 uM"))
    for rows in (selection, None):
        fitted = fit(data, (samples, train[1]), features if with_features else None, rows)
        for queried in (samples, unknown, samples.iloc[:0]):
            predicted = fitted.predict(queried)
            assert predicted.shape == (len(queried), GENES) and np.isfinite(predicted).all()


def test_one_perturbation_without_dose_is_additive(data, train):
    samples = CASES["one perturbation"](train[0]).assign(perturbation_dose=None)
    predicted = fit(data, (samples, train[1]), None, None).predict(samples)
    expected = Additive(profiles(data, samples, train[1])).predict(samples)
    np.testing.assert_allclose(predicted, expected, atol=1e-10)
