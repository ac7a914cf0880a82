"""Observation models: what is measured, given what is decoded. Three behind one interface, by name in OBSERVATIONS.

B samples, G genes, W ways in which a sample's latents come about (model.py): each way has a noise of its own. Decoded values
(B, G) are log-CPM for `normal`, and logits of the genes' shares, on the scale of the natural log of CPM, for models of counts.
A library is the counts of a sample over the modelled genes; totals are over all genes of the source.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betainc
from torch import Tensor, nn

from pipeline.gem.data.expression import CPM, log_cpm, round_to_totals
from pipeline.gem.model.normal import (
    LOG_VARIANCE_RANGE,
    NARROW,
    normal_log_likelihood,
    normal_log_mass,
    normal_log_mass_between,
    sample_normal,
)

INVERSE_DISPERSION_RANGE = (1e-4, 1e8)
_STEP, _FIRST, _LAST = (
    1.0,
    -9.0,
    3.7,
)  # of the integral over log t; the trapezoid rule converges as exp(-pi^2 / step)

CountProbabilities = tuple[
    Tensor, Tensor, Tensor
]  # (B, G) probability of fewer, of at most the observed counts; (B,) nats of all of them


@dataclass(frozen=True)
class Observed:
    """What was measured of B samples."""

    expression: Tensor  # (B, G) log-CPM
    counts: Tensor | None = None  # (B, G) whole numbers, where the model is one of counts

    def __len__(self) -> int:
        return len(self.expression)

    def rows(self, chosen: slice | Tensor) -> "Observed":
        return Observed(
            self.expression[chosen], None if self.counts is None else self.counts[chosen]
        )

    def first(self, number: int) -> "Observed":
        """The first samples; of all of them what was worked out once stays."""
        return self if number == len(self) else self.rows(slice(number))

    @cached_property
    def exact(self) -> Tensor:
        """(B, G) counts in float64."""
        return self.counts.double()

    @cached_property
    def library(self) -> Tensor:
        """(B, 1) counts over the modelled genes, float64."""
        return self.exact.sum(1, keepdim=True)

    @cached_property
    def log_factorials(self) -> Tensor:
        """(B,) sum over genes of log c!"""
        return torch.lgamma(self.exact + 1).sum(1)


class Observation(nn.Module, ABC):
    """The interface. Probabilities are in nats, summed over genes; `way` is one for all samples or one for each (B,)."""

    of_counts: bool  # whether the likelihood needs counts

    @abstractmethod
    def start(self, expression: Tensor) -> Tensor:
        """(G,) what the decoder's last bias starts from, for training log-CPM (N, G); sets the noise to that of the training split."""

    @abstractmethod
    def log_likelihood(self, observed: Observed, decoded: Tensor, way: int | Tensor) -> Tensor:
        """(B,) log density (normal) or log probability (counts) of what was observed."""

    @abstractmethod
    def fractions(self, decoded: Tensor) -> Tensor:
        """(B, G) share of the library that each gene is expected to have; may overwrite `decoded`."""

    @abstractmethod
    def log_cpm(self, decoded: Tensor) -> Tensor:
        """(B, G) log-CPM that is decoded, without noise."""

    @abstractmethod
    def expected_log_cpm(self, decoded: Tensor, totals: Tensor, way: int | Tensor) -> Tensor:
        """(B, G) mean log-CPM of counts with totals (B,)."""

    @abstractmethod
    def draw_log_cpm(
        self, decoded: Tensor, totals: Tensor | None, way: int | Tensor, generator: torch.Generator
    ) -> Tensor:
        """(B, G) log-CPM of one sample each, with totals (B,); a Normal needs none, and may lie below zero."""

    @abstractmethod
    def draw_counts(
        self, decoded: Tensor, library: np.ndarray, way: int | Tensor, generator: torch.Generator
    ) -> np.ndarray:
        """(B, G) whole counts of samples with libraries (B,): exactly those, but for the negative binomial, which has them on average."""

    @abstractmethod
    def count_probabilities(
        self, observed: Observed, totals: Tensor, way: int | Tensor
    ) -> Callable[[Tensor], CountProbabilities]:
        """What decoded values (B, G) say of the observed counts: the same measure for every observation model."""

    @abstractmethod
    def precision(self) -> Tensor:
        """(G,) one over the variance of log-CPM around what is decoded of a sample's own latents."""


