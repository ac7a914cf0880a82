"""Statistics of a cohort by which simulated counts can be told from real ones.

`cohort_statistics` measures simulated and real cohorts with the same code, from raw counts and
metadata only, on at most SAMPLES samples: whole pairs of study and context, drawn by seed.

N samples, G genes. Depth-adjusted counts are counts times median total / total. *Replicates* are
samples of one condition (context, perturbation, dose, time) and one study. A *contrast* compares
such a condition with the controls of its study and context.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import polygamma
from scipy.stats import rankdata

from benchmarks.realism_effects import context_correlations
from pipeline.gem.common.config import Data
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.references import SampleGroups
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.evaluation.differential_expression import differential_genes

SAMPLES = 2000  # measured at most: every statistic is stable well below
GROUP = 100  # of one condition and study at most: a large group of controls would dominate
PAIRS = 300  # of replicates that are correlated at most
MINIMUM = 3  # samples on each side of a contrast: the least for a variance one can test with
FDR = 0.05
TOP = 0.01  # the top genes, as a share of all
BCV_FROM = 10.0  # counts: below, a moment estimate from few replicates is mostly Poisson noise
SCATTER_FROM = 100.0  # counts: Poisson's part of the variance is small beside a BCV of 0.2
EFFECTS_FROM = 50.0  # counts: below, the log-CPM of a replicate is mostly count noise
TESTED_FROM = 1.0  # counts, of the mean over all samples, which keeps the level of the test
BINS = 10 ** np.arange(-2, 6.01, 0.5)  # edges of mean depth-adjusted counts
BIN_GENES = 10  # genes that a bin needs
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Statistic:
    """A value and the quantiles of the `n` numbers that it summarises, or None with a reason."""

    value: float | None
    quantiles: tuple[float, ...] = ()  # at QUANTILES
    n: int = 0
    reason: str = ""

    @classmethod
    def median(cls, values: np.ndarray, reason: str) -> "Statistic":
        """The median of values (V,) and their quantiles; None with `reason` if V is 0."""
        if not len(values):
            return cls(None, reason=reason)
        quantiles = tuple(np.quantile(values, QUANTILES).tolist())
        return cls(quantiles[2], quantiles, len(values))

    @classmethod
    def mean(cls, values: np.ndarray, reason: str) -> "Statistic":
        if not len(values):
            return cls(None, reason=reason)
        return cls(float(np.mean(values)), n=len(values))


@dataclass(frozen=True)
class Curve:
    """A statistic of genes against their mean depth-adjusted count, by bins of the mean."""

    mean: tuple[float, ...] = ()  # counts, the median gene of the bin
    value: tuple[float, ...] = ()  # median over the genes of the bin (mean, for shares of zeros)
    low: tuple[float, ...] = ()  # quartiles over the genes of the bin
    high: tuple[float, ...] = ()
    poisson: tuple[float, ...] = ()  # expected from Poisson counts


@dataclass(frozen=True)
class CohortStatistics:
    """The statistics of one cohort (see STATISTICS), and two curves."""

    samples: int  # in the cohort
    measured: int  # of them
    genes: int  # with any count among the measured
    gene_mean: Statistic
    bcv: Statistic
    bcv_scatter: Statistic
    zero_share: Statistic
    zero_excess: Statistic
    library_size: Statistic
    library_variation: Statistic
    replicates: Statistic
    replicate_pearson: Statistic
    replicate_spearman: Statistic
    differential_share: Statistic
    context_correlation: Statistic
    target_fold: Statistic
    target_first: Statistic
    target_top: Statistic
    target_rank: Statistic  # rank of the target by its change, as a share of the genes
    bcv_curve: Curve
    zero_curve: Curve

    @classmethod
    def from_json(cls, record: dict) -> "CohortStatistics":
        """The inverse of `dataclasses.asdict` through JSON."""
        parts = dict(record)
        for field in fields(cls):
            if field.type is not int:
                values = record[field.name].items()
                as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values}
                parts[field.name] = field.type(**as_tuples)
        return cls(**parts)


@dataclass(frozen=True)
class CountTable:
    """Raw counts of a cohort with their metadata."""

    counts: np.ndarray  # (N, G)
    totals: np.ndarray  # (N,) over all genes of the source
    samples: pd.DataFrame  # N rows, with sample_id
    genes: np.ndarray  # (G,)
    data: Data
    targets: pd.DataFrame | None = None  # perturbation, gene_id of its target

    @classmethod
    def of_training_split(cls, cohort: Cohort) -> "CountTable":
        rows = cohort.rows([TRAIN])
        targets = cohort.targets.rename_axis("perturbation").reset_index(name="gene_id")
        counts, totals = cohort.counts([TRAIN]), rows["total"].to_numpy()
        return cls(counts, totals, rows, cohort.genes, cohort.declared, targets)


class ReplicateGroups:
    """Which samples are replicates, and their controls. Positions index the given samples."""

    def __init__(self, samples: pd.DataFrame, data: Data):
        keys = SampleGroups(samples, data)
        self.control = keys.control.to_numpy()
        missing = np.full(len(samples), None)
        self.perturbation = keys.perturbation.to_numpy() if data.control else missing
        self._study_context = keys.study_context.to_numpy()
        # Controls form one group, whatever dose or time is recorded of them.
        self._condition = np.where(self.control, "control", keys.treatment.to_numpy())

    @cached_property
    def blocks(self) -> list[list[np.ndarray]]:
        """Replicate groups by study and context, controls first; independent of sample order."""
        columns = {
            "block": self._study_context,
            "treated": ~self.control,
            "condition": self._condition,
        }
        groups = pd.DataFrame(columns).groupby(list(columns)).indices
        blocks: dict[str, list[np.ndarray]] = {}
        for (block, _, _), rows in sorted(groups.items()):
            blocks.setdefault(block, []).append(rows)
        return list(blocks.values())

    def __iter__(self) -> Iterator[np.ndarray]:
        return (group for block in self.blocks for group in block)

    @property
    def replicated(self) -> list[np.ndarray]:
        return [group for group in self if len(group) >= 2]

    def contrasts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(treated rows, control rows) of every condition with MINIMUM samples on both sides."""
        for control, *treated in self.blocks:
            if self.control[control[0]] and len(control) >= MINIMUM:
                yield from ((group, control) for group in treated if len(group) >= MINIMUM)


