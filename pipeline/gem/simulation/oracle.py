"""Ideal predictors of a synthetic cohort, from the simulator's truth.

Each predicts E[log-CPM | available information] and draws counts. expected_log_cpm.py integrates
over count noise, hidden_factors.py sums over hidden factors. The approximations: tables (1e-4
log-CPM); the normaliser of integrated noise, by its mean and variance; observed total counts in
place of the library size. Compared with independent simulation (test_oracle_resimulation.py)
their error is below 1 % of the difference that an oracle is used to measure: to ridge for the
metadata oracle, between metadata and omniscient for the reference oracle.

Draws are ancestral: hidden factors given the information, then counts. Rows are independent: two
rows of one unknown study, donor or perturbation do not share its effect.

N samples, G genes; otherwise the legend of truth.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from pipeline.gem.simulation.expected_log_cpm import ExpectationCache
from pipeline.gem.simulation.generator import draw_counts
from pipeline.gem.simulation.hidden_factors import (
    DonorHypothesis,
    OracleQuery,
    age_distribution,
    age_quadrature,
    donor_hypotheses,
    draw_subpopulations,
    subpopulations,
)
from pipeline.gem.simulation.perturbation_outcomes import (
    KnownPerturbations,
    PerturbationOutcome,
    draw_perturbation_effects,
    perturbation_outcomes,
)
from pipeline.gem.simulation.truth import Truth

CHANGED_FOLD = 1.2  # a true effect of this fold, up or down, counts as a change
_BLOCK = 256  # samples at a time
_NEGLIGIBLE = 1e-7  # hypotheses of smaller posterior probability are left out


@dataclass(frozen=True)
class ReferenceControls:
    """A control sample for each of N samples, with its true stratum and donor."""

    samples: pd.DataFrame
    stratum: np.ndarray  # (N,)
    donor: np.ndarray  # (N,)


class MetadataOracle:
    """E[log-CPM | recorded metadata, library size], with the true effects of all training levels.

    Summed over: the donor and, where sex or age is missing or may be wrong, the stratum; for a
    study outside training the population of studies and donors; for a perturbation outside training
    its residual and whether it is active (its embedding and its target gene are public); for a pair
    of context and perturbation outside training the program that it has in this context only; the
    subpopulation of a cell.

    Reference controls, if given, reveal their study effect, stratum and donor effect. This is
    informative where the reference is of the sample's own study and that study is outside training:
    the sample's donor is then the reference's, one of the same stratum, or of another.
    """

    def __init__(
        self,
        truth: Truth,
        training_studies: set,
        training_perturbations: set,
        training_samples: pd.DataFrame | None = None,
    ):
        """`training_samples` say which pairs are in training; None: all of known perturbations."""
        self.truth, self.expectations = truth, ExpectationCache(truth)
        self.study_in_training = np.isin(truth.studies, list(training_studies))
        self.known = KnownPerturbations.of(truth, training_perturbations, training_samples)

    def predict(
        self,
        samples: pd.DataFrame,
        totals: np.ndarray,
        references: ReferenceControls | None = None,
    ) -> np.ndarray:
        """(N, G) expected log-CPM of all genes of the truth, for metadata rows and total counts."""
        query, truth = self._query(samples, totals, references), self.truth
        result = np.zeros((len(query.totals), len(truth.baseline)))
        if len(result):
            self.expectations.extend_to(query.totals)
        for rows, study_in_training, kind in self._blocks(query):
            block = query.take(rows)
            hypotheses = donor_hypotheses(block, study_in_training, age_quadrature())
            outcomes = perturbation_outcomes(truth, block.levels, kind)
            result[rows] = self._expected(block, hypotheses, outcomes)
        return result

    def draw(
        self,
        samples: pd.DataFrame,
        totals: np.ndarray,
        references: ReferenceControls | None = None,
        *,
        rng: np.random.Generator,
        genes: np.ndarray | slice = slice(None),
    ) -> np.ndarray:
        """(N, G) counts with these expected totals, of some `genes` alone; arguments as in
        `predict`."""
        query, truth = self._query(samples, totals, references), self.truth
        dispersion = truth.dispersion[genes]
        result = np.zeros((len(query.totals), len(dispersion)), dtype=np.int64)
        for rows, study_in_training, kind in self._blocks(query):
            block = query.take(rows)
            levels = block.levels
            log_mu = truth.base_log_mu(levels)
            log_mu += draw_perturbation_effects(truth, levels, kind, rng)
            hypotheses = donor_hypotheses(block, study_in_training, age_distribution())
            log_mu += self._draw_donor_effects(hypotheses, log_mu.shape, rng)
            if (drawn := draw_subpopulations(truth, levels, rng)) is not None:
                log_mu += truth.subpopulation[levels.context, drawn]
            log_fraction = log_mu[:, genes] - expected_log_sum_exp(log_mu)[:, None]
            result[rows] = draw_counts(log_fraction, block.totals, dispersion, rng)
        return result

    def _query(
        self, samples: pd.DataFrame, totals: np.ndarray, references: ReferenceControls | None
    ) -> OracleQuery:
        query = OracleQuery.from_samples(self.truth, samples, totals)
        if references is None:
            return query
        same_study = samples["study"].to_numpy() == references.samples["study"].to_numpy()
        informative = same_study & ~self.study_in_training[query.levels.study]
        stratum = np.where(informative, references.stratum, -1)
        return replace(query, stratum=stratum, donor=np.where(informative, references.donor, -1))

    def _blocks(self, query: OracleQuery) -> Iterator[tuple[np.ndarray, bool, int]]:
        """(rows, study in training, kind of perturbation) of blocks of which the same is known."""
        study_in_training = self.study_in_training[query.levels.study]
        perturbation = self.known.kinds(query.levels)
        keys = np.stack([study_in_training, perturbation, query.stratum >= 0], axis=1)
        for key in np.unique(keys, axis=0):
            rows = np.flatnonzero((keys == key).all(axis=1))
            for start in range(0, len(rows), _BLOCK):
                yield rows[start : start + _BLOCK], bool(key[0]), int(key[1])

    def _expected(
        self,
        query: OracleQuery,
        hypotheses: list[DonorHypothesis],
        outcomes: list[PerturbationOutcome],
    ) -> np.ndarray:
        """(N, G) log-CPM, the sum over hypotheses, subpopulations, outcomes and nodes."""
        base = self.truth.base_log_mu(query.levels)
        result = np.zeros(base.shape)
        for weight, hypothesis in zip(_probabilities(hypotheses), hypotheses, strict=True):
            rows = np.flatnonzero(weight > _NEGLIGIBLE)
            if not len(rows):
                continue
            some = query.take(rows)
            donor_log_mu = base[rows] + hypothesis.effects(self.truth, rows)
            expected = sum(
                (share * self._given_donor(some, hypothesis, outcomes, rows, donor_log_mu + effect))
                for share, effect in subpopulations(self.truth, some.levels)
            )
            result[rows] += weight[rows][:, None] * expected
        return result

    def _given_donor(
        self,
        query: OracleQuery,
        hypothesis: DonorHypothesis,
        outcomes: list[PerturbationOutcome],
        rows: np.ndarray,
        untreated: np.ndarray,
    ) -> np.ndarray:
        """(n, G) log-CPM of the samples `rows`, given log mu without the perturbation."""
        noise_sd, detected = hypothesis.noise_sd, hypothesis.detected
        table = self.expectations.table(query.totals, noise_sd)
        result = np.zeros(untreated.shape)
        for outcome in outcomes:
            log_mu = untreated + outcome.program[rows]
            log_mean, second_moment = outcome.moments(rows)
            if detected is not None:
                log_mean, second_moment = log_mean + np.log(detected), second_moment / detected
            normaliser = expected_log_sum_exp(log_mu + log_mean, noise_sd, second_moment)
            log_fraction = log_mu - normaliser[:, None]
            for probability, deviation in outcome.deviations(rows):
                result += probability * table(log_fraction + deviation, query.totals)
        return result if detected is None else detected * result

    def _draw_donor_effects(
        self, hypotheses: list[DonorHypothesis], shape: tuple[int, int], rng: np.random.Generator
    ) -> np.ndarray:
        """(N, G) effects of donor and study."""
        cumulative = np.cumsum(_probabilities(hypotheses), axis=0)
        draw = (cumulative < rng.random(shape[0])).sum(axis=0)
        noise_sd = np.array([hypothesis.noise_sd for hypothesis in hypotheses])[draw]
        effects, detected = np.zeros(shape), np.ones(shape)
        for index in np.unique(draw):
            rows = np.flatnonzero(draw == index)
            effects[rows] = hypotheses[index].effects(self.truth, rows)
            if hypotheses[index].detected is not None:
                detected[rows] = hypotheses[index].detected
        if noise_sd.any():
            effects = effects + noise_sd[:, None] * rng.standard_normal(shape)
        if (detected < 1).any():
            effects = np.where(rng.random(shape) < detected, effects, -np.inf)
        return effects


class OmniscientOracle:
    """E[log-CPM | all hidden factors, library size]: only count noise remains."""

    def __init__(self, expectations: ExpectationCache):
        self.expectations = expectations

    def predict(self, log_fraction: np.ndarray, totals: np.ndarray) -> np.ndarray:
        """(N, G) expected log-CPM from true log fractions (N, G) and total counts (N,)."""
        table, totals = self.expectations.table(totals), np.asarray(totals, dtype=float)
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(totals), _BLOCK)]
        parts = [table(log_fraction[block], totals[block]) for block in blocks]
        return np.concatenate(parts).astype(float)

    def draw(
        self,
        log_fraction: np.ndarray,
        totals: np.ndarray,
        *,
        rng: np.random.Generator,
        genes: np.ndarray | slice = slice(None),
    ) -> np.ndarray:
        """(N, G) counts with these expected totals, of some `genes` alone."""
        dispersion, totals = self.expectations.dispersion[genes], np.asarray(totals, dtype=float)
        return draw_counts(log_fraction[:, genes], totals, dispersion, rng)


def true_effects(truth: Truth, samples: pd.DataFrame) -> np.ndarray:
    """(N, G) change of the log fraction between each sample and the same sample untreated.

    Fractions are compositional: a gene loses what other genes gain, by an amount that depends on
    the untreated profile. That profile is taken from metadata and study, without the donor: in the
    default cohort this moves a change by 0.008 (root mean square, of 0.37), and 2 in 1,000 genes
    across a fold of 1.2.
    """
    levels = truth.levels(samples)
    untreated = truth.base_log_mu(levels) + truth.study[levels.study]
    effects = truth.perturbation_effects(levels)
    shift = expected_log_sum_exp(untreated + effects) - expected_log_sum_exp(untreated)
    return effects - shift[:, None]


def _probabilities(hypotheses: list[DonorHypothesis]) -> np.ndarray:
    """(hypotheses, N) that sum to one over the hypotheses. ValueError for impossible metadata."""
    weights = np.stack([hypothesis.weight for hypothesis in hypotheses])
    total = weights.sum(axis=0)
    if not (total > 0).all():
        raise ValueError(
            f"{np.sum(total <= 0)} samples with a sex, age and disease that no donor of their study"
            " can have"
        )
    return weights / total


def expected_log_sum_exp(
    log_mu: np.ndarray, noise_sd: float = 0.0, second_moment: np.ndarray | float = 1.0
) -> np.ndarray:
    """(N,) E[log of the sum over genes of exp(log mu + noise)], for log mu (N, G).

    Noise is independent over genes: Normal of standard deviation `noise_sd`, times a factor of mean
    one and this second moment, of all genes or (N, G) or (N, 1). Delta method: E[log S] =
    log E[S] - var S / (2 E[S]^2).
    """
    highest = log_mu.max(axis=1)
    shares = np.exp(log_mu - highest[:, None])
    total = shares.sum(axis=1)
    excess = np.broadcast_to(second_moment * np.exp(noise_sd**2) - 1, shares.shape)
    variance = np.einsum("ng,ng,ng->n", shares, shares, excess) / (2 * total**2)
    return highest + np.log(total) + noise_sd**2 / 2 - variance