class Normal(Observation):
    """Log-CPM are Normal around what is decoded, each gene and way with a variance of its own."""

    of_counts = False

    def __init__(self, ways: int, genes: int, min_variance: float):
        super().__init__()
        self.min_log_variance = math.log(min_variance)
        self.log_variances = nn.Parameter(torch.zeros(ways, genes))

    def log_variance(self, way: int | Tensor) -> Tensor:
        """(G,) or (B, G). The floor is added, not clamped: a clamped parameter has no gradient and would never come back."""
        floor = self.log_variances.new_tensor(self.min_log_variance)
        return torch.logaddexp(self.log_variances[way], floor).clamp(max=LOG_VARIANCE_RANGE[1])

    def start(self, expression: Tensor) -> Tensor:
        floor = math.exp(self.min_log_variance)
        with torch.no_grad():
            self.log_variances.copy_(
                (expression.var(0) - floor)
                .clamp_min(0.1 * floor)
                .log()
                .expand_as(self.log_variances)
            )
        return expression.mean(0)

    def log_likelihood(self, observed: Observed, decoded: Tensor, way: int | Tensor) -> Tensor:
        return normal_log_likelihood(observed.expression, decoded, self.log_variance(way))

    def fractions(self, decoded: Tensor) -> Tensor:
        linear = decoded.clamp_(min=0).expm1_()
        return linear.div_(linear.sum(1, keepdim=True))

    def log_cpm(self, decoded: Tensor) -> Tensor:
        return decoded

    def expected_log_cpm(self, decoded: Tensor, totals: Tensor, way: int | Tensor) -> Tensor:
        return decoded

    def draw_log_cpm(
        self, decoded: Tensor, totals: Tensor | None, way: int | Tensor, generator: torch.Generator
    ) -> Tensor:
        return sample_normal(decoded, self.log_variance(way), generator)

    def draw_counts(
        self, decoded: Tensor, library: np.ndarray, way: int | Tensor, generator: torch.Generator
    ) -> np.ndarray:
        fractions = (
            self.fractions(sample_normal(decoded, self.log_variance(way), generator))
            .cpu()
            .numpy()
            .astype(np.float64)
        )
        return round_to_totals(
            fractions / fractions.sum(1, keepdims=True) * library[:, None], library
        )

    def count_probabilities(
        self, observed: Observed, totals: Tensor, way: int | Tensor
    ) -> Callable[[Tensor], CountProbabilities]:
        """The Normal's mass on the interval that rounds to a count; nothing lies below a count of zero."""
        counts, scale = observed.exact, (CPM / totals.double())[:, None]
        deviation = torch.exp(0.5 * self.log_variance(way))
        above = torch.log1p((counts + 0.5) * scale) / deviation
        below = torch.where(
            counts > 0, torch.log1p((counts - 0.5).clamp_min(0) * scale) / deviation, -torch.inf
        )
        # Before rounding to float32, in which neighbouring counts of a million are the same.
        middle, width = ((below + above) / 2).float(), (above - below).float()
        below, above, root = below.float(), above.float(), math.sqrt(2)
        edges = below / root, above / root
        wide = ~(width < NARROW)  # also where the interval is infinite

        def judged(decoded: Tensor) -> CountProbabilities:
            centre = decoded / deviation
            # erf is the Normal's distribution function but for a half.
            lower, upper = ((torch.erf(edge - centre / root) + 1) / 2 for edge in edges)
            nats = normal_log_mass(middle - centre, width)
            nats[wide] = normal_log_mass_between(
                below[wide] - centre[wide], above[wide] - centre[wide]
            ).float()
            return lower, torch.maximum(upper, lower), nats.sum(1, dtype=torch.float64)

        return judged

    def precision(self) -> Tensor:
        return torch.exp(-self.log_variance(0))


