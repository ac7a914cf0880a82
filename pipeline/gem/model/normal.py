"""Densities of the objective, in nats, summed over the last dimension and over nothing else.

B samples, G genes, L latent size.
"""

import math

import torch
from torch import Tensor

LOG_VARIANCE_RANGE = (-10.0, 10.0)
NARROW = 0.1  # deviations: intervals on which a Normal's density is a parabola


def normal_log_likelihood(value: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) log density of values (B, G) under independent Normals with means (B, G) and log variances (G,)."""
    squares = (value - mean).square() @ torch.exp(-log_variance)
    return -0.5 * (squares + log_variance.sum() + value.shape[-1] * math.log(2 * math.pi))


def normal_log_mass(centre: Tensor, width: Tensor) -> Tensor:
    """Log probability of intervals around `centre` under a standard Normal, where `width` is below NARROW: to 1e-4 up to 20 deviations out."""
    curvature = width.square() * (centre.square() - 1) / 24
    return (
        torch.log(width)
        - 0.5 * (centre.square() + math.log(2 * math.pi))
        + torch.log1p(curvature.clamp_min(-0.5))
    )


def normal_log_mass_between(low: Tensor, high: Tensor) -> Tensor:
    """Log probability between `low`, which may be minus infinity, and `high` under a standard Normal; in float64."""
    # In the left tail, where the distribution function is accurate.
    right = low + high > 0
    low, high = torch.where(right, -high, low).double(), torch.where(right, -low, high).double()
    upper = torch.special.log_ndtr(high)
    return upper + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - upper))


def kl_normal(
    mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor
) -> Tensor:
    """(B, L) KL(q | p) per dimension between diagonal Normals (Kingma & Welling 2014, appendix B, for any prior)."""
    difference = (mean_q - mean_p).square() * torch.exp(-log_variance_p)
    return 0.5 * (
        log_variance_p
        - log_variance_q
        + torch.exp(log_variance_q - log_variance_p)
        + difference
        - 1
    )


def sample_normal(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """A reparameterised draw, shaped as `mean`."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + torch.exp(0.5 * log_variance) * noise
