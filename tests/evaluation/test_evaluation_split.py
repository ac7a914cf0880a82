"""Test splits, recomputed from the tables of the cohort by plain loops."""

import numpy as np
import pandas as pd
import pytest
from support.comparison import SPLITS

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.splits import VISIBLE
from pipeline.gem.evaluation.baselines.profiles import Profiles
from pipeline.gem.evaluation.evaluation_split import EvaluationSplits

CONTEXT = ["tissue", "cell_type"]
STUDY_CONTEXT = [*CONTEXT, "study"]


@pytest.fixture(params=SPLITS)
def split(evaluation, request):
    return evaluation.by_split[request.param][0]


def texts(samples: pd.DataFrame, columns: list[str]) -> list[tuple]:
    rows = samples[columns].to_numpy(dtype=object)
    return [tuple("?" if pd.isna(value) else str(value) for value in row) for row in rows]


def table_of(cohort: Cohort, name: str) -> tuple[pd.DataFrame, np.ndarray]:
    return cohort.rows([name]), cohort.expression([name])


def hidden_controls(evaluation, split) -> tuple[pd.DataFrame, np.ndarray]:
    """Controls of the observed side: the reserved ones, or the scored ones of a new study."""
    if split.name != "test_study":
        return table_of(evaluation.cohort, "test_control")
    return split.samples[~split.treated], split.observed[~split.treated]


def test_every_test_split_of_the_cohort_is_evaluated(evaluation):
    assert tuple(evaluation.by_split) == SPLITS


def test_all_samples_are_scored_but_the_reference_controls_of_a_new_study(evaluation, split):
    rows, expression = table_of(evaluation.cohort, split.name)
    scored = rows["sample_id"].isin(split.samples["sample_id"]).to_numpy()
    assert (rows[~scored]["perturbation"] == "control").all()
    assert scored.all() == (split.name != "test_study")
    np.testing.assert_array_equal(split.observed, expression[scored])
    np.testing.assert_array_equal(split.counts, evaluation.cohort.counts([split.name])[scored])
    np.testing.assert_array_equal(split.treated, split.samples["perturbation"] != "control")


@pytest.mark.parametrize("side", ["observed", "predicted", "reference"])
def test_matched_controls_have_the_same_study_and_context_else_the_same_context(
    evaluation, split, side
):
    rows, expression = evaluation.cohort.rows(VISIBLE), evaluation.cohort.expression(VISIBLE)
    control = (rows["perturbation"] == "control").to_numpy()
    pool, values = rows[control], expression[control]
    if side == "observed":
        pool, values = hidden_controls(evaluation, split)
    if side == "reference" and split.name == "test_study":
        rows, of_rows = table_of(evaluation.cohort, split.name)
        visible = ~rows["sample_id"].isin(split.samples["sample_id"]).to_numpy()
        pool, values = pd.concat([pool, rows[visible]]), np.concatenate([values, of_rows[visible]])
    controls = getattr(split, f"{side}_control")
    keys = [
        list(zip(texts(pool, columns), range(len(pool)), strict=True))
        for columns in (STUDY_CONTEXT, CONTEXT)
    ]
    own_keys = zip(texts(split.samples, STUDY_CONTEXT), texts(split.samples, CONTEXT), strict=True)
    for row, own in enumerate(own_keys):
        of_study, of_context = (
            [index for other, index in pairs if other == key]
            for pairs, key in zip(keys, own, strict=True)
        )
        matched = of_study or of_context
        np.testing.assert_allclose(
            controls.mean[row], values[matched].mean(axis=0), rtol=1e-5, equal_nan=False
        )
        assert controls.number[row] == len(matched)
        assert (controls.mean[controls.group == controls.group[row]] == controls.mean[row]).all()


def test_no_control_is_on_both_sides_and_predictors_lack_the_observed_ones(evaluation, split):
    hidden = set(hidden_controls(evaluation, split)[0]["sample_id"])
    assert hidden and not hidden & set(evaluation.splits.visible.samples["sample_id"])
    assert not hidden & set(split.reference_samples["sample_id"])


