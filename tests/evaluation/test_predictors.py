"""Who predicts what: that each name is the predictor it claims to be, and that a cohort lacks only those that it cannot have."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from support.comparison import World, world_of

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.evaluation.baselines import Additive, Ridge, training_mean
from pipeline.gem.evaluation.predictors import CEILINGS, FLOORS, MODELS, PREDICTORS, Predictors
from pipeline.gem.evaluation.test_split import EvaluationSplits
from pipeline.gem.model.gem import decode
from pipeline.gem.simulation.generator import Truth, draw_counts, log_fractions

NEED_CONTROLS = {
    "no_change",
    "perturbed_mean",
    "matched_mean",
    "additive",
    "additive_nearest",
    "bilinear",
}


@pytest.fixture(scope="module")
def world(cohort, params) -> World:
    return world_of(cohort, params)


def test_a_synthetic_cohort_with_two_models_has_every_predictor_in_order(world):
    for _, said in world.by_split.values():
        assert tuple(said) == PREDICTORS


def test_every_prediction_is_finite_and_shaped_as_the_scene_but_for_the_replicates_half(world):
    for scene, said in world.by_split.values():
        for name, several in said.items():
            assert len(several) == (2 if name in ("gem", "gem_reference") else 1)
            for one in several:
                rows = np.isfinite(one.values).all(axis=1)
                assert one.values.shape == scene.observed.shape
                assert rows.all() if name != "replicate" else 0 < rows.mean() <= 0.5
                assert (one.drawn is None) == (name in FLOORS)
                assert (one.pit is None) == (name in (*FLOORS, "replicate"))
                assert one.pit is None or ((one.pit >= 0) & (one.pit <= 1)).all()


def test_floors_are_the_baselines_fitted_on_the_training_split(world):
    scene, said = world.by_split["test_combination"]
    declared, train, expression = (
        world.cohort.declared,
        world.scenes.train,
        world.scenes.train_expression,
    )
    additive = Additive(declared, train, expression)
    choice = (
        world.cohort.rows(["validation_combination"]),
        world.cohort.expression(["validation_combination"]),
    )
    ridge = Ridge.fit(
        MetadataEncoder.fit(train, declared.covariates.identities()), train, expression, choice
    )
    expected = {
        "training_mean": training_mean(expression, len(scene.samples)),
        "no_change": additive.no_change(scene.samples),
        "additive": additive.predict(scene.samples),
        "ridge": ridge.predict(scene.samples),
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(said[name][0].values, values)


def test_gem_from_metadata_is_the_mean_over_draws_of_the_prior_and_from_a_reference_of_the_mixed_latents(
    world,
):
    scene, said = world.by_split["test_study"]
    for seed, gem in enumerate(world.predictors.by_name["gem"].args[0]):
        expected = []
        for reference in (None, scene.reference):
            query, generator = (
                gem.query(scene.samples, reference, unknown="missing"),
                torch.Generator().manual_seed(0),
            )
            with torch.no_grad():
                deviation = torch.exp(0.5 * query.latents.log_variance)
                draws = [
                    decode(
                        gem.network,
                        query,
                        query.latents.mean
                        + deviation * torch.randn(deviation.shape, generator=generator),
                    )
                    for _ in range(400)
                ]
            expected.append(torch.stack(draws).mean(dim=0).numpy())
        # Four draws against four hundred.
        assert np.abs(said["gem"][seed].values - expected[0]).mean() < 0.25
        assert np.abs(said["gem_reference"][seed].values - expected[1]).mean() < 0.25
        assert np.abs(said["gem"][seed].values - said["gem_reference"][seed].values).max() > 1e-3


def test_who_sees_a_sample_of_the_study_says_so(world):
    for name, several in world.by_split["test_study"][1].items():
        assert several[0].uses_study_controls == (
            name in ("replicate", "oracle_reference", "oracle_omniscient")
            or name.endswith("_reference")
        )


def test_the_omniscient_oracle_is_the_mean_of_counts_drawn_again(world):
    scene, said = world.by_split["test_random"]
    truth = Truth.load(world.cohort.truth_folder)
    causes = (
        pd.read_parquet(world.cohort.truth_folder / "samples.parquet")
        .set_index("sample_id")
        .loc[scene.samples["sample_id"]]
    )
    fractions = log_fractions(
        truth, scene.samples, causes["stratum"].to_numpy(), causes["donor"].to_numpy()
    )
    rng, kept = np.random.default_rng(5), pd.Index(truth.gene_id).get_indexer(world.cohort.genes)
    again = [
        draw_counts(fractions, scene.totals.astype(float), truth.dispersion, rng)
        for _ in range(300)
    ]
    mean = np.mean([log_cpm(counts, counts.sum(axis=1)) for counts in again], axis=0)[:, kept]
    assert np.abs(said["oracle_omniscient"][0].values - mean).mean() < 0.01


def test_transforms_under_the_oracles_are_uniform_on_average(world):
    for name in CEILINGS:
        pit = np.concatenate([said[name][0].pit.ravel() for _, said in world.by_split.values()])
        assert pit.mean() == pytest.approx(0.5, abs=0.02)
        assert pit.std() == pytest.approx(np.sqrt(1 / 12), abs=0.02)


def test_the_true_change_is_none_for_controls_and_marks_a_fold_of_a_fifth(world):
    scene = world.by_split["test_study"][0]
    changed, change = world.predictors.true_change(scene)
    assert not change[~scene.treated].any() and changed[scene.treated].any()
    np.testing.assert_array_equal(changed, np.abs(change) >= np.log(1.2))


def without(cohort: Cohort, folder, *, truth: bool = True, **declared) -> Cohort:
    shutil.copytree(cohort.folder, folder / "cohort")
    if not truth:
        shutil.rmtree(folder / "cohort" / "truth")
    plain = Cohort(folder / "cohort")
    plain.declared = plain.declared.model_copy(update=declared)
    return plain


def test_without_the_truth_there_is_no_oracle_and_without_controls_none_that_needs_them(
    world, tmp_path
):
    plain = without(world.cohort, tmp_path, truth=False, control=None)
    scenes = EvaluationSplits(plain, world.params.evaluate)
    predictors = Predictors(scenes, {"gem": world.predictors.by_name["gem"].args[0]})
    assert predictors.true_change is None
    assert set(predictors.by_name) == set(PREDICTORS) - NEED_CONTROLS - set(CEILINGS) - {
        "gem_tuned",
        "gem_tuned_reference",
    }
    said = predictors(scenes.scene("test_random"))
    assert [one.values for one in said["gem_reference"]] == [None, None]
    assert all("no control" in one.reason for one in said["gem_reference"])


def test_a_model_predicts_the_same_whatever_else_is_predicted(world):
    scene, said = world.by_split["test_random"]
    for name in (*MODELS, "oracle_metadata", "replicate"):
        np.testing.assert_array_equal(
            world.predictors.by_name[name](scene)[0].values, said[name][0].values
        )