class Counts(Observation):
    """What models of counts share: decoded values are logits of the genes' shares of the library."""

    of_counts = True

    def __init__(self, genes: int):
        super().__init__()
        self.register_buffer("variance", torch.ones(genes))  # of training log-CPM
        self.register_buffer(
            "modelled_share", torch.ones(())
        )  # of a total, on average: the library

    def start(self, expression: Tensor) -> Tensor:
        cpm = sum(part.double().expm1().sum(0) for part in expression.split(1024)) / len(expression)
        self.variance.copy_(expression.var(0).clamp_min(1e-4))
        self.modelled_share.copy_(cpm.sum() / CPM)
        # A gene that training counts once in a million libraries starts there, not at minus infinity.
        return cpm.clamp_min(1e-2).log().float()

    def fractions(self, decoded: Tensor) -> Tensor:
        return torch.softmax(decoded, dim=1)

    def log_cpm(self, decoded: Tensor) -> Tensor:
        return torch.log1p(CPM * self.modelled_share * torch.softmax(decoded, dim=1))

    def expected_log_cpm(self, decoded: Tensor, totals: Tensor, way: int | Tensor) -> Tensor:
        """By Frullani's integral log(1 + y) = int_0^inf (1 - exp(-y t)) exp(-t) / t dt, with the Laplace transform of the counts; to 1e-3."""
        totals = totals.to(decoded)[:, None]
        fractions, library, scale = (
            torch.softmax(decoded, dim=1),
            self.modelled_share * totals,
            CPM / totals,
        )
        first = _FIRST - math.log(1 + CPM * (float(fractions.max()) if len(fractions) else 0.0))
        result = torch.zeros_like(decoded)
        for log_t in np.arange(first, _LAST, _STEP):
            t = math.exp(log_t)
            result -= (
                math.exp(-t)
                * self._log_laplace(fractions, library, -torch.expm1(-scale * t), way).expm1_()
            )
        return _STEP * result

    def draw_log_cpm(
        self, decoded: Tensor, totals: Tensor, way: int | Tensor, generator: torch.Generator
    ) -> Tensor:
        totals = totals.cpu().numpy().astype(np.float64)
        counts = self.draw_counts(
            decoded, np.round(float(self.modelled_share) * totals).astype(np.int64), way, generator
        )
        return torch.from_numpy(log_cpm(counts, totals)).to(decoded)

    @abstractmethod
    def _log_laplace(
        self, fractions: Tensor, library: Tensor, caught: Tensor, way: int | Tensor
    ) -> Tensor:
        """(B, G) log E[(1 - caught)^c], for caught (B, 1) in [0, 1]."""

    def precision(self) -> Tensor:
        return 1 / self.variance


class NegativeBinomial(Counts):
    """Counts of mean m = library times share and variance m + m^2 / theta, each gene and way with an inverse dispersion theta."""

    def __init__(self, ways: int, genes: int):
        super().__init__(genes)
        self.log_inverse_dispersions = nn.Parameter(torch.zeros(ways, genes))

    def log_inverse_dispersion(self, way: int | Tensor) -> Tensor:
        """(G,) or (B, G) log theta."""
        return self.log_inverse_dispersions[way].clamp(*map(math.log, INVERSE_DISPERSION_RANGE))

    def start(self, expression: Tensor) -> Tensor:
        started = super().start(expression)
        with torch.no_grad():
            self.log_inverse_dispersions.copy_(
                -self.variance.clamp(1e-2, 1e2).log().expand_as(self.log_inverse_dispersions)
            )
        return started

    def log_likelihood(self, observed: Observed, decoded: Tensor, way: int | Tensor) -> Tensor:
        log_mean = torch.log_softmax(decoded.double(), dim=1) + observed.library.log()
        terms = negative_binomial_terms(
            observed.exact, log_mean, self.log_inverse_dispersion(way).double()
        )
        return terms.sum(1) - observed.log_factorials

    def draw_counts(
        self, decoded: Tensor, library: np.ndarray, way: int | Tensor, generator: torch.Generator
    ) -> np.ndarray:
        mean = self.fractions(decoded.double()).cpu().numpy() * library[:, None]
        theta = self.log_inverse_dispersion(way).double().exp().cpu().numpy()
        rng = numpy_generator(generator)
        return rng.poisson(rng.gamma(np.broadcast_to(theta, mean.shape), mean / theta))

    def count_probabilities(
        self, observed: Observed, totals: Tensor, way: int | Tensor
    ) -> Callable[[Tensor], CountProbabilities]:
        log_theta, counts = self.log_inverse_dispersion(way).double(), observed.exact
        own_factorials = torch.lgamma(counts + 1)

        def judged(decoded: Tensor) -> CountProbabilities:
            log_mean = torch.log_softmax(decoded.double(), dim=1) + observed.library.log()
            nats = negative_binomial_terms(counts, log_mean, log_theta) - own_factorials
            # P(X <= c) = I_p(theta, c + 1) with p = theta / (theta + m)
            at_most = _beta(
                log_theta.exp().expand_as(counts), counts + 1, torch.sigmoid(log_theta - log_mean)
            )
            return *_below(at_most, nats), nats.sum(1)

        return judged

    def _log_laplace(
        self, fractions: Tensor, library: Tensor, caught: Tensor, way: int | Tensor
    ) -> Tensor:
        theta = self.log_inverse_dispersion(way).exp()
        return torch.log1p(fractions * (library * caught) / theta).mul_(-theta)


