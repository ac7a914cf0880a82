"""Densities and divergences against torch.distributions, Monte Carlo and finite differences."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pipeline.gem.model.normal import kl_normal, normal_log_likelihood, sample_normal


def _normals(generator, rows=7, size=5):
    """Means and log variances of two families of Normals, float64, log variances over the clamped range."""

    def draw():
        return torch.randn(rows, size, generator=generator, dtype=torch.float64)

    return draw(), 3 * draw().clamp(-3, 3), draw(), 3 * draw().clamp(-3, 3)


def test_log_likelihood_is_the_sum_over_genes_of_normal_log_densities(generator):
    value, mean = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    log_variance = torch.linspace(-9, 9, 5, dtype=torch.float64)
    expected = Normal(mean, torch.exp(0.5 * log_variance)).log_prob(value).sum(dim=1)
    torch.testing.assert_close(
        normal_log_likelihood(value, mean, log_variance), expected, rtol=1e-12, atol=1e-12
    )


def test_log_likelihood_of_concatenated_genes_is_the_sum_of_both(generator):
    value, mean = (torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    log_variance = torch.randn(8, generator=generator, dtype=torch.float64)
    parts = [
        normal_log_likelihood(value[:, part], mean[:, part], log_variance[part])
        for part in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(
        normal_log_likelihood(value, mean, log_variance), parts[0] + parts[1]
    )


def test_log_likelihood_in_float32_is_within_a_thousandth_nat_of_float64(generator):
    # log-CPM as large as they come, variances down to the floor of the default parameters.
    value = 14 * torch.rand(20, 500, generator=generator, dtype=torch.float64).float().double()
    mean = (
        (value + 0.3 * torch.randn(20, 500, generator=generator, dtype=torch.float64))
        .float()
        .double()
    )
    log_variance = torch.linspace(math.log(0.09), 1.0, 500, dtype=torch.float64).float().double()
    exact = normal_log_likelihood(value, mean, log_variance)
    single = normal_log_likelihood(value.float(), mean.float(), log_variance.float())
    assert (single.double() - exact).abs().max() < 1e-3


def test_kl_agrees_with_torch_distributions_per_dimension(generator):
    mean_q, log_q, mean_p, log_p = _normals(generator)
    expected = kl_divergence(
        Normal(mean_q, torch.exp(0.5 * log_q)), Normal(mean_p, torch.exp(0.5 * log_p))
    )
    found = kl_normal(mean_q, log_q, mean_p, log_p)
    assert found.shape == (7, 5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_kl_agrees_with_its_monte_carlo_definition(generator):
    mean_q, log_q, mean_p, log_p = (part / 3 for part in _normals(generator, rows=2, size=3))
    draws = mean_q + torch.exp(0.5 * log_q) * torch.randn(
        200_000, 2, 3, generator=generator, dtype=torch.float64
    )
    ratio = Normal(mean_q, torch.exp(0.5 * log_q)).log_prob(draws) - Normal(
        mean_p, torch.exp(0.5 * log_p)
    ).log_prob(draws)
    error = ratio.std(dim=0) / math.sqrt(len(ratio))
    assert ((kl_normal(mean_q, log_q, mean_p, log_p) - ratio.mean(dim=0)).abs() < 4.5 * error).all()


def test_kl_is_zero_for_equal_normals_and_positive_for_any_others(generator):
    mean, log_variance, *_ = _normals(generator)
    assert torch.equal(
        kl_normal(mean, log_variance, mean, log_variance), torch.zeros(7, 5, dtype=torch.float64)
    )
    for shift in (-1.0, -1e-3, 1e-3, 1.0):
        assert (
            kl_normal(
                mean + shift * torch.exp(0.5 * log_variance), log_variance, mean, log_variance
            )
            > 0
        ).all()
        assert (kl_normal(mean, log_variance + shift, mean, log_variance) > 0).all()


def test_kl_is_not_symmetric():
    narrow, wide = (torch.tensor([[value]], dtype=torch.float64) for value in (-2.0, 2.0))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    # KL(q | p) with the narrow one first is 0.5 (4 + exp(-4) - 1): a Normal inside another is cheap, the reverse is dear.
    torch.testing.assert_close(
        kl_normal(zero, narrow, zero, wide),
        torch.full((1, 1), 0.5 * (3 + math.exp(-4)), dtype=torch.float64),
    )
    torch.testing.assert_close(
        kl_normal(zero, wide, zero, narrow),
        torch.full((1, 1), 0.5 * (math.exp(4) - 5), dtype=torch.float64),
    )


def test_gradients_of_the_log_likelihood_agree_with_finite_differences(generator):
    value, mean = (
        torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    log_variance = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normal_log_likelihood, (value, mean, log_variance))


def test_gradients_of_kl_agree_with_finite_differences(generator):
    inputs = tuple((part / 3).requires_grad_() for part in _normals(generator, rows=2, size=3))
    assert torch.autograd.gradcheck(kl_normal, inputs)


def test_draws_have_the_mean_and_variance_asked_for_and_pass_gradients_on(generator):
    mean = torch.tensor([1.0, -2.0, 0.0]).expand(100_000, 3).clone().requires_grad_()
    log_variance = torch.tensor([-4.0, 0.0, 2.0]).expand(100_000, 3).clone().requires_grad_()
    draws = sample_normal(mean, log_variance, generator)
    deviation = torch.exp(0.5 * log_variance[0])
    assert ((draws.mean(dim=0) - mean[0]).abs() < 4.5 * deviation / math.sqrt(100_000)).all()
    assert ((draws.std(dim=0) / deviation - 1).abs() < 4.5 / math.sqrt(200_000)).all()
    draws.sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones_like(mean))
    # d(mean + exp(s / 2) noise) / ds is half the deviation from the mean.
    torch.testing.assert_close(
        log_variance.grad, 0.5 * (draws - mean).detach(), atol=1e-6, rtol=1e-5
    )


def test_the_same_seed_gives_the_same_draws():
    mean, log_variance = torch.zeros(5, 3), torch.zeros(5, 3)
    first, second = (
        sample_normal(mean, log_variance, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            first, sample_normal(mean, log_variance, torch.Generator().manual_seed(4))
        )