def measured_rows(samples: pd.DataFrame, data: Data, seed: int) -> np.ndarray:
    """Positions of at most SAMPLES samples, whole pairs of study and context drawn by seed, in the
    order of sample_id."""
    ordered = np.argsort(samples["sample_id"].to_numpy(dtype=str), kind="stable")
    rng = np.random.default_rng(seed)
    blocks = ReplicateGroups(samples.iloc[ordered], data).blocks
    rows, room = [np.empty(0, dtype=np.int64)], SAMPLES
    for block in rng.permutation(len(blocks)):
        control, *treated = blocks[block]
        for group in [control, *(treated[index] for index in rng.permutation(len(treated)))]:
            rows.append(rng.permutation(group)[: min(room, GROUP)])
            room -= len(rows[-1])
            if not room:
                return ordered[np.sort(np.concatenate(rows))]
    return ordered[np.sort(np.concatenate(rows))]


def cohort_statistics(table: CountTable, seed: int) -> CohortStatistics:
    """All statistics of a cohort. Samples without counts are left out."""
    totals = table.totals.astype(np.float64)  # unsigned totals cannot be negated
    rows = measured_rows(table.samples, table.data, seed)
    rows = rows[totals[rows] > 0]
    sizes, depth, counts = np.sort(totals[totals > 0]), totals[rows], table.counts[rows]
    expressed = counts.any(axis=0)
    counts, genes = counts[:, expressed], table.genes[expressed]
    groups = ReplicateGroups(table.samples.iloc[rows], table.data)
    factor = np.median(sizes) / depth
    # By groups: their order does not depend on that of the samples, and no copy of all counts.
    mean = sum((counts[group] * factor[group, None]).sum(axis=0) for group in groups) / len(rows)
    bcv = biological_variation(counts, factor, groups)
    bcv_curve = curve(mean, bcv, np.zeros_like(bcv), mean >= 1)
    zeros, poisson = zero_shares(counts, depth, groups)
    expression = log_cpm(counts, depth)
    pearson, spearman = replicate_correlations(expression, groups, seed)
    differential = differential_shares(expression, mean, groups)
    single = "no two samples of one condition and study"
    no_contrast = f"no condition with {MINIMUM} samples and {MINIMUM} controls of its study"
    reliable = (mean >= BCV_FROM) & np.isfinite(bcv)
    return CohortStatistics(
        samples=len(table.samples),
        measured=len(rows),
        genes=len(genes),
        gene_mean=Statistic.median(mean, "no counts"),
        bcv=Statistic.median(bcv[reliable], single),
        bcv_scatter=bcv_scatter(bcv_curve, groups),
        zero_share=Statistic((counts == 0).mean().item(), n=counts.size),
        zero_excess=Statistic.mean((zeros - poisson)[np.isfinite(zeros)], single),
        library_size=Statistic.median(sizes, "no counts"),
        library_variation=Statistic(float(sizes.std() / sizes.mean()), n=len(sizes)),
        replicates=Statistic.median(np.array([len(group) for group in groups]), "no samples"),
        replicate_pearson=Statistic.median(pearson, single),
        replicate_spearman=Statistic.median(spearman, single),
        differential_share=Statistic.median(differential, no_contrast),
        context_correlation=context_correlation(
            expression[:, mean >= EFFECTS_FROM], table.samples.iloc[rows], table.data, seed
        ),
        **target_statistics(expression, genes, groups, table.targets),
        bcv_curve=bcv_curve,
        zero_curve=curve(mean, zeros, poisson, mean > 0, average=True),
    )


