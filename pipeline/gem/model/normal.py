"""Densities, divergences and draws of Normals, in nats.

B samples, G genes, L latent size.
"""

import math

import torch
from torch import Tensor

LOG_VARIANCE_RANGE = (-10.0, 10.0)
NARROW = 0.1  # deviations: on an interval this wide the density is a parabola


def normal_log_likelihood(value: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) log density of values (B, G), summed over genes; means (B, G), log variances (G,)."""
    squares = (value - mean).square() @ torch.exp(-log_variance)
    return -0.5 * (squares + log_variance.sum() + value.shape[-1] * math.log(2 * math.pi))


def normal_log_mass(centre: Tensor, width: Tensor) -> Tensor:
    """Log probability of intervals narrower than NARROW under a standard Normal, to 1e-4 up to 20
    deviations from the mean."""
    log_density = -0.5 * (centre.square() + math.log(2 * math.pi))
    curvature = width.square() * (centre.square() - 1) / 24
    return torch.log(width) + log_density + torch.log1p(curvature.clamp_min(-0.5))


def normal_log_mass_between(low: Tensor, high: Tensor) -> Tensor:
    """Log probability between `low` (may be minus infinity) and `high` under a standard Normal, in
    float64."""
    # Intervals right of the mean are mirrored: log_ndtr is accurate in the left tail.
    right = low + high > 0
    low, high = torch.where(right, -high, low).double(), torch.where(right, -low, high).double()
    upper = torch.special.log_ndtr(high)
    return upper + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - upper))


def kl_normal(
    mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor
) -> Tensor:
    """(B, L) KL(q | p) per dimension (Kingma & Welling 2014, appendix B, with any prior p)."""
    squares = (mean_q - mean_p).square() * torch.exp(-log_variance_p)
    log_ratio = log_variance_p - log_variance_q
    return 0.5 * (log_ratio + torch.exp(log_variance_q - log_variance_p) + squares - 1)


def sample_normal(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """A draw, shaped as `mean`."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return shift_and_scale(noise, mean, log_variance)


def shift_and_scale(noise: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The reparameterised draw that standard Normal `noise` makes."""
    return mean + torch.exp(0.5 * log_variance) * noise
