"""The bilinear model against closed forms by other means, and on cohorts whose effects are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Data
from pipeline.gem.evaluation.baselines import Additive
from pipeline.gem.evaluation.bilinear import (
    COMPONENTS,
    PENALTIES,
    WITHOUT_CHOICE,
    Bilinear,
    leading_components,
    squared_errors,
)

GENES = 7
DOSE = {"100 nM": 0.1, "1 uM": 1.0, "10 uM": 10.0}


@pytest.fixture(scope="module")
def data(dosed) -> Data:
    return dosed


def cohort(
    effect, perturbations: list[str], noise: float, seed: int, doses: list = (*DOSE, None)
) -> tuple[pd.DataFrame, np.ndarray]:
    """Two controls and every perturbation at every dose, in each study and tissue; `effect(perturbation, dose)` is (G,)."""
    rng = np.random.default_rng(seed)
    done = [
        ("control", None),
        ("control", None),
        *((name, dose) for name in perturbations for dose in doses),
    ]
    rows = [
        (study, tissue, *treatment)
        for study in ("a", "b")
        for tissue in ("liver", "lung")
        for treatment in done
    ]
    samples = pd.DataFrame(rows, columns=["study", "tissue", "perturbation", "perturbation_dose"])
    level = samples["tissue"].map({"liver": 6.0, "lung": 3.0}) + samples["study"].map(
        {"a": 0.5, "b": -1.0}
    )
    effects = [
        np.zeros(GENES)
        if row.perturbation == "control"
        else effect(row.perturbation, row.perturbation_dose)
        for row in samples.itertuples()
    ]
    return samples, level.to_numpy()[:, None] + np.stack(effects) + noise * rng.normal(
        size=(len(samples), GENES)
    )


def query(*treatments: tuple[str, str | None]) -> pd.DataFrame:
    return pd.DataFrame(
        [("a", "liver", *treatment) for treatment in treatments],
        columns=["study", "tissue", "perturbation", "perturbation_dose"],
    )


NAMES = [f"p{index}" for index in range(12)]


@pytest.fixture(scope="module")
def features() -> pd.DataFrame:
    """Three features of each perturbation, on scales of their own."""
    return pd.DataFrame(
        np.random.default_rng(3).normal([1, 0, 50], [1, 0.1, 20], (len(NAMES), 3)),
        index=NAMES,
        columns=["f", "g", "h"],
    )


@pytest.fixture(scope="module")
def noisy() -> tuple[pd.DataFrame, np.ndarray]:
    """Effects of no particular structure, of all but the last two perturbations."""
    rng = np.random.default_rng(4)
    table = {(name, dose): rng.normal(0, 2, GENES) for name in NAMES for dose in (*DOSE, None)}
    samples, expression = cohort(lambda name, dose: table[name, dose], NAMES[:10], 0.5, 5)
    # Some treatments are measured less often than others.
    kept = (samples["perturbation"] == "control").to_numpy() | (rng.random(len(samples)) < 0.7)
    return samples[kept].reset_index(drop=True), expression[kept]


@pytest.fixture(scope="module")
def held(noisy) -> tuple[pd.DataFrame, np.ndarray]:
    """A choice split: other draws of the same perturbations."""
    samples, expression = noisy
    rows = np.random.default_rng(6).choice(len(samples), 40, replace=False)
    return samples.iloc[rows], expression[rows] + np.random.default_rng(7).normal(size=(40, GENES))


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("genes", [5, 300])
def test_the_components_are_the_singular_vectors_of_the_values_repeated(rng, genes):
    values, numbers = rng.normal(size=(12, genes)), rng.integers(1, 9, 12)
    expected = np.linalg.svd(np.repeat(values, numbers, axis=0), full_matrices=False)[2][
        : min(12, genes)
    ].T
    found = leading_components(values, numbers)
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.abs((found * expected).sum(axis=0)), 1, rtol=1e-7)
    np.testing.assert_allclose(found.T @ found, np.eye(found.shape[1]), atol=1e-7)


def test_there_are_no_more_components_than_allowed_and_none_of_nothing(rng):
    assert leading_components(rng.normal(size=(200, 100)), np.ones(200)).shape == (100, COMPONENTS)
    assert leading_components(np.zeros((200, 100)), np.ones(200)).shape == (100, 0)


def test_squared_errors_are_those_of_the_truncated_predictions(rng):
    components = np.linalg.qr(rng.normal(size=(GENES, 4)))[0]
    observed, scores = rng.normal(size=(9, GENES)), rng.normal(size=(9, 4))
    weights = rng.integers(1, 5, 9)
    errors = [
        weights @ ((observed - scores[:, :number] @ components[:, :number].T) ** 2).sum(axis=1)
        for number in range(5)
    ]
    np.testing.assert_allclose(
        squared_errors(scores, observed @ components, weights),
        np.subtract(errors, errors[0]),
        atol=1e-10,
    )


# --- the whole, against a slow closed form --------------------------------------------------------------------------


def slow_design(
    samples: pd.DataFrame, training: pd.DataFrame, table: dict[str, np.ndarray], size: int
) -> np.ndarray:
    """p of each sample by a loop: log dose (standardised on the training rows that have one), whether there is one, features, products."""
    logs = np.array([np.log(DOSE[dose] + 1e-6) for dose in training["perturbation_dose"] if dose])
    rows = []
    for row in samples.itertuples():
        given = (
            [(np.log(DOSE[row.perturbation_dose] + 1e-6) - logs.mean()) / logs.std(), 1.0]
            if row.perturbation_dose
            else [0.0, 0.0]
        )
        own = table.get(row.perturbation, np.zeros(size))
        rows.append([*given, *own, *(one * other for one in own for other in given)])
    return np.array(rows)


def slow_term(train, effects, held, held_effects, table, size, asked):
    """(prediction of the training rows, of the held rows, of the asked) of one map, searched over every penalty and number."""
    exact = train["perturbation"] + train["perturbation_dose"].map(str)
    means = np.stack(
        [
            np.sqrt((exact == name).sum()) * effects[exact == name].mean(axis=0)
            for name in exact.unique()
        ]
    )
    components = np.linalg.svd(means, full_matrices=False)[2].T
    designs = [slow_design(samples, train, table, size) for samples in (train, held, asked)]
    designs = [design - designs[0].mean(axis=0) for design in designs]
    best = None
    for penalty in PENALTIES:
        gram = designs[0].T @ designs[0] + penalty * len(train) * np.eye(designs[0].shape[1])
        weights = np.linalg.solve(gram, designs[0].T @ effects)
        for number in range(components.shape[1] + 1):
            onto = components[:, :number] @ components[:, :number].T
            error = ((held_effects - designs[1] @ weights @ onto) ** 2).mean()
            if best is None or error < best[0] - 1e-12:
                best = (error, [design @ weights @ onto for design in designs])
    return best[1]


def slow_bilinear(data, noisy, held, features, asked) -> np.ndarray:
    """All of it, with explicit loops and matrices."""
    additive = Additive(data, *noisy)
    (train, effects), (other, other_effects) = (
        (samples[treated], (expression - additive.no_change(samples))[treated])
        for samples, expression in (noisy, held)
        for treated in [(samples["perturbation"] != "control").to_numpy()]
    )
    mean = effects.mean(axis=0)
    effects, other_effects = effects - mean, other_effects - mean
    seen = features.loc[sorted(train["perturbation"].unique())].to_numpy()
    table = {
        name: (features.loc[name].to_numpy() - seen.mean(axis=0)) / seen.std(axis=0)
        for name in features.index
    }
    said = slow_term(train, effects, other, other_effects, table, features.shape[1], asked)
    effects, other_effects = effects - said[0], other_effects - said[1]
    names = sorted(train["perturbation"].unique())
    means = np.stack([effects[train["perturbation"] == name].mean(axis=0) for name in names])
    numbers = np.array([(train["perturbation"] == name).sum() for name in names])
    _, values, directions = np.linalg.svd(np.sqrt(numbers)[:, None] * means, full_matrices=False)
    scores = means @ directions[values > 1e-5 * values[0]].T
    scores = scores / np.sqrt((scores**2).sum(axis=1).mean())
    more = slow_term(
        train,
        effects,
        other,
        other_effects,
        dict(zip(names, scores, strict=True)),
        scores.shape[1],
        asked,
    )
    return additive.no_change(asked) + mean + said[2] + more[2]


def test_bilinear_is_its_definition_by_loops_and_explicit_solutions(data, noisy, held, features):
    asked = query(*((name, dose) for name in (*NAMES, "never seen") for dose in (*DOSE, None)))
    found = Bilinear.fit(data, *noisy, features, held)
    np.testing.assert_allclose(
        found.predict(asked), slow_bilinear(data, noisy, held, features, asked), atol=1e-6
    )


def test_the_choice_split_chooses_and_does_not_fit(data, noisy, held, features, monkeypatch):
    chosen = Bilinear.fit(data, *noisy, features, held).maps[0]
    # The same penalty and number without a choice split: the same coefficients, from training alone.
    monkeypatch.setattr(
        "pipeline.gem.evaluation.bilinear.WITHOUT_CHOICE", (chosen.penalty, chosen.weights.shape[1])
    )
    alone = Bilinear.fit(data, *noisy, features, None).maps[0]
    np.testing.assert_array_equal(alone.weights, chosen.weights)
    np.testing.assert_array_equal(alone.components, chosen.components)


def test_a_choice_split_of_controls_alone_is_none(data, noisy, features):
    samples, expression = noisy
    control = (samples["perturbation"] == "control").to_numpy()
    found = Bilinear.fit(
        data, samples, expression, features, (samples[control], expression[control])
    )
    assert found.maps[0].penalty == WITHOUT_CHOICE[0]
    np.testing.assert_array_equal(
        found.predict(samples),
        Bilinear.fit(data, samples, expression, features, None).predict(samples),
    )


# --- cohorts whose answer is known ----------------------------------------------------------------------------------


def linear_in_features(features: pd.DataFrame, by_dose: bool):
    """An effect that is linear in the features, in a space of two directions; `by_dose`: times the log of the dose."""
    rng = np.random.default_rng(8)
    onto = (
        rng.normal(size=(features.shape[1], 2))
        @ rng.normal(size=(2, GENES))
        / features.std().to_numpy()[:, None]
    )

    def effect(name: str, dose: str | None) -> np.ndarray:
        return (features.loc[name].to_numpy() @ onto + 2) * (
            1 + 0.3 * np.log(DOSE[dose]) if by_dose else 1.0
        )

    return effect


@pytest.mark.parametrize("by_dose", [False, True])
def test_effects_linear_in_the_features_are_recovered_for_an_unseen_perturbation(
    data, features, by_dose
):
    effect = linear_in_features(features, by_dose)
    samples, expression = cohort(effect, NAMES[:10], 0.0, 9, doses=list(DOSE))
    fitted = Bilinear.fit(data, samples, expression, features, (samples, expression))
    asked = query(*((name, dose) for name in NAMES[10:] for dose in DOSE))
    additive = Additive(data, samples, expression).predict(asked)
    expected = np.stack(
        [6.5 + effect(row.perturbation, row.perturbation_dose) for row in asked.itertuples()]
    )
    spread = np.sqrt(np.mean((expected - additive) ** 2))  # what the mean effect leaves
    assert np.sqrt(np.mean((fitted.predict(asked) - expected) ** 2)) < 0.005 * spread


def test_without_features_seen_perturbations_are_recovered_and_unseen_ones_have_the_mean_effect(
    data,
):
    rng = np.random.default_rng(10)
    table = {name: rng.normal(0, 2, GENES) for name in NAMES[:10]}
    samples, expression = cohort(lambda name, dose: table[name], NAMES[:10], 0.0, 11, doses=[None])
    fitted = Bilinear.fit(data, samples, expression, None, (samples, expression))
    np.testing.assert_allclose(fitted.predict(samples), expression, atol=0.01)
    mean = 6.5 + np.mean(list(table.values()), axis=0)
    np.testing.assert_allclose(
        fitted.predict(query(("never seen", None), (None, None))), [mean, mean], atol=1e-10
    )


def test_what_the_features_do_not_tell_of_seen_perturbations_is_learnt_too(
    data, noisy, held, features
):
    # The effects here have nothing to do with the features.
    samples, expression = noisy
    fitted = Bilinear.fit(data, samples, expression, features, (samples, expression))
    first = replace(fitted, maps=fitted.maps[:1])
    assert np.mean((fitted.predict(samples) - expression) ** 2) < 0.5 * np.mean(
        (first.predict(samples) - expression) ** 2
    )


def test_controls_have_no_change(data, noisy, held, features):
    samples = noisy[0][noisy[0]["perturbation"] == "control"]
    np.testing.assert_array_equal(
        Bilinear.fit(data, *noisy, features, held).predict(samples),
        Additive(data, *noisy).no_change(samples),
    )


def test_on_the_cohort_bilinear_is_better_than_no_change_on_held_out_samples(cohort, source_folder):
    features = pd.read_parquet(source_folder / "embeddings" / "perturbation.parquet").set_index(
        "perturbation"
    )
    train, choice = (
        (cohort.rows(["train"]), cohort.expression(["train"])),
        (cohort.rows(["validation"]), cohort.expression(["validation"])),
    )
    fitted = Bilinear.fit(cohort.declared, *train, features, choice)
    error = np.mean((fitted.predict(choice[0]) - choice[1]) ** 2)
    assert error < np.mean((fitted.additive.no_change(choice[0]) - choice[1]) ** 2)


# --- invariances ----------------------------------------------------------------------------------------------------


def test_the_order_of_rows_and_of_features_and_their_units_do_not_matter(
    data, noisy, held, features, rng
):
    samples, expression = noisy
    expected = Bilinear.fit(data, samples, expression, features, held).predict(samples)
    order, other = rng.permutation(len(samples)), rng.permutation(len(held[0]))
    shuffled = Bilinear.fit(
        data,
        samples.iloc[order],
        expression[order],
        features.sample(frac=1, random_state=0),
        (held[0].iloc[other], held[1][other]),
    )
    np.testing.assert_allclose(shuffled.predict(samples.iloc[order]), expected[order], atol=1e-8)
    rescaled = Bilinear.fit(data, samples, expression, (1000 * features + 7)[["h", "f", "g"]], held)
    np.testing.assert_allclose(rescaled.predict(samples), expected, atol=1e-8)


def test_the_features_of_perturbations_that_training_lacks_teach_nothing(
    data, noisy, held, features
):
    changed = features.copy()
    changed.loc[NAMES[10:]] = 1e6
    samples = noisy[0]
    expected = Bilinear.fit(data, *noisy, features, held).predict(samples)
    np.testing.assert_array_equal(
        Bilinear.fit(data, *noisy, changed, held).predict(samples), expected
    )
    np.testing.assert_array_equal(
        Bilinear.fit(data, *noisy, features.loc[NAMES[:10]], held).predict(samples), expected
    )


def test_a_fit_is_the_same_twice_and_changes_no_input(data, noisy, held, features):
    kept = noisy[1].copy(), held[1].copy(), features.copy()
    first, second = (Bilinear.fit(data, *noisy, features, held).predict(noisy[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(noisy[1], kept[0])
    np.testing.assert_array_equal(held[1], kept[1])
    pd.testing.assert_frame_equal(features, kept[2])


# --- odd cohorts ----------------------------------------------------------------------------------------------------


def test_without_controls_or_without_treated_samples_nothing_is_fitted(data, noisy, features):
    samples, expression = noisy
    control = (samples["perturbation"] == "control").to_numpy()
    for rows in (control, ~control):
        with pytest.raises(ValueError, match="controls and treated"):
            Bilinear.fit(data, samples[rows], expression[rows], features, None)


@pytest.mark.parametrize("with_features", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        "no dose",
        "no dose anywhere",
        "missing contexts",
        "one context",
        "one perturbation",
        "features missing",
        "constant feature",
    ],
)
def test_odd_cohorts_get_finite_predictions(data, noisy, held, features, kind, with_features):
    samples, expression = noisy
    if kind == "no dose":
        samples = samples.drop(columns="perturbation_dose")
    if kind == "no dose anywhere":
        samples = samples.assign(perturbation_dose=None)
    if kind == "missing contexts":
        samples = samples.assign(tissue=samples["tissue"].where(samples["tissue"] != "liver", None))
    if kind == "one context":
        samples = samples.assign(tissue="lung", study="a")
    if kind == "one perturbation":
        samples = samples.assign(
            perturbation=samples["perturbation"].where(samples["perturbation"] == "control", "p0")
        )
    if kind == "features missing":
        features = features.iloc[:4].assign(g=[np.nan, 1.0, 2.0, np.nan])
    if kind == "constant feature":
        features = features.assign(g=1.0)
    for choice in (held, None):
        fitted = Bilinear.fit(
            data, samples, expression, features if with_features else None, choice
        )
        for rows in (
            samples,
            query(("never seen", "1 uM"), ("p0", None), (None, None), ("p11", "10 uM")),
            samples.iloc[:0],
        ):
            assert np.isfinite(fitted.predict(rows)).all() and fitted.predict(rows).shape == (
                len(rows),
                GENES,
            )


def test_one_perturbation_without_dose_is_additive(data, noisy):
    samples, expression = noisy
    one = samples.assign(
        perturbation=samples["perturbation"].where(samples["perturbation"] == "control", "p0"),
        perturbation_dose=None,
    )
    found = Bilinear.fit(data, one, expression, None, None)
    np.testing.assert_allclose(
        found.predict(one), Additive(data, one, expression).predict(one), atol=1e-10
    )
