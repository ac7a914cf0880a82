"""Densities of the objective, in nats, summed over the last dimension and over nothing else.

B samples, G genes, L latent size.
"""

import math

import torch
from torch import Tensor

LOG_VARIANCE_RANGE = (-10.0, 10.0)


def normal_log_likelihood(value: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) log density of values (B, G) under independent Normals with means (B, G) and log variances (G,)."""
    squares = (value - mean).square() @ torch.exp(-log_variance)
    return -0.5 * (squares + log_variance.sum() + value.shape[-1] * math.log(2 * math.pi))


def kl_normal(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """(B, L) KL(q | p) per dimension between diagonal Normals (Kingma & Welling 2014, appendix B, for any prior)."""
    difference = (mean_q - mean_p).square() * torch.exp(-log_variance_p)
    return 0.5 * (log_variance_p - log_variance_q + torch.exp(log_variance_q - log_variance_p) + difference - 1)


def sample_normal(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """A reparameterised draw, shaped as `mean`."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + torch.exp(0.5 * log_variance) * noise
