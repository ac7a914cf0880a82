"""Observation models against scipy, mpmath and their own draws, over all depths and dispersions."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import binom, multinomial, nbinom, norm

from pipeline.gem.data.expression import log_cpm
from pipeline.gem.model.normal import NARROW, normal_log_mass, normal_log_mass_between
from pipeline.gem.model.observation import (
    CountProbabilities,
    GeneMoments,
    LatentSource,
    Observation,
    Observed,
)
from pipeline.gem.model.observation_models import NegativeBinomial, build_observation
from pipeline.gem.simulation.expected_log_cpm import expected_log_cpm

GENES = 7
COUNT_MODELS = ("negative_binomial", "multinomial")
MODELS = ("normal", *COUNT_MODELS)


def model_of(name: str, genes: int = GENES) -> Observation:
    """A model with different noise for each gene and latent source."""
    model = build_observation(name, genes, 0.01)
    noise = torch.linspace(-1, 2, len(LatentSource) * genes).reshape(-1, genes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(noise)
    return model.requires_grad_(False)


def observed(counts: np.ndarray) -> Observed:
    return Observed(torch.from_numpy(log_cpm(counts, counts.sum(1))), torch.from_numpy(counts))


def probabilities(
    model: Observation, counts: np.ndarray, decoded: torch.Tensor, source
) -> CountProbabilities:
    totals = torch.from_numpy(counts.sum(1))
    return model.count_probabilities(observed(counts), totals, source)(decoded)


@pytest.fixture
def counts(rng) -> np.ndarray:
    return rng.negative_binomial(2, 0.02, (5, GENES)) + np.eye(5, GENES, dtype=np.int64)


@pytest.fixture
def decoded(rng) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 1, (5, GENES))).float()


def fractions(decoded: torch.Tensor) -> np.ndarray:
    return torch.softmax(decoded.double(), 1).numpy()


def theta_of(model: Observation, source: int) -> np.ndarray:
    return model.log_inverse_dispersion(source).double().exp().numpy()


def scipy_marginals(model: Observation, library, decoded: torch.Tensor, source: int):
    """The distribution of each gene's count in libraries (B, 1)."""
    if not isinstance(model, NegativeBinomial):
        return binom(library, fractions(decoded))
    theta = theta_of(model, source)
    return nbinom(theta, theta / (theta + fractions(decoded) * library))


def scipy_log_probability(
    model: Observation, counts: np.ndarray, decoded: torch.Tensor, source: int
) -> np.ndarray:
    library = counts.sum(1)
    if isinstance(model, NegativeBinomial):
        return scipy_marginals(model, library[:, None], decoded, source).logpmf(counts).sum(1)
    return np.array([*map(multinomial.logpmf, counts, library, fractions(decoded))])


# --- likelihoods ---


@pytest.mark.parametrize("name", COUNT_MODELS)
@pytest.mark.parametrize("source", LatentSource)
def test_likelihood_of_counts_is_that_of_scipy(name, source, counts, decoded):
    model = model_of(name)
    log_likelihood = model.log_likelihood(observed(counts), decoded, source).numpy()
    expected = scipy_log_probability(model, counts, decoded, source)
    np.testing.assert_allclose(log_likelihood, expected, rtol=1e-9)


def exact_softmax(decoded: torch.Tensor) -> list[mpmath.mpf]:
    weights = [mpmath.exp(mpmath.mpf(value)) for value in decoded.double().tolist()]
    total = mpmath.fsum(weights)
    return [weight / total for weight in weights]


@pytest.mark.parametrize("library", [1, 100, 10_000, 10**6, 10**8])
@pytest.mark.parametrize("theta", [1e-4, 1e-2, 1.0, 1e4, 1e8])
def test_negative_binomial_is_accurate_to_a_thousandth_nat(library, theta, rng):
    model = NegativeBinomial(2000).requires_grad_(False)
    model.log_inverse_dispersions.fill_(math.log(theta))
    decoded = torch.from_numpy(rng.normal(0, 2, (1, 2000))).float()
    counts = rng.multinomial(library, fractions(decoded)[0])[None]
    log_likelihood = model.log_likelihood(observed(counts), decoded, 0).item()
    with mpmath.workdps(50):
        r = mpmath.exp(mpmath.mpf(model.log_inverse_dispersion(0)[0].item()))
        exact = mpmath.mpf(0)
        for count, fraction in zip(counts[0].tolist(), exact_softmax(decoded[0]), strict=True):
            mean = library * fraction
            exact += mpmath.loggamma(count + r) - mpmath.loggamma(r) - mpmath.loggamma(count + 1)
            exact += r * mpmath.log(r / (r + mean)) + count * mpmath.log(mean / (r + mean))
    assert abs(log_likelihood - float(exact)) < 1e-3


