"""The predictive distribution against scipy with the same draws, and against the model's counts."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import kstest, norm

from pipeline.gem.model import predictive
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.observation import LatentSource, Observed
from pipeline.gem.model.predictive import predictive_distribution, predictive_log_likelihood
from pipeline.gem.model.query import DecoderInput, decode
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit

DRAWS, SEED = 5, 3
SPLIT = ["test_random"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def gem(model_directory) -> TrainedGEM:
    return replace(TrainedGEM.load(model_directory), network_weight=0.5)


@pytest.fixture(scope="module")
def samples(cohort) -> pd.DataFrame:
    return cohort.rows(SPLIT)


@pytest.fixture(scope="module")
def inputs(gem, samples) -> DecoderInput:
    return gem.decoder_input(samples, unknown="missing")


@pytest.fixture(scope="module")
def observed(cohort) -> Observed:
    return Observed(torch.from_numpy(cohort.expression(SPLIT)))


@pytest.fixture(scope="module")
def counts(cohort) -> np.ndarray:
    return cohort.counts(SPLIT)


@pytest.fixture(scope="module")
def totals(samples) -> np.ndarray:
    return samples["total"].to_numpy()


def deviation_of(gem: TrainedGEM, source: LatentSource) -> torch.Tensor:
    return torch.exp(0.5 * gem.network.observation.log_variance(source)).detach()


def decoded_by_hand(gem: TrainedGEM, inputs: DecoderInput, generator) -> torch.Tensor:
    """(N, G) decoded from one draw of the latents."""
    mean, log_variance = inputs.latents
    noise = torch.randn(mean.shape, generator=generator)
    return decode(gem.network, inputs, mean + torch.exp(0.5 * log_variance) * noise)


# --- the mixture over draws of the latents ---


@pytest.mark.parametrize("source", [LatentSource.PRIOR, LatentSource.REFERENCE])
@torch.no_grad()
def test_the_mixture_is_that_of_scipy_over_the_same_draws(
    gem, cohort, samples, counts, totals, source
):
    reference = cohort.expression(SPLIT)[::-1].copy() if source == LatentSource.REFERENCE else None
    inputs = gem.decoder_input(samples, reference, unknown="missing")
    result = predictive_distribution(gem, inputs, counts, totals, DRAWS, SEED)
    generator, deviation = seeded(SEED), deviation_of(gem, source)
    decoded = [decoded_by_hand(gem, inputs, generator)]
    draw = decoded[0] + deviation * torch.randn(decoded[0].shape, generator=generator)
    decoded += [decoded_by_hand(gem, inputs, generator) for _ in range(DRAWS - 1)]
    decoded = torch.stack(decoded).double().numpy()
    np.testing.assert_allclose(result.mean, decoded.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.draw, draw.clamp_min(0).numpy(), rtol=1e-4, atol=1e-4)
    scale, normals = 1e6 / totals[:, None], norm(decoded, deviation.double().numpy())
    lower = normals.cdf(np.log1p(np.maximum(counts - 0.5, 0) * scale)) * (counts > 0)
    upper = normals.cdf(np.log1p((counts + 0.5) * scale))
    np.testing.assert_allclose(result.lower, lower.mean(axis=0), atol=2e-4)
    np.testing.assert_allclose(result.upper, upper.mean(axis=0), atol=2e-4)


def test_probabilities_are_ordered_and_those_of_neighbouring_counts_meet(
    gem, inputs, counts, totals
):
    same, more, zero = (
        predictive_distribution(gem, inputs, other, totals, DRAWS, SEED)
        for other in (counts, counts + 1, 0 * counts)
    )
    assert (same.lower >= 0).all() and (same.upper <= 1 + 1e-6).all()
    assert (same.lower <= same.upper).all()
    np.testing.assert_array_equal(same.upper, more.lower)
    assert (zero.lower == 0).all()


def test_the_seed_decides_the_draws_and_blocks_of_rows_take_other_draws(
    gem, inputs, counts, totals, monkeypatch
):
    def mean() -> np.ndarray:
        return predictive_distribution(gem, inputs, counts, totals, 200, SEED).mean

    first = mean()
    np.testing.assert_array_equal(first, mean())
    monkeypatch.setattr(predictive, "_ROWS", 7)
    assert 0 < np.abs(mean() - first).max() < 0.3


def uniform_transform(distribution: predictive.PredictiveDistribution) -> np.ndarray:
    """(N, G) randomised probability integral transform of the observed counts."""
    random = np.random.default_rng(0).random(distribution.lower.shape)
    width = distribution.upper - distribution.lower
    return (distribution.lower + random * width).clip(0, 1)


def miscalibration(transform: np.ndarray) -> float:
    """Sum over ten bins of |share - 1/10|."""
    shares = np.histogram(transform, 10, (0, 1))[0] / transform.size
    return float(np.abs(shares - 0.1).sum())


@torch.no_grad()
def test_counts_drawn_from_the_model_are_calibrated_and_with_more_noise_they_are_not(gem, samples):
    # Few counts in each sample, so that zeros and rounding matter.
    many, totals = samples.iloc[np.arange(500) % len(samples)], np.full(500, 3e5)
    inputs = gem.decoder_input(many, unknown="missing")
    generator, deviation = seeded(99), deviation_of(gem, LatentSource.PRIOR)
    decoded = decoded_by_hand(gem, inputs, generator)
    noise = deviation * torch.randn(decoded.shape, generator=generator)
    transforms = []
    for factor in (1, 2):
        expression = (decoded + factor * noise).double().clamp_min(0).numpy()
        counts = np.round(np.expm1(expression) * totals[:, None] / 1e6).astype(np.int64)
        distribution = predictive_distribution(gem, inputs, counts, totals, 200, SEED)
        transforms.append(uniform_transform(distribution))
    # The genes of a sample share its latents: one gene of each is independent.
    independent = transforms[0][np.arange(500), np.arange(500) % transforms[0].shape[1]]
    assert kstest(independent, "uniform").pvalue > 1e-3
    assert miscalibration(transforms[0]) < 0.03 < 0.2 < miscalibration(transforms[1])


@pytest.mark.parametrize("name", ["negative_binomial", "multinomial"])
@torch.no_grad()
def test_counts_drawn_from_a_count_model_are_calibrated_and_likelier_than_under_other_models(
    cohort, params, name
):
    """Others: the other count model, and the same with another training seed."""
    (other_name,) = {"negative_binomial", "multinomial"} - {name}
    data = TrainingData.load(cohort, torch.device("cpu"), with_counts=True)

    def fitted(observation: str, seed: int) -> tuple[TrainedGEM, DecoderInput]:
        changes = {"train.epochs": 2, "model.observation": observation}
        with torch.enable_grad():
            gem = fit(data, params.override(changes), seed).gem
        inputs = gem.decoder_input(cohort.rows(["train"]))
        # Without variance in the latents, so that many counts tell the models apart.
        none = torch.full_like(inputs.latents.mean, -30.0)
        return gem, inputs._replace(latents=inputs.latents._replace(log_variance=none))

    own, inputs = fitted(name, 1)
    decoded, library = (
        decode(own.network, inputs, inputs.latents.mean),
        np.full(len(inputs[1]), 2000),
    )
    counts = own.network.observation.draw_counts(decoded, library, inputs.source, seeded(5))
    distribution, *others = (
        predictive_distribution(gem, given, counts, counts.sum(axis=1), 2, SEED)
        for gem, given in ((own, inputs), fitted(name, 2), fitted(other_name, 1))
    )
    mean = distribution.log_likelihood.mean()
    assert all(mean > other.log_likelihood.mean() for other in others)
    assert miscalibration(uniform_transform(distribution)) < 0.1


# --- the log likelihood of log-CPM ---


@torch.no_grad()
@pytest.mark.parametrize("draws", [1, 6])
def test_predictive_log_likelihood_is_the_log_of_the_mean_likelihood(gem, inputs, observed, draws):
    result, mean = predictive_log_likelihood(gem.network, observed, inputs, draws, seeded(1))
    generator, deviation = seeded(1), deviation_of(gem, LatentSource.PRIOR).double().numpy()
    decoded = torch.stack([decoded_by_hand(gem, inputs, generator) for _ in range(draws)])
    log_density = norm(decoded.double(), deviation).logpdf(observed.expression.double()).sum(2)
    expected = logsumexp(log_density, axis=0) - math.log(draws)
    # Float32 sums of 60 genes, whose normalisers alone are 55 nats.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(mean, decoded.mean(dim=0))


@torch.no_grad()
def test_more_draws_raise_the_predictive_log_likelihood_in_expectation(gem, inputs, observed):
    # Jensen: the log of a mean of K draws grows with K towards the marginal likelihood.
    def mean(draws: int) -> float:
        scores = [
            predictive_log_likelihood(gem.network, observed, inputs, draws, seeded(seed))[0]
            for seed in range(20)
        ]
        return float(torch.stack(scores).mean())

    assert mean(1) < mean(4) < mean(16)
