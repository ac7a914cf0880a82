"""What short fits learn for unseen studies, references and genetic perturbations."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.generation import expected_log_cpm

from pipeline.gem.data.references import choose_references
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.model.query import TargetGenes
from pipeline.gem.training.trainer import fit


def sources(gem, samples, reference=None) -> list[LatentSource]:
    return gem.decoder_input(samples, reference, unknown="missing").source.tolist()


def test_unseen_studies_and_references_have_observation_noise_of_their_own(
    data, params, cohort, tmp_path
):
    fit(data, params.override({"train.epochs": 2}), seed=1).gem.save(tmp_path / "model.safetensors")
    gem = TrainedGEM.load(tmp_path / "model.safetensors")
    known, unseen = cohort.rows([TRAIN]).iloc[:3], cohort.rows(["validation_study"]).iloc[:2]
    samples = pd.concat([known, unseen, known.drop(columns="study")])
    expected = [LatentSource.PRIOR] * 3 + [LatentSource.UNSEEN_STUDY] * 5
    assert sources(gem, samples) == expected
    observation = gem.network.observation
    rows = torch.stack([observation.log_variance(source) for source in expected])
    torch.testing.assert_close(observation.log_variance(torch.tensor(expected)), rows)
    reference = np.repeat(cohort.expression([TRAIN])[:1], len(samples), axis=0)
    assert set(sources(gem, samples, reference)) == {LatentSource.REFERENCE}


def test_a_fit_that_masks_no_study_treats_unseen_studies_as_any_other(data, params, cohort):
    changed = params.override({"train.epochs": 1, "train.unseen_study_weight": 0.0})
    gem = fit(data, changed, seed=1).gem
    assert gem.hidden_study is None
    assert set(sources(gem, cohort.rows(["validation_study"]))) == {LatentSource.PRIOR}


def test_a_short_fit_learns_that_knock_down_lowers_and_over_expression_raises(data, params, cohort):
    gem = fit(data, params.override({"train.epochs": 12, "train.learning_rate": 5e-3}), seed=1).gem
    samples = cohort.rows([TRAIN])
    inputs = gem.decoder_input(samples)
    effect, kind = inputs.target_effect.numpy(), samples["perturbation_type"].to_numpy()
    positions = TargetGenes.from_cohort(cohort).positions(samples)
    assert (inputs.target_gene.numpy() == positions).all()
    for name, sign in (("crispri", -1), ("overexpression", 1)):
        if (kind == name).any():
            assert (sign * effect[kind == name]).mean() > 0.3


@pytest.mark.slow
def test_a_reference_of_an_unseen_study_lowers_the_error(data, params, cohort):
    gem = fit(data, params.override({"train.epochs": 30, "train.learning_rate": 5e-3}), seed=1).gem
    samples, expression = cohort.rows(["validation_study"]), cohort.expression(["validation_study"])
    control = (samples["perturbation"] == "control").to_numpy()
    is_reference = control & (np.cumsum(control) % 2 == 1)
    cell_types = samples["cell_type"][is_reference]
    rows = np.flatnonzero(~is_reference & samples["cell_type"].isin(cell_types).to_numpy())
    queries = samples.iloc[rows]
    chosen = choose_references(queries, samples[is_reference], cohort.declared, seed=0)
    reference = expression[is_reference][chosen]

    def mse(reference) -> float:
        inputs = gem.decoder_input(queries, reference, unknown="missing")
        return float(np.mean((expected_log_cpm(gem, inputs, 4, 0) - expression[rows]) ** 2))

    assert mse(reference) < 0.9 * mse(None)