@pytest.mark.parametrize("library", [1, 10_000, 10**8])
def test_multinomial_is_accurate_to_a_thousandth_nat(library, rng):
    decoded = torch.from_numpy(rng.normal(0, 2, (1, 500))).float()
    counts = rng.multinomial(library, fractions(decoded)[0])[None]
    model = model_of("multinomial", 500)
    log_likelihood = model.log_likelihood(observed(counts), decoded, 0).item()
    with mpmath.workdps(50):
        exact = mpmath.loggamma(library + 1) + mpmath.fsum(
            count * mpmath.log(fraction) - mpmath.loggamma(count + 1)
            for count, fraction in zip(counts[0].tolist(), exact_softmax(decoded[0]), strict=True)
        )
    assert abs(log_likelihood - float(exact)) < 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_the_likelihood_is_that_of_finite_differences(name, counts, generator):
    model, sample = model_of(name).double().requires_grad_(True), observed(counts)
    sample = Observed(sample.expression.double(), sample.counts)
    decoded = torch.randn(5, GENES, dtype=torch.float64, generator=generator).requires_grad_()

    def log_likelihood(decoded, *_):
        return model.log_likelihood(sample, decoded, 1)

    assert torch.autograd.gradcheck(log_likelihood, (decoded, *model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_a_latent_source_per_sample_is_that_of_each_sample(name, counts, decoded):
    model, sources = model_of(name), torch.tensor([0, 3, 1, 2, 3])
    together = probabilities(model, counts, decoded, sources).log_likelihood
    for row, source in enumerate(sources.tolist()):
        one = slice(row, row + 1)
        alone = probabilities(model, counts[one], decoded[one], source).log_likelihood
        torch.testing.assert_close(together[one], alone)
        if name != "normal":
            likelihood = model.log_likelihood(observed(counts), decoded, sources)[one]
            torch.testing.assert_close(likelihood, alone)


@pytest.mark.parametrize("name", COUNT_MODELS)
def test_a_constant_added_to_all_logits_changes_nothing(name, counts, decoded):
    model, sample = model_of(name), observed(counts)
    before, after = (model.log_likelihood(sample, x, 0) for x in (decoded, decoded + 3))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(model.log_cpm(decoded + 3), model.log_cpm(decoded))


# --- decoded values ---


@pytest.mark.parametrize("name", MODELS)
def test_fractions_are_the_normalised_decoded_values(name, decoded):
    linear = (decoded + 3).clamp_min(0).expm1() if name == "normal" else decoded.exp()
    torch.testing.assert_close(
        model_of(name).fractions(decoded + 3), linear / linear.sum(1, keepdim=True)
    )


@pytest.mark.parametrize("name", COUNT_MODELS)
@pytest.mark.parametrize("total", [30, 3_000, 10_000_000])
def test_expected_log_cpm_is_the_mean_over_drawn_counts(name, total, decoded, generator):
    model, totals = model_of(name), np.full(20_000, total)
    expected = model.expected_log_cpm(decoded[:1], torch.tensor([total]), 1)[0].numpy()
    counts = model.draw_counts(decoded[:1].expand(len(totals), GENES), totals, 1, generator)
    draws = log_cpm(counts, totals).astype(np.float64)
    error = draws.std(0) / math.sqrt(len(totals))
    assert (np.abs(expected - draws.mean(0)) < 4 * error + 1e-3).all()


@pytest.mark.parametrize("total", [30, 3_000, 10_000_000])
def test_expected_log_cpm_of_a_negative_binomial_is_the_exact_integral(total, decoded):
    model = model_of("negative_binomial")
    result = model.expected_log_cpm(decoded, torch.full((5,), total), 2).numpy()
    exact = expected_log_cpm(fractions(decoded) * total, 1 / theta_of(model, 2), total)
    np.testing.assert_allclose(result, exact, atol=1e-3)


@pytest.mark.parametrize("name", COUNT_MODELS)
def test_genes_outside_the_model_keep_their_share_of_the_total(name, rng):
    counts = rng.poisson(50, (400, GENES))
    model = build_observation(name, GENES, 0.01)
    expression = torch.from_numpy(log_cpm(counts, counts.sum(1) * 4))
    bias = model.initialise(GeneMoments.of(expression.split(300)))
    assert model.modelled_share.item() == pytest.approx(0.25, rel=1e-5)
    mean_cpm = model.log_cpm(bias[None]).exp().mean().item() - 1
    assert mean_cpm == pytest.approx(0.25e6 / GENES, rel=1e-3)


# --- draws ---


@pytest.mark.parametrize("name", COUNT_MODELS)
def test_drawn_counts_have_the_mean_and_variance_of_the_closed_form(name, decoded, generator):
    model, library = model_of(name), np.full(40_000, 500)
    draws = model.draw_counts(decoded[:1].expand(len(library), GENES), library, 2, generator)
    marginals = scipy_marginals(model, 500, decoded[:1], 2)
    mean, variance = marginals.mean()[0], marginals.var()[0]
    assert np.issubdtype(draws.dtype, np.integer)
    assert (np.abs(draws.mean(0) - mean) < 5 * np.sqrt(variance / len(library))).all()
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.1)
    # A multinomial has the library exactly, a negative binomial on average.
    assert (len(np.unique(draws.sum(1))) == 1) == (name == "multinomial")


def test_drawn_counts_of_a_normal_have_their_library_and_the_noise_of_log_cpm(generator):
    model, library = model_of("normal", 200), np.full(500, 10**9)
    draws = model.draw_counts(torch.linspace(6, 9, 200).expand(500, 200), library, 0, generator)
    assert (draws.sum(1) == library).all()
    centred = np.log(draws) - np.log(draws).mean(1, keepdims=True)
    expected = np.exp(0.5 * model.log_variance(0).numpy())
    np.testing.assert_allclose(centred.std(0), expected, rtol=0.2)


@pytest.mark.parametrize("name", MODELS)
def test_draws_depend_on_the_generator_alone(name, decoded):
    model = model_of(name)
    first, again, other = (
        model.draw_counts(decoded + 3, np.full(5, 1000), 0, torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# --- probabilities of counts ---


@pytest.mark.parametrize("name", COUNT_MODELS)
def test_count_probabilities_are_those_of_scipy(name, counts, decoded):
    model = model_of(name)
    fewer, at_most, nats = probabilities(model, counts, decoded, 1)
    marginals = scipy_marginals(model, counts.sum(1)[:, None], decoded, 1)
    np.testing.assert_allclose(at_most, marginals.cdf(counts), atol=1e-6)
    np.testing.assert_allclose(fewer, marginals.cdf(counts - 1), atol=1e-6)
    expected = scipy_log_probability(model, counts, decoded, 1)
    np.testing.assert_allclose(nats, expected, rtol=1e-9)


@pytest.mark.parametrize("depth", [2, 300, 10**6])
def test_count_probability_of_a_normal_is_its_mass_on_the_interval_of_the_count(depth, rng):
    model = model_of("normal")
    counts = rng.poisson(depth * rng.gamma(1, 1, (5, GENES))) + np.eye(5, GENES, dtype=np.int64)
    scale = 1e6 / counts.sum(1, keepdims=True)
    decoded = observed(counts).expression + torch.linspace(-6, 6, GENES)
    fewer, at_most, nats = (
        part.numpy() for part in probabilities(model, counts, decoded, LatentSource.UNSEEN_STUDY)
    )
    edges = np.log1p(np.maximum(counts - 0.5, 0) * scale), np.log1p((counts + 0.5) * scale)
    deviation = np.exp(0.5 * model.log_variance(LatentSource.UNSEEN_STUDY).double().numpy())
    low, high = ((edge - decoded.double().numpy()) / deviation for edge in edges)
    low[counts == 0] = -np.inf
    mirrored = low + high > 0
    low, high = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    exact = norm.logcdf(high) + np.log1p(-np.exp(norm.logcdf(low) - norm.logcdf(high)))
    np.testing.assert_allclose(nats, exact.sum(1), rtol=1e-3, atol=2e-2)
    np.testing.assert_allclose(at_most - fewer, norm.cdf(high) - norm.cdf(low), atol=1e-5)


@pytest.mark.parametrize(("name", "most"), [("normal", 2000), ("multinomial", 12)])
def test_probabilities_of_all_counts_of_a_gene_sum_to_one(name, most):
    first = torch.arange(most + 1)
    counts = torch.stack([first, (12 - first).clamp_min(0)], 1)
    sample = Observed(torch.zeros(most + 1, 2), counts)
    decoded = torch.tensor([[math.log(3e5), math.log(7e5)]]).expand(most + 1, 2)
    count_probabilities = model_of(name, 2).count_probabilities(sample, torch.tensor([12]), 0)
    fewer, at_most, _ = count_probabilities(decoded)
    masses = at_most[:, 0] - fewer[:, 0]
    assert masses.sum().item() == pytest.approx(1, abs=1e-3) and masses.min() >= 0


@pytest.mark.parametrize(("limit", "tolerance"), [(20, 1e-2), (6, 1e-4)])
def test_mass_of_a_narrow_interval_is_that_between_its_edges(limit, tolerance):
    centre = torch.linspace(-limit, limit, 401, dtype=torch.float64)
    width = torch.tensor(NARROW, dtype=torch.float64)
    torch.testing.assert_close(
        normal_log_mass(width)(centre.clone()),
        normal_log_mass_between(centre - width / 2, centre + width / 2),
        rtol=0,
        atol=tolerance,
    )


@pytest.mark.parametrize("name", ["normal", "negative_binomial", "multinomial"])
def test_cumulative_probabilities_of_some_genes_are_those_of_all(name, rng):
    counts, genes = rng.poisson(5, (4, 6)), torch.tensor([1, 4])
    decoded = torch.from_numpy(rng.normal(10, 1, (4, 6))).float()
    arguments = observed(counts), torch.from_numpy(counts.sum(1)), 0
    whole = model_of(name, 6).count_probabilities(*arguments)(decoded)
    part = model_of(name, 6).count_probabilities(*arguments, genes)(decoded)
    torch.testing.assert_close(part.fewer, whole.fewer[:, genes])
    torch.testing.assert_close(part.at_most, whole.at_most[:, genes])
    torch.testing.assert_close(part.log_likelihood, whole.log_likelihood)
