"""Baselines against plain loops, and on cohorts with a known answer."""

import itertools

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Covariates, Data
from pipeline.gem.evaluation.baselines.profiles import GroupMeans, Groups, Profiles
from pipeline.gem.evaluation.baselines.simple import (
    Additive,
    AdditiveNearest,
    MatchedMean,
    PerturbedMean,
    context_similarity,
    training_mean,
)

GENES = 4
GENE = np.arange(1, GENES + 1)
CONTEXTS = ("brain", "kidney", "liver", "lung", "skin")
FITTED = [PerturbedMean, MatchedMean, Additive, AdditiveNearest]


@pytest.fixture(scope="module")
def data(dosed) -> Data:
    """`dosed` with an age."""
    covariates = dosed.covariates.model_dump()
    covariates["biological"]["age_years"] = {"kind": "numeric", "scale": "linear"}
    return dosed.model_copy(update={"covariates": Covariates.model_validate(covariates)})


def table(*rows) -> pd.DataFrame:
    """Samples from (study, tissue, perturbation, dose)."""
    columns = ["study", "tissue", "perturbation", "perturbation_dose"]
    return pd.DataFrame(list(rows), columns=columns).assign(age_years=np.nan)


def profiles(data: Data, samples: pd.DataFrame, expression: np.ndarray) -> Profiles:
    """In two blocks."""
    return Profiles.of(data, samples, np.array_split(expression, 2))


def groups(values: np.ndarray) -> Groups:
    """Each of one sample."""
    return Groups(pd.DataFrame(index=range(len(values))), np.ones(len(values)), values)


def is_control(samples: pd.DataFrame) -> np.ndarray:
    return (samples["perturbation"] == "control").to_numpy()


@pytest.fixture(scope="module")
def expression(samples) -> np.ndarray:
    shift = samples["perturbation"].map({"control": 0.0, "x": 1.0, "y": -2.0}).to_numpy()
    noise = np.random.default_rng(1).normal(0, 0.5, (80, GENES))
    return (6 + shift[:, None] * np.arange(GENES) + noise).astype(np.float32)


# --- training mean ---


def test_the_training_mean_is_in_every_row(data, samples, expression):
    expected = np.tile(expression.astype(float).mean(axis=0), (7, 1))
    mean = training_mean(profiles(data, samples, expression), 7)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_the_training_mean_is_summed_in_double_precision(data):
    # A running sum in float32 loses 9.3 once it reaches a few million.
    values = np.full((600_000, 2), 9.3, dtype=np.float32)
    samples = table(("a", "liver", "x", None)).loc[np.zeros(len(values), dtype=int)]
    mean = training_mean(profiles(data, samples, values), 1)
    np.testing.assert_allclose(mean[0], np.float32(9.3), rtol=1e-6)


# --- group means ---


def test_means_are_looked_up_by_the_most_specific_known_key():
    specific, general = pd.Series(["a1", "a1", "a2", "b1"]), pd.Series(["a", "a", "a", "b"])
    values = np.array([[1.0, 10.0], [3.0, 30.0], [8.0, 80.0], [5.0, 50.0]])
    query = [pd.Series(["a1", "a9", "b1", "c1"]), pd.Series(["a", "a", "b", "c"])]
    predicted = GroupMeans.fit([specific, general], groups(values)).lookup(query)
    np.testing.assert_allclose(predicted, [[2, 20], [4, 40], [5, 50], [np.nan, np.nan]])


def test_means_do_not_depend_on_row_labels_or_order(rng):
    keys, values = pd.Series(rng.choice(["a", "b", "c"], 30)), rng.normal(size=(30, 3))
    order, query = rng.permutation(30), pd.Series(["a", "b", "c"], index=[9, 8, 7])
    shuffled = GroupMeans.fit([keys.iloc[order]], groups(values[order])).lookup([query])
    expected = [values[keys == key].mean(axis=0) for key in "abc"]
    np.testing.assert_allclose(shuffled, expected, rtol=1e-12)


