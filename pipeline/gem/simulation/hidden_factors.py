"""What stays hidden of a sample whose metadata are known, and how probable it is: donor, study, perturbation.

A hidden donor (with the study's effect, where that is hidden too) is one of a few possibilities, each with a weight, an
expected effect and, around it, Normal effects independent over genes. Likewise for what an unseen perturbation does.

Donor effects are centred over the D donors of a stratum: x_i = e_i - mean(e), e ~ Normal(0, s^2), s = DONOR_SCALE. Hence
var x_i = s^2 (1 - 1/D) and cov(x_i, x_j) = -s^2 / D, and of another donor of the stratum of a known one
E[x_j | x_i] = -x_i / (D - 1) and var(x_j | x_i) = s^2 (D - 2) / (D - 1).

N samples, G genes; otherwise the legend of simulator.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.simulation.generator import (
    AGES,
    DONOR_SCALE,
    RESIDUAL_FOLD,
    RESIDUAL_SHARE,
    SEXES,
    STUDY_SCALE,
    Levels,
    Truth,
    age_missing_probability,
)

DISEASE_SHARES = np.array(
    [0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3]
)  # of strata, as the simulator draws them
YEARS = AGES[1] - AGES[0] + 1  # ages of donors are whole years, all equally frequent

Ages = tuple[np.ndarray, np.ndarray]  # (years, weights summing to 1)


@dataclass(frozen=True)
class Query:
    """N samples and what is known of them: recorded metadata, total counts and, of some, whose control the reference is."""

    levels: Levels
    sex: np.ndarray  # index into SEXES as recorded, -1 missing
    age: np.ndarray  # years as recorded, NaN missing
    totals: np.ndarray  # total counts
    stratum: np.ndarray  # of a reference from the same study, -1 without one
    donor: np.ndarray  # of that reference, within the stratum

    @classmethod
    def of(cls, truth: Truth, samples: pd.DataFrame, totals: np.ndarray) -> "Query":
        """Of metadata rows (N) and their total counts (N,), without references."""
        sex = (
            samples["sex"]
            .map({name: index for index, name in enumerate(SEXES)})
            .fillna(-1)
            .to_numpy(dtype=np.int64)
        )
        none = np.full(len(samples), -1)
        return cls(
            truth.levels(samples),
            sex,
            samples["age_years"].to_numpy(dtype=float),
            np.asarray(totals, dtype=float),
            none,
            none,
        )

    def rows(self, chosen: np.ndarray) -> "Query":
        parts = (self.sex, self.age, self.totals, self.stratum, self.donor)
        return Query(self.levels.rows(chosen), *(part[chosen] for part in parts))

    def likelihood(self, truth: Truth, sex: np.ndarray, age: np.ndarray) -> np.ndarray:
        """(N,) probability of sex and age as recorded, given the true sex (index) and age (years), up to a factor of the sample."""
        wrong, missing = float(truth.wrong_sex), age_missing_probability(truth, age)
        of_sex = np.where(self.sex < 0, 1.0, np.where(self.sex == sex, 1 - wrong, wrong))
        return of_sex * np.where(np.isnan(self.age), missing, (self.age == age) * (1 - missing))


@dataclass(frozen=True)
class DonorHypothesis:
    """One of the values that what is hidden of donor and study may have, for N samples at once."""

    weight: np.ndarray  # (N,) probability, up to a factor of the sample
    effects: Callable[
        [np.ndarray], np.ndarray
    ]  # rows (n,) -> (n, G) effects of sex, age, donor and study on log mu
    blur: float = 0.0  # standard deviation of Normal effects around them


def few_ages() -> Ages:
    """Gauss-Legendre nodes of the uniform ages: for expectations, which are all but linear in age."""
    nodes, weights = np.polynomial.legendre.leggauss(3)
    return (AGES[0] + AGES[1]) / 2 + YEARS / 2 * nodes, weights / 2


def all_ages() -> Ages:
    """Every age: for draws."""
    return np.arange(AGES[0], AGES[1] + 1.0), np.full(YEARS, 1 / YEARS)


def possible_donors(
    truth: Truth, query: Query, seen_study: bool, ages: Ages
) -> Iterator[DonorHypothesis]:
    """Who the donors of N samples may be: all of seen studies, or all of unseen ones and all or none with a reference.

    The donor of a sample is drawn without regard to those of others, so that where the donors of a study are known a
    reference tells nothing more. Of an unseen study it tells the study's effect, its stratum and its donor. (That a
    reference was chosen for its likeness is not used: it would move the weight of the stratum a little, no effect.)
    """
    if seen_study:
        return _of_seen_study(truth, query)
    return (
        _beside_reference(truth, query, ages)
        if (query.stratum >= 0).all()
        else _of_unseen_study(truth, query, ages)
    )


def _of_seen_study(truth: Truth, query: Query) -> Iterator[DonorHypothesis]:
    study, (_, strata, donors, _) = query.levels.study, truth.donor.shape
    for stratum in range(strata):
        weight, traits = _stratum(truth, query, np.full(len(study), stratum))
        for donor in range(donors):
            yield DonorHypothesis(
                weight,
                _sum(
                    traits,
                    lambda rows, at=(stratum, donor): (
                        truth.study[study[rows]] + truth.donor[study[rows], *at]
                    ),
                ),
            )


def _of_unseen_study(truth: Truth, query: Query, ages: Ages) -> Iterator[DonorHypothesis]:
    blur = float(np.sqrt(STUDY_SCALE**2 + _donor_variance(truth)))
    for weight, traits in _strangers(truth, query, ages):
        yield DonorHypothesis(weight, traits, blur)


def _beside_reference(truth: Truth, query: Query, ages: Ages) -> Iterator[DonorHypothesis]:
    """The reference's donor, another donor of its stratum, or one of another stratum."""
    study, (_, strata, donors, _) = query.levels.study, truth.donor.shape
    likelihood, traits = _stratum(truth, query, query.stratum)
    likelihood = likelihood / strata

    def beside(factor: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda rows: (
            truth.study[study[rows]]
            + factor * truth.donor[study[rows], query.stratum[rows], query.donor[rows]]
        )

    yield DonorHypothesis(likelihood / donors, _sum(traits, beside(1.0)))
    if donors > 1:
        blur = DONOR_SCALE * float(np.sqrt((donors - 2) / (donors - 1)))
        yield DonorHypothesis(
            likelihood * (1 - 1 / donors), _sum(traits, beside(-1 / (donors - 1))), blur
        )
    if strata > 1:
        for weight, strange in _strangers(truth, query, ages):
            yield DonorHypothesis(
                weight * (1 - 1 / strata),
                _sum(strange, beside(0.0)),
                float(np.sqrt(_donor_variance(truth))),
            )


def _donor_variance(truth: Truth) -> float:
    return DONOR_SCALE**2 * (1 - 1 / truth.donor.shape[2])


def _stratum(truth: Truth, query: Query, stratum: np.ndarray) -> tuple[np.ndarray, Callable]:
    """(probability of what was recorded (N,), effects of sex and age) of known strata (N,)."""
    study = query.levels.study
    sex, age = truth.stratum_sex[study, stratum], truth.stratum_age[study, stratum]
    weight = query.likelihood(truth, sex, age) * (
        truth.stratum_disease[study, stratum] == query.levels.disease
    )
    return weight, _traits(truth, sex, age)


def _strangers(truth: Truth, query: Query, ages: Ages) -> Iterator[tuple[np.ndarray, Callable]]:
    """(probability with what was recorded (N,), effects of sex and age) of a stratum of which nothing is known."""
    recorded = ~np.isnan(query.age)
    for number, (age_node, age_weight) in enumerate(zip(*ages, strict=True)):
        age = np.where(recorded, query.age, age_node)
        # A recorded age is right: one node stands for it.
        share = (
            DISEASE_SHARES[query.levels.disease]
            / len(SEXES)
            * np.where(recorded, (number == 0) / YEARS, age_weight)
        )
        for sex in range(len(SEXES)):
            sexes = np.full(len(age), sex)
            yield share * query.likelihood(truth, sexes, age), _traits(truth, sexes, age)


def _traits(truth: Truth, sex: np.ndarray, age: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: truth.donor_trait_effects(sex[rows], age[rows])


def _sum(first: Callable, second: Callable) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: first(rows) + second(rows)


@dataclass(frozen=True)
class Outcome:
    """One of the things that the perturbations of N samples may do. What is peculiar to one moves each gene by itself."""

    program: np.ndarray  # (N, G) added to log mu
    nodes: tuple[
        tuple[float, np.ndarray], ...
    ]  # (share, (N,) added to the log mu of any one gene): quadrature
    growth: np.ndarray  # (N,) log E[exp(peculiar effect)]
    spread: np.ndarray  # (N,) E[exp(2 peculiar effect)] / E[exp(peculiar effect)]^2


def possible_outcomes(truth: Truth, levels: Levels, seen_perturbation: bool) -> list[Outcome]:
    """What the perturbations do: known if all of them are seen; if none is, nothing, or what follows from the embedding and more."""
    still, one = np.zeros(len(levels.study)), np.ones(len(levels.study))
    if seen_perturbation:
        return [Outcome(truth.perturbation_effects(levels), ((1.0, still),), still, one)]
    program, null = truth.predictable_program(levels), float(truth.null_share)
    nodes, weights = _residual_nodes()
    moved = truth.residual_scale(levels)[:, None] * nodes  # (N, nodes)
    mean, square = np.exp(moved) @ weights, np.exp(2 * moved) @ weights
    inactive = Outcome(np.broadcast_to(0.0, program.shape), ((null, still),), still, one)
    return [
        inactive,
        Outcome(
            program,
            tuple(zip((1 - null) * weights, moved.T, strict=True)),
            np.log(mean),
            square / mean**2,
        ),
    ]


def _residual_nodes() -> tuple[np.ndarray, np.ndarray]:
    """Quadrature over one gene's peculiar effect: none, or a signed log fold uniform in its range."""
    low, high = np.log(RESIDUAL_FOLD)
    nodes, weights = np.polynomial.legendre.leggauss(2)
    sizes, weights = (
        (low + high) / 2 + (high - low) / 2 * nodes,
        weights / weights.sum() / 2 * RESIDUAL_SHARE,
    )
    return np.concatenate([[0.0], sizes, -sizes]), np.concatenate(
        [[1 - RESIDUAL_SHARE], weights, weights]
    )


def draw_outcomes(
    truth: Truth, levels: Levels, seen_perturbation: bool, rng: np.random.Generator
) -> np.ndarray:
    """(N, G) effects on log mu of the perturbations, all seen or none, each row by itself."""
    if seen_perturbation:
        return truth.perturbation_effects(levels)
    effects, scale = truth.predictable_program(levels), truth.residual_scale(levels)
    row, gene = np.nonzero(rng.random(effects.shape, dtype=np.float32) < RESIDUAL_SHARE)
    effects[row, gene] += (
        scale[row]
        * rng.choice([-1.0, 1.0], len(row))
        * rng.uniform(*np.log(RESIDUAL_FOLD), len(row))
    )
    effects[rng.random(len(effects)) < truth.null_share] = 0
    return effects
