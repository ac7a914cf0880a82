"""Observation models against scipy, mpmath and counts that they have drawn themselves: accurate wherever cohorts go."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import binom, multinomial, nbinom, norm

from pipeline.gem.data.expression import log_cpm
from pipeline.gem.model.normal import NARROW, normal_log_mass, normal_log_mass_between
from pipeline.gem.model.observation import (
    OBSERVATIONS,
    NegativeBinomial,
    Observation,
    Observed,
    observation,
)
from pipeline.gem.simulation.expected_log_cpm import expected_log_cpm

GENES, LATENT_SOURCES = 7, 4
COUNTED = [name for name in OBSERVATIONS if name != "normal"]


def made(name: str, genes: int = GENES) -> Observation:
    """A model with a noise of its own for each gene and way."""
    model = observation(name, LATENT_SOURCES, genes, 0.01)
    with torch.no_grad():
        for noise in model.parameters():
            noise.copy_(
                torch.linspace(-1, 2, LATENT_SOURCES * genes).reshape(LATENT_SOURCES, genes)
            )
    return model.requires_grad_(False)


def observed(counts: np.ndarray) -> Observed:
    return Observed(torch.from_numpy(log_cpm(counts, counts.sum(1))), torch.from_numpy(counts))


@pytest.fixture
def counts(rng) -> np.ndarray:
    return rng.negative_binomial(2, 0.02, (5, GENES)) + np.eye(5, GENES, dtype=np.int64)


@pytest.fixture
def decoded(rng) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 1, (5, GENES))).float()


def shares(decoded: torch.Tensor) -> np.ndarray:
    return torch.softmax(decoded.double(), 1).numpy()


def scipy_log_probability(
    name: str, model: Observation, counts: np.ndarray, decoded: torch.Tensor, way: int
) -> np.ndarray:
    library = counts.sum(1)
    if name == "multinomial":
        return np.array(
            [
                multinomial.logpmf(row, total, share)
                for row, total, share in zip(counts, library, shares(decoded), strict=True)
            ]
        )
    theta = model.log_inverse_dispersion(way).double().exp().detach().numpy()
    return nbinom.logpmf(counts, theta, theta / (theta + shares(decoded) * library[:, None])).sum(1)


# --- likelihoods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("way", range(LATENT_SOURCES))
def test_the_likelihood_of_counts_is_that_of_scipy(name, way, counts, decoded):
    model = made(name)
    np.testing.assert_allclose(
        model.log_likelihood(observed(counts), decoded, way).detach().numpy(),
        scipy_log_probability(name, model, counts, decoded, way),
        rtol=1e-9,
    )


@pytest.mark.parametrize("library", [1, 100, 10_000, 10**6, 10**8])
@pytest.mark.parametrize("theta", [1e-4, 1e-2, 1.0, 1e4, 1e8])
def test_a_negative_binomial_is_accurate_to_a_thousandth_of_a_nat_at_every_depth_and_dispersion(
    library, theta, rng
):
    genes = 2000
    model = NegativeBinomial(LATENT_SOURCES, genes)
    with torch.no_grad():
        model.log_inverse_dispersions.fill_(math.log(theta))
    decoded = torch.from_numpy(rng.normal(0, 2, (1, genes))).float()
    counts = rng.multinomial(library, shares(decoded)[0])[None]
    found = model.log_likelihood(observed(counts), decoded, 0).item()
    with mpmath.workdps(50):
        r = mpmath.exp(mpmath.mpf(model.log_inverse_dispersion(0)[0].item()))
        logits = [mpmath.mpf(value) for value in decoded[0].double().tolist()]
        norm_ = mpmath.fsum(mpmath.exp(value) for value in logits)
        exact = mpmath.mpf(0)
        for count, logit in zip(counts[0].tolist(), logits, strict=True):
            mean = library * mpmath.exp(logit) / norm_
            exact += mpmath.loggamma(count + r) - mpmath.loggamma(r) - mpmath.loggamma(count + 1)
            exact += r * mpmath.log(r / (r + mean)) + count * mpmath.log(mean / (r + mean))
    assert abs(found - float(exact)) < 1e-3


@pytest.mark.parametrize("library", [1, 10_000, 10**8])
def test_a_multinomial_is_accurate_to_a_thousandth_of_a_nat_at_every_depth(library, rng):
    decoded = torch.from_numpy(rng.normal(0, 2, (1, 500))).float()
    counts = rng.multinomial(library, shares(decoded)[0])[None]
    found = made("multinomial", 500).log_likelihood(observed(counts), decoded, 0).item()
    with mpmath.workdps(50):
        logits = [mpmath.mpf(value) for value in decoded[0].double().tolist()]
        log_norm = mpmath.log(mpmath.fsum(mpmath.exp(value) for value in logits))
        exact = mpmath.loggamma(library + 1) + mpmath.fsum(
            count * (logit - log_norm) - mpmath.loggamma(count + 1)
            for count, logit in zip(counts[0].tolist(), logits, strict=True)
        )
    assert abs(found - float(exact)) < 1e-3


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_the_gradient_is_that_of_finite_differences(name, counts):
    model, seen = made(name).double().requires_grad_(True), observed(counts)
    seen = Observed(seen.expression.double(), seen.counts)
    decoded = torch.randn(
        5, GENES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    inputs = (decoded, *model.parameters())
    assert torch.autograd.gradcheck(
        lambda decoded, *noise: model.log_likelihood(seen, decoded, 1), inputs
    )


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_a_way_for_each_sample_is_the_way_of_each(name, counts, decoded):
    model, ways = made(name), torch.tensor([0, 3, 1, 2, 3])
    if (
        name == "normal"
    ):  # its likelihood is asked for one way at a time, its verdict on counts for many
        together = model.count_probabilities(
            observed(counts), torch.from_numpy(counts.sum(1)), ways
        )(decoded)[2]
    else:
        together = model.log_likelihood(observed(counts), decoded, ways)
    for row, way in enumerate(ways.tolist()):
        one = observed(counts[row : row + 1])
        alone = (
            model.count_probabilities(one, torch.from_numpy(one.counts.sum(1).numpy()), way)(
                decoded[row : row + 1]
            )[2]
            if name == "normal"
            else model.log_likelihood(one, decoded[row : row + 1], way)
        )
        torch.testing.assert_close(together[row], alone[0])


@pytest.mark.parametrize("name", COUNTED)
def test_a_constant_added_to_all_logits_changes_nothing(name, counts, decoded):
    model, seen = made(name), observed(counts)
    torch.testing.assert_close(
        model.log_likelihood(seen, decoded + 3, 0),
        model.log_likelihood(seen, decoded, 0),
        rtol=1e-5,
        atol=1e-3,
    )
    torch.testing.assert_close(model.log_cpm(decoded + 3), model.log_cpm(decoded))


# --- what is decoded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_fractions_sum_to_one_and_are_those_of_what_is_decoded(name, decoded):
    found = made(name).fractions(decoded.clone() + 3)
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    linear = (decoded + 3).clamp_min(0).expm1() if name == "normal" else decoded.exp()
    torch.testing.assert_close(found, linear / linear.sum(1, keepdim=True))


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("total", [30, 3_000, 10_000_000])
def test_the_expected_log_cpm_is_the_mean_of_that_of_drawn_counts(name, total, decoded, generator):
    model, rows = made(name), 20_000
    totals = torch.full((1,), total)
    found = model.expected_log_cpm(decoded[:1], totals, 1)[0].detach().numpy()
    drawn = model.draw_counts(decoded[:1].expand(rows, GENES), np.full(rows, total), 1, generator)
    sampled = log_cpm(drawn, np.full(rows, total)).astype(np.float64)
    error = sampled.std(0) / math.sqrt(rows)
    assert (np.abs(found - sampled.mean(0)) < 4 * error + 1e-3).all()


@pytest.mark.parametrize("total", [30, 3_000, 10_000_000])
def test_the_expected_log_cpm_of_a_negative_binomial_is_the_exact_integral(total, decoded):
    model = made("negative_binomial")
    theta = model.log_inverse_dispersion(2).double().exp().detach().numpy()
    found = model.expected_log_cpm(decoded, torch.full((5,), total), 2).detach().numpy()
    np.testing.assert_allclose(
        found, expected_log_cpm(shares(decoded) * total, 1 / theta, total), atol=1e-3
    )


@pytest.mark.parametrize("name", COUNTED)
def test_genes_left_out_of_the_model_keep_their_share_of_a_total(name, rng):
    counts = rng.poisson(50, (400, GENES))
    totals = counts.sum(1) * 4
    model = observation(name, LATENT_SOURCES, GENES, 0.01)
    bias = model.start(torch.from_numpy(log_cpm(counts, totals)))
    assert model.modelled_share.item() == pytest.approx(0.25, rel=1e-5)
    torch.testing.assert_close(
        model.log_cpm(bias[None]).exp().mean(), torch.tensor(1 + 0.25e6 / GENES), rtol=1e-3, atol=0
    )


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTED)
def test_drawn_counts_have_the_mean_and_the_variance_of_the_closed_form(name, decoded, generator):
    model, rows, library = made(name), 40_000, 500
    drawn = model.draw_counts(decoded[:1].expand(rows, GENES), np.full(rows, library), 2, generator)
    mean = shares(decoded[:1])[0] * library
    if name == "multinomial":
        variance = mean * (1 - mean / library)
        assert (drawn.sum(1) == library).all()
    else:
        variance = mean + mean**2 / model.log_inverse_dispersion(2).double().exp().detach().numpy()
        assert len(np.unique(drawn.sum(1))) > 100
    assert np.issubdtype(drawn.dtype, np.integer)
    assert (np.abs(drawn.mean(0) - mean) < 5 * np.sqrt(variance / rows)).all()
    np.testing.assert_allclose(drawn.var(0), variance, rtol=0.1)


def test_drawn_counts_of_a_normal_have_exactly_their_totals_and_the_noise_of_log_cpm(generator):
    model, rows, genes = made("normal", 200), 500, 200
    decoded = torch.linspace(6, 9, genes).expand(rows, genes)
    library = np.full(rows, 10**9)
    drawn = model.draw_counts(decoded, library, 0, generator)
    assert (drawn.sum(1) == library).all()
    centred = np.log(drawn) - np.log(drawn).mean(1, keepdims=True)
    expected = np.exp(0.5 * model.log_variance(0).detach().numpy())
    np.testing.assert_allclose(centred.std(0), expected, rtol=0.2)


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_draws_depend_on_the_generator_alone(name, decoded):
    model, library = made(name), np.full(5, 1000)
    first, again = (
        model.draw_counts(decoded + 3, library, 0, torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(
        first, model.draw_counts(decoded + 3, library, 0, torch.Generator().manual_seed(4))
    )


# --- the same measure for all: the probability of the counts ------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTED)
def test_the_verdict_on_counts_is_that_of_scipy(name, counts, decoded):
    model, way = made(name), 1
    fewer, at_most, nats = (
        part.detach().numpy()
        for part in model.count_probabilities(
            observed(counts), torch.from_numpy(counts.sum(1)), way
        )(decoded)
    )
    library, share = counts.sum(1)[:, None], shares(decoded)
    theta = (
        None
        if name == "multinomial"
        else model.log_inverse_dispersion(way).double().exp().detach().numpy()
    )
    margin = (
        binom(library, share) if theta is None else nbinom(theta, theta / (theta + share * library))
    )
    np.testing.assert_allclose(at_most, margin.cdf(counts), atol=1e-6)
    np.testing.assert_allclose(fewer, margin.cdf(counts - 1), atol=1e-6)
    np.testing.assert_allclose(
        nats, scipy_log_probability(name, model, counts, decoded, way), rtol=1e-9
    )


@pytest.mark.parametrize("depth", [2, 300, 10**6])
def test_the_verdict_of_a_normal_is_its_mass_on_the_interval_that_rounds_to_the_count(depth, rng):
    model, way = made("normal"), 3
    counts = rng.poisson(depth * rng.gamma(1, 1, (5, GENES))) + np.eye(5, GENES, dtype=np.int64)
    totals = counts.sum(1)
    decoded = torch.from_numpy(log_cpm(counts, totals)) + torch.linspace(-6, 6, GENES)
    fewer, at_most, nats = (
        part.detach().numpy()
        for part in model.count_probabilities(observed(counts), torch.from_numpy(totals), way)(
            decoded
        )
    )
    scale, deviation = (
        1e6 / totals[:, None],
        np.exp(0.5 * model.log_variance(way).detach().double().numpy()),
    )
    with np.errstate(divide="ignore"):
        low = np.where(counts > 0, np.log1p(np.maximum(counts - 0.5, 0) * scale), -np.inf)
    low, high = (
        (edge - decoded.double().numpy()) / deviation
        for edge in (low, np.log1p((counts + 0.5) * scale))
    )
    flip = low + high > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    exact = (norm.logcdf(high) + np.log1p(-np.exp(norm.logcdf(low) - norm.logcdf(high)))).sum(1)
    np.testing.assert_allclose(nats, exact, rtol=1e-3, atol=2e-2)
    np.testing.assert_allclose(
        at_most - fewer, np.exp(norm.logcdf(high)) - np.exp(norm.logcdf(low)), atol=1e-5
    )


@pytest.mark.parametrize(("name", "most"), [("normal", 2000), ("multinomial", 12)])
def test_probabilities_of_all_counts_of_a_gene_sum_to_one(name, most):
    model, decoded, first = (
        made(name, 2),
        torch.tensor([[math.log(3e5), math.log(7e5)]]),
        torch.arange(most + 1),
    )
    seen = Observed(torch.zeros(most + 1, 2), torch.stack([first, (12 - first).clamp_min(0)], 1))
    fewer, at_most, _ = model.count_probabilities(seen, torch.tensor([12]), 0)(
        decoded.expand(most + 1, 2)
    )
    masses = at_most[:, 0] - fewer[:, 0]
    assert masses.sum().item() == pytest.approx(1, abs=1e-3) and masses.min() >= 0


def test_mass_of_a_narrow_interval_is_that_between_its_edges():
    centre, width = (
        torch.linspace(-20, 20, 401, dtype=torch.float64),
        torch.tensor(NARROW, dtype=torch.float64),
    )
    torch.testing.assert_close(
        normal_log_mass(centre, width),
        normal_log_mass_between(centre - width / 2, centre + width / 2),
        rtol=0,
        atol=1e-2,
    )
    near = centre.abs() < 6
    torch.testing.assert_close(
        normal_log_mass(centre, width)[near],
        normal_log_mass_between(centre - width / 2, centre + width / 2)[near],
        rtol=0,
        atol=1e-4,
    )


def test_an_unknown_observation_model_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match="poisson is no observation model; known: normal, negative_binomial, multinomial",
    ):
        observation("poisson", 1, 1, 0.01)
