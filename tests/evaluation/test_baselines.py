"""The floors of every comparison, against scikit-learn and against cohorts whose answer is known by hand."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

from pipeline.gem.common.config import GROUPS, Covariates, Data
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.evaluation.baselines import (
    RIDGE_PENALTIES,
    Additive,
    AdditiveNearest,
    MatchedMean,
    Means,
    PerturbedMean,
    Ridge,
    similarity_of_contexts,
    training_mean,
)

GENES = 4


@pytest.fixture(scope="module")
def data(params) -> Data:
    """Declarations of a hand-made cohort: context is the tissue, every group has covariates."""
    covariates = {
        "technical": {"study": {"kind": "categorical"}},
        "biological": {
            "tissue": {"kind": "categorical"},
            "age_years": {"kind": "numeric", "scale": "linear"},
        },
        "perturbation": {
            "perturbation": {"kind": "categorical"},
            "perturbation_dose": {"kind": "numeric", "scale": "log"},
        },
    }
    return params.data.model_copy(
        update={"covariates": Covariates.model_validate(covariates), "context_columns": ("tissue",)}
    )


def table(rows) -> pd.DataFrame:
    """Samples from (study, tissue, perturbation, dose)."""
    samples = pd.DataFrame(rows, columns=["study", "tissue", "perturbation", "perturbation_dose"])
    samples["age_years"] = np.nan
    return samples


@pytest.fixture(scope="module")
def samples() -> pd.DataFrame:
    """Random metadata with missing values, more levels than a design of full rank has."""
    rng = np.random.default_rng(0)
    made = table(
        zip(
            rng.choice(["a", "b", "c"], 80),
            rng.choice(["liver", "lung"], 80),
            rng.choice(["control", "x", "y"], 80),
            [None] * 80,
            strict=True,
        )
    )
    made["perturbation_dose"] = np.where(
        made["perturbation"] == "x", rng.choice(["100 nM", "1 uM"], 80), None
    )
    made["age_years"] = np.where(rng.random(80) < 0.7, rng.uniform(20, 80, 80), np.nan)
    made.loc[rng.random(80) < 0.2, "tissue"] = None
    return made


@pytest.fixture(scope="module")
def encoder(samples, data) -> MetadataEncoder:
    return MetadataEncoder.fit(samples, data.covariates)


@pytest.fixture(scope="module")
def expression(samples) -> np.ndarray:
    rng = np.random.default_rng(1)
    shift = samples["perturbation"].map({"control": 0.0, "x": 1.0, "y": -2.0}).to_numpy()
    return (6 + shift[:, None] * np.arange(GENES) + rng.normal(0, 0.5, (80, GENES))).astype(
        np.float32
    )


def design(encoder: MetadataEncoder, samples: pd.DataFrame) -> np.ndarray:
    encoded = encoder.encode(samples, unknown="missing")
    return np.concatenate([encoded[group] for group in GROUPS], axis=1).astype(float)


# --- the training mean ----------------------------------------------------------------------------------------------


def test_the_training_mean_is_the_same_for_every_row(expression):
    predicted = training_mean(expression, 7)
    assert predicted.shape == (7, GENES)
    np.testing.assert_allclose(
        predicted, np.tile(expression.astype(float).mean(axis=0), (7, 1)), rtol=1e-6
    )


def test_the_training_mean_of_many_samples_is_that_of_double_precision():
    # A running sum in float32 stops resolving a value of 9.3 once it reaches a few million.
    many = np.full((600_000, 2), 9.3, dtype=np.float32)
    np.testing.assert_allclose(training_mean(many, 1)[0], np.float32(9.3), rtol=1e-6)


# --- ridge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [RIDGE_PENALTIES[0], 1.0, RIDGE_PENALTIES[-1]])
def test_ridge_with_one_penalty_to_choose_from_is_that_of_scikit_learn(
    encoder, samples, expression, penalty, data
):
    features = design(encoder, samples)
    expected = SklearnRidge(alpha=penalty).fit(features, expression.astype(float))
    # A choice split that this very fit predicts perfectly makes it the choice.
    choice = expected.predict(features)
    found = Ridge.fit(encoder, samples, expression, (samples, choice))
    assert found.penalty == pytest.approx(penalty)
    np.testing.assert_allclose(found.predict(samples), choice, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(found.coefficients.T, expected.coef_, rtol=1e-5, atol=1e-7)


def test_ridge_agrees_with_scikit_learn_at_every_penalty(encoder, samples, expression):
    features = design(encoder, samples)
    for penalty in RIDGE_PENALTIES:
        expected = (
            SklearnRidge(alpha=penalty).fit(features, expression.astype(float)).predict(features)
        )
        found = Ridge.fit(encoder, samples, expression, (samples, expected))
        assert found.penalty == pytest.approx(penalty)
        np.testing.assert_allclose(found.predict(samples), expected, rtol=1e-7, atol=1e-7)


def test_ridge_chooses_the_penalty_with_the_least_error_on_the_choice_split(
    encoder, samples, expression
):
    train, held = samples.iloc[:50], samples.iloc[50:]
    errors = {}
    for penalty in RIDGE_PENALTIES:
        expected = SklearnRidge(alpha=penalty).fit(
            design(encoder, train), expression[:50].astype(float)
        )
        errors[penalty] = float(
            np.mean((expected.predict(design(encoder, held)) - expression[50:]) ** 2)
        )
    found = Ridge.fit(encoder, train, expression[:50], (held, expression[50:]))
    assert found.penalty == min(errors, key=errors.get)
    assert np.mean((found.predict(held) - expression[50:]) ** 2) == pytest.approx(
        min(errors.values()), rel=1e-7
    )


def test_ridge_without_a_choice_split_has_penalty_one(encoder, samples, expression):
    found = Ridge.fit(encoder, samples, expression, None)
    expected = SklearnRidge(alpha=1.0).fit(design(encoder, samples), expression.astype(float))
    assert found.penalty == 1.0
    np.testing.assert_allclose(
        found.predict(samples), expected.predict(design(encoder, samples)), rtol=1e-7, atol=1e-7
    )


def test_ridge_treats_an_unknown_level_as_missing(encoder, samples, expression):
    found = Ridge.fit(encoder, samples, expression, None)
    query = samples.head(5)
    np.testing.assert_array_equal(
        found.predict(query.assign(study="never seen")), found.predict(query.assign(study=None))
    )


def test_ridge_on_the_cohort_is_better_than_the_training_mean_on_held_out_samples(cohort):
    train, truth = cohort.expression(["train"]), cohort.expression(["test_random"])
    encoder = MetadataEncoder.fit(cohort.rows(["train"]), cohort.declared.covariates)
    ridge = Ridge.fit(encoder, cohort.rows(["train"]), train, None).predict(
        cohort.rows(["test_random"])
    )
    assert np.mean((ridge - truth) ** 2) < 0.8 * np.mean(
        (training_mean(train, len(truth)) - truth) ** 2
    )


# --- means by key ---------------------------------------------------------------------------------------------------


def test_means_are_looked_up_by_the_most_specific_known_key():
    specific = pd.Series(["a1", "a1", "a2", "b1"])
    general = pd.Series(["a", "a", "a", "b"])
    values = np.array([[1.0, 10.0], [3.0, 30.0], [8.0, 80.0], [5.0, 50.0]])
    means = Means.fit([specific, general], values)
    found = means.lookup([pd.Series(["a1", "a9", "b1", "c1"]), pd.Series(["a", "a", "b", "c"])])
    np.testing.assert_allclose(found[:3], [[2, 20], [4, 40], [5, 50]])
    assert np.isnan(found[3]).all()


def test_means_do_not_depend_on_row_labels_or_order(rng):
    keys, values = pd.Series(rng.choice(["a", "b", "c"], 30)), rng.normal(size=(30, 3))
    order = rng.permutation(30)
    plain = Means.fit([keys], values).lookup([pd.Series(["a", "b", "c"])])
    labelled = Means.fit([keys.iloc[order]], values[order]).lookup(
        [pd.Series(["a", "b", "c"], index=[9, 8, 7])]
    )
    np.testing.assert_allclose(labelled, plain, rtol=1e-12)
    np.testing.assert_allclose(
        plain, [values[keys == key].mean(axis=0) for key in "abc"], rtol=1e-12
    )


def test_changing_what_was_looked_up_changes_no_mean():
    keys, values = pd.Series(["a", "b"]), np.array([[1.0], [2.0]])
    means = Means.fit([keys], values)
    found = means.lookup([keys])  # exactly the keys of the table, in its order
    found += 100
    np.testing.assert_array_equal(means.lookup([keys]), values)


# --- additive -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def additive_cohort() -> tuple[pd.DataFrame, np.ndarray]:
    """Study, context and effect add up exactly; every study and context has controls, some pairs are absent."""
    studies, tissues = {"a": 0.5, "b": -1.0}, {"liver": 3.0, "lung": 7.0}
    effects = {("control", None): 0.0, ("x", "100 nM"): 1.0, ("x", "10 uM"): 2.0, ("y", None): -1.5}
    rows = [
        (study, tissue, name, dose)
        for study in studies
        for tissue in tissues
        for name, dose in effects
        if (tissue, name) != ("lung", "y")
    ]
    samples = table(rows)
    gene = np.arange(1, GENES + 1)
    level = [
        studies[study] * gene + tissues[tissue] + effects[name, dose] * gene**2
        for study, tissue, name, dose in rows
    ]
    return samples, np.array(level)


def test_additive_is_exact_on_an_additive_cohort_and_on_its_unseen_pairs(data, additive_cohort):
    samples, expression = additive_cohort
    additive = Additive(data, samples, expression)
    np.testing.assert_allclose(additive.predict(samples), expression, atol=1e-12)
    gene = np.arange(1, GENES + 1)
    unseen = additive.predict(table([("a", "lung", "y", None), ("b", "lung", "y", None)]))
    np.testing.assert_allclose(
        unseen, [0.5 * gene + 7 - 1.5 * gene**2, -gene + 7 - 1.5 * gene**2], atol=1e-12
    )


def test_additive_predicts_the_same_twice(data, additive_cohort):
    samples, expression = additive_cohort
    additive = Additive(data, samples, expression)
    first = additive.predict(samples).copy()
    np.testing.assert_array_equal(additive.predict(samples), first)
    np.testing.assert_array_equal(
        additive.no_change(samples), Additive(data, samples, expression).no_change(samples)
    )


def test_no_change_is_the_mean_of_controls_of_context_and_study_else_context_else_all(
    data, additive_cohort
):
    samples, expression = additive_cohort
    control = (samples["perturbation"] == "control").to_numpy()
    additive = Additive(data, samples, expression)
    found = additive.no_change(
        table(
            [
                ("a", "lung", "x", "1 uM"),
                ("new", "lung", "x", None),
                ("new", "brain", "x", None),
                (None, "lung", "y", None),
            ]
        )
    )
    lung = (samples["tissue"] == "lung").to_numpy()
    expected = [
        expression[control & lung & (samples["study"] == "a").to_numpy()].mean(axis=0),
        expression[control & lung].mean(axis=0),
        expression[control].mean(axis=0),
        expression[control & lung].mean(axis=0),
    ]
    np.testing.assert_allclose(found, expected)


def test_additive_falls_back_from_dose_to_perturbation_to_all_treated(data, additive_cohort):
    samples, expression = additive_cohort
    additive = Additive(data, samples, expression)
    base = additive.no_change(table([("a", "liver", "control", None)]))[0]
    gene = np.arange(1, GENES + 1)
    other_dose, unknown = (
        additive.predict(table([("a", "liver", "x", "1 uM"), ("a", "liver", "never seen", None)]))
        - base
    )
    np.testing.assert_allclose(
        other_dose, 1.5 * gene**2, atol=1e-12
    )  # the mean of effects 1 and 2, equally frequent
    # Treated samples: in liver x, x, y; in lung x, x; each in both studies.
    np.testing.assert_allclose(unknown, (1 + 2 - 1.5 + 1 + 2) / 5 * gene**2, atol=1e-12)


def test_additive_predicts_no_change_for_controls(data, additive_cohort):
    samples, expression = additive_cohort
    additive = Additive(data, samples, expression)
    controls = samples[samples["perturbation"] == "control"]
    np.testing.assert_array_equal(additive.predict(controls), additive.no_change(controls))


def test_additive_treats_unknown_levels_as_missing(data, additive_cohort):
    samples, expression = additive_cohort
    additive = Additive(data, samples, expression)
    known = table([("a", "liver", "x", "10 uM")])
    np.testing.assert_array_equal(
        additive.predict(known.assign(study="never seen")),
        additive.predict(known.assign(study=None)),
    )
    np.testing.assert_array_equal(
        additive.predict(known.assign(tissue="never seen")),
        additive.predict(known.assign(tissue=None)),
    )
    np.testing.assert_array_equal(
        additive.predict(known.assign(perturbation="never seen")),
        additive.predict(known.assign(perturbation=None)),
    )


def test_additive_needs_controls_and_treated_samples(data, additive_cohort):
    samples, expression = additive_cohort
    control = (samples["perturbation"] == "control").to_numpy()
    for rows in (control, ~control):
        with pytest.raises(ValueError, match="controls and treated"):
            Additive(data, samples[rows], expression[rows])


def test_additive_ignores_the_order_of_training_samples(data, additive_cohort, rng):
    samples, expression = additive_cohort
    noisy = expression + rng.normal(size=expression.shape)
    order = rng.permutation(len(samples))
    np.testing.assert_allclose(
        Additive(data, samples.iloc[order], noisy[order]).predict(samples),
        Additive(data, samples, noisy).predict(samples),
        atol=1e-12,
    )


# --- means over perturbations ---------------------------------------------------------------------------------------


def slow_mean(samples: pd.DataFrame, expression: np.ndarray, row, by_context: bool) -> np.ndarray:
    """By a plain loop: the mean over training samples that are treated as `row` is, in its context if any is there."""
    alike = [
        index
        for index, other in enumerate(samples.itertuples())
        if (other.perturbation == "control") == (row.perturbation == "control")
    ]
    there = [index for index in alike if label(samples["tissue"].iloc[index]) == label(row.tissue)]
    return expression[there if by_context and there else alike].astype(float).mean(axis=0)


def label(value) -> str:
    return "?" if pd.isna(value) else str(value)


@pytest.mark.parametrize(("baseline", "by_context"), [(PerturbedMean, False), (MatchedMean, True)])
def test_means_over_perturbations_are_those_of_a_plain_loop(
    data, samples, expression, baseline, by_context
):
    rows = pd.concat(
        [
            samples.iloc[60:],
            table(
                [
                    ("a", "brain", "x", None),
                    ("a", "brain", "control", None),
                    ("z", None, "never seen", None),
                ]
            ),
        ]
    )
    expected = [
        slow_mean(samples.iloc[:60], expression[:60], row, by_context) for row in rows.itertuples()
    ]
    np.testing.assert_allclose(
        baseline(data, samples.iloc[:60], expression[:60]).predict(rows), expected, rtol=1e-5
    )


def test_the_matched_mean_falls_back_to_all_contexts_for_a_context_with_controls_alone(data):
    training = table(
        [
            ("a", "liver", "control", None),
            ("a", "lung", "control", None),
            ("a", "lung", "x", None),
            ("a", "lung", "y", None),
        ]
    )
    expression = np.array([[1.0], [2.0], [3.0], [5.0]])
    found = MatchedMean(data, training, expression).predict(
        table([("a", "liver", "x", None), ("a", "liver", "control", None)])
    )
    np.testing.assert_allclose(found, [[4.0], [1.0]])


# --- the effect in the most similar context -------------------------------------------------------------------------

CONTEXTS = ("brain", "kidney", "liver", "lung", "skin")


@pytest.fixture(scope="module")
def many_contexts() -> tuple[pd.DataFrame, np.ndarray]:
    """Noise everywhere, treatments that are missing in many contexts, one context without controls and one with controls alone."""
    rng = np.random.default_rng(2)
    rows = [
        (
            rng.choice(["a", "b"]),
            rng.choice(CONTEXTS),
            rng.choice(["control", "x", "y", "z"]),
            rng.choice(["1 uM", "10 uM", "100 uM"]),
        )
        for _ in range(90)
    ]
    rows = [
        (study, tissue, treatment, None if treatment == "control" else dose)
        for study, tissue, treatment, dose in rows
    ]
    rows = [
        row
        for row in rows
        if not (row[1] == "skin" and row[2] == "control")
        and (row[1] != "brain" or row[2] == "control")
    ]
    return table(rows), rng.normal(5, 2, (len(rows), GENES))


def slow_nearest(data, samples: pd.DataFrame, expression: np.ndarray, row) -> np.ndarray:
    """The effect for one row, by the definition and plain loops."""
    control = (samples["perturbation"] == "control").to_numpy()
    shifts = expression - Additive(data, samples, expression).no_change(samples)
    profile = {
        tissue: expression[control & (samples["tissue"] == tissue)].mean(axis=0)
        for tissue in samples["tissue"][control].unique()
    }
    exact = (samples["perturbation"] == row.perturbation) & (
        samples["perturbation_dose"].map(label) == label(row.perturbation_dose)
    )
    same = [exact.to_numpy(), (samples["perturbation"] == row.perturbation).to_numpy()]
    for treated in same:
        closeness = {}
        for tissue in samples["tissue"][treated].unique():
            if tissue == row.tissue:
                closeness[tissue] = 2.0
            elif tissue in profile and row.tissue in profile:
                closeness[tissue] = np.corrcoef(profile[tissue], profile[row.tissue])[0, 1]
        if closeness:
            return shifts[
                treated & (samples["tissue"] == max(closeness, key=closeness.get)).to_numpy()
            ].mean(axis=0)
    here = ~control & (samples["tissue"] == row.tissue).to_numpy()
    return shifts[next(rows for rows in (*same, here, ~control) if rows.any())].mean(axis=0)


def test_additive_nearest_is_its_definition_by_plain_loops(data, many_contexts):
    samples, expression = many_contexts
    rows = table(
        [
            (study, tissue, treatment, dose)
            for study in ("a", "new")
            for tissue in (*CONTEXTS, "never seen")
            for treatment in ("x", "y", "never seen")
            for dose in ("1 uM", "10 uM", "3 uM", None)
        ]
    )
    expected = Additive(data, samples, expression).no_change(rows) + [
        slow_nearest(data, samples, expression, row) for row in rows.itertuples()
    ]
    np.testing.assert_allclose(
        AdditiveNearest(data, samples, expression).predict(rows), expected, atol=1e-10
    )


def test_the_similarity_of_contexts_is_the_correlation_of_their_mean_controls(many_contexts):
    samples, expression = many_contexts
    control = (samples["perturbation"] == "control").to_numpy()
    found = similarity_of_contexts(samples["tissue"][control], expression[control])
    means = {
        tissue: expression[control & (samples["tissue"] == tissue)].mean(axis=0)
        for tissue in found.index
    }
    for one in found.index:
        for other in found.index:
            assert found.loc[one, other] == pytest.approx(
                np.corrcoef(means[one], means[other])[0, 1]
            )


def test_additive_nearest_takes_the_effect_of_the_like_context_and_not_the_mean(data):
    profile = {"liver": [1.0, 2, 3, 4], "kidney": [1.0, 2, 3, 5], "brain": [4.0, 3, 2, 1]}
    effect = {"kidney": 1.0, "brain": -1.0}
    training = table(
        [
            ("a", tissue, treatment, None)
            for tissue in profile
            for treatment in ("control", "x")
            if treatment == "control" or tissue in effect
        ]
    )
    expression = np.array([profile[row.tissue] for row in training.itertuples()])
    expression[(training["perturbation"] == "x").to_numpy()] += [
        [effect[tissue]] for tissue in training["tissue"][training["perturbation"] == "x"]
    ]
    query = table(
        [("a", "liver", "x", None), ("a", "brain", "x", None), ("a", "never seen", "x", None)]
    )
    expected = [
        np.add(profile["liver"], 1),
        np.subtract(profile["brain"], 1),
        np.mean(list(profile.values()), axis=0),
    ]
    np.testing.assert_allclose(AdditiveNearest(data, training, expression).predict(query), expected)


def test_additive_nearest_is_exact_on_an_additive_cohort_and_on_its_unseen_pairs(
    data, additive_cohort
):
    samples, expression = additive_cohort
    nearest, additive = (
        AdditiveNearest(data, samples, expression),
        Additive(data, samples, expression),
    )
    np.testing.assert_allclose(nearest.predict(samples), expression, atol=1e-12)
    unseen = table([("a", "lung", "y", None), ("b", "lung", "y", None)])
    np.testing.assert_allclose(nearest.predict(unseen), additive.predict(unseen), atol=1e-12)


def test_additive_nearest_with_one_context_is_additive(data, many_contexts):
    samples, expression = many_contexts
    samples = samples.assign(tissue="liver")
    seen = samples[samples["perturbation"] != "control"]
    np.testing.assert_allclose(
        AdditiveNearest(data, samples, expression).predict(seen),
        Additive(data, samples, expression).predict(seen),
        atol=1e-12,
    )


def test_controls_constant_over_genes_leave_the_mean_over_contexts(data):
    # A correlation with a constant is none: no warning, and no context is nearest.
    training = table(
        [
            ("a", tissue, treatment, None)
            for tissue in ("liver", "lung", "skin")
            for treatment in ("control", "x")
        ]
    )[:5]
    expression = np.array(
        [[2.0] * GENES, [3.0] * GENES, [2.0] * GENES, [7.0] * GENES, [1.0] * GENES]
    )
    found = AdditiveNearest(data, training, expression).predict(table([("a", "skin", "x", None)]))
    np.testing.assert_allclose(found, [[1 + (1 + 5) / 2] * GENES])


# --- what holds for all of them -------------------------------------------------------------------------------------

FITTED = [PerturbedMean, MatchedMean, Additive, AdditiveNearest]


@pytest.mark.parametrize("baseline", FITTED)
def test_the_order_of_training_samples_and_of_queries_does_not_matter(
    data, many_contexts, baseline, rng
):
    samples, expression = many_contexts
    order, asked = rng.permutation(len(samples)), rng.permutation(len(samples))
    expected = baseline(data, samples, expression).predict(samples)
    np.testing.assert_allclose(
        baseline(data, samples.iloc[order], expression[order]).predict(samples.iloc[asked]),
        expected[asked],
        atol=1e-12,
    )


@pytest.mark.parametrize("baseline", FITTED)
def test_fit_and_prediction_leave_the_inputs_and_a_repeated_prediction_as_they_were(
    data, many_contexts, baseline
):
    samples, expression = many_contexts
    kept_samples, kept = samples.copy(), expression.copy()
    fitted = baseline(data, samples, expression)
    first = fitted.predict(samples).copy()
    np.testing.assert_array_equal(fitted.predict(samples), first)
    np.testing.assert_array_equal(expression, kept)
    pd.testing.assert_frame_equal(samples, kept_samples)


@pytest.mark.parametrize("baseline", FITTED)
def test_without_controls_or_without_treated_samples_nothing_is_fitted(
    data, many_contexts, baseline
):
    samples, expression = many_contexts
    control = (samples["perturbation"] == "control").to_numpy()
    for rows in (control, ~control):
        with pytest.raises(ValueError, match="controls and treated"):
            baseline(data, samples[rows], expression[rows])
    with pytest.raises(ValueError, match="controls and treated"):
        baseline(data.model_copy(update={"control": None}), samples, expression)


@pytest.mark.parametrize("baseline", FITTED)
@pytest.mark.parametrize(
    "kind", ["no dose", "missing contexts", "no context columns", "no study", "one perturbation"]
)
def test_odd_cohorts_get_finite_predictions(data, many_contexts, baseline, kind):
    samples, expression = many_contexts
    if kind == "no dose":
        samples = samples.drop(columns="perturbation_dose")
    if kind == "missing contexts":
        samples = samples.assign(tissue=samples["tissue"].where(samples["tissue"] != "liver", None))
    if kind == "no context columns":
        data = data.model_copy(update={"context_columns": ()})
    if kind == "no study":
        data = data.model_copy(update={"study_column": None})
    if kind == "one perturbation":
        samples = samples.assign(
            perturbation=samples["perturbation"].where(samples["perturbation"] == "control", "x")
        )
    fitted = baseline(data, samples, expression)
    strange = samples.iloc[:3].assign(
        tissue=[None, "never seen", "liver"],
        perturbation=["never seen", None, "x"],
        study=[None, "a", "new"],
    )
    for rows in (samples, strange, samples.iloc[:0]):
        assert np.isfinite(fitted.predict(rows)).all() and fitted.predict(rows).shape == (
            len(rows),
            GENES,
        )
