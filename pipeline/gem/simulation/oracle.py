"""The ideal predictors of a synthetic cohort, from the truth of the simulator: E[log-CPM | what is known], and draws of counts.

The expectation over count noise is that of expectation.py. What is hidden is summed or integrated over (causes.py). The
approximations: tables (1e-4 log-CPM); the normaliser of what is integrated, by its mean and variance; total counts taken for
the library size. Against independent simulation (tests/test_oracle.py) they cost less than 1 % of the gap that an
oracle is used for: to ridge for the metadata oracle, between metadata and omniscient for the reference oracle.

A draw is ancestral: hidden causes given what is known, then counts. Rows are drawn each by itself, from what is known of
that row: two rows of one unseen study, donor or perturbation do not share its effect.

N samples, G genes; otherwise the legend of simulator.py.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from pipeline.gem.simulation.expected_log_cpm import Tables
from pipeline.gem.simulation.generator import Truth, draw_counts
from pipeline.gem.simulation.hidden_factors import (
    DonorHypothesis,
    Outcome,
    Query,
    all_ages,
    draw_outcomes,
    few_ages,
    possible_donors,
    possible_outcomes,
)

_BLOCK = 256  # samples at a time
_NEGLIGIBLE = 1e-7  # posterior probability below which a possibility is left out


class MetadataOracle:
    """E[log-CPM | metadata as recorded, library size], all effects of levels seen in training being known.

    Hidden and summed over: the donor and, where sex or age is missing or may be wrong, the stratum; for an unseen
    study the population of studies and donors; for an unseen perturbation its peculiar effect and whether it acts
    (its embedding and its target gene are public, as a compound library's or a guide library's are).
    """

    def __init__(self, truth: Truth, seen_studies: set[str], seen_perturbations: set[str]):
        self.truth, self.tables = truth, Tables(truth)
        self.seen_study = np.array([name in seen_studies for name in truth.studies])
        self.seen_perturbation = np.array(
            [name in seen_perturbations for name in truth.perturbations]
        )
        self.seen_perturbation[0] = True  # a control is one, whoever has seen it

    def predict(self, samples: pd.DataFrame, totals: np.ndarray) -> np.ndarray:
        """(N, G) expected log-CPM over all genes of the truth, for metadata rows and their total counts."""
        return self.expect(Query.of(self.truth, samples, totals))

    def draw(
        self, samples: pd.DataFrame, totals: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """(N, G) counts drawn for metadata rows, of these expected totals."""
        return self.sample(Query.of(self.truth, samples, totals), rng)

    def expect(self, query: Query) -> np.ndarray:
        """(N, G) expected log-CPM given all that the query tells."""
        result = np.zeros((len(query.totals), len(self.truth.baseline)))
        if len(result):
            self.tables.cover(query.totals)
        for rows, seen_study, seen_perturbation in self._blocks(query):
            block = query.rows(rows)
            donors = list(possible_donors(self.truth, block, seen_study, few_ages()))
            result[rows] = self._expect(
                block, donors, possible_outcomes(self.truth, block.levels, seen_perturbation)
            )
        return result

    def sample(self, query: Query, rng: np.random.Generator) -> np.ndarray:
        """(N, G) counts given all that the query tells."""
        result = np.zeros((len(query.totals), len(self.truth.baseline)), dtype=np.int64)
        for rows, seen_study, seen_perturbation in self._blocks(query):
            block = query.rows(rows)
            log_mu = self.truth.known_effects(block.levels) + draw_outcomes(
                self.truth, block.levels, seen_perturbation, rng
            )
            log_mu += self._draw_donors(
                list(possible_donors(self.truth, block, seen_study, all_ages())), log_mu.shape, rng
            )
            log_fraction = log_mu - _normaliser(log_mu)[:, None]
            result[rows] = draw_counts(log_fraction, block.totals, self.truth.dispersion, rng)
        return result

    def _blocks(self, query: Query) -> Iterator[tuple[np.ndarray, bool, bool]]:
        """(rows, study seen, perturbation seen) in blocks of which the same is known."""
        seen_study, seen_perturbation = (
            self.seen_study[query.levels.study],
            self.seen_perturbation[query.levels.perturbation],
        )
        kind = 4 * seen_study + 2 * seen_perturbation + (query.stratum >= 0)
        for present in np.unique(kind):
            rows = np.flatnonzero(kind == present)
            for start in range(0, len(rows), _BLOCK):
                yield rows[start : start + _BLOCK], bool(present & 4), bool(present & 2)

    def _expect(
        self, query: Query, donors: list[DonorHypothesis], outcomes: list[Outcome]
    ) -> np.ndarray:
        known, result = (
            self.truth.known_effects(query.levels),
            np.zeros((len(query.totals), len(self.truth.baseline))),
        )
        for weight, possibility in zip(_probabilities(donors), donors, strict=True):
            rows = np.flatnonzero(weight > _NEGLIGIBLE)
            if not len(rows):
                continue
            table = self.tables.of(query.totals, possibility.blur)
            log_mu = known[rows] + possibility.effects(rows)
            for outcome in outcomes:
                moved = log_mu + outcome.program[rows]
                normaliser = (
                    _normaliser(moved, possibility.blur, outcome.spread[rows])
                    + outcome.growth[rows]
                )
                for share, shift in outcome.nodes:
                    fractions = moved + (shift[rows] - normaliser)[:, None]
                    result[rows] += (weight[rows] * share)[:, None] * table(
                        fractions, query.totals[rows]
                    )
        return result

    @staticmethod
    def _draw_donors(
        donors: list[DonorHypothesis], shape: tuple[int, int], rng: np.random.Generator
    ) -> np.ndarray:
        """(N, G) effects of donor and study."""
        chosen = (np.cumsum(_probabilities(donors), axis=0) < rng.random(shape[0])).sum(axis=0)
        blur, effects = (
            np.array([possibility.blur for possibility in donors])[chosen],
            np.zeros(shape),
        )
        for index in np.unique(chosen):
            rows = np.flatnonzero(chosen == index)
            effects[rows] = donors[index].effects(rows)
        return effects + blur[:, None] * rng.standard_normal(shape) if blur.any() else effects


class ReferenceOracle:
    """The metadata oracle that also knows the study and donor effects, and the stratum, of a reference control of each sample.

    That tells something where the reference is of the sample's own study and that study was not seen in training: its
    effect, and the donor's, who may be the sample's, one of the same stratum, or of another. Otherwise it is the metadata oracle.
    """

    def __init__(self, metadata: MetadataOracle):
        self.metadata, self.tables = metadata, metadata.tables

    def predict(
        self,
        samples: pd.DataFrame,
        totals: np.ndarray,
        reference_samples: pd.DataFrame,
        reference_stratum: np.ndarray,
        reference_donor: np.ndarray,
    ) -> np.ndarray:
        """(N, G) expected log-CPM; row i of `reference_samples`, and its true stratum and donor (N,), belong to sample i."""
        return self.metadata.expect(
            self._query(samples, totals, reference_samples, reference_stratum, reference_donor)
        )

    def draw(
        self,
        samples: pd.DataFrame,
        totals: np.ndarray,
        reference_samples: pd.DataFrame,
        reference_stratum: np.ndarray,
        reference_donor: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """(N, G) counts; arguments as in `predict`."""
        return self.metadata.sample(
            self._query(samples, totals, reference_samples, reference_stratum, reference_donor), rng
        )

    def _query(
        self,
        samples: pd.DataFrame,
        totals: np.ndarray,
        references: pd.DataFrame,
        stratum: np.ndarray,
        donor: np.ndarray,
    ) -> Query:
        query = Query.of(self.metadata.truth, samples, totals)
        own = samples["study"].to_numpy() == references["study"].to_numpy()
        tells = own & ~self.metadata.seen_study[query.levels.study]
        return replace(
            query, stratum=np.where(tells, stratum, -1), donor=np.where(tells, donor, -1)
        )


class OmniscientOracle:
    """E[log-CPM | every hidden cause, library size]: what is left is count noise."""

    def __init__(self, tables: Tables):
        self.tables = tables

    def predict(self, log_fraction: np.ndarray, totals: np.ndarray) -> np.ndarray:
        """(N, G) from true log fractions (N, G) and total counts (N,)."""
        table, totals = self.tables.of(totals), np.asarray(totals, dtype=float)
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(totals), _BLOCK)]
        return np.concatenate(
            [table(log_fraction[block], totals[block]) for block in blocks]
        ).astype(float)

    def draw(
        self, log_fraction: np.ndarray, totals: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """(N, G) counts of these expected totals."""
        return draw_counts(
            log_fraction, np.asarray(totals, dtype=float), self.tables.dispersion, rng
        )


def true_effects(truth: Truth, samples: pd.DataFrame) -> np.ndarray:
    """(N, G) change of the log fraction that the perturbation of each recorded sample causes, against the same one untreated.

    Compositional: what other genes gain, a gene loses. How much depends on the untreated profile, here that of the
    metadata and the study. The donor's part in it is left out: in the default cohort that moves a change by 0.008 (root
    mean square, of 0.37), and 2 in 1,000 genes across a fold of 1.2.
    """
    levels = truth.levels(samples)
    untreated, effects = (
        truth.known_effects(levels) + truth.study[levels.study],
        truth.perturbation_effects(levels),
    )
    return effects - (_normaliser(untreated + effects) - _normaliser(untreated))[:, None]


def truly_changed(truth: Truth, samples: pd.DataFrame, fold: float = 1.2) -> np.ndarray:
    """(N, G) whether the perturbation changes the gene's share by at least this factor, up or down."""
    return np.abs(true_effects(truth, samples)) >= np.log(fold)


def _probabilities(donors: list[DonorHypothesis]) -> np.ndarray:
    """(possibilities, N) that sum to one over the possibilities. ValueError for metadata that cannot come about."""
    weights = np.stack([possibility.weight for possibility in donors])
    total = weights.sum(axis=0)
    if not (total > 0).all():
        raise ValueError(
            f"{np.sum(total <= 0)} samples whose sex, age and disease no donor of their study can have"
        )
    return weights / total


def _normaliser(
    log_mu: np.ndarray, blur: float = 0.0, spread: np.ndarray | float = 1.0
) -> np.ndarray:
    """(N,) E[log of the sum over genes of exp(log mu + noise)].

    Noise is independent over genes: Normal of standard deviation `blur`, times a factor of mean one and second moment
    `spread`. Delta method: E[log S] = log E[S] - var S / (2 E[S]^2).
    """
    highest = log_mu.max(axis=1)
    shares = np.exp(log_mu - highest[:, None])
    total = shares.sum(axis=1)
    dominance = np.einsum("ng,ng->n", shares, shares) / total**2
    return highest + np.log(total) + blur**2 / 2 - (spread * np.exp(blur**2) - 1) / 2 * dominance
