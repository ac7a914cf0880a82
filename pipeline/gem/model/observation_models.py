"""Normal, negative binomial and multinomial observation models.

B samples, G genes. Shapes and units as in the interface (observation.py).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betainc
from torch import Tensor, nn

from pipeline.gem.data.expression import CPM, log_cpm, round_to_totals
from pipeline.gem.model.normal import (
    LOG_VARIANCE_RANGE,
    NARROW,
    mean_log_likelihoods,
    normal_log_likelihood,
    normal_log_mass,
    normal_log_mass_between,
    sample_normal,
)
from pipeline.gem.model.observation import (
    EVERY_GENE,
    CountProbabilities,
    GeneMoments,
    Genes,
    LatentSource,
    Observation,
    Observed,
    Source,
)

INVERSE_DISPERSION_RANGE = (1e-4, 1e8)
LARGE_MASS = 0.01  # of an interval: the difference of two probabilities in float32 has it to 1e-5
# The integral over log t of `expected_log_cpm`; the trapezoid rule converges as exp(-pi^2 / step).
_STEP, _FIRST, _LAST = 1.0, -9.0, 3.7


class Normal(Observation):
    """Log-CPM are Normal around the decoded values, with a variance per latent source and gene."""

    def __init__(self, genes: int, min_variance: float):
        super().__init__()
        self.min_log_variance = math.log(min_variance)
        self.log_variances = nn.Parameter(torch.zeros(len(LatentSource), genes))

    def log_variance(self, source: Source | slice) -> Tensor:
        """(G,), (B, G) or, of a slice of sources, (S, G). The floor is added: a clamped parameter
        would have no gradient."""
        floor = self.log_variances.new_tensor(self.min_log_variance)
        return torch.logaddexp(self.log_variances[source], floor).clamp(max=LOG_VARIANCE_RANGE[1])

    def initialise(self, moments: GeneMoments) -> Tensor:
        floor = math.exp(self.min_log_variance)
        with torch.no_grad():
            log_variance = (moments.variance - floor).clamp_min(0.1 * floor).log()
            self.log_variances.copy_(log_variance.expand_as(self.log_variances))
        return moments.mean

    def blend_variance(self, variance: Tensor, network_weight: float) -> None:
        """Averages the variances (G,) around predictions from metadata with those of the mixed
        model, as the predictions are averaged."""
        floor, variance = math.exp(self.min_log_variance), variance.to(self.log_variances.device)
        with torch.no_grad():
            for source in (LatentSource.PRIOR, LatentSource.UNSEEN_STUDY):
                own = self.log_variance(source).exp()
                other = variance if source == LatentSource.PRIOR else torch.maximum(own, variance)
                blended = network_weight * own + (1 - network_weight) * other
                excess = (blended - floor).clamp_min(0.1 * floor)
                self.log_variances[source] = excess.log()

    def log_likelihood(self, observed: Observed, decoded: Tensor, source: Source) -> Tensor:
        return normal_log_likelihood(observed.expression, decoded, self.log_variance(source))

    def mean_log_likelihoods(
        self, observed: Observed, decoded: Mapping[LatentSource, Tensor]
    ) -> dict[LatentSource, Tensor]:
        log_variances = self.log_variance(slice(None))
        means = mean_log_likelihoods(observed.expression, log_variances, decoded).unbind()
        return {source: means[source] for source in decoded}

    def fractions(self, decoded: Tensor) -> Tensor:
        linear = decoded.clamp_(min=0).expm1_()
        return linear.div_(linear.sum(1, keepdim=True))

    def log_cpm(self, decoded: Tensor) -> Tensor:
        return decoded

    def expected_log_cpm(self, decoded: Tensor, totals: Tensor, source: Source) -> Tensor:
        return decoded

    def draw_log_cpm(
        self, decoded: Tensor, totals: Tensor | None, source: Source, generator: torch.Generator
    ) -> Tensor:
        return sample_normal(decoded, self.log_variance(source), generator)

    def draw_counts(
        self, decoded: Tensor, library: np.ndarray, source: Source, generator: torch.Generator
    ) -> np.ndarray:
        drawn = self.draw_log_cpm(decoded, None, source, generator)
        fractions = self.fractions(drawn).cpu().numpy().astype(np.float64)
        counts = fractions / fractions.sum(1, keepdims=True) * library[:, None]
        return round_to_totals(counts, library)

    def count_probabilities(
        self, observed: Observed, totals: Tensor, source: Source, genes: Genes = EVERY_GENE
    ) -> Callable[[Tensor], CountProbabilities]:
        """The Normal's mass on the interval that rounds to a count; for a count of zero the
        interval has no lower end."""
        counts, scale = observed.counts64, (CPM / totals.double())[:, None]
        deviation = torch.exp(0.5 * self.log_variance(source))
        high = torch.log1p((counts + 0.5) * scale) / deviation
        low = torch.log1p((counts - 0.5).clamp_min(0) * scale) / deviation
        low = torch.where(counts > 0, low, -torch.inf)
        # Before rounding to float32, which cannot tell a million counts from a million and one.
        middle, width = ((low + high) / 2).float(), (high - low).float()
        low, high, root = low.float(), high.float(), math.sqrt(2)
        edges = [(edge / root)[:, genes] for edge in (low, high)]
        narrow = width < NARROW  # not if infinite
        wide = (~narrow).flatten().nonzero()[:, 0]
        low, high, sample = low.view(-1)[wide], high.view(-1)[wide], wide // counts.shape[1]
        middle, log_mass = torch.where(narrow, middle, 0), normal_log_mass(width.where(narrow, 1))
        narrow, inverse = narrow.to(width), 1 / deviation

        def probabilities(decoded: Tensor) -> CountProbabilities:
            centre = decoded * inverse
            of_genes = centre[:, genes] / root
            fewer, at_most = (torch.erf(edge - of_genes).add_(1).mul_(0.5) for edge in edges)
            of_wide = centre.view(-1)[wide]
            lower, upper = low - of_wide, high - of_wide
            mass = (torch.erf(upper / root) - torch.erf(lower / root)).div_(2)
            nats, tail = mass.log().double(), (mass < LARGE_MASS).nonzero()[:, 0]
            nats[tail] = normal_log_mass_between(lower[tail], upper[tail])
            # A narrow interval needs no difference of probabilities.
            of_narrow = log_mass(torch.sub(middle, centre, out=centre)).mul_(narrow)
            total = of_narrow.sum(1).double().index_add_(0, sample, nats)
            return CountProbabilities(fewer, torch.maximum(at_most, fewer), total)

        return probabilities

    def precision(self) -> Tensor:
        return torch.exp(-self.log_variance(LatentSource.POSTERIOR))


class CountModel(Observation):
    """The common part of count models: decoded values are logits of the gene fractions."""

    def __init__(self, genes: int):
        super().__init__()
        self.register_buffer("variance", torch.ones(genes))  # of training log-CPM
        # The library's mean share of the total in training.
        self.register_buffer("modelled_share", torch.ones(()))

    def initialise(self, moments: GeneMoments) -> Tensor:
        self.variance.copy_(moments.variance.clamp_min(1e-4))
        self.modelled_share.copy_(moments.mean_cpm.sum() / CPM)
        # A gene without training counts starts at one count in a hundred libraries of a million.
        return moments.mean_cpm.clamp_min(1e-2).log().float()

    def fractions(self, decoded: Tensor) -> Tensor:
        return torch.softmax(decoded, dim=1)

    def log_cpm(self, decoded: Tensor) -> Tensor:
        return torch.log1p(CPM * self.modelled_share * torch.softmax(decoded, dim=1))

    def expected_log_cpm(self, decoded: Tensor, totals: Tensor, source: Source) -> Tensor:
        """To 1e-3, by Frullani's integral log(1 + y) = int_0^inf (1 - exp(-y t)) exp(-t) / t dt
        and the Laplace transform of the counts."""
        totals = totals.to(decoded)[:, None]
        fractions, library = torch.softmax(decoded, dim=1), self.modelled_share * totals
        scale, highest = CPM / totals, float(fractions.max()) if len(fractions) else 0.0
        result = torch.zeros_like(decoded)
        for log_t in np.arange(_FIRST - math.log(1 + CPM * highest), _LAST, _STEP):
            t = math.exp(log_t)
            caught = -torch.expm1(-scale * t)
            log_laplace = self._log_laplace(fractions, library, caught, source)
            result -= math.exp(-t) * log_laplace.expm1_()
        return _STEP * result

    def draw_log_cpm(
        self, decoded: Tensor, totals: Tensor, source: Source, generator: torch.Generator
    ) -> Tensor:
        totals = totals.cpu().numpy().astype(np.float64)
        library = np.round(float(self.modelled_share) * totals).astype(np.int64)
        counts = self.draw_counts(decoded, library, source, generator)
        return torch.from_numpy(log_cpm(counts, totals)).to(decoded)

    @abstractmethod
    def _log_laplace(
        self, fractions: Tensor, library: Tensor, caught: Tensor, source: Source
    ) -> Tensor:
        """(B, G) log E[(1 - caught)^c] of counts c, for `caught` (B, 1) in [0, 1]."""

    def precision(self) -> Tensor:
        return 1 / self.variance


class NegativeBinomial(CountModel):
    """Counts with mean m = library * fraction and variance m + m^2 / theta; an inverse dispersion
    theta per latent source and gene."""

    def __init__(self, genes: int):
        super().__init__(genes)
        self.log_inverse_dispersions = nn.Parameter(torch.zeros(len(LatentSource), genes))

    def log_inverse_dispersion(self, source: Source) -> Tensor:
        """(G,) or (B, G) log theta."""
        return self.log_inverse_dispersions[source].clamp(*map(math.log, INVERSE_DISPERSION_RANGE))

    def initialise(self, moments: GeneMoments) -> Tensor:
        bias = super().initialise(moments)
        with torch.no_grad():
            log_theta = -self.variance.clamp(1e-2, 1e2).log()
            self.log_inverse_dispersions.copy_(log_theta.expand_as(self.log_inverse_dispersions))
        return bias

    def log_likelihood(self, observed: Observed, decoded: Tensor, source: Source) -> Tensor:
        log_mean = torch.log_softmax(decoded.double(), dim=1) + observed.library.log()
        log_theta = self.log_inverse_dispersion(source).double()
        terms = negative_binomial_terms(observed.counts64, log_mean, log_theta)
        return terms.sum(1) - observed.log_factorials

    def draw_counts(
        self, decoded: Tensor, library: np.ndarray, source: Source, generator: torch.Generator
    ) -> np.ndarray:
        mean = self.fractions(decoded.double()).cpu().numpy() * library[:, None]
        theta = self.log_inverse_dispersion(source).double().exp().cpu().numpy()
        rng = numpy_generator(generator)
        return rng.poisson(rng.gamma(np.broadcast_to(theta, mean.shape), mean / theta))

    def count_probabilities(
        self, observed: Observed, totals: Tensor, source: Source, genes: Genes = EVERY_GENE
    ) -> Callable[[Tensor], CountProbabilities]:
        log_theta, counts = self.log_inverse_dispersion(source).double(), observed.counts64
        log_factorials = torch.lgamma(counts + 1)

        def probabilities(decoded: Tensor) -> CountProbabilities:
            log_mean = torch.log_softmax(decoded.double(), dim=1) + observed.library.log()
            nats = negative_binomial_terms(counts, log_mean, log_theta) - log_factorials
            # P(X <= c) = I_p(theta, c + 1) with p = theta / (theta + m)
            theta, p = log_theta.exp().expand_as(counts), torch.sigmoid(log_theta - log_mean)
            of_genes = incomplete_beta(*(part[:, genes] for part in (theta, counts + 1, p)))
            fewer, at_most = _cumulative(of_genes, nats[:, genes])
            return CountProbabilities(fewer, at_most, nats.sum(1))

        return probabilities

    def _log_laplace(
        self, fractions: Tensor, library: Tensor, caught: Tensor, source: Source
    ) -> Tensor:
        theta = self.log_inverse_dispersion(source).exp()
        return torch.log1p(fractions * (library * caught) / theta).mul_(-theta)


class Multinomial(CountModel):
    """A library of independently drawn counts: counting is the only noise."""

    def log_likelihood(self, observed: Observed, decoded: Tensor, source: Source) -> Tensor:
        log_fractions = torch.log_softmax(decoded.double(), dim=1)
        log_arrangements = torch.lgamma(observed.library[:, 0] + 1) - observed.log_factorials
        return log_arrangements + (observed.counts64 * log_fractions).sum(1)

    def draw_counts(
        self, decoded: Tensor, library: np.ndarray, source: Source, generator: torch.Generator
    ) -> np.ndarray:
        fractions = self.fractions(decoded.double()).cpu().numpy()
        return numpy_generator(generator).multinomial(library, fractions)

    def count_probabilities(
        self, observed: Observed, totals: Tensor, source: Source, genes: Genes = EVERY_GENE
    ) -> Callable[[Tensor], CountProbabilities]:
        counts, library = observed.counts64[:, genes], observed.library
        others = library - counts  # counts of the other genes
        log_choose = torch.lgamma(library + 1) - torch.lgamma(counts + 1) - torch.lgamma(others + 1)

        def probabilities(decoded: Tensor) -> CountProbabilities:
            p = torch.softmax(decoded.double(), dim=1)[:, genes]
            # Each gene alone is binomial.
            nats = log_choose + torch.xlogy(counts, p) + torch.special.xlog1py(others, -p)
            # P(X <= c) = I_{1 - p}(n - c, c + 1) for c < n
            at_most = incomplete_beta(others.clamp_min(1), counts + 1, 1 - p)
            at_most = torch.where(counts < library, at_most, 1.0)
            log_likelihood = self.log_likelihood(observed, decoded, source)
            return CountProbabilities(*_cumulative(at_most, nats), log_likelihood)

        return probabilities

    def _log_laplace(
        self, fractions: Tensor, library: Tensor, caught: Tensor, source: Source
    ) -> Tensor:
        return torch.log1p(-fractions * caught).mul_(library)


def build_observation(name: str, genes: int, min_variance: float) -> Observation:
    """The observation model that `model.observation` of params.yaml names."""
    match name:
        case "normal":
            return Normal(genes, min_variance)
        case "negative_binomial":
            return NegativeBinomial(genes)
        case "multinomial":
            return Multinomial(genes)
    raise ValueError(f"unknown observation model {name!r}")


def negative_binomial_terms(counts: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """(B, G) log probability of counts without the term -log c!, from float64: in float32 it is off
    by 100 nats at theta = 1e8."""
    theta = log_theta.exp()
    ratio = log_mean - log_theta
    log_gammas = torch.lgamma(counts + theta) - torch.lgamma(theta)
    return log_gammas + counts * ratio - (counts + theta) * F.softplus(ratio, threshold=50)


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator seeded by torch's: numpy draws counts much faster."""
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed))


def incomplete_beta(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The regularised incomplete beta function I_x(a, b), which torch lacks."""
    return torch.from_numpy(betainc(a.cpu().numpy(), b.cpu().numpy(), x.cpu().numpy())).to(x)


def _cumulative(at_most: Tensor, nats: Tensor) -> tuple[Tensor, Tensor]:
    """((B, G) P(X < c), (B, G) P(X <= c)) in float32, from P(X <= c) and log P(X = c)."""
    return (at_most - nats.exp()).clamp_min(0).float(), at_most.float()
