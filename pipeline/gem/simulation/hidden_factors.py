"""The hidden factors of a sample given its metadata: donor, study effect and subpopulation.

A hidden donor (with the study effect, where that is hidden too) is one of a few hypotheses, each
with a weight, an expected effect and Normal noise around it that is independent over genes.

Donor effects are centred over the D donors of a stratum: x_i = e_i - mean(e) with
e ~ Normal(0, s^2) and s = DONOR_SCALE. Hence var x_i = s^2 (1 - 1/D), cov(x_i, x_j) = -s^2 / D, and
for another donor of the stratum of a known one E[x_j | x_i] = -x_i / (D - 1) and
var(x_j | x_i) = s^2 (D - 2) / (D - 1).

N samples, G genes; otherwise the legend of truth.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from pipeline.gem.simulation.generator import (
    AGES,
    DISEASE_SHARES,
    DONOR_SCALE,
    STUDY_SCALE,
)
from pipeline.gem.simulation.truth import SEXES, Levels, Truth

YEARS = AGES[1] - AGES[0] + 1  # ages of donors are whole years, uniform

Ages = tuple[np.ndarray, np.ndarray]  # (years, weights that sum to 1)
Evidence = tuple[np.ndarray, np.ndarray, np.ndarray]  # (probability of the record, sex, age) (N,)


@dataclass(frozen=True)
class OracleQuery:
    """N samples as an oracle gets them: recorded metadata, total counts, donors of references."""

    truth: Truth
    levels: Levels
    sex: np.ndarray  # index into SEXES as recorded, -1 where missing
    age: np.ndarray  # years as recorded, NaN where missing
    totals: np.ndarray  # total counts
    stratum: np.ndarray  # of a reference from the same study outside training, -1 without one
    donor: np.ndarray  # of that reference, within the stratum

    @classmethod
    def from_samples(cls, truth: Truth, samples: pd.DataFrame, totals: np.ndarray) -> "OracleQuery":
        """A query without references, from metadata rows (N) and their total counts (N,)."""
        codes = {name: index for index, name in enumerate(SEXES)}
        sex = samples["sex"].astype(object).map(codes).fillna(-1).to_numpy(dtype=np.int64)
        age = samples["age_years"].to_numpy(dtype=float)
        no_reference = np.full(len(samples), -1)
        totals = np.asarray(totals, dtype=float)
        return cls(truth, truth.levels(samples), sex, age, totals, no_reference, no_reference)

    def take(self, rows: np.ndarray) -> "OracleQuery":
        arrays = (getattr(self, field.name)[rows] for field in fields(self)[2:])
        return OracleQuery(self.truth, self.levels.take(rows), *arrays)

    def likelihood(self, sex: np.ndarray, age: np.ndarray) -> np.ndarray:
        """(N,) probability of the recorded sex and age given the true sex (index) and age (years),
        up to a factor of the sample."""
        wrong, missing = float(self.truth.wrong_sex), self.truth.age_missing_probability(age)
        of_sex = np.where(self.sex < 0, 1.0, np.where(self.sex == sex, 1 - wrong, wrong))
        return of_sex * np.where(np.isnan(self.age), missing, (self.age == age) * (1 - missing))


@dataclass(frozen=True)
class DonorHypothesis:
    """One hypothesis about the hidden donors and study effects of N samples.

    The expected effect is that of sex, age and, where `known_donor` indexes a donor of the truth
    (study, stratum, donor), of its study plus `donor_weight` times that donor.
    """

    weight: np.ndarray  # (N,) probability, up to a factor of the sample
    sex: np.ndarray  # (N,) index
    age: np.ndarray  # (N,) years
    known_donor: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # (N,) each
    donor_weight: float = 1.0
    noise_sd: float = 0.0  # standard deviation of Normal effects around the expected one
    detected: np.ndarray | None = None  # (G,) probability that the study detects a gene; None: 1

    def effects(self, truth: Truth, rows: np.ndarray) -> np.ndarray:
        """(n, G) expected effects on log mu of the samples `rows` (n,)."""
        effects = truth.donor_trait_effects(self.sex[rows], self.age[rows])
        if self.known_donor is None:
            return effects
        study, stratum, donor = (index[rows] for index in self.known_donor)
        donor_effects = self.donor_weight * truth.donor[study, stratum, donor]
        return effects + (truth.study[study] + donor_effects)


def age_quadrature() -> Ages:
    """Gauss-Legendre nodes of the uniform ages, for expectations (nearly linear in age)."""
    nodes, weights = np.polynomial.legendre.leggauss(3)
    return (AGES[0] + AGES[1]) / 2 + YEARS / 2 * nodes, weights / 2


def age_distribution() -> Ages:
    """Every age, for draws."""
    return np.arange(AGES[0], AGES[1] + 1.0), np.full(YEARS, 1 / YEARS)


def donor_hypotheses(
    query: OracleQuery, study_in_training: bool, ages: Ages
) -> list[DonorHypothesis]:
    """Hypotheses about the donors of N samples of one kind.

    The samples are all from training studies or all from others, the latter all with or all without
    a reference. The donor of a sample is drawn independently of other samples, so that a reference
    adds no information where the donors of a study are known. In a study outside training it
    determines the study effect, its stratum and its donor. (References are chosen for similarity to
    the sample; the small evidence that this gives about the stratum is ignored.)
    """
    if study_in_training:
        return list(_known_study(query))
    if (query.stratum >= 0).all():
        return list(_given_reference(query, ages))
    return list(_unknown_study(query, ages))


def _known_study(query: OracleQuery) -> Iterator[DonorHypothesis]:
    """Every donor of the study is a hypothesis."""
    study, (_, strata, donors, _) = query.levels.study, query.truth.donor.shape
    for stratum in (np.full(len(study), index) for index in range(strata)):
        evidence = _known_stratum(query, stratum)
        for donor in (np.full(len(study), index) for index in range(donors)):
            yield DonorHypothesis(*evidence, (study, stratum, donor))


def _unknown_study(query: OracleQuery, ages: Ages) -> Iterator[DonorHypothesis]:
    noise_sd = float(np.sqrt(STUDY_SCALE**2 + _donor_variance(query.truth)))
    undetected = query.truth.undetected_probability
    detected = None if undetected is None else 1 - undetected
    for evidence in _unknown_stratum(query, ages):
        yield DonorHypothesis(*evidence, noise_sd=noise_sd, detected=detected)


def _given_reference(query: OracleQuery, ages: Ages) -> Iterator[DonorHypothesis]:
    """The reference's donor, another donor of its stratum, or a donor of another stratum."""
    _, strata, donors, _ = query.truth.donor.shape
    reference = (query.levels.study, query.stratum, query.donor)
    likelihood, sex, age = _known_stratum(query, query.stratum)
    likelihood = likelihood / strata
    yield DonorHypothesis(likelihood / donors, sex, age, reference)
    if donors > 1:
        weight, noise_sd = likelihood * (1 - 1 / donors), np.sqrt((donors - 2) / (donors - 1))
        yield DonorHypothesis(
            weight, sex, age, reference, -1 / (donors - 1), DONOR_SCALE * float(noise_sd)
        )
    if strata > 1:
        noise_sd = float(np.sqrt(_donor_variance(query.truth)))
        for weight, sex, age in _unknown_stratum(query, ages):
            yield DonorHypothesis(weight * (1 - 1 / strata), sex, age, reference, 0.0, noise_sd)


