"""What holds for any correct implementation, whatever the numbers: order, limits, and that nothing depends on what does not matter."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support.comparison import World, rows_of, world_of
from support.settings import at_source

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.comparison import sample_errors
from pipeline.gem.preparation.prepare import write_cohort

MEDIUM = {
    "synthesize.samples": 2000,
    "synthesize.genes": 100,
    "synthesize.studies": 16,
    "synthesize.perturbations": 20,
    "splits.study": 0.13,
}
TABLES = ("scores", "comparisons", "conditions", "calibration", "regret")


@pytest.fixture(scope="module")
def tiny(cohort, params) -> World:
    return world_of(cohort, params)


@pytest.fixture(scope="module")
def medium(params, tmp_path_factory) -> World:
    """2,000 samples of 100 genes, without a trained model."""
    from pipeline.synthesize import write_source

    folder = tmp_path_factory.mktemp("medium")
    params = params.override(MEDIUM)
    write_source(params.synthesize, folder / "source")
    data = params.override(at_source(folder / "source")).data
    write_cohort(open_source(data), data, params.splits, folder / "cohort")
    return World.of(Cohort(folder / "cohort"), params, {})


@pytest.fixture(params=["tiny", "medium"])
def world(request) -> World:
    return request.getfixturevalue(request.param)


def gap(world: World, split: str, better: str, worse: str):
    """mse of `worse` less that of `better`, with its interval over what the split holds out (over conditions where that is one)."""
    scene, said = world.by_split[split]
    difference = sample_errors(scene, said[worse]) - sample_errors(scene, said[better])
    known = np.isfinite(difference)
    entity = scene.entity if len(np.unique(scene.entity[known])) > 2 else scene.condition
    resamples = Bootstrap(np.unique(entity[known], return_inverse=True)[1], 400, 0)
    return resamples.score(resamples.mean(difference[known]))


def ideal_of(name: str) -> str:
    """The oracle that knows all that the predictor may know. A replicate also knows what nobody wrote down."""
    return (
        "oracle_omniscient"
        if name == "replicate"
        else "oracle_reference"
        if name.endswith("_reference")
        else "oracle_metadata"
    )


def test_no_predictor_beats_the_oracle_that_knows_what_it_knows(world):
    for split, (_, said) in world.by_split.items():
        for name in said:
            for oracle in (
                {ideal_of(name), "oracle_omniscient"}
                if not name.startswith("oracle")
                else {"oracle_omniscient"}
            ):
                found = gap(world, split, oracle, name)
                # The oracles' own error is below 1 % of what they are used for.
                error = 0.01 * gap(world, split, oracle, "ridge").value
                assert found.high >= -error, (split, name, oracle, found)
                assert found.value >= -error - (found.high - found.low) / 2, (
                    split,
                    name,
                    oracle,
                    found,
                )


def test_who_knows_more_errs_less_on_known_circumstances(world):
    scene, said = world.by_split["test_random"]
    order = ("oracle_omniscient", "oracle_reference", "oracle_metadata", "ridge")
    errors = [sample_errors(scene, said[name]).mean() for name in order]
    assert errors == sorted(errors)
    assert errors[0] < errors[2] < errors[3]


def test_a_reference_tells_the_oracle_something_of_a_new_study_and_nothing_of_a_known_one(world):
    assert gap(world, "test_study", "oracle_reference", "oracle_metadata").low > 0
    said = world.by_split["test_random"][1]
    np.testing.assert_array_equal(
        said["oracle_reference"][0].values, said["oracle_metadata"][0].values
    )


def test_ridge_beats_every_prediction_that_is_the_same_for_all(world):
    for floor in ("training_mean", "perturbed_mean"):
        assert gap(world, "test_random", "ridge", floor).low > 0


def assert_same(first: pd.DataFrame, second: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(first, second, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("split", ["test_random", "test_combination", "test_study"])
def test_nothing_depends_on_the_order_of_samples(tiny, split):
    scene, said = tiny.by_split[split]
    order = np.random.default_rng(1).permutation(len(scene.samples))
    moved, moved_said = rows_of(scene, said, order)
    first, second = tiny.result(split), tiny.result(split, moved_said, moved)
    for name in TABLES:
        assert_same(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("split", ["test_random", "test_study"])
def test_no_score_depends_on_the_numbering_of_conditions(tiny, split):
    """Only the intervals do, by which resamples are drawn."""
    scene, said = tiny.by_split[split]
    number = scene.condition.max() + 1
    other = np.random.default_rng(2).permutation(number)
    entity = other[scene.entity] if scene.entity_kind == "condition" else scene.entity
    first, second = (
        tiny.result(split),
        tiny.result(split, said, replace(scene, condition=other[scene.condition], entity=entity)),
    )
    drawn = ["low", "high"]
    assert_same(first.scores.drop(columns=drawn), second.scores.drop(columns=drawn))
    assert_same(
        first.comparisons.drop(columns=[*drawn, "verdict"]),
        second.comparisons.drop(columns=[*drawn, "verdict"]),
    )
    moved = [
        table.sort_values(["predictor", "condition"]).reset_index(drop=True)
        for table in (first.conditions, second.conditions)
    ]
    assert_same(*moved)
    ends = [table.loc[table["metric"] == "mse", "high"] for table in (first.scores, second.scores)]
    np.testing.assert_allclose(*ends, rtol=0.5)


def test_the_same_model_again_as_another_seed_changes_nothing_but_the_table_of_seeds(tiny):
    said = tiny.by_split["test_study"][1]
    models = ("gem", "gem_reference", "gem_tuned", "gem_tuned_reference")
    one, two = (
        {name: several[:1] * times if name in models else several for name, several in said.items()}
        for times in (1, 2)
    )
    first = tiny.result("test_study", one, seeds={name: [1] for name in models})
    second = tiny.result("test_study", two, seeds={name: [1, 2] for name in models})
    for name in TABLES:
        assert_same(getattr(first, name), getattr(second, name))
    assert len(second.seeds) == 2 * len(first.seeds) > 0
    of_seeds = second.seeds.pivot(index=["predictor", "metric"], columns="seed", values="value")
    np.testing.assert_array_equal(of_seeds[1], of_seeds[2])


def test_the_same_evaluation_twice_is_the_same(tiny):
    scene = tiny.scenes.scene("test_random")
    first, second = (
        tiny.result("test_random"),
        tiny.result("test_random", tiny.predictors(scene), scene),
    )
    for name in (*TABLES, "seeds"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))