def test_the_controls_of_a_new_study_are_halved_within_each_context(evaluation):
    rows = evaluation.cohort.rows(["test_study"])
    rows = rows[rows["perturbation"] == "control"]
    scored = rows["sample_id"].isin(evaluation.by_split["test_study"][0].samples["sample_id"])
    for _, halves in scored.groupby(
        [rows["study"], *(rows[name] for name in CONTEXT)], observed=True
    ):
        assert halves.sum() - (~halves).sum() in (0, 1)


def test_the_deviation_of_controls_is_pooled_within_context_and_study(evaluation):
    control = evaluation.by_split["test_random"][0].predicted_control
    visible = evaluation.cohort.rows(VISIBLE)
    is_control = (visible["perturbation"] == "control").to_numpy()
    values = evaluation.cohort.expression(VISIBLE)[is_control].astype(float)
    groups = texts(visible[is_control], STUDY_CONTEXT)
    for context in {group[:2] for group in groups}:
        squares, degrees = 0.0, 0
        for group in {group for group in groups if group[:2] == context}:
            members = values[[other == group for other in groups]]
            squares = squares + len(members) * members.var(axis=0)
            degrees += len(members) - 1
        name = " / ".join(context)
        assert control.degrees_of_freedom[name] == degrees
        np.testing.assert_allclose(control.deviation[name], np.sqrt(squares / degrees), rtol=1e-6)


def test_the_perturbed_centroid_counts_each_visible_perturbation_of_a_context_once(
    evaluation, split
):
    visible = evaluation.cohort.rows(VISIBLE)
    values = evaluation.cohort.expression(VISIBLE).astype(float)
    contexts, perturbations = texts(visible, CONTEXT), visible["perturbation"].to_numpy()
    for row in range(0, len(split.samples), 7):
        own = texts(split.samples.iloc[[row]], CONTEXT)[0]
        in_context = np.array([context == own for context in contexts])
        centroids = [
            values[in_context & (perturbations == name)].mean(axis=0)
            for name in sorted(set(perturbations[in_context]) - {"control"})
        ]
        np.testing.assert_allclose(
            split.perturbed_centroid[row], np.mean(centroids, axis=0), rtol=1e-5
        )


def test_conditions_are_contexts_and_treatments_and_entities_are_held_out(evaluation, split):
    condition = [*CONTEXT, "perturbation", "perturbation_dose", "perturbation_time"]
    entity = {
        "test_random": condition,
        "test_combination": [*CONTEXT, "perturbation"],
        "test_perturbation": ["perturbation"],
        "test_study": ["study"],
    }[split.name]
    for columns, index in ((condition, split.condition), (entity, split.entity)):
        keys = texts(split.samples, columns)
        assert len(set(zip(keys, index, strict=True))) == len(set(keys)) == index.max() + 1


@pytest.mark.parametrize("name", ["test_random", "test_combination"])
def test_a_reference_is_a_control_of_the_same_context_and_if_possible_study(evaluation, name):
    split, visible = evaluation.by_split[name][0], evaluation.cohort.rows(VISIBLE)
    assert (split.reference_samples["perturbation"] == "control").all()
    possible = set(texts(visible[visible["perturbation"] == "control"], STUDY_CONTEXT))
    own_keys = texts(split.samples, STUDY_CONTEXT)
    for own, other in zip(own_keys, texts(split.reference_samples, STUDY_CONTEXT), strict=True):
        assert own == other if own in possible else own[:2] == other[:2]
    position = pd.Index(visible["sample_id"]).get_indexer(split.reference_samples["sample_id"])
    np.testing.assert_array_equal(split.reference, evaluation.cohort.expression(VISIBLE)[position])


def test_a_sample_of_a_study_of_the_validation_has_a_reference_of_it(evaluation):
    split = evaluation.by_split["test_combination"][0]
    own = split.samples["study"].isin(evaluation.cohort.rows(["validation_study"])["study"])
    assert 0 < own.sum() < len(own)
    assert set(split.reference_samples["split"][own.to_numpy()]) == {"validation_study"}


def test_references_of_a_new_study_are_its_own_controls(evaluation):
    split = evaluation.by_split["test_study"][0]
    same = split.reference_samples["study"].to_numpy() == split.samples["study"].to_numpy()
    assert same.mean() > 0.9


