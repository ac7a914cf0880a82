"""The predictive distribution against scipy with the same draws, and against counts that the model itself has made."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest, norm
from support.comparison import world_of

from pipeline.gem.evaluation.metrics import calibration, pit_histogram, randomised_pit
from pipeline.gem.model import predictive as module
from pipeline.gem.model.gem import TrainedGEM, decode
from pipeline.gem.model.network import PRIOR, REFERENCE_SAMPLE
from pipeline.gem.model.predictive import predictive
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit

DRAWS, SEED = 5, 3


@pytest.fixture(scope="module")
def gem(cohort, params) -> TrainedGEM:
    return world_of(cohort, params).predictors.by_name["gem"].args[0][0]


@pytest.fixture(scope="module")
def scene(cohort, params):
    return world_of(cohort, params).by_split["test_random"][0]


def many(scene, rows: int) -> pd.DataFrame:
    return scene.samples.iloc[np.arange(rows) % len(scene.samples)]


@pytest.mark.parametrize("way", [PRIOR, REFERENCE_SAMPLE])
def test_the_mixture_is_that_of_scipy_over_the_same_draws(gem, scene, way):
    query = gem.query(
        scene.samples, scene.reference if way == REFERENCE_SAMPLE else None, unknown="missing"
    )
    latents, found = query.latents, predictive(gem, query, scene.counts, scene.totals, DRAWS, SEED)
    generator = torch.Generator().manual_seed(SEED)
    noise = np.exp(0.5 * gem.network.observation.log_variance(way).detach().numpy().astype(float))
    decoded = []
    with torch.no_grad():
        for number in range(DRAWS):
            z = latents.mean + torch.exp(0.5 * latents.log_variance) * torch.randn(
                latents.mean.shape, generator=generator
            )
            decoded.append(decode(gem.network, query, z).numpy().astype(float))
            if number == 0:
                drawn = (
                    decoded[0] + noise * torch.randn(decoded[0].shape, generator=generator).numpy()
                )
    np.testing.assert_allclose(found.mean, np.mean(decoded, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.draw, drawn.clip(0), rtol=1e-4, atol=1e-4)
    for row in range(0, len(scene.samples), 5):
        for gene in range(0, scene.counts.shape[1], 7):
            count, scale = float(scene.counts[row, gene]), 1e6 / scene.totals[row]
            below = [
                norm.cdf(np.log1p((count - 0.5) * scale), one[row, gene], noise[gene])
                if count
                else 0.0
                for one in decoded
            ]
            upto = [
                norm.cdf(np.log1p((count + 0.5) * scale), one[row, gene], noise[gene])
                for one in decoded
            ]
            assert found.lower[row, gene] == pytest.approx(np.mean(below), abs=2e-4)
            assert found.upper[row, gene] == pytest.approx(np.mean(upto), abs=2e-4)


def test_probabilities_are_ordered_and_those_of_neighbouring_counts_meet(gem, scene):
    query = gem.query(scene.samples, unknown="missing")
    one, next_ = (
        predictive(gem, query, scene.counts + step, scene.totals, DRAWS, SEED) for step in (0, 1)
    )
    assert (
        (one.lower >= 0).all() and (one.upper <= 1 + 1e-6).all() and (one.lower <= one.upper).all()
    )
    np.testing.assert_array_equal(one.upper, next_.lower)
    assert (predictive(gem, query, 0 * scene.counts, scene.totals, DRAWS, SEED).lower == 0).all()


def test_the_same_seed_gives_the_same_and_blocks_of_rows_only_other_draws(gem, scene, monkeypatch):
    query = gem.query(scene.samples, unknown="missing")

    def mean(draws: int = 200) -> np.ndarray:
        return predictive(gem, query, scene.counts, scene.totals, draws, SEED).mean

    first = mean()
    np.testing.assert_array_equal(first, mean())
    monkeypatch.setattr(module, "_ROWS", 7)
    assert np.abs(mean() - first).max() < 0.3


def counts_from(
    gem: TrainedGEM, samples: pd.DataFrame, totals: np.ndarray, stretch: float = 1.0
) -> np.ndarray:
    """Counts drawn from the model: latents, noise, and rounding; its noise `stretch` times as wide."""
    generator = torch.Generator().manual_seed(99)
    query = gem.query(samples, unknown="missing")
    with torch.no_grad():
        deviation = torch.exp(0.5 * query.latents.log_variance)
        decoded = decode(
            gem.network,
            query,
            query.latents.mean + deviation * torch.randn(deviation.shape, generator=generator),
        )
        noise = torch.exp(0.5 * gem.network.observation.log_variance(PRIOR)) * torch.randn(
            decoded.shape, generator=generator
        )
    expression = (decoded + stretch * noise).numpy().astype(float)
    return np.round(np.expm1(expression.clip(0)) * totals[:, None] / 1e6).astype(np.int64)


def test_counts_that_the_model_made_have_uniform_transforms_and_are_calibrated_to_chance(
    gem, scene, rng
):
    samples, totals = (
        many(scene, 500),
        np.full(500, 3e5),
    )  # few counts, so that zeros and rounding matter
    found = {}
    for stretch in (1.0, 2.0):
        counts = counts_from(gem, samples, totals, stretch)
        said = predictive(gem, gem.query(samples, unknown="missing"), counts, totals, 200, SEED)
        pit = randomised_pit(said.lower, said.upper, rng).clip(0, 1)
        found[stretch] = calibration(pit_histogram(pit, np.zeros(500, dtype=int)), np.ones((1, 1)))[
            0
        ]
        if stretch == 1:
            # Genes of a sample share its latents: one gene each is independent.
            assert (
                kstest(pit[np.arange(500), np.arange(500) % pit.shape[1]], "uniform").pvalue > 1e-3
            )
    assert found[1.0] < 0.03 < 0.2 < found[2.0]


@pytest.mark.parametrize("observation", ["negative_binomial", "multinomial"])
def test_counts_that_a_model_of_counts_has_made_are_more_likely_to_it_than_to_others_and_calibrated(
    cohort, params, observation
):
    """Its own draws, judged by itself, by the other model of counts, and by one of another seed."""
    names = {"negative_binomial", "multinomial"}
    data = TrainingData.load(cohort, torch.device("cpu"), counted=True)
    own, *others = (
        fit(data, params.override({"train.epochs": 2, "model.observation": name}), seed).gem
        for name, seed in ((observation, 1), (observation, 2), (*(names - {observation}), 1))
    )
    samples = cohort.rows(["train"])

    def known(gem: TrainedGEM):
        """A query whose latents are certain: many counts tell them apart from any other draw."""
        query = gem.query(samples)
        return query._replace(
            latents=query.latents._replace(log_variance=torch.full_like(query.latents.mean, -30.0))
        )

    with torch.no_grad():
        query = known(own)
        decoded = decode(own.network, query, query.latents.mean)
        counts = own.network.observation.draw_counts(
            decoded, np.full(len(samples), 2000), query.way, torch.Generator().manual_seed(5)
        )
    mine, *theirs = (
        predictive(gem, known(gem), counts, counts.sum(axis=1), 2, SEED) for gem in (own, *others)
    )
    assert all(mine.log_likelihood.mean() > one.log_likelihood.mean() for one in theirs)
    pit = randomised_pit(mine.lower, mine.upper, np.random.default_rng(0))
    assert calibration(pit_histogram(pit, np.zeros(len(pit), dtype=int)), np.ones((1, 1)))[0] < 0.1
