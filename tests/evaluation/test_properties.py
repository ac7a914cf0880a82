"""Properties of any correct evaluation: the order of oracles, and invariances of all tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support.comparison import CohortEvaluation, rows_of
from support.settings import at_source

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.catalogue import MODELS
from pipeline.gem.evaluation.comparison import sample_errors
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.simulation.write import write_source

MEDIUM = {
    "synthesize.samples": 2000,
    "synthesize.genes": 100,
    "synthesize.studies": 16,
    "synthesize.perturbations": 20,
    "splits.study": 0.13,
}
TABLES = ("scores", "comparisons", "conditions", "calibration", "error_decomposition")


@pytest.fixture(scope="module")
def medium(params, tmp_path_factory) -> CohortEvaluation:
    """2,000 samples of 100 genes, without a trained model."""
    folder, params = tmp_path_factory.mktemp("medium"), params.override(MEDIUM)
    write_source(params.synthesize, folder / "source")
    data = params.override(at_source(folder / "source")).data
    write_cohort(open_source(data), data, params.splits, folder / "cohort")
    return CohortEvaluation.of(Cohort(folder / "cohort"), params, {})


@pytest.fixture(params=["evaluation", "medium"])
def any_evaluation(request) -> CohortEvaluation:
    return request.getfixturevalue(request.param)


# --- the order of predictors ---


def mse_gap(evaluation: CohortEvaluation, name: str, better: str, worse: str):
    """mse of `worse` minus that of `better`, resampled over the held-out entities (over conditions
    if there are fewer than three)."""
    split, predictions = evaluation.by_split[name]
    gap = sample_errors(split, predictions[worse]) - sample_errors(split, predictions[better])
    valid = np.isfinite(gap)
    enough = len(np.unique(split.entity[valid])) > 2
    entity = (split.entity if enough else split.condition)[valid]
    resamples = Bootstrap(np.unique(entity, return_inverse=True)[1], 400, 0)
    return resamples.score(resamples.mean(gap[valid]))


def matched_oracles(name: str) -> set[str]:
    """The oracles with at least the inputs of a predictor. A replicate has hidden factors too."""
    if name == "replicate" or name.startswith("oracle"):
        return {"oracle_omniscient"}
    reference = name.endswith("_reference")
    return {"oracle_omniscient", "oracle_reference" if reference else "oracle_metadata"}


def test_no_predictor_beats_an_oracle_with_the_same_inputs(any_evaluation):
    for split, (_, predictions) in any_evaluation.by_split.items():
        for name in predictions:
            for oracle in matched_oracles(name):
                gap = mse_gap(any_evaluation, split, oracle, name)
                # The oracles' own error is below 1 % of the gaps that they are used for.
                error = 0.01 * mse_gap(any_evaluation, split, oracle, "ridge").value
                case = (split, name, oracle, gap)
                assert gap.high >= -error, case
                assert gap.value >= -error - (gap.high - gap.low) / 2, case


def test_oracles_with_more_inputs_have_less_error_on_random_samples(any_evaluation):
    split, predictions = any_evaluation.by_split["test_random"]
    order = ("oracle_omniscient", "oracle_reference", "oracle_metadata", "ridge")
    errors = [sample_errors(split, predictions[name]).mean() for name in order]
    assert errors == sorted(errors)
    assert errors[0] < errors[2] < errors[3]


def test_a_reference_helps_the_oracle_in_new_studies_only(any_evaluation):
    assert mse_gap(any_evaluation, "test_study", "oracle_reference", "oracle_metadata").low > 0
    predictions = any_evaluation.by_split["test_random"][1]
    np.testing.assert_array_equal(
        predictions["oracle_reference"][0].values, predictions["oracle_metadata"][0].values
    )


@pytest.mark.parametrize("floor", ["training_mean", "perturbed_mean"])
def test_ridge_beats_predictions_that_ignore_the_metadata(any_evaluation, floor):
    assert mse_gap(any_evaluation, "test_random", "ridge", floor).low > 0


# --- invariances ---


def assert_equal_tables(first, second, tables=TABLES, without=()) -> None:
    for name in tables:
        pair = [getattr(result, name).drop(columns=list(without)) for result in (first, second)]
        pd.testing.assert_frame_equal(*pair, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["test_random", "test_combination", "test_study"])
def test_no_table_depends_on_the_order_of_samples(evaluation, name, rng):
    split, predictions = evaluation.by_split[name]
    other, other_predictions = rows_of(split, predictions, rng.permutation(len(split.samples)))
    shuffled = evaluation.result(name, other_predictions, other)
    assert_equal_tables(evaluation.result(name), shuffled)


@pytest.mark.parametrize("name", ["test_random", "test_study"])
def test_no_value_depends_on_the_numbering_of_conditions(evaluation, name, rng):
    """Only the intervals do, through the resamples."""
    split, predictions = evaluation.by_split[name]
    order = rng.permutation(split.condition.max() + 1)
    entity = order[split.entity] if split.entity_kind == "condition" else split.entity
    renumbered = replace(split, condition=order[split.condition], entity=entity)
    first, second = evaluation.result(name), evaluation.result(name, predictions, renumbered)
    assert_equal_tables(first, second, ["scores"], ["low", "high"])
    assert_equal_tables(first, second, ["comparisons"], ["low", "high", "verdict"])
    by = ["predictor", "condition"]
    conditions = [
        result.conditions.sort_values(by).reset_index(drop=True) for result in (first, second)
    ]
    pd.testing.assert_frame_equal(*conditions, rtol=1e-6, atol=1e-9)
    high = [result.scores.query("metric == 'mse'")["high"] for result in (first, second)]
    np.testing.assert_allclose(*high, rtol=0.5)


def test_a_model_repeated_as_another_seed_changes_only_the_table_of_seeds(evaluation):
    predictions = evaluation.by_split["test_study"][1]
    single, double = (
        evaluation.result(
            "test_study",
            predictions | {name: predictions[name][:1] * number for name in MODELS},
            seeds={name: list(range(1, number + 1)) for name in MODELS},
        )
        for number in (1, 2)
    )
    assert_equal_tables(single, double)
    assert len(double.seeds) == 2 * len(single.seeds) > 0
    by_seed = double.seeds.pivot(index=["predictor", "metric"], columns="seed", values="value")
    np.testing.assert_array_equal(by_seed[1], by_seed[2])


@pytest.mark.slow
def test_an_evaluation_is_deterministic(evaluation):
    split = evaluation.splits.split("test_random")
    again = evaluation.result("test_random", evaluation.predictors(split), split)
    for name in (*TABLES, "seeds"):
        first = getattr(evaluation.result("test_random"), name)
        pd.testing.assert_frame_equal(first, getattr(again, name))