def test_changing_a_looked_up_array_changes_no_mean():
    keys, values = pd.Series(["a", "b"]), np.array([[1.0], [2.0]])
    means = GroupMeans.fit([keys], groups(values))
    predicted = means.lookup([keys])  # exactly the keys of the table, in its order
    predicted += 100
    np.testing.assert_array_equal(means.lookup([keys]), values)


# --- perturbed and matched mean ---


@pytest.mark.parametrize(("baseline", "by_context"), [(PerturbedMean, False), (MatchedMean, True)])
def test_means_over_perturbations_are_those_of_a_plain_loop(
    data, samples, expression, baseline, by_context
):
    train, values = samples.iloc[:60], expression[:60].astype(float)
    unknown = table(
        ("a", "brain", "x", None), ("a", "brain", "control", None), ("z", None, "unknown", None)
    )
    query = pd.concat([samples.iloc[60:], unknown])
    tissues = train["tissue"].fillna("?").to_numpy()
    expected = []
    for tissue, control in zip(query["tissue"].fillna("?"), is_control(query), strict=True):
        alike = is_control(train) == control
        in_context = alike & (tissues == tissue)
        rows = in_context if by_context and in_context.any() else alike
        expected.append(values[rows].mean(axis=0))
    predicted = baseline(profiles(data, train, expression[:60])).predict(query)
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)


# --- additive ---


@pytest.fixture(scope="module")
def additive_cohort() -> tuple[pd.DataFrame, np.ndarray]:
    """Study, context and effect add up exactly; all studies and contexts have controls, y is
    missing in lung."""
    studies, tissues = {"a": 0.5, "b": -1.0}, {"liver": 3.0, "lung": 7.0}
    effects = {("control", None): 0.0, ("x", "100 nM"): 1.0, ("x", "10 uM"): 2.0, ("y", None): -1.5}
    rows, expression = [], []
    for study, tissue, (name, dose) in itertools.product(studies, tissues, effects):
        if (tissue, name) != ("lung", "y"):
            rows.append((study, tissue, name, dose))
            level = studies[study] * GENE + tissues[tissue]
            expression.append(level + effects[name, dose] * GENE**2)
    return table(*rows), np.array(expression)


@pytest.mark.parametrize("baseline", [Additive, AdditiveNearest])
def test_additive_is_exact_on_an_additive_cohort_and_its_unknown_pairs(
    data, additive_cohort, baseline
):
    samples, expression = additive_cohort
    fitted = baseline(profiles(data, samples, expression))
    np.testing.assert_allclose(fitted.predict(samples), expression, atol=1e-12)
    unknown = fitted.predict(table(("a", "lung", "y", None), ("b", "lung", "y", None)))
    expected = [0.5 * GENE + 7 - 1.5 * GENE**2, -GENE + 7 - 1.5 * GENE**2]
    np.testing.assert_allclose(unknown, expected, atol=1e-12)


def test_no_change_is_the_mean_of_controls_of_study_and_context_else_context_else_all(
    data, additive_cohort
):
    samples, expression = additive_cohort
    query = table(
        ("a", "lung", "x", "1 uM"),
        ("new", "lung", "x", None),
        ("new", "brain", "x", None),
        (None, "lung", "y", None),
    )
    predicted = Additive(profiles(data, samples, expression)).no_change(query)
    control, lung = is_control(samples), (samples["tissue"] == "lung").to_numpy()
    of_study = control & lung & (samples["study"] == "a").to_numpy()
    rows = of_study, control & lung, control, control & lung
    np.testing.assert_allclose(predicted, [expression[selected].mean(axis=0) for selected in rows])


