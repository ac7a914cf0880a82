"""The ideal predictors of a synthetic cohort: E[log-CPM | what is known], from the truth of the simulator.

The expectation over count noise is exact. With Frullani's log(1 + y) = int_0^inf (1 - exp(-y t)) exp(-t) / t dt
and the Laplace transform of the negative binomial, E[exp(-c t)] = (1 + phi m (1 - exp(-t)))^(-1 / phi),

    E[log1p(s c)] = int_0^inf (1 - (1 + phi m (1 - exp(-s t)))^(-1 / phi)) exp(-t) / t dt.

What is hidden (donor, stratum, an unseen study, an unseen perturbation) is summed or integrated over. The only
approximations are the interpolation of a table and the normaliser of what is integrated. Against independent
simulation (tests/test_oracle.py) their error is below 0.04 % of the gap between training mean and oracle.

N samples, G genes; otherwise the legend of simulator.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import CubicSpline

from pipeline.gem.simulator import (
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

_STEP = 0.3           # of the integral over log t: the trapezoid rule converges as exp(-pi^2 / step)
_COARSE, _FINE = 0.25, 0.02  # of the grids over log fraction: exact integrals, then a cubic spline of them
_DEPTH_MARGIN = 1.1   # a table is built for library sizes a little beyond those asked for
_DEPTHS = 8           # Chebyshev nodes over log library size
_BLOCK = 256          # samples at a time
_NEGLIGIBLE = 1e-7    # posterior weight below which a possibility is left out


def expected_log_cpm(mean: np.ndarray, dispersion: np.ndarray, total: np.ndarray) -> np.ndarray:
    """E[log1p(1e6 c / total)] for c ~ NegativeBinomial(mean, dispersion); arguments broadcast. Exact to 1e-9."""
    scale = 1e6 / np.asarray(total, dtype=float)
    mean, dispersion = np.asarray(mean, dtype=float), np.asarray(dispersion, dtype=float)
    first = -21.0 - max(np.log(np.max(scale * mean) + 1e-300), 0.0)
    result = np.zeros(np.broadcast_shapes(mean.shape, dispersion.shape, scale.shape))
    for log_t in np.arange(first, 3.7, _STEP):
        t = np.exp(log_t)
        result += np.exp(-t) * -np.expm1(-np.log1p(-dispersion * mean * np.expm1(-scale * t)) / dispersion)
    return _STEP * result


@dataclass(frozen=True)
class ExpectationTable:
    """E[log-CPM] per gene as a function of log fraction and library size, optionally blurred by Normal noise."""

    lowest: float
    tables: np.ndarray       # (depths, grid, G)
    log_depths: np.ndarray   # (depths,)

    @classmethod
    def build(cls, dispersion: np.ndarray, lowest: float, highest: float, totals: np.ndarray, blur: float = 0.0) -> "ExpectationTable":
        """For log fractions in [lowest, highest]; `blur` is the standard deviation of Normal noise on the log fraction."""
        log_depths = _depth_nodes(totals)
        margin = 6 * blur + 3 * _COARSE
        coarse = np.arange(lowest - margin, highest + margin + _COARSE, _COARSE)
        fine = np.arange(lowest, highest + _FINE, _FINE)
        nodes, weights = np.polynomial.hermite_e.hermegauss(9) if blur else (np.zeros(1), np.ones(1))
        weights = weights / weights.sum()
        tables = np.empty((len(log_depths), len(fine), len(dispersion)))
        for index, log_depth in enumerate(log_depths):
            depth = np.exp(log_depth)
            exact = expected_log_cpm(np.exp(coarse)[:, None] * depth, dispersion, depth)
            spline = CubicSpline(coarse, exact, axis=0)
            tables[index] = sum(weight * spline(fine + blur * node) for node, weight in zip(nodes, weights, strict=True))
        return cls(float(fine[0]), tables, log_depths)

    def __call__(self, log_fraction: np.ndarray, totals: np.ndarray) -> np.ndarray:
        """(N, G) expectations for log fractions (N, G) and library sizes (N,); linear in the fine grid, Lagrange in depth."""
        _, grid, genes = self.tables.shape
        position = np.clip((log_fraction - self.lowest) / _FINE, 0, grid - 1.001)
        index = position.astype(np.int64)
        share = position - index
        flat = index * genes + np.arange(genes)
        result = np.zeros_like(log_fraction)
        for table, weight in zip(self.tables, _lagrange(self.log_depths, np.log(totals)), strict=True):
            below = table.take(flat)
            result += weight[:, None] * (below + share * (table.take(flat + genes) - below))
        return result


def _depth_nodes(totals: np.ndarray) -> np.ndarray:
    low, high = np.log(np.min(totals)), np.log(np.max(totals))
    if high - low < 1e-9:
        return np.array([low])
    angles = (2 * np.arange(_DEPTHS) + 1) * np.pi / (2 * _DEPTHS)
    return (low + high) / 2 + (high - low) / 2 * np.cos(angles)


def _lagrange(nodes: np.ndarray, points: np.ndarray) -> list[np.ndarray]:
    weights = []
    for index, node in enumerate(nodes):
        others = np.delete(nodes, index)
        weights.append(np.prod([(points - other) / (node - other) for other in others], axis=0) * np.ones(len(points)))
    return weights


class Tables:
    """The tables of one truth: built when first asked for, again only for library sizes beyond those built for."""

    def __init__(self, truth: Truth):
        self._dispersion = truth.dispersion
        # Below a share of 2e-9 a gene is as good as silent: its expected log-CPM is under 0.002.
        self._lowest = max(float(truth.baseline.min()) - 6, -20.0)
        self._built: dict[float, tuple[float, float, ExpectationTable]] = {}

    def of(self, totals: np.ndarray, blur: float = 0.0) -> ExpectationTable:
        low, high = float(np.min(totals)), float(np.max(totals))
        if blur in self._built:
            known_low, known_high, table = self._built[blur]
            if known_low <= low and high <= known_high:
                return table
            low, high = min(low, known_low), max(high, known_high)
        low, high = low / _DEPTH_MARGIN, high * _DEPTH_MARGIN
        table = ExpectationTable.build(self._dispersion, self._lowest, 0.0, np.array([low, high]), blur)
        self._built[blur] = (low, high, table)
        return table


class MetadataOracle:
    """E[log-CPM | metadata as recorded, library size], all effects of levels seen in training being known.

    Hidden and summed over: the donor and, where sex or age is missing or may be wrong, the stratum; for an unseen
    study the population of studies and donors; for an unseen perturbation its peculiar effect and whether it acts
    (its embedding and its target gene are public, as a compound library's or a guide library's are).
    """

    def __init__(self, truth: Truth, seen_studies: set[str], seen_perturbations: set[str]):
        self.truth, self.tables = truth, Tables(truth)
        self.seen_study = np.array([name in seen_studies for name in truth.studies])
        self.seen_perturbation = np.array([name in seen_perturbations for name in truth.perturbations])

    def predict(self, samples: pd.DataFrame, totals: np.ndarray) -> np.ndarray:
        """(N, G) expected log-CPM over all genes of the truth, for metadata rows and their total counts."""
        levels, totals = self.truth.levels(samples), np.asarray(totals, dtype=float)
        recorded = _Recorded.of(samples)
        result = np.empty((len(samples), len(self.truth.baseline)))
        for seen in (True, False):
            rows = np.flatnonzero(self.seen_study[levels.study] == seen)
            if len(rows):
                blur = 0.0 if seen else self._unseen_study_scale()
                table = self.tables.of(totals, blur)
                for start in range(0, len(rows), _BLOCK):
                    block = rows[start : start + _BLOCK]
                    result[block] = self._expect(levels.rows(block), recorded.rows(block), totals[block], table, blur)
        return result

    def _unseen_study_scale(self) -> float:
        donors = self.truth.donor.shape[2]
        return float(np.sqrt(STUDY_SCALE**2 + DONOR_SCALE**2 * (1 - 1 / donors)))

    def _expect(self, levels: Levels, recorded: "_Recorded", totals: np.ndarray, table: ExpectationTable, blur: float) -> np.ndarray:
        total_weight, result = np.zeros(len(totals)), np.zeros((len(totals), len(self.truth.baseline)))
        for weight, log_mu in self._hidden_donors(levels, recorded, blur):
            rows = np.flatnonzero(weight > _NEGLIGIBLE)
            if not len(rows):
                continue
            for share, moved, normaliser in self._hidden_perturbations(levels.rows(rows), log_mu[rows]):
                fractions = moved - (normaliser + blur**2 / 2)[:, None]
                result[rows] += (weight[rows] * share)[:, None] * table(fractions, totals[rows])
            total_weight[rows] += weight[rows]
        return result / total_weight[:, None]

    def _hidden_donors(self, levels: Levels, recorded: "_Recorded", blur: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(weight (N,), log mu (N, G) without the perturbation) over who the donor may be."""
        truth, known = self.truth, self.truth.known_effects(levels)
        if not blur:
            for stratum in range(truth.stratum_sex.shape[1]):
                sex, age = truth.stratum_sex[levels.study, stratum], truth.stratum_age[levels.study, stratum]
                weight = recorded.likelihood(truth, sex, age) * (truth.stratum_disease[levels.study, stratum] == levels.disease)
                base = known + truth.donor_trait_effects(sex, age) + truth.study[levels.study]
                for donor in range(truth.donor.shape[2]):
                    yield weight / truth.donor.shape[2], base + truth.donor[levels.study, stratum, donor]
            return
        # An unseen study: sexes are equally frequent, ages uniform; quadrature over the ages nobody recorded.
        nodes, weights = np.polynomial.legendre.leggauss(5)
        ages = (AGES[0] + AGES[1]) / 2 + (AGES[1] - AGES[0]) / 2 * nodes
        for sex_index in range(len(SEXES)):
            for age_node, age_weight in zip(ages, weights / weights.sum(), strict=True):
                age = np.where(recorded.age_known, recorded.age, age_node)
                sex = np.full(len(age), sex_index)
                yield age_weight * recorded.likelihood(truth, sex, age), known + truth.donor_trait_effects(sex, age)

    def _hidden_perturbations(self, levels: Levels, log_mu: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(share (N,), log mu (N, G), log normaliser (N,)) over what an unseen perturbation may do."""
        seen = self.seen_perturbation[levels.perturbation] | (levels.perturbation == 0)
        if seen.all():
            moved = log_mu + self.truth.perturbation_effects(levels)
            yield np.ones(len(moved)), moved, _log_sum_exp(moved)
            return
        # Seen and unseen together: for a seen one every node below stands for its known effect.
        known = np.where(seen[:, None], self.truth.perturbation_effects(levels), self.truth.predictable_program(levels))
        null = np.where(seen, 0.0, self.truth.null_share)
        yield null, log_mu, _log_sum_exp(log_mu)
        scale = np.where(seen, 0.0, self.truth.residual_scale(levels))
        nodes, weights = _residual_nodes()
        growth = np.log(np.exp(scale[:, None] * nodes) @ weights)
        moved = log_mu + known
        normaliser = _log_sum_exp(moved) + growth
        for node, weight in zip(nodes, weights, strict=True):
            yield (1 - null) * weight, moved + (scale * node)[:, None], normaliser


class OmniscientOracle:
    """E[log-CPM | every hidden cause, library size]: what is left is count noise."""

    def __init__(self, tables: Tables):
        self.tables = tables

    def predict(self, log_fraction: np.ndarray, totals: np.ndarray) -> np.ndarray:
        """(N, G) from true log fractions (N, G) and total counts (N,)."""
        return self.tables.of(totals)(log_fraction, np.asarray(totals, dtype=float))


@dataclass(frozen=True)
class _Recorded:
    """Sex and age as recorded, and how likely they are recorded so."""

    sex: np.ndarray        # index into SEXES, -1 missing
    age: np.ndarray        # years, NaN missing
    age_known: np.ndarray

    @classmethod
    def of(cls, samples: pd.DataFrame) -> "_Recorded":
        sex = samples["sex"].map({name: index for index, name in enumerate(SEXES)}).fillna(-1).to_numpy(dtype=np.int64)
        age = samples["age_years"].to_numpy(dtype=float)
        return cls(sex, age, ~np.isnan(age))

    def rows(self, chosen: np.ndarray) -> "_Recorded":
        return _Recorded(self.sex[chosen], self.age[chosen], self.age_known[chosen])

    def likelihood(self, truth: Truth, sex: np.ndarray, age: np.ndarray) -> np.ndarray:
        """(N,) probability of what was recorded, up to a factor, given the true sex (index) and age (years)."""
        wrong = float(truth.wrong_sex)
        of_sex = np.where(self.sex < 0, 1.0, np.where(self.sex == sex, 1 - wrong, wrong))
        missing = age_missing_probability(truth, age)
        return of_sex * np.where(self.age_known, (self.age == age) * (1 - missing), missing)


def _residual_nodes() -> tuple[np.ndarray, np.ndarray]:
    """Quadrature over one gene's peculiar effect: none, or a signed log fold uniform in its range."""
    low, high = np.log(RESIDUAL_FOLD)
    nodes, weights = np.polynomial.legendre.leggauss(2)
    sizes, weights = (low + high) / 2 + (high - low) / 2 * nodes, weights / weights.sum() / 2 * RESIDUAL_SHARE
    return np.concatenate([[0.0], sizes, -sizes]), np.concatenate([[1 - RESIDUAL_SHARE], weights, weights])


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    highest = values.max(axis=1)
    return highest + np.log(np.exp(values - highest[:, None]).sum(axis=1))

