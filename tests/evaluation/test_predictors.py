"""The table of predictors, and that each name is the predictor that it stands for."""

import shutil

import numpy as np
import pytest
import torch
from support.comparison import SEEDS

from pipeline.gem.common.plotting import COLOURS
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.evaluation.catalogue import (
    BASELINES,
    MODELS,
    PREDICTOR_ROLES,
    PREDICTORS,
    predictors_with_role,
)
from pipeline.gem.evaluation.evaluation_split import EvaluationSplits
from pipeline.gem.evaluation.predictors import Predictors
from pipeline.gem.model.query import decode

NEED_CONTROLS = {
    "no_change",
    "perturbed_mean",
    "matched_mean",
    "additive",
    "additive_nearest",
    "bilinear",
}
ORACLES = {"oracle_metadata", "oracle_reference", "oracle_omniscient"}


def test_predictors_are_ordered_by_role_and_have_a_meaning_and_a_colour():
    roles = [PREDICTOR_ROLES.index(info.role) for info in PREDICTORS.values()]
    assert roles == sorted(roles) and set(roles) == {0, 1, 2, 3}
    assert all(info.meaning and info.colour in COLOURS for info in PREDICTORS.values())
    assert set(predictors_with_role("ceiling")) == {"replicate", *ORACLES}
    assert BASELINES + MODELS + predictors_with_role("ceiling") == tuple(PREDICTORS)


def test_a_synthetic_cohort_with_two_models_has_every_predictor(evaluation):
    for _, predictions in evaluation.by_split.values():
        assert list(predictions) == list(PREDICTORS)


def test_every_sample_is_predicted_but_half_of_the_replicates(evaluation):
    for split, predictions in evaluation.by_split.values():
        for name, seeds in predictions.items():
            assert len(seeds) == len(SEEDS.get(name, [1]))
            for predicted in seeds:
                rows = np.isfinite(predicted.values).all(axis=1)
                assert predicted.values.shape == split.observed.shape
                assert rows.all() if name != "replicate" else 0 < rows.mean() <= 0.5


def test_models_and_oracles_have_a_distribution_and_the_replicate_draws(evaluation):
    for _, predictions in evaluation.by_split.values():
        for name, seeds in predictions.items():
            for predicted in seeds:
                assert (predicted.draw is None) == (name in BASELINES)
                assert (predicted.pit is None) == (name in (*BASELINES, "replicate"))
                if predicted.pit is not None:
                    assert ((predicted.pit >= 0) & (predicted.pit <= 1)).all()


@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_gem_is_the_mean_over_draws_of_latents_from_metadata_or_from_a_reference(
    evaluation, suffix
):
    split, predictions = evaluation.by_split["test_study"]
    for gem, predicted in zip(evaluation.models["gem"], predictions[f"gem{suffix}"], strict=True):
        reference = split.reference if suffix else None
        inputs = gem.decoder_input(split.samples, reference, unknown="missing")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            mean, deviation = inputs.latents.mean, torch.exp(0.5 * inputs.latents.log_variance)
            draws = [
                decode(
                    gem.network,
                    inputs,
                    mean + deviation * torch.randn(mean.shape, generator=generator),
                )
                for _ in range(400)
            ]
        # Four draws against four hundred.
        assert np.abs(predicted.values - torch.stack(draws).mean(dim=0).numpy()).mean() < 0.25
    from_metadata, from_reference = (predictions[name][0] for name in ("gem", "gem_reference"))
    assert np.abs(from_metadata.values - from_reference.values).max() > 1e-3


def test_predictors_with_a_sample_of_the_study_use_its_controls(evaluation):
    for name, seeds in evaluation.by_split["test_study"][1].items():
        expected = name in ("replicate", "oracle_omniscient") or name.endswith("_reference")
        assert seeds[0].uses_study_controls == expected


def test_without_truth_and_controls_the_predictors_that_need_them_are_absent(evaluation, tmp_path):
    shutil.copytree(evaluation.cohort.folder, tmp_path / "cohort")
    shutil.rmtree(tmp_path / "cohort" / "truth")
    cohort = Cohort(tmp_path / "cohort")
    cohort.declared = cohort.declared.model_copy(update={"control": None})
    splits = EvaluationSplits(cohort, evaluation.params.evaluate)
    predictors = Predictors(splits, {"gem": evaluation.models["gem"]})
    assert predictors.true_change is None
    absent = NEED_CONTROLS | ORACLES | {"gem_tuned", "gem_tuned_reference"}
    assert set(predictors.by_name) == set(PREDICTORS) - absent
    for predicted in predictors(splits.split("test_random"))["gem_reference"]:
        assert predicted.values is None and "no control" in predicted.reason


def test_a_prediction_does_not_depend_on_other_predictors(evaluation):
    split, predictions = evaluation.by_split["test_random"]
    for name in (*MODELS, "oracle_metadata", "replicate"):
        again = evaluation.predictors.by_name[name](split)[0].values
        np.testing.assert_array_equal(again, predictions[name][0].values)