def test_the_additive_effect_falls_back_from_dose_to_perturbation_to_all(data, additive_cohort):
    additive = Additive(profiles(data, *additive_cohort))
    base = additive.no_change(table(("a", "liver", "control", None)))[0]
    query = table(("a", "liver", "x", "1 uM"), ("a", "liver", "unknown", None))
    other_dose, unknown = additive.predict(query) - base
    # The mean of the effects 1 and 2, equally frequent.
    np.testing.assert_allclose(other_dose, 1.5 * GENE**2, atol=1e-12)
    # Treated samples: in liver x, x, y; in lung x, x; each in both studies.
    np.testing.assert_allclose(unknown, (1 + 2 - 1.5 + 1 + 2) / 5 * GENE**2, atol=1e-12)


def test_additive_predicts_no_change_for_controls(data, additive_cohort):
    samples, expression = additive_cohort
    additive, controls = Additive(profiles(data, samples, expression)), samples[is_control(samples)]
    np.testing.assert_array_equal(additive.predict(controls), additive.no_change(controls))


@pytest.mark.parametrize("column", ["study", "tissue", "perturbation"])
def test_additive_treats_an_unknown_level_as_missing(data, additive_cohort, column):
    additive, query = (
        Additive(profiles(data, *additive_cohort)),
        table(("a", "liver", "x", "10 uM")),
    )
    unknown, missing = (
        additive.predict(query.assign(**{column: level})) for level in ("unknown", None)
    )
    np.testing.assert_array_equal(unknown, missing)


# --- the effect in the most similar context ---


@pytest.fixture(scope="module")
def many_contexts() -> tuple[pd.DataFrame, np.ndarray]:
    """Noise; treatments missing in many contexts; skin without controls, brain with controls
    alone."""
    rng, rows = np.random.default_rng(2), []
    for _ in range(90):
        study, tissue = rng.choice(["a", "b"]), rng.choice(CONTEXTS)
        name, dose = rng.choice(["control", "x", "y", "z"]), rng.choice(["1 uM", "10 uM", "100 uM"])
        if (tissue, name == "control") not in (("skin", True), ("brain", False)):
            rows.append((study, tissue, name, None if name == "control" else dose))
    return table(*rows), rng.normal(5, 2, (len(rows), GENES))


def nearest_effect(data, samples: pd.DataFrame, expression: np.ndarray, row) -> np.ndarray:
    """The effect for one row, by definition."""
    control, tissue = is_control(samples), samples["tissue"].to_numpy()
    shifts = expression - Additive(profiles(data, samples, expression)).no_change(samples)
    of_context = {
        name: expression[control & (tissue == name)].mean(axis=0) for name in set(tissue[control])
    }
    perturbation = (samples["perturbation"] == row.perturbation).to_numpy()
    dose = samples["perturbation_dose"].fillna("?") == (row.perturbation_dose or "?")
    for treated in (perturbation & dose.to_numpy(), perturbation):
        similarity = {}
        for name in set(tissue[treated]):
            if name == row.tissue:
                similarity[name] = 2.0
            elif name in of_context and row.tissue in of_context:
                similarity[name] = np.corrcoef(of_context[name], of_context[row.tissue])[0, 1]
        if similarity:
            nearest = max(similarity, key=similarity.get)
            return shifts[treated & (tissue == nearest)].mean(axis=0)
    in_context = ~control & (tissue == row.tissue)
    fallbacks = perturbation & dose.to_numpy(), perturbation, in_context, ~control
    return shifts[next(rows for rows in fallbacks if rows.any())].mean(axis=0)


def test_additive_nearest_is_its_definition_by_plain_loops(data, many_contexts):
    tissues, doses = (*CONTEXTS, "unknown"), ("1 uM", "10 uM", "3 uM", None)
    query = table(*itertools.product(("a", "new"), tissues, ("x", "y", "unknown"), doses))
    effects = [nearest_effect(data, *many_contexts, row) for row in query.itertuples()]
    expected = Additive(profiles(data, *many_contexts)).no_change(query) + effects
    predicted = AdditiveNearest(profiles(data, *many_contexts)).predict(query)
    np.testing.assert_allclose(predicted, expected, atol=1e-10)


