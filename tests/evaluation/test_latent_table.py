"""The table of what latents know, with latents made by hand: what is written in one group is read there and nowhere else."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from support.comparison import World, world_of

from pipeline.gem.data.labels import label_texts
from pipeline.gem.evaluation.latent_table import COLUMNS, latent_table
from pipeline.gem.model.calibration import calibration_error
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.network import Gaussian

SPLITS = ["test_random", "test_perturbation", "test_study", "test_control"]


@pytest.fixture(scope="module")
def world(cohort, params) -> World:
    return world_of(cohort, params)


@pytest.fixture(scope="module")
def gem(world) -> TrainedGEM:
    return world.predictors.by_name["gem"].args[0][0]


class Written(TrainedGEM):
    """A GEM whose posterior means are given, in place of the encoder's."""

    def posterior(self, expression: np.ndarray) -> Gaussian:
        return Gaussian(torch.from_numpy(expression).float(), torch.zeros(expression.shape))


def table_of(gem: TrainedGEM, samples: pd.DataFrame, latents: np.ndarray) -> pd.DataFrame:
    return latent_table(Written(**vars(gem)), "gem", samples, latents, 0)


def test_a_label_written_in_one_group_is_read_there_and_noise_is_at_chance(world, gem, rng):
    samples = world.cohort.rows(SPLITS)
    latents = rng.normal(0, 1, (len(samples), 12))
    codes, tissues = pd.factorize(samples["tissue"])
    place = gem.network.slices()["technical"].start
    latents[:, place : place + len(tissues)] = np.eye(len(tissues))[codes]
    probes = (
        table_of(gem, samples, latents)
        .query("measure == 'probe'")
        .set_index(["group", "covariate"])
    )
    assert probes.loc[("technical", "tissue"), "value"] == 1
    assert probes.loc[("technical", "tissue"), "covariate_group"] == "biological"
    for group in ("biological", "perturbation"):
        assert probes.loc[(group, "tissue"), "value"] == pytest.approx(1 / len(tissues), abs=0.15)
        assert probes.loc[(group, "tissue"), "chance"] == 1 / len(tissues)
    others = probes.drop([("technical", "tissue"), ("technical", "cell_type")])
    noise = others[others.index.get_level_values(0) != "technical"]
    assert abs((noise["value"] - noise["chance"]).dropna().mean()) < 0.08


def test_every_categorical_covariate_is_probed_in_every_group(world, gem):
    probes = latent_table(
        gem, "gem", world.cohort.rows(SPLITS), world.cohort.expression(SPLITS), 0
    ).query("measure == 'probe'")
    declared = [
        name
        for name, covariate in world.cohort.declared.covariates.all().items()
        if covariate.kind in ("categorical", "embedding")
    ]
    assert set(zip(probes["group"], probes["covariate"], strict=True)) == {
        (group, name) for group in ("technical", "biological", "perturbation") for name in declared
    }
    assert (probes["value"].notna() | (probes["reason"].str.len() > 0)).all()


def test_heads_are_scored_on_the_samples_with_a_label_that_training_knows(world, gem):
    samples, expression = world.cohort.rows(SPLITS), world.cohort.expression(SPLITS)
    found = (
        latent_table(gem, "gem", samples, expression, 0)
        .query("measure == 'accuracy'")
        .set_index("covariate")
    )
    with torch.no_grad():
        logits = gem.network.classify(gem.posterior(expression).mean)
    assert set(found.index) == set(logits)
    for field in gem.metadata.heads():
        texts = label_texts(samples[field.name])
        known = texts.isin(list(field.levels)).to_numpy()
        if not known.any():
            assert pd.isna(found.loc[field.name, "value"]) and found.loc[field.name, "reason"]
            continue
        said = np.array(list(field.levels))[logits[field.name].argmax(dim=1).numpy()]
        index = pd.Index(field.levels)
        right = [
            np.mean(said[known][(texts[known] == name).to_numpy()] == name)
            for name in texts[known].unique()
        ]
        assert found.loc[field.name, "value"] == pytest.approx(np.mean(right))
        assert found.loc[field.name, "chance"] == pytest.approx(1 / texts[known].nunique())
        truth, guess = index.get_indexer(texts[known]), index.get_indexer(said[known])
        if set(guess) <= set(truth):
            assert found.loc[field.name, "value"] == pytest.approx(
                balanced_accuracy_score(truth, guess)
            )


def test_the_calibration_error_of_a_head_is_that_of_its_calibrated_probabilities(world, gem):
    samples, expression = world.cohort.rows(SPLITS), world.cohort.expression(SPLITS)
    found = (
        latent_table(gem, "gem", samples, expression, 0)
        .query("measure == 'calibration_error'")
        .set_index("covariate")["value"]
    )
    chances, labels = (
        gem.probabilities(gem.posterior(expression).mean),
        gem.metadata.labels(samples),
    )
    assert set(found.index) == set(chances)
    for name, value in found.dropna().items():
        assert value == calibration_error(chances[name], labels[name])
        assert 0 <= value <= 1


def test_units_that_do_not_vary_are_not_active(world, gem, rng):
    samples = world.cohort.rows(SPLITS)
    latents = rng.normal(0, 1, (len(samples), 12))
    latents[:, 1:4] = 0.3 + 0.05 * latents[:, 1:4]  # of the technical group: variance 0.0025
    found = (
        table_of(gem, samples, latents)
        .query("measure == 'active_units'")
        .set_index("group")["value"]
    )
    assert dict(found) == {"technical": 1, "biological": 4, "perturbation": 4}


def test_a_label_that_no_sample_has_is_null_with_a_reason(world, gem, rng):
    samples = world.cohort.rows(SPLITS).assign(tissue=None)
    found = table_of(gem, samples, rng.normal(0, 1, (len(samples), 12)))
    assert list(found.columns) == COLUMNS
    rows = found[found["covariate"] == "tissue"]
    assert len(rows) >= 3
    assert rows["value"].isna().all() and rows["reason"].str.len().gt(0).all()
