"""The parts of a model's error add up, and each is what its name says."""

import numpy as np
import pandas as pd
import pytest
from support.comparison import SEEDS, SPLITS, rows_of

from pipeline.gem.evaluation.bootstrap import Bootstrap
from pipeline.gem.evaluation.comparison import sample_errors
from pipeline.gem.evaluation.error_decomposition import (
    BY_STUDY,
    COUNT_NOISE,
    HIDDEN_FACTORS,
    PARTS,
    REFERENCE_INFORMATION,
    RESIDUAL,
    SAMPLING_ERROR,
    SYSTEMATIC,
    decompose_error,
    project_on_groups,
)
from pipeline.gem.evaluation.evaluation_split import PredictedSplit


def decompose(split, predictions) -> pd.DataFrame:
    table = decompose_error(split, predictions, Bootstrap(split.condition, 20, 0))
    return table.set_index(["predictor", "part"])


@pytest.mark.parametrize("name", SPLITS)
def test_the_parts_of_every_model_add_up_to_its_error(evaluation, name):
    split, predictions = evaluation.by_split[name]
    table = decompose(split, predictions)
    assert set(table.index.get_level_values(0)) == set(SEEDS)
    for model in SEEDS:
        error = sample_errors(split, predictions[model]).mean()
        assert table.loc[model, "value"].sum() == pytest.approx(error, rel=1e-12)
        assert table.loc[model, "share"].sum() == pytest.approx(1)
        parts = list(PARTS)
        if model.endswith("_reference"):
            parts.remove(REFERENCE_INFORMATION)
        assert list(table.loc[model].index) == parts
    assert abs(table.loc[("gem", SAMPLING_ERROR), "share"]) < 0.25


def test_the_parts_of_some_of_the_samples_add_up_too(evaluation):
    split, predictions = rows_of(*evaluation.by_split["test_study"], np.arange(9))
    error = sample_errors(split, predictions["gem"]).mean()
    assert decompose(split, predictions).loc["gem", "value"].sum() == pytest.approx(error)


def test_unavoidable_parts_are_differences_of_oracles(evaluation):
    split, predictions = evaluation.by_split["test_study"]
    omniscient, reference, metadata = (
        sample_errors(split, predictions[f"oracle_{name}"]).mean()
        for name in ("omniscient", "reference", "metadata")
    )
    values = decompose(split, predictions).loc["gem", "value"]
    assert values[COUNT_NOISE] == pytest.approx(omniscient)
    assert values[HIDDEN_FACTORS] == pytest.approx(reference - omniscient)
    assert values[REFERENCE_INFORMATION] == pytest.approx(metadata - reference)


def test_the_part_of_the_seeds_is_the_variance_of_their_predictions(evaluation):
    split, predictions = evaluation.by_split["test_study"]
    seeds = [predicted.values.astype(float) for predicted in predictions["gem"]]
    table = decompose(split, predictions)
    assert table.loc[("gem", "seeds"), "value"] == pytest.approx(np.var(seeds, axis=0).mean())
    assert table.loc[("gem_tuned", "seeds"), "value"] == 0


def test_the_ideal_prediction_has_no_systematic_part_and_no_sampling_error(evaluation):
    split, predictions = evaluation.by_split["test_study"]
    ideal = {
        "gem": predictions["oracle_metadata"],
        "gem_reference": predictions["oracle_reference"],
    }
    table = decompose(split, predictions | ideal)["value"]
    for name in ideal:
        parts = table.loc[name, [*SYSTEMATIC, "seeds", SAMPLING_ERROR]]
        assert parts.to_numpy() == pytest.approx(0, abs=1e-12)


def test_an_error_that_depends_on_the_study_is_attributed_to_the_study(evaluation, rng):
    split, predictions = evaluation.by_split["test_random"]
    studies, index = np.unique(split.study, return_inverse=True)
    shift = rng.normal(0, 1, (len(studies), split.observed.shape[1]))[index]
    shifted = PredictedSplit(predictions["oracle_metadata"][0].values + shift)
    values = decompose(split, predictions | {"gem": [shifted]})["value"]["gem"]
    assert values[BY_STUDY] == pytest.approx(np.mean(shift**2), rel=1e-5)
    assert values[list(SYSTEMATIC[1:])].to_numpy() == pytest.approx(0, abs=1e-9)


def test_parts_are_successive_orthogonal_projections_on_group_indicators(rng):
    """Against projection matrices, each applied to the residual of the one before."""
    distance = rng.normal(0, 1, (50, 7)) + rng.normal(0, 1, (4, 7))[rng.integers(0, 4, 50)]
    groupings = {
        "a": rng.integers(0, 4, 50),
        "b": rng.integers(0, 5, 50).astype(str),
        "c": rng.integers(0, 25, 50),
    }
    parts, residual = project_on_groups(distance, groupings), distance
    for name, group in groupings.items():
        indicator = (np.asarray(group)[:, None] == np.unique(group)).astype(float)
        projection = indicator @ np.linalg.pinv(indicator) @ residual
        residual = residual - projection
        assert np.abs(np.sum(projection * residual, axis=0)).max() < 1e-9
        np.testing.assert_allclose(parts[name], (projection**2).mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(parts[RESIDUAL], (residual**2).mean(axis=1), rtol=1e-9)
    assert sum(part.mean() for part in parts.values()) == pytest.approx((distance**2).mean())


def test_without_a_known_truth_the_decomposition_is_empty(evaluation):
    split, predictions = evaluation.by_split["test_random"]
    without_oracles = {
        name: seeds for name, seeds in predictions.items() if not name.startswith("oracle")
    }
    assert decompose(split, without_oracles).empty
