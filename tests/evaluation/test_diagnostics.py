"""What the page shows beside tables: the right conditions, the right genes, the same picture whatever the order of samples."""

import numpy as np
import pandas as pd
import pytest
from support.comparison import World, made_scene, rows_of, world_of

from pipeline.gem.evaluation import diagnostics
from pipeline.gem.evaluation.predictors import Prediction

SPLITS = ("test_random", "test_combination", "test_perturbation", "test_study")


@pytest.fixture(scope="module")
def world(cohort, params) -> World:
    return world_of(cohort, params)


@pytest.fixture(scope="module")
def tables(world) -> dict:
    return {split: world.result(split).conditions for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_conditions_show_the_numbers_of_their_table_and_the_best_are_better_than_the_worst(
    world, tables, split
):
    scene, said = world.by_split[split]
    found = diagnostics.conditions(scene, said, tables[split])
    assert found
    known = tables[split].set_index(["predictor", "condition"])["delta_pearson"]
    for one in found:
        for name in ("gem", "ridge"):
            assert one.correlation[name] == known[name, one.name]
            assert np.corrcoef(one.observed, one.predicted[name])[0, 1] == pytest.approx(
                known[name, one.name], abs=0.1
            )
    best, worst = (
        [one.correlation["gem"] for one in found if one.best == side] for side in (True, False)
    )
    assert min(best) >= max(worst)
    assert 1 <= len(best) <= diagnostics.CHOSEN and len({one.name for one in found}) == len(found)


def test_conditions_of_one_sample_are_shown_only_where_there_are_no_others(world, tables):
    scene, said = world.by_split["test_random"]
    table = tables["test_random"]
    found = diagnostics.conditions(scene, said, table)
    several = (table.query("predictor == 'gem'")["samples"] >= 2).sum()
    assert several < 2 * diagnostics.CHOSEN or all(one.samples >= 2 for one in found)


def test_without_a_change_there_is_nothing_to_show(world, tables):
    scene, said = world.by_split["test_random"]
    assert (
        diagnostics.conditions(scene, said, tables["test_random"].assign(delta_pearson=np.nan))
        == []
    )
    assert diagnostics.conditions(scene, said, tables["test_random"].iloc[:0]) == []


def test_spread_is_the_pooled_deviation_within_conditions(rng):
    condition = np.repeat(np.arange(3), [4, 3, 1])
    observed = rng.normal(0, 1, (8, 5)) + 10 * condition[:, None]
    drawn = rng.normal(0, 2, (8, 5)) - 10 * condition[:, None]
    (found,) = diagnostics.spread(
        made_scene(observed, condition),
        {"gem": [Prediction(drawn, drawn=drawn)], "ridge": [Prediction(drawn)]},
    )
    parts = [
        observed[condition == index].var(axis=0, ddof=1) * (number - 1)
        for index, number in ((0, 4), (1, 3))
    ]
    assert found.observed == pytest.approx(np.sqrt(sum(parts) / 5))
    assert found.conditions == 2 and list(found.predicted) == ["gem"]
    assert (found.predicted["gem"] > found.observed).mean() > 0.5


def test_without_replicates_or_a_distribution_there_is_no_spread(rng):
    values = rng.normal(0, 1, (3, 5))
    said = {"gem": [Prediction(values, drawn=values)]}
    assert diagnostics.spread(made_scene(values, np.arange(3)), said) == []
    assert (
        diagnostics.spread(
            made_scene(values, np.zeros(3, dtype=int)), {"gem": [Prediction(values)]}
        )
        == []
    )


def test_the_spread_does_not_depend_on_the_order_of_samples(world):
    scene, said = world.by_split["test_study"]
    other = rows_of(scene, said, np.random.default_rng(0).permutation(len(scene.samples)))
    (first,), (second,) = diagnostics.spread(scene, said), diagnostics.spread(*other)
    assert first.observed == pytest.approx(second.observed)
    assert first.predicted["gem"] == pytest.approx(second.predicted["gem"])


def test_every_latent_group_is_shown_by_a_covariate_of_every_group(world):
    splits = ["test_random", "test_control"]
    gem, samples, expression = (
        world.predictors.by_name["gem"].args[0][0],
        world.cohort.rows(splits),
        world.cohort.expression(splits),
    )
    maps = diagnostics.latent_maps(gem, "gem", samples, expression, world.cohort.declared, 0)
    groups = ["technical", "biological", "perturbation"]
    assert [(one.group, one.covariate_group) for one in maps] == [
        (group, owner) for group in groups for owner in groups
    ]
    assert {one.covariate_group: one.covariate for one in maps} == {
        "technical": "study",
        "biological": "tissue",
        "perturbation": "perturbation",
    }
    for one in maps:
        assert one.points.shape == (len(samples), 2) and 0 < one.share <= 1 + 1e-9
        shown = samples[one.covariate].to_numpy()[one.level == 0]
        assert (shown == one.levels[0]).all()


def test_of_many_samples_some_are_drawn(world, monkeypatch):
    monkeypatch.setattr(diagnostics, "MAP_SAMPLES", 20)
    splits = ["test_random", "test_control"]
    gem = world.predictors.by_name["gem"].args[0][0]
    maps = diagnostics.latent_maps(
        gem,
        "gem",
        world.cohort.rows(splits),
        world.cohort.expression(splits),
        world.cohort.declared,
        0,
    )
    assert {(len(one.points), len(one.level)) for one in maps} == {(20, 20)}


def test_levels_are_the_commonest_and_the_missing_have_none():
    levels, level = diagnostics._levels(pd.Series(["b", "a", "b", None, *"cdefg"]))
    assert levels == ("b", "a", "c", "d", "e")
    assert level.tolist() == [0, 1, 0, -1, 2, 3, 4, 5, 5]


def test_the_plane_holds_most_of_the_variance_and_its_sign_is_fixed(rng):
    means = rng.normal(0, 1, (100, 4)) * [1, 5, 0.1, 3]
    points, share = diagnostics._plane(means)
    assert np.abs(np.corrcoef(points[:, 0], means[:, 1])[0, 1]) > 0.99
    assert share == pytest.approx(points.var(axis=0).sum() / means.var(axis=0).sum())
    again, _ = diagnostics._plane(means[::-1])
    assert again[::-1] == pytest.approx(points)
    flat, none = diagnostics._plane(np.zeros((5, 1)))
    assert flat.shape == (5, 2) and none == 0
