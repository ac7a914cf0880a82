"""The interface of observation models: distributions of expression or counts, given decoded values.

B samples, G genes. Decoded values (B, G) are log-CPM for `normal`, and logits of the gene fractions
(on the scale of log CPM) for count models. A library is a sample's counts over the modelled genes;
its total is over all genes of the cohort's source.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class LatentSource(IntEnum):
    """Where a sample's latents come from. Each source has observation noise of its own."""

    POSTERIOR = 0  # the encoder, applied to the sample itself
    PRIOR = 1  # the sample's metadata
    REFERENCE = 2  # groups named in `conditioning`: the encoder, applied to a reference sample
    UNSEEN_STUDY = 3  # metadata without the study


Source = LatentSource | Tensor  # one for all samples, or one for each (B,)
Genes = slice | Tensor  # all, or (g,) positions
EVERY_GENE = slice(None)


class GeneMoments(NamedTuple):
    """Of the log-CPM of N samples."""

    mean: Tensor  # (G,)
    variance: Tensor  # (G,) with N - 1 degrees of freedom
    mean_cpm: Tensor  # (G,) mean counts per million, float64

    @classmethod
    def of(cls, blocks: Iterable[Tensor]) -> "GeneMoments":
        """Of log-CPM (B, G) block after block: float64 sums, relative to the mean of the first."""
        samples, first, second, cpm, shift = 0, 0.0, 0.0, 0.0, None
        for block in blocks:
            values = block.double()
            shift = values.mean(0) if shift is None else shift
            samples += len(values)
            cpm = cpm + values.expm1().sum(0)
            values -= shift
            first, second = first + values.sum(0), second + values.square().sum(0)
        variance = (second - first.square() / samples) / (samples - 1)
        mean = shift + first / samples
        return cls(mean.float(), variance.clamp_min(0).float(), cpm / samples)


class CountProbabilities(NamedTuple):
    """Probabilities of observed counts."""

    fewer: Tensor  # (B, g) of fewer counts than observed
    at_most: Tensor  # (B, g) of at most the observed counts
    log_likelihood: Tensor  # (B,) nats, of all counts of a sample


@dataclass(frozen=True)
class Observed:
    """Measured expression of B samples."""

    expression: Tensor  # (B, G) log-CPM
    counts: Tensor | None = None  # (B, G) integers; count models only

    def __len__(self) -> int:
        return len(self.expression)

    def rows(self, index: slice | Tensor) -> "Observed":
        counts = None if self.counts is None else self.counts[index]
        return Observed(self.expression[index], counts)

    def first(self, number: int) -> "Observed":
        """The first `number` samples. All of them keep the cached properties."""
        return self if number == len(self) else self.rows(slice(number))

    @cached_property
    def counts64(self) -> Tensor:
        """(B, G) counts in float64."""
        return self.counts.double()

    @cached_property
    def library(self) -> Tensor:
        """(B, 1) counts over the modelled genes, float64."""
        return self.counts64.sum(1, keepdim=True)

    @cached_property
    def log_factorials(self) -> Tensor:
        """(B,) sum over genes of log c!"""
        return torch.lgamma(self.counts64 + 1).sum(1)


class Observation(nn.Module, ABC):
    """The interface of observation models. Log-likelihoods are in nats, summed over genes."""

    @abstractmethod
    def initialise(self, moments: GeneMoments) -> Tensor:
        """(G,) initial decoder bias for the moments of the training split; sets the noise to
        theirs."""

    @abstractmethod
    def log_likelihood(self, observed: Observed, decoded: Tensor, source: Source) -> Tensor:
        """(B,) log density of log-CPM (normal) or log probability of counts (count models)."""

    def mean_log_likelihoods(
        self, observed: Observed, decoded: Mapping[LatentSource, Tensor]
    ) -> dict[LatentSource, Tensor]:
        """By source: the mean log-likelihood of the first samples, which are decoded (B_s, G)."""
        return {
            source: self.log_likelihood(observed.first(len(part)), part, source).mean()
            for source, part in decoded.items()
        }

    def blend_variance(self, variance: Tensor, network_weight: float) -> None:
        """Averages the variances (G,) around predictions from metadata with those of a mixed
        model, as the predictions are averaged. Models of counts keep their dispersion."""

    @abstractmethod
    def fractions(self, decoded: Tensor) -> Tensor:
        """(B, G) expected fraction of each gene in the library; may overwrite `decoded`."""

    @abstractmethod
    def log_cpm(self, decoded: Tensor) -> Tensor:
        """(B, G) decoded log-CPM, without noise."""

    @abstractmethod
    def expected_log_cpm(self, decoded: Tensor, totals: Tensor, source: Source) -> Tensor:
        """(B, G) mean log-CPM of counts with totals (B,)."""

    @abstractmethod
    def draw_log_cpm(
        self, decoded: Tensor, totals: Tensor | None, source: Source, generator: torch.Generator
    ) -> Tensor:
        """(B, G) log-CPM of one draw per sample with totals (B,). A Normal ignores the totals and
        may be negative."""

    @abstractmethod
    def draw_counts(
        self, decoded: Tensor, library: np.ndarray, source: Source, generator: torch.Generator
    ) -> np.ndarray:
        """(B, G) integer counts that sum to the libraries (B,): exactly, or for the negative
        binomial in expectation."""

    @abstractmethod
    def count_probabilities(
        self, observed: Observed, totals: Tensor, source: Source, genes: Genes = EVERY_GENE
    ) -> Callable[[Tensor], CountProbabilities]:
        """A function from decoded values (B, G) to the probabilities of the observed counts, which
        compare between observation models: the cumulative ones of g `genes`, which take most of the
        time, and those of whole samples."""

    @abstractmethod
    def precision(self) -> Tensor:
        """(G,) inverse variance of log-CPM around the values decoded from the posterior."""