class Multinomial(Counts):
    """A library of counts, each of a gene drawn by its share: no noise but that of counting."""

    def log_likelihood(self, observed: Observed, decoded: Tensor, way: int | Tensor) -> Tensor:
        log_share = torch.log_softmax(decoded.double(), dim=1)
        return (
            torch.lgamma(observed.library[:, 0] + 1)
            - observed.log_factorials
            + (observed.exact * log_share).sum(1)
        )

    def draw_counts(
        self, decoded: Tensor, library: np.ndarray, way: int | Tensor, generator: torch.Generator
    ) -> np.ndarray:
        return numpy_generator(generator).multinomial(
            library, self.fractions(decoded.double()).cpu().numpy()
        )

    def count_probabilities(
        self, observed: Observed, totals: Tensor, way: int | Tensor
    ) -> Callable[[Tensor], CountProbabilities]:
        counts, library = observed.exact, observed.library
        choose = (
            torch.lgamma(library + 1)
            - torch.lgamma(counts + 1)
            - torch.lgamma(library - counts + 1)
        )

        def judged(decoded: Tensor) -> CountProbabilities:
            share = torch.softmax(decoded.double(), dim=1)
            nats = (
                choose
                + torch.xlogy(counts, share)
                + torch.special.xlog1py(library - counts, -share)
            )  # of each gene by itself
            # P(X <= c) = I_{1 - p}(n - c, c + 1); all of the library is at most itself
            at_most = torch.where(
                counts < library, _beta((library - counts).clamp_min(1), counts + 1, 1 - share), 1.0
            )
            return *_below(at_most, nats), self.log_likelihood(observed, decoded, way)

        return judged

    def _log_laplace(
        self, fractions: Tensor, library: Tensor, caught: Tensor, way: int | Tensor
    ) -> Tensor:
        return torch.log1p(-fractions * caught).mul_(library)


OBSERVATIONS = ("normal", "negative_binomial", "multinomial")


def observation(name: str, ways: int, genes: int, min_variance: float) -> Observation:
    """The observation model of params.yaml's `model.observation`."""
    match name:
        case "normal":
            return Normal(ways, genes, min_variance)
        case "negative_binomial":
            return NegativeBinomial(ways, genes)
        case "multinomial":
            return Multinomial(genes)
    raise ValueError(f"{name} is no observation model; known: {', '.join(OBSERVATIONS)}")


def negative_binomial_terms(counts: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """(B, G) log probability of counts without the term -log c!, all in float64: single precision is off by 100 nats at theta 1e8."""
    theta = log_theta.exp()
    ratio = log_mean - log_theta
    return (
        torch.lgamma(counts + theta)
        - torch.lgamma(theta)
        + counts * ratio
        - (counts + theta) * F.softplus(ratio, threshold=50)
    )


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """numpy draws counts much faster; its seed comes from torch's generator."""
    return np.random.default_rng(
        int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    )


def _beta(first: Tensor, second: Tensor, at: Tensor) -> Tensor:
    """The regularised incomplete beta function, which torch lacks."""
    return torch.from_numpy(
        betainc(first.cpu().numpy(), second.cpu().numpy(), at.cpu().numpy())
    ).to(at)


def _below(at_most: Tensor, nats: Tensor) -> tuple[Tensor, Tensor]:
    """(B, G) float32 probability of fewer, and of at most, from that of at most and the log probability of just as many."""
    return (at_most - nats.exp()).clamp_min(0).float(), at_most.float()