def test_context_similarity_is_the_correlation_of_mean_controls(many_contexts):
    samples, expression = many_contexts
    control, tissue = is_control(samples), samples["tissue"].to_numpy()
    of_contexts = pd.DataFrame(expression[control]).groupby(tissue[control]).mean()
    similarity = context_similarity(of_contexts)
    means = [expression[control & (tissue == name)].mean(axis=0) for name in similarity.index]
    np.testing.assert_allclose(similarity, np.corrcoef(means))


def test_additive_nearest_takes_the_effect_of_the_similar_context_and_not_the_mean(data):
    profile = {"liver": [1.0, 2, 3, 4], "kidney": [1.0, 2, 3, 5], "brain": [4.0, 3, 2, 1]}
    effect = {"kidney": 1.0, "brain": -1.0}
    train = table(
        *(("a", tissue, "control", None) for tissue in profile),
        *(("a", tissue, "x", None) for tissue in effect),
    )
    treated = [np.add(profile[tissue], effect[tissue]) for tissue in effect]
    expression = np.array([*profile.values(), *treated])
    query = table(*(("a", tissue, "x", None) for tissue in ("liver", "brain", "unknown")))
    expected = [
        np.add(profile["liver"], 1),
        np.subtract(profile["brain"], 1),
        np.mean(list(profile.values()), axis=0),
    ]
    np.testing.assert_allclose(
        AdditiveNearest(profiles(data, train, expression)).predict(query), expected
    )


def test_additive_nearest_with_one_context_is_additive(data, many_contexts):
    samples, expression = many_contexts[0].assign(tissue="liver"), many_contexts[1]
    treated = samples[~is_control(samples)]
    nearest, additive = (
        baseline(profiles(data, samples, expression)).predict(treated)
        for baseline in (AdditiveNearest, Additive)
    )
    np.testing.assert_allclose(nearest, additive, atol=1e-12)


def test_with_controls_constant_over_genes_the_effect_is_the_mean_over_contexts(data):
    # A correlation with a constant is undefined: no warning, and no context is nearest.
    rows = itertools.product(["a"], ("liver", "lung", "skin"), ("control", "x"), [None])
    train = table(*rows)[:5]
    expression = np.repeat([[2.0], [3.0], [2.0], [7.0], [1.0]], GENES, axis=1)
    predicted = AdditiveNearest(profiles(data, train, expression)).predict(
        table(("a", "skin", "x", None))
    )
    np.testing.assert_allclose(predicted, [[1 + (1 + 5) / 2] * GENES])


# --- properties of all of them ---


@pytest.mark.parametrize("baseline", FITTED)
def test_the_order_of_training_samples_and_of_queries_does_not_matter(
    data, many_contexts, baseline, rng
):
    samples, expression = many_contexts
    order, query = rng.permutation(len(samples)), rng.permutation(len(samples))
    expected = baseline(profiles(data, samples, expression)).predict(samples)
    shuffled = baseline(profiles(data, samples.iloc[order], expression[order]))
    np.testing.assert_allclose(shuffled.predict(samples.iloc[query]), expected[query], atol=1e-12)


@pytest.mark.parametrize("baseline", FITTED)
def test_a_prediction_is_repeatable_and_leaves_its_inputs_unchanged(data, many_contexts, baseline):
    samples, expression = many_contexts
    samples_before, expression_before = samples.copy(), expression.copy()
    fitted = baseline(profiles(data, samples, expression))
    first = fitted.predict(samples).copy()
    np.testing.assert_array_equal(fitted.predict(samples), first)
    np.testing.assert_array_equal(expression, expression_before)
    pd.testing.assert_frame_equal(samples, samples_before)


