"""Training samples as tensors: encoding, references, spread of studies, latent sizes."""

from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.networks import dense

from pipeline.gem.common.config import Data
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.training.dataset import TrainingData, resolve_observation, study_spread


def test_every_sample_points_at_its_own_metadata_row(cohort, data):
    encoded = data.train
    for group, rows in data.encoder.encode(cohort.rows([TRAIN])).items():
        matrix = rows.matrix().toarray()
        assert len(encoded.metadata[group]) < len(matrix)
        own = encoded.metadata[group][encoded.index[group]]
        assert np.array_equal(dense(own, matrix.shape[1]).numpy(), matrix)


def test_model_selection_uses_the_validation_split_of_combinations(data):
    assert data.selection_split == "validation_combination"


def test_references_are_controls_of_the_same_study_and_context(cohort, data, generator):
    samples = cohort.rows([TRAIN]).reset_index(drop=True)
    rows = data.references.draw(torch.arange(len(samples)), generator).numpy()
    references = samples.iloc[rows].reset_index(drop=True)

    def location(table):
        return table[["study", "tissue", "cell_type"]].astype(str).sum(axis=1)

    controls = samples["perturbation"] == "control"
    has_control = location(samples).isin(location(samples)[controls])
    assert has_control.mean() > 0.9
    assert (references["perturbation"][has_control] == "control").all()
    assert location(references)[has_control].equals(location(samples)[has_control])
    assert (rows[~has_control] == np.flatnonzero(~has_control)).all()


def test_study_spread_is_the_deviation_of_control_means_of_studies_within_a_context(cohort, data):
    samples, expression = cohort.rows([TRAIN]), cohort.expression([TRAIN])
    resident = data.train.expression
    control = (samples["perturbation"] == "control").to_numpy()
    squares, freedom = np.zeros(expression.shape[1]), 0
    contexts = samples[["tissue", "cell_type"]].astype(str).sum(axis=1)
    for context in set(contexts[control]):
        inside = control & (contexts == context).to_numpy()
        means = np.array(
            [
                expression[inside & (samples["study"] == study).to_numpy()].mean(axis=0)
                for study in set(samples["study"][inside])
            ]
        )
        squares += ((means - means.mean(axis=0)) ** 2).sum(axis=0)
        freedom += len(means) - 1
    spread = study_spread(samples, resident, cohort.declared)
    np.testing.assert_allclose(spread, np.sqrt(squares / freedom), rtol=1e-4)
    without_study = cohort.declared.model_copy(update={"study_column": None})
    assert (study_spread(samples, resident, without_study) == 0).all()


@pytest.mark.parametrize(("columns", "size"), [(0, 64), (47, 64), (65, 65), (300, 300), (513, 512)])
def test_unset_technical_latents_become_the_number_of_technical_columns_within_bounds(
    data, params, columns, size
):
    encoder = SimpleNamespace(inputs={"technical": columns, "biological": 900, "perturbation": 900})
    other = replace(data, encoder=encoder)
    resolved = other.resolve(params.override({"model.latent.technical": None}))
    assert resolved.model.latent.technical == size
    assert resolved.model.latent.biological == params.model.latent.biological
    assert other.resolve(params) is params, "a set number stays"


def test_a_combination_with_a_label_below_min_count_is_extrapolated(cohort):
    """The encoder treats the label as missing, and so do the training support and the heads."""
    counts = cohort.rows([TRAIN])["cell_type"].value_counts()
    declared = cohort.declared.model_dump(mode="json")
    declared["covariates"]["biological"]["cell_type"]["min_count"] = int(counts.iloc[-1]) + 1
    other = copy(cohort)
    other.declared = Data.model_validate(declared)
    other_data = TrainingData.load(other, torch.device("cpu"))
    encoder, support = other_data.encoder, other_data.training_support
    query = cohort.rows([TRAIN]).drop_duplicates("cell_type")
    rare = (query["cell_type"].map(counts) == counts.iloc[-1]).to_numpy()
    assert rare.any() and not rare.all()
    assert (support.is_extrapolated(query) == rare).all()
    assert ((encoder.labels(query)["cell_type"] < 0) == rare).all()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[0, 1, 0, 900], [2, 0, 3, 0]], "negative_binomial"),
        ([[50, 6, 7, 900], [20, 5, 0, 8]], "normal"),
        (np.eye(40, dtype=int).tolist(), "normal"),
    ],
    ids=["cells", "bulk", "too shallow"],
)
def test_the_observation_model_follows_the_counts(params, counts, expected):
    cohort = SimpleNamespace(blocks=lambda splits: iter([np.array(counts)]))
    open_choice = params.override({"model.observation": "auto"})
    assert resolve_observation(open_choice, cohort).model.observation == expected
    fixed = params.override({"model.observation": "multinomial"})
    assert resolve_observation(fixed, cohort) is fixed