def test_the_target_is_the_position_of_the_perturbed_gene(evaluation):
    genes, with_target = list(evaluation.cohort.genes), 0
    for split, _ in evaluation.by_split.values():
        for name, positions in zip(split.samples["perturbation"], split.target, strict=True):
            gene = evaluation.cohort.targets.get(name)
            assert list(positions) == [genes.index(gene) if gene in genes else -1]
            with_target += positions[0] >= 0
    assert with_target


# --- cohorts without controls or studies ---


def splits_without(evaluation, **changes) -> EvaluationSplits:
    cohort = Cohort(evaluation.cohort.folder)
    cohort.declared = cohort.declared.model_copy(update=changes)
    return EvaluationSplits(cohort, evaluation.params.evaluate)


def test_without_declared_controls_all_samples_are_treated_and_have_no_match(evaluation):
    absent = (
        "reference",
        "observed_control",
        "predicted_control",
        "reference_control",
        "perturbed_centroid",
    )
    for split in splits_without(evaluation, control=None):
        assert split.treated.all() and (split.target == -1).all()
        assert all(getattr(split, name) is None for name in absent)


def test_without_studies_controls_match_by_context(evaluation):
    split = splits_without(evaluation, study_column=None).split("test_random")
    pool, values = table_of(evaluation.cohort, "test_control")
    for row, context in enumerate(texts(split.samples, CONTEXT)):
        matched = [other == context for other in texts(pool, CONTEXT)]
        np.testing.assert_allclose(
            split.observed_control.mean[row], values[matched].mean(axis=0), rtol=1e-5
        )
    assert set(split.study) == {""}


def test_a_context_without_hidden_controls_has_none_and_the_others_keep_theirs(
    evaluation, monkeypatch
):
    splits = EvaluationSplits(evaluation.cohort, evaluation.params.evaluate)
    pool, values = table_of(evaluation.cohort, "test_control")
    first = texts(pool, CONTEXT)[0]
    with_controls = np.array([context != first for context in texts(pool, CONTEXT)])
    hidden = Profiles.of(splits.data, pool[with_controls], [values[with_controls]])
    monkeypatch.setattr(splits, "_hidden_controls", lambda _: hidden)
    split, complete = splits.split("test_random"), evaluation.by_split["test_random"][0]
    without = np.array([context == first for context in texts(split.samples, CONTEXT)])
    assert without.any() and not without.all()
    expected = np.where(without[:, None], np.nan, complete.observed_control.mean)
    np.testing.assert_array_equal(split.observed_control.mean, expected)
    assert not split.shared_control


@pytest.mark.parametrize("hidden", ["none", "of other contexts"])
def test_without_hidden_controls_of_its_contexts_a_split_takes_those_of_training(
    evaluation, monkeypatch, hidden
):
    splits, profiles = EvaluationSplits(evaluation.cohort, evaluation.params.evaluate), None
    if hidden == "of other contexts":
        pool, values = table_of(evaluation.cohort, "test_control")
        profiles = Profiles.of(splits.data, pool.assign(tissue="another"), [values])
    monkeypatch.setattr(splits, "_hidden_controls", lambda _: profiles)
    split, complete = splits.split("test_combination"), evaluation.by_split["test_combination"][0]
    assert split.shared_control and not complete.shared_control
    assert split.observed_control is split.predicted_control
    np.testing.assert_array_equal(split.predicted_control.mean, complete.predicted_control.mean)


def test_a_large_split_is_scored_on_whole_conditions_drawn_by_seed(evaluation):
    name, params = "test_random", evaluation.params.evaluate
    few = params.model_copy(update={"split_samples": 20})
    every, some, other = (
        EvaluationSplits(evaluation.cohort, changed).split(name)
        for changed in (params, few, few.model_copy(update={"seed": params.seed + 1}))
    )
    assert 0 < len(some.samples) <= 20 < len(every.samples)
    of_all = pd.Series(every.condition_name).value_counts()
    of_some = pd.Series(some.condition_name).value_counts()
    assert of_some.equals(of_all[of_some.index]), "each condition is complete"
    assert set(other.samples["sample_id"]) != set(some.samples["sample_id"])
    rows = every.samples["sample_id"].isin(some.samples["sample_id"]).to_numpy()
    for field in ("counts", "observed", "treated", "condition_name", "context"):
        np.testing.assert_array_equal(getattr(some, field), getattr(every, field)[rows])