@pytest.mark.parametrize("baseline", FITTED)
def test_training_without_controls_or_without_treated_samples_is_refused(
    data, many_contexts, baseline
):
    samples, expression = many_contexts
    control, undeclared = is_control(samples), data.model_copy(update={"control": None})
    cases = (data, control), (data, ~control), (undeclared, np.ones(len(samples), dtype=bool))
    for declared, rows in cases:
        with pytest.raises(ValueError, match="controls and treated"):
            baseline(profiles(declared, samples[rows], expression[rows]))


@pytest.mark.parametrize("baseline", FITTED)
@pytest.mark.parametrize(
    "case", ["no dose", "missing contexts", "no context columns", "no study", "one perturbation"]
)
def test_unusual_cohorts_get_finite_predictions(data, many_contexts, baseline, case):
    samples, expression = many_contexts
    if case == "no dose":
        samples = samples.drop(columns="perturbation_dose")
    if case == "missing contexts":
        samples = samples.assign(tissue=samples["tissue"].replace("liver", None))
    if case == "no context columns":
        data = data.model_copy(update={"context_columns": ()})
    if case == "no study":
        data = data.model_copy(update={"study_column": None})
    if case == "one perturbation":
        samples = samples.assign(perturbation=np.where(is_control(samples), "control", "x"))
    fitted = baseline(profiles(data, samples, expression))
    unknown = samples.iloc[:3].assign(
        tissue=[None, "unknown", "liver"],
        perturbation=["unknown", None, "x"],
        study=[None, "a", "new"],
    )
    for query in (samples, unknown, samples.iloc[:0]):
        predicted = fitted.predict(query)
        assert predicted.shape == (len(query), GENES) and np.isfinite(predicted).all()


# --- sets of perturbations ---


@pytest.fixture(scope="module")
def sets(data) -> Data:
    covariates = data.covariates.model_dump()
    covariates["perturbation"]["perturbation"] = {"kind": "multilabel"}
    return data.model_copy(update={"covariates": Covariates.model_validate(covariates)})


def screen() -> tuple[pd.DataFrame, np.ndarray]:
    """Two perturbations apart in two tissues, and one set; effects and tissues add up."""
    effects = {"control": 0 * GENE, "x": GENE, "y": -2.0 * GENE**2, "x|z": 7.0 + GENE}
    rows = [("a", tissue, name, None) for tissue in ("liver", "lung") for name in effects]
    samples = table(*rows, ("a", "liver", "z", None))
    effects |= {"z": 100.0 * GENE}
    base = samples["tissue"].map({"liver": 3.0, "lung": 5.0}).to_numpy()[:, None]
    return samples, base + np.stack([effects[name] for name in samples["perturbation"]])


@pytest.mark.parametrize("baseline", [Additive, AdditiveNearest])
def test_the_effect_of_an_unknown_set_is_the_sum_of_those_of_its_labels(sets, baseline):
    fitted = baseline(profiles(sets, *screen()))
    query = table(*(("a", "lung", name, None) for name in ("x|y", "x|z", "x", "q|x", "x|y|z")))
    predicted = fitted.predict(query) - 5.0
    np.testing.assert_allclose(predicted[0], GENE - 2.0 * GENE**2)
    np.testing.assert_allclose(predicted[1], 7.0 + GENE)  # a set that training has
    np.testing.assert_allclose(predicted[2], GENE)
    np.testing.assert_allclose(predicted[4], GENE - 2.0 * GENE**2 + 100.0 * GENE)
    # A label that training lacks: the effect of any unknown perturbation.
    unknown = fitted.predict(table(("a", "lung", "q", None))) - 5.0
    np.testing.assert_allclose(predicted[3], unknown[0])


def test_a_text_with_a_bar_is_no_set_unless_the_column_has_sets(data):
    fitted = Additive(profiles(data, *screen()))
    predicted = fitted.predict(table(*(("a", "lung", name, None) for name in ("x|y", "q"))))
    np.testing.assert_allclose(*predicted)