def biological_variation(
    counts: np.ndarray, factor: np.ndarray, groups: ReplicateGroups
) -> np.ndarray:
    """(G,) square root of the dispersion by moments, pooled over replicate groups with their
    degrees of freedom; NaN without replicates.

    Depth-adjusted counts of a group have mean m and variance m * mean(factor) + dispersion * m^2
    (edgeR's BCV squared). Numerators and denominators are unbiased and pooled before the division,
    which keeps small groups from biasing the ratio.
    """
    extra, square = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for group in groups.replicated:
        adjusted = counts[group] * factor[group, None]
        mean, variance = adjusted.mean(axis=0), adjusted.var(axis=0, ddof=1)
        extra += (len(group) - 1) * (variance - mean * factor[group].mean())
        square += (len(group) - 1) * (mean**2 - variance / len(group))
    nan = np.full_like(extra, np.nan)
    return np.sqrt(np.divide(np.maximum(extra, 0), square, out=nan, where=square > 0))


def bcv_scatter(bcv: Curve, groups: ReplicateGroups) -> Statistic:
    """How much genes of one mean differ in BCV: the median over bins of the interquartile range of
    ln BCV / 1.349, less the scatter of a variance with f degrees of freedom: ln s^2 has variance
    trigamma(f / 2)."""
    freedom = sum(len(group) - 1 for group in groups)
    quartiles = zip(bcv.mean, bcv.low, bcv.high, strict=True)
    spreads = [
        np.log(high / low) / 1.349
        for mean, low, high in quartiles
        if mean >= SCATTER_FROM and low > 0
    ]
    if not spreads or not freedom:
        return Statistic(None, reason=f"too few replicated genes above {SCATTER_FROM:g} counts")
    variance = np.median(spreads) ** 2 - polygamma(1, freedom / 2) / 4
    return Statistic(float(np.sqrt(max(variance, 0))), n=len(spreads))


def zero_shares(
    counts: np.ndarray, depth: np.ndarray, groups: ReplicateGroups
) -> tuple[np.ndarray, np.ndarray]:
    """(G,) share of zeros in groups of replicates, observed and of Poisson counts; NaN without.

    Given the sum of a gene over a group, Poisson counts are multinomial by depth: P(zero) =
    (1 - share of the depth)^sum, with no mean to estimate. (With estimated means, exp(-mean)
    expects too many zeros wherever replicates are few.)
    """
    zeros, expected = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for group in groups.replicated:
        log_missed = np.log1p(-depth[group] / depth[group].sum())
        zeros += (counts[group] == 0).sum(axis=0)
        expected += np.exp(log_missed[:, None] * counts[group].sum(axis=0)).sum(axis=0)
    number = sum(map(len, groups.replicated)) or np.nan
    return zeros / number, expected / number


