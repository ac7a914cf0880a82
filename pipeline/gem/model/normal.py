"""Densities, divergences and draws of Normals, in nats.

B samples, G genes, L latent size. The functions of the training objective have closed forms for
their gradients: autograd would read and write each array several times as often.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

LOG_VARIANCE_RANGE = (-10.0, 10.0)
NARROW = 0.1  # deviations: on an interval this wide the density is a parabola


class _LogLikelihood(Function):
    """The arguments and the result of `normal_log_likelihood`."""

    @staticmethod
    def forward(ctx, value: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        error, precision = value - mean, torch.exp(-log_variance)
        ctx.save_for_backward(error, precision)
        constant = log_variance.sum() + value.shape[-1] * math.log(2 * math.pi)
        return (error.square() @ precision).add_(constant).mul_(-0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        error, precision = ctx.saved_tensors
        of_mean = (error * precision).mul_(gradient[:, None])
        # d/dv of -0.5 (error^2 exp(-v) + v)
        of_log_variance = (gradient @ error.square()).mul_(precision).sub_(gradient.sum())
        return -of_mean if ctx.needs_input_grad[0] else None, of_mean, of_log_variance.mul_(0.5)


def normal_log_likelihood(value: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B,) log density of values (B, G), summed over genes; means (B, G), log variances (G,)."""
    return _LogLikelihood.apply(value, mean, log_variance)


class _MeanLogLikelihoods(Function):
    """The arguments and the result of `mean_log_likelihoods`."""

    @staticmethod
    def forward(
        ctx, value: Tensor, log_variances: Tensor, families: tuple[int, ...], *means: Tensor
    ) -> Tensor:
        precisions = torch.exp(-log_variances)
        constants = log_variances.sum(1).add_(value.shape[1] * math.log(2 * math.pi))
        errors = [value[: len(mean)] - mean for mean in means]
        scaled = torch.zeros_like(precisions)
        for family, error in zip(families, errors, strict=True):
            torch.mean(error.square(), 0, out=scaled[family])
        scaled *= precisions
        ctx.save_for_backward(scaled, precisions, *errors)
        ctx.families = families
        return constants.add_(scaled.sum(1)).mul_(-0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled, precisions, *errors = ctx.saved_tensors
        # d/dv of -0.5 (error^2 exp(-v) + v)
        of_log_variances = (scaled - 1).mul_(0.5 * gradient[:, None])
        factors = (precisions * gradient[:, None]).unbind()
        of_means = [
            error * factors[family].div(len(error))
            for family, error in zip(ctx.families, errors, strict=True)
        ]
        return None, of_log_variances, None, *of_means


def mean_log_likelihoods(
    value: Tensor, log_variances: Tensor, means: Mapping[int, Tensor]
) -> Tensor:
    """(F,) log densities of values (B, G) under F families of Normals, summed over genes and
    averaged over samples. Values have no gradient.

    Log variances (F, G). `means` by family: (B_f, G) of the first B_f samples; what a family
    without means gets has no meaning.
    """
    return _MeanLogLikelihoods.apply(value, log_variances, tuple(means), *means.values())


def normal_log_mass(width: Tensor) -> Callable[[Tensor], Tensor]:
    """Log probability of intervals narrower than NARROW under a standard Normal, to 1e-4 up to 20
    deviations from the mean: a function of their centres, which it overwrites."""
    constant, curvature = width.log() - 0.5 * math.log(2 * math.pi), width.square() / 24

    def of(centre: Tensor) -> Tensor:
        squares = centre.square_()
        correction = (squares - 1).mul_(curvature).clamp_(min=-0.5).log1p_()
        return squares.mul_(-0.5).add_(constant).add_(correction)

    return of


def normal_log_mass_between(low: Tensor, high: Tensor) -> Tensor:
    """Log probability between `low` (may be minus infinity) and `high` under a standard Normal, in
    float64."""
    # Intervals right of the mean are mirrored: log_ndtr is accurate in the left tail.
    right = low + high > 0
    low, high = torch.where(right, -high, low).double(), torch.where(right, -low, high).double()
    upper = torch.special.log_ndtr(high)
    return upper + torch.log1p(-torch.exp(torch.special.log_ndtr(low) - upper))


class _Divergence(Function):
    """The arguments and the result of `kl_normal`."""

    @staticmethod
    def forward(
        ctx, mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor
    ) -> Tensor:
        log_ratio, precision = log_variance_q - log_variance_p, torch.exp(-log_variance_p)
        ratio, difference = torch.exp(log_ratio), mean_q - mean_p
        scaled = difference * precision
        squares = difference.mul_(scaled)
        ctx.save_for_backward(scaled, ratio, squares)
        return (ratio + squares).sub_(log_ratio).sub_(1).mul_(0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled, ratio, squares = ctx.saved_tensors
        of_mean, half = gradient * scaled, 0.5 * gradient
        of_log_variance_p = torch.rsub(ratio, 1).sub_(squares).mul_(half)
        if not ctx.needs_input_grad[0]:
            return None, None, -of_mean, of_log_variance_p
        return of_mean, (ratio - 1).mul_(half), -of_mean, of_log_variance_p


def kl_normal(
    mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor
) -> Tensor:
    """(B, L) KL(q | p) per dimension (Kingma & Welling 2014, appendix B, with any prior p)."""
    return _Divergence.apply(mean_q, log_variance_q, mean_p, log_variance_p)


def sample_normal(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """A draw, shaped as `mean`."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return shift_and_scale(noise, mean, log_variance)


def shift_and_scale(noise: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The reparameterised draw that standard Normal `noise` makes."""
    return mean + torch.exp(0.5 * log_variance) * noise