def _donor_variance(truth: Truth) -> float:
    return DONOR_SCALE**2 * (1 - 1 / truth.donor.shape[2])


def _known_stratum(query: OracleQuery, stratum: np.ndarray) -> Evidence:
    """The evidence for known strata (N,) of the samples' studies."""
    truth, study = query.truth, query.levels.study
    sex, age = truth.stratum_sex[study, stratum], truth.stratum_age[study, stratum]
    same_disease = truth.stratum_disease[study, stratum] == query.levels.disease
    return query.likelihood(sex, age) * same_disease, sex, age


def _unknown_stratum(query: OracleQuery, ages: Ages) -> Iterator[Evidence]:
    """The evidence for strata of the population, by age and sex."""
    is_recorded = ~np.isnan(query.age)
    disease_share = np.array(DISEASE_SHARES)[query.levels.disease]
    for number, (age_node, age_weight) in enumerate(zip(*ages, strict=True)):
        age = np.where(is_recorded, query.age, age_node)
        # A recorded age is exact: the first node stands for it.
        age_share = np.where(is_recorded, (number == 0) / YEARS, age_weight)
        share = disease_share / len(SEXES) * age_share
        for sex in (np.full(len(age), index) for index in range(len(SEXES))):
            yield share * query.likelihood(sex, age), sex, age


def subpopulations(
    truth: Truth, levels: Levels
) -> list[tuple[np.ndarray | float, np.ndarray | float]]:
    """((N, 1) share, (N, G) effect) of each subpopulation of the samples' contexts."""
    if truth.subpopulation is None:
        return [(1.0, 0.0)]
    shares, effects = truth.subpopulation_share[levels.context], truth.subpopulation
    return [
        (shares[:, number, None], effects[levels.context, number])
        for number in range(shares.shape[1])
    ]


def draw_subpopulations(
    truth: Truth, levels: Levels, rng: np.random.Generator
) -> np.ndarray | None:
    """(N,) subpopulation of each sample; None of a truth without them."""
    if truth.subpopulation is None:
        return None
    cumulative = np.cumsum(truth.subpopulation_share[levels.context], axis=1)
    drawn = (cumulative < rng.random(len(cumulative))[:, None]).sum(axis=1)
    return np.minimum(drawn, cumulative.shape[1] - 1)
