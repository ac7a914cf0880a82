"""Densities and divergences of Normals against torch.distributions, Monte Carlo and differences."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pipeline.gem.model.normal import (
    kl_normal,
    mean_log_likelihoods,
    normal_log_likelihood,
    sample_normal,
)

assert_close = torch.testing.assert_close


def randn(generator, *shape) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def two_normals(generator, rows=7, size=5) -> tuple[torch.Tensor, ...]:
    """Means and log variances (rows, size) of two families; log variances over the whole range."""
    means = (randn(generator, rows, size) for _ in range(2))
    log_variances = (3 * randn(generator, rows, size).clamp(-3, 3) for _ in range(2))
    (mean_q, log_q), (mean_p, log_p) = zip(means, log_variances, strict=True)
    return mean_q, log_q, mean_p, log_p


def normal(mean: torch.Tensor, log_variance: torch.Tensor) -> Normal:
    return Normal(mean, torch.exp(0.5 * log_variance))


# --- densities ---


def test_log_likelihood_is_the_sum_over_genes_of_normal_log_densities(generator):
    value, mean = randn(generator, 2, 7, 5)
    log_variance = torch.linspace(-9, 9, 5, dtype=torch.float64)
    expected = normal(mean, log_variance).log_prob(value).sum(dim=1)
    result = normal_log_likelihood(value, mean, log_variance)
    assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_log_likelihood_in_float32_is_within_a_thousandth_nat_of_float64(generator):
    # The largest log-CPM, and variances down to the floor of the default parameters.
    value = (14 * torch.rand(20, 500, generator=generator)).double()
    mean = (value + 0.3 * randn(generator, 20, 500)).float().double()
    log_variance = torch.linspace(math.log(0.09), 1.0, 500).double()
    exact = normal_log_likelihood(value, mean, log_variance)
    single = normal_log_likelihood(value.float(), mean.float(), log_variance.float())
    assert (single.double() - exact).abs().max() < 1e-3


def test_mean_log_likelihoods_are_means_over_the_first_samples(generator):
    value, log_variances = randn(generator, 7, 5), randn(generator, 3, 5)
    means = {0: randn(generator, 7, 5), 2: randn(generator, 4, 5)}
    result = mean_log_likelihoods(value, log_variances, means)
    for family, mean in means.items():
        each = normal(mean, log_variances[family]).log_prob(value[: len(mean)]).sum(dim=1)
        assert_close(result[family], each.mean(), rtol=1e-12, atol=1e-12)


def test_gradients_of_mean_log_likelihoods_are_finite_differences(generator):
    value, log_variances = randn(generator, 4, 3), randn(generator, 3, 3).requires_grad_()
    means = [randn(generator, rows, 3).requires_grad_() for rows in (4, 2)]

    def of_used(log_variances, first, second):
        return mean_log_likelihoods(value, log_variances, {0: first, 2: second})[[0, 2]]

    assert torch.autograd.gradcheck(of_used, (log_variances, *means))


# --- divergences ---


def test_kl_is_that_of_torch_distributions_per_dimension(generator):
    mean_q, log_q, mean_p, log_p = two_normals(generator)
    expected = kl_divergence(normal(mean_q, log_q), normal(mean_p, log_p))
    assert_close(kl_normal(mean_q, log_q, mean_p, log_p), expected, rtol=1e-9, atol=1e-9)


def test_kl_agrees_with_its_monte_carlo_definition(generator):
    mean_q, log_q, mean_p, log_p = (part / 3 for part in two_normals(generator, rows=2, size=3))
    draws = mean_q + torch.exp(0.5 * log_q) * randn(generator, 200_000, 2, 3)
    ratio = normal(mean_q, log_q).log_prob(draws) - normal(mean_p, log_p).log_prob(draws)
    error = ratio.std(dim=0) / math.sqrt(len(ratio))
    assert ((kl_normal(mean_q, log_q, mean_p, log_p) - ratio.mean(dim=0)).abs() < 4.5 * error).all()


def test_kl_is_zero_for_equal_normals_and_positive_for_others(generator):
    mean, log_variance, *_ = two_normals(generator)
    assert (kl_normal(mean, log_variance, mean, log_variance) == 0).all()
    for shift in (-1.0, -1e-3, 1e-3, 1.0):
        moved = mean + shift * torch.exp(0.5 * log_variance)
        assert (kl_normal(moved, log_variance, mean, log_variance) > 0).all()
        assert (kl_normal(mean, log_variance + shift, mean, log_variance) > 0).all()


def test_kl_of_a_narrow_normal_from_a_wide_one_is_smaller_than_the_reverse():
    zero, two = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0).double()
    narrow_first, wide_first = kl_normal(zero, -two, zero, two), kl_normal(zero, two, zero, -two)
    assert narrow_first.item() == pytest.approx(0.5 * (3 + math.exp(-4)))
    assert wide_first.item() == pytest.approx(0.5 * (math.exp(4) - 5))


# --- gradients and draws ---


def test_gradients_are_those_of_finite_differences(generator):
    value, mean, log_variance = (randn(generator, *shape) for shape in ((3, 4), (3, 4), (4,)))
    inputs = tuple(part.requires_grad_() for part in (value, mean, log_variance))
    assert torch.autograd.gradcheck(normal_log_likelihood, inputs)
    parts = two_normals(generator, rows=2, size=3)
    assert torch.autograd.gradcheck(kl_normal, tuple((part / 3).requires_grad_() for part in parts))


def test_draws_have_their_mean_and_variance_and_are_differentiable(generator):
    mean = torch.tensor([1.0, -2.0, 0.0]).expand(100_000, 3).clone().requires_grad_()
    log_variance = torch.tensor([-4.0, 0.0, 2.0]).expand(100_000, 3).clone().requires_grad_()
    draws = sample_normal(mean, log_variance, generator)
    deviation = torch.exp(0.5 * log_variance[0])
    assert ((draws.mean(dim=0) - mean[0]).abs() < 4.5 * deviation / math.sqrt(100_000)).all()
    assert ((draws.std(dim=0) / deviation - 1).abs() < 4.5 / math.sqrt(200_000)).all()
    draws.sum().backward()
    assert_close(mean.grad, torch.ones_like(mean))
    # d(mean + exp(s / 2) noise) / ds is half the deviation from the mean.
    assert_close(log_variance.grad, 0.5 * (draws - mean).detach(), atol=1e-6, rtol=1e-5)


def test_draws_depend_on_the_seed():
    first, again, other = (
        sample_normal(torch.zeros(5, 3), torch.zeros(5, 3), torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