def replicate_correlations(
    expression: np.ndarray, groups: ReplicateGroups, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's and Spearman's correlation over genes of log-CPM (N, G), each for up to PAIRS
    disjoint pairs of replicates."""
    rng = np.random.default_rng(seed)
    pairs = [rng.permutation(group)[: len(group) // 2 * 2].reshape(-1, 2) for group in groups]
    pairs = rng.permutation(np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs]))[:PAIRS]
    if not len(pairs):
        return np.empty(0), np.empty(0)

    def correlation(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(axis=2, keepdims=True, dtype=np.float64)
        centred /= np.maximum(np.sqrt((centred**2).sum(axis=2, keepdims=True)), 1e-12)
        return (centred[:, 0] * centred[:, 1]).sum(axis=1)

    values = expression[pairs]  # (pairs, 2, G)
    return correlation(values), correlation(rankdata(values, axis=2))


def differential_shares(
    expression: np.ndarray, mean: np.ndarray, groups: ReplicateGroups
) -> np.ndarray:
    """(contrasts,) share of differential genes among those with a mean of TESTED_FROM counts."""
    tested = expression[:, mean >= TESTED_FROM]
    if not tested.shape[1]:
        return np.empty(0)
    contrasts = groups.contrasts()
    return np.array([differential_genes(tested[a], tested[b], FDR)[0].mean() for a, b in contrasts])


def context_correlation(
    expression: np.ndarray, samples: pd.DataFrame, data: Data, seed: int
) -> Statistic:
    """Of the effects of a treatment in two contexts: the sum over pairs of their covariances over
    that of proportional effects, so that strong effects count most."""
    samples = samples.reset_index(drop=True)
    covariance, proportional = context_correlations(expression, samples, data, seed)
    if not len(covariance):
        return Statistic(None, reason="no treatment with replicates and an effect in two contexts")
    return Statistic(float(covariance.sum() / proportional.sum()), n=len(covariance))


def target_statistics(
    expression: np.ndarray,
    genes: np.ndarray,
    groups: ReplicateGroups,
    targets: pd.DataFrame | None,
) -> dict[str, Statistic]:
    """The statistics of the target gene of a genetic perturbation, over contrasts.

    Genes are ranked by the absolute change of mean log-CPM (N, G), the largest first. Of equal
    changes, the target takes the last rank.
    """
    reason, target = "no target genes are known", {}
    if targets is not None and len(targets):
        reason = "no perturbation of a measured target gene has enough samples and controls"
        position = {gene: index for index, gene in enumerate(genes)}
        pairs = zip(targets["perturbation"], targets["gene_id"], strict=True)
        target = {name: position[gene] for name, gene in pairs if gene in position}
    ranks, folds = [], []
    for treated, control in groups.contrasts():
        index = target.get(groups.perturbation[treated[0]])
        if index is not None:
            means = (expression[rows].mean(axis=0, dtype=np.float64) for rows in (treated, control))
            change = np.abs(np.subtract(*means))
            ranks.append((change >= change[index]).sum())
            folds.append(np.exp(change[index]))
    rank = np.array(ranks)
    return {
        "target_fold": Statistic.median(np.array(folds), reason),
        "target_first": Statistic.mean(rank <= 1, reason),
        "target_top": Statistic.mean(rank <= max(1, TOP * len(genes)), reason),
        "target_rank": Statistic.median(rank / len(genes), reason),
    }


def curve(
    mean: np.ndarray,
    values: np.ndarray,
    poisson: np.ndarray,
    included: np.ndarray,
    average: bool = False,
) -> Curve:
    """Values (G,) by bins of the mean (G,), over the `included` genes (G,)."""
    bins = np.where(included & np.isfinite(values), np.digitize(mean, BINS), 0)
    centre, rows = np.mean if average else np.median, []
    for index in range(1, len(BINS)):
        genes = np.flatnonzero(bins == index)
        if len(genes) >= BIN_GENES:
            quartiles = np.quantile(values[genes], [0.25, 0.75])
            middle = np.median(mean[genes]), centre(values[genes])
            rows.append((*middle, *quartiles, poisson[genes].mean()))
    return Curve(*(tuple(map(float, column)) for column in zip(*rows, strict=True)))
