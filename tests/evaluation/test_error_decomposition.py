"""The parts of a model's error: they add up, and each is what it says."""

import numpy as np
import pytest
from support.comparison import SEEDS, World, rows_of, world_of

from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.comparison import sample_errors
from pipeline.gem.evaluation.error_decomposition import (
    CHANCE,
    HIDDEN,
    NOISE,
    OWN,
    PARTS,
    REFERENCE,
    regret,
    systematic,
)
from pipeline.gem.evaluation.predictors import Prediction

SPLITS = ("test_random", "test_combination", "test_perturbation", "test_study")


@pytest.fixture(scope="module")
def world(cohort, params) -> World:
    return world_of(cohort, params)


def parts_of(world: World, split: str, said=None):
    scene, own = world.by_split[split]
    return regret(scene, said or own, Bootstrap(scene.condition, 20, 0)).set_index(
        ["predictor", "part"]
    )


@pytest.mark.parametrize("split", SPLITS)
def test_the_parts_of_every_model_add_up_to_its_error(world, split):
    scene, said = world.by_split[split]
    found = parts_of(world, split)
    assert set(found.index.get_level_values(0)) == set(SEEDS)
    for name in SEEDS:
        assert found.loc[name, "value"].sum() == pytest.approx(
            sample_errors(scene, said[name]).mean(), rel=1e-12
        )
        assert found.loc[name, "share"].sum() == pytest.approx(1)
        own = (
            [part for part in PARTS if part != REFERENCE]
            if name.endswith("_reference")
            else list(PARTS)
        )
        assert list(found.loc[name].index) == own


def test_what_no_model_can_help_is_the_difference_of_oracles(world):
    scene, said = world.by_split["test_study"]
    errors = {
        name: sample_errors(scene, said[f"oracle_{name}"]).mean()
        for name in ("omniscient", "reference", "metadata")
    }
    found = parts_of(world, "test_study").loc["gem", "value"]
    assert found[NOISE] == pytest.approx(errors["omniscient"])
    assert found[HIDDEN] == pytest.approx(errors["reference"] - errors["omniscient"])
    assert found[REFERENCE] == pytest.approx(errors["metadata"] - errors["reference"])


def test_the_part_of_the_seeds_is_the_variance_of_their_predictions(world):
    said = world.by_split["test_study"][1]
    variance = np.var([one.values.astype(float) for one in said["gem"]], axis=0).mean()
    found = parts_of(world, "test_study")
    assert found.loc[("gem", "seeds"), "value"] == pytest.approx(variance)
    assert found.loc[("gem_tuned", "seeds"), "value"] == 0


def test_the_ideal_prediction_has_nothing_systematic_and_no_chance(world):
    said = world.by_split["test_study"][1]
    found = parts_of(
        world,
        "test_study",
        said | {"gem": said["oracle_metadata"], "gem_reference": said["oracle_reference"]},
    )["value"]
    for name in ("gem", "gem_reference"):
        assert found.loc[name, [*OWN, "seeds", CHANCE]].to_numpy() == pytest.approx(0, abs=1e-12)


def test_an_error_that_depends_on_the_study_alone_is_found_by_study(world, rng):
    scene, said = world.by_split["test_random"]
    shift = dict(
        zip(
            np.unique(scene.study),
            rng.normal(0, 1, (len(np.unique(scene.study)), scene.observed.shape[1])),
            strict=True,
        )
    )
    wrong = said["oracle_metadata"][0].values + np.stack([shift[name] for name in scene.study])
    found = parts_of(world, "test_random", said | {"gem": [Prediction(wrong)]})["value"]["gem"]
    assert found["by study"] == pytest.approx(
        np.mean([np.mean(shift[name] ** 2) for name in scene.study]), rel=1e-5
    )
    assert found[list(OWN[1:])].to_numpy() == pytest.approx(0, abs=1e-9)


def test_systematic_parts_are_orthogonal_projections_one_after_another(rng):
    """Against projections as matrices: of each grouping on its indicators, of what the one before has left."""
    distance = rng.normal(0, 1, (50, 7)) + rng.normal(0, 1, (4, 7))[rng.integers(0, 4, 50)]
    groupings = {
        "a": rng.integers(0, 4, 50),
        "b": rng.integers(0, 5, 50).astype(str),
        "c": rng.integers(0, 25, 50),
    }
    found, left = systematic(distance, groupings), distance
    for name, group in groupings.items():
        indicator = (np.asarray(group)[:, None] == np.unique(group)).astype(float)
        shared = indicator @ np.linalg.pinv(indicator) @ left
        assert np.abs(np.einsum("ng,ng->g", shared, left - shared)).max() < 1e-9
        np.testing.assert_allclose(found[name], (shared**2).mean(axis=1), rtol=1e-9)
        left = left - shared
    np.testing.assert_allclose(found["rest"], (left**2).mean(axis=1), rtol=1e-9)
    assert sum(part.mean() for part in found.values()) == pytest.approx((distance**2).mean())


def test_chance_is_small_beside_the_error_of_a_model(world):
    for split in SPLITS:
        found = parts_of(world, split)["value"]["gem"]
        assert abs(found[CHANCE]) < 0.25 * found.sum()


def test_without_the_truth_there_is_no_regret(world):
    scene, said = world.by_split["test_random"]
    assert regret(
        scene,
        {name: one for name, one in said.items() if not name.startswith("oracle")},
        Bootstrap(scene.condition, 5, 0),
    ).empty


def test_of_a_part_of_the_samples_the_parts_add_up_too(world):
    scene, said = rows_of(*world.by_split["test_study"], np.arange(9))
    found = regret(scene, said, Bootstrap(scene.condition, 5, 0)).set_index(["predictor", "part"])[
        "value"
    ]
    assert found["gem"].sum() == pytest.approx(sample_errors(scene, said["gem"]).mean())
