"""What a cohort looks like to someone who has seen many: the numbers by which simulated counts are recognised.

A portrait is measured alike on simulated and on real cohorts, from raw counts and metadata only, on at most SAMPLES
samples: whole pairs of study and context, drawn by seed. PUBLISHED says what the literature expects, `real_portraits`
what this code found in two real cohorts, `comparison_table` puts all side by side.

N samples, G genes. Depth-adjusted counts are counts times median total / total. *Replicates* are samples of one
condition (context, perturbation, dose, time) and one study; a *contrast* is such a condition against the controls of
its study and context.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import polygamma
from scipy.stats import rankdata

from pipeline.gem.common.config import Data
from pipeline.gem.data.encoder import label_texts
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.sources import Source
from pipeline.gem.data.splits import contexts, is_control, joined
from pipeline.gem.evaluation.differential_expression import differential_genes

SAMPLES = 2000  # measured at most: every number is steady well before
GROUP = 100  # of one condition and study at most, or one large group of controls would be the whole portrait
PAIRS = 300  # of replicates that are correlated at most
MINIMUM = 3  # samples on each side of a contrast: the least for a variance one can test with
FDR = 0.05
TOP = 0.01  # share of genes among which a target is said to be at the top
BCV_FROM = (
    10.0  # counts: below, a moment estimate from few replicates is mostly Poisson's own noise
)
SCATTER_FROM = (
    100.0  # counts: from here on Poisson's part of the variance is small beside a BCV of 0.2
)
TESTED_FROM = 1.0  # counts: fewer cannot differ; chosen by the mean over all samples, which keeps the test's level
BINS = 10 ** np.arange(-2, 6.01, 0.5)  # edges of mean depth-adjusted counts
BIN_GENES = 10  # genes that a bin needs
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
REAL = Path(__file__).with_name("realism_real.json")


@dataclass(frozen=True)
class Number:
    """A value, its quantiles over what it was measured on (`over` of them), or null with a reason."""

    value: float | None
    quantiles: tuple[float, ...] = ()  # at QUANTILES
    over: int = 0
    reason: str = ""

    @classmethod
    def median(cls, values: np.ndarray, reason: str) -> "Number":
        """The median of values (V,) and their quantiles; null with `reason` where there are none."""
        if not len(values):
            return cls(None, reason=reason)
        found = np.quantile(values, QUANTILES)
        return cls(float(found[2]), tuple(map(float, found)), len(values))

    @classmethod
    def mean(cls, values: np.ndarray, reason: str) -> "Number":
        return (
            cls(float(np.mean(values)), over=len(values))
            if len(values)
            else cls(None, reason=reason)
        )


@dataclass(frozen=True)
class Curve:
    """A quantity of genes against their mean depth-adjusted count, by bins of the mean."""

    mean: tuple[float, ...]  # counts, the middle gene of the bin
    value: tuple[float, ...]  # median over the genes of the bin (mean, for shares of zeros)
    low: tuple[float, ...]  # quartiles over the genes of the bin
    high: tuple[float, ...]
    poisson: tuple[float, ...]  # what counts without any spread beyond Poisson's would give


class Quantity(NamedTuple):
    unit: str
    meaning: str


QUANTITIES = {
    "gene_mean": Quantity(
        "counts", "mean count of a gene at the median total: median over genes with any count"
    ),
    "bcv": Quantity(
        "coefficient",
        f"biological coefficient of variation: median over genes with a mean of {BCV_FROM:g} counts",
    ),
    "bcv_scatter": Quantity(
        "ln",
        f"standard deviation over genes of ln BCV at equal means above {SCATTER_FROM:g} counts, beyond estimation's own",
    ),
    "zero_share": Quantity("share", "zeros among the counts of genes with any count"),
    "zero_excess": Quantity(
        "share", "zeros beyond those of Poisson counts with the same means and totals"
    ),
    "library_size": Quantity("counts", "total counts of a sample: median"),
    "library_variation": Quantity("coefficient", "standard deviation of the totals by their mean"),
    "replicates": Quantity("samples", "samples of a condition in a study: median"),
    "replicate_pearson": Quantity(
        "correlation", "log-CPM of two replicates over genes with any count: median over pairs"
    ),
    "replicate_spearman": Quantity("correlation", "the same by ranks"),
    "differential_share": Quantity(
        "share",
        "differential genes of a contrast (Welch t, Benjamini-Hochberg 5 %): median over contrasts",
    ),
    "target_fold": Quantity(
        "fold",
        "change of the target gene of a genetic perturbation, either way: median over contrasts",
    ),
    "target_first": Quantity(
        "share", "contrasts of a genetic perturbation in which no gene moves more than its target"
    ),
    "target_top": Quantity(
        "share",
        "contrasts of a genetic perturbation whose target is among the 1 % of genes that move most",
    ),
}


class Published(NamedTuple):
    expected: str
    source: str


# Only what the source itself says; a quantity that is not here has no range one could cite.
PUBLISHED = {
    "bcv": Published(
        "0.4 human, 0.1 isogenic, 0.01 technical",
        "edgeR User's Guide, section 2.12 (no replicates)",
    ),
    "zero_share": Published(
        "droplets: at least 0.9 of all genes", "scvi-tools blog, Zero inflation, 2019"
    ),
    "zero_excess": Published(
        "droplets: none beyond the negative binomial", "Svensson, Nature Biotechnology 2020"
    ),
    "library_size": Published(
        "bulk: 2e7 to 3e7 aligned reads; droplets: at least 2e4 read pairs",
        "ENCODE4 bulk RNA-seq standards; 10x Genomics, 3' v3 guide",
    ),
    "replicates": Published("6 at least, 12 for all fold changes", "Schurch et al., RNA 2016"),
    "replicate_spearman": Published(
        "> 0.9 isogenic, > 0.8 between donors", "ENCODE4 bulk RNA-seq standards"
    ),
    "differential_share": Published(
        "316 genes for dexamethasone, 18 hours", "Himes et al., PLoS ONE 2014"
    ),
    "target_fold": Published(
        "CRISPRi: 6.9 (K562, 85.5 % lower) to 12 (RPE1, 91.6 % lower)", "Replogle et al., Cell 2022"
    ),
}


@dataclass(frozen=True)
class CohortStatistics:
    """One cohort's numbers, named and explained by QUANTITIES, and two curves."""

    samples: int  # in the cohort
    measured: int  # of them
    genes: int  # with any count among the measured
    gene_mean: Number
    bcv: Number
    bcv_scatter: Number
    zero_share: Number
    zero_excess: Number
    library_size: Number
    library_variation: Number
    replicates: Number
    replicate_pearson: Number
    replicate_spearman: Number
    differential_share: Number
    target_fold: Number
    target_first: Number
    target_top: Number
    target_rank: Number  # rank of the target by its change, as a share of the genes
    bcv_curve: Curve
    zero_curve: Curve

    @classmethod
    def from_json(cls, record: dict) -> "CohortStatistics":
        """The inverse of `dataclasses.asdict` through JSON."""

        def rebuilt(kind: type, part: dict):
            return kind(
                **{
                    key: tuple(entry) if isinstance(entry, list) else entry
                    for key, entry in part.items()
                }
            )

        return cls(
            **record
            | {
                field.name: rebuilt(field.type, record[field.name])
                for field in fields(cls)
                if field.type is not int
            }
        )


class Groups:
    """Who is a replicate of whom, and who is whose control. Positions are in the samples given."""

    def __init__(self, samples: pd.DataFrame, data: Data):
        self.control = is_control(samples, data).to_numpy()
        self.perturbation = (
            label_texts(samples[data.control.column]).to_numpy()
            if data.control
            else np.full(len(samples), None)
        )
        where = [
            contexts(samples, data),
            *([samples[data.study_column]] if data.study_column else []),
        ]
        columns = dict.fromkeys(
            [*data.covariates.perturbation, *([data.control.column] if data.control else [])]
        )
        self._block = joined(where).to_numpy()
        # A control has no dose or time: what is recorded of it there must not part controls.
        condition = (
            joined([samples[name] for name in columns]).to_numpy()
            if columns
            else np.full(len(samples), "all")
        )
        self._condition = np.where(self.control, "control", condition)

    @cached_property
    def blocks(self) -> list[list[np.ndarray]]:
        """Per study and context the replicate groups, controls first; a fixed order whatever the order of samples."""
        table = pd.DataFrame(
            {"block": self._block, "treated": ~self.control, "condition": self._condition}
        )
        found: dict[str, list[np.ndarray]] = {}
        for (block, _, _), rows in sorted(
            table.groupby(["block", "treated", "condition"]).indices.items()
        ):
            found.setdefault(block, []).append(rows)
        return list(found.values())

    @property
    def all(self) -> Iterator[np.ndarray]:
        return (group for block in self.blocks for group in block)

    def contrasts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(treated rows, control rows) of every condition that has MINIMUM samples on both sides."""
        for control, *treated in self.blocks:
            if self.control[control[0]] and len(control) >= MINIMUM:
                yield from ((group, control) for group in treated if len(group) >= MINIMUM)


def measured_rows(samples: pd.DataFrame, data: Data, seed: int) -> np.ndarray:
    """Positions of the samples to measure: whole pairs of study and context by seed, in the order of sample_id."""
    ordered = np.argsort(samples["sample_id"].to_numpy(dtype=str), kind="stable")
    rng = np.random.default_rng(seed)
    blocks = Groups(samples.iloc[ordered], data).blocks
    chosen, room = [np.empty(0, dtype=np.int64)], SAMPLES
    for index in rng.permutation(len(blocks)):
        control, *treated = blocks[index]
        for group in [control, *(treated[place] for place in rng.permutation(len(treated)))]:
            chosen.append(rng.permutation(group)[: min(room, GROUP)])
            room -= len(chosen[-1])
            if not room:
                return ordered[np.sort(np.concatenate(chosen))]
    return ordered[np.sort(np.concatenate(chosen))]


def portrait_of(
    source: Source, data: Data, targets: pd.DataFrame | None, seed: int
) -> CohortStatistics:
    """The portrait of a source, read once; in memory only the measured samples' counts."""
    rows = measured_rows(source.samples, data, seed)
    place = np.full(len(source.samples), -1)
    place[rows] = np.arange(len(rows))
    totals, counts = (
        np.zeros(len(source.samples)),
        np.zeros((len(rows), len(source.genes)), dtype=np.uint32),
    )
    for found, block in source.chunks():
        totals[found] = block.sum(axis=1)
        wanted = place[found] >= 0
        counts[place[found[wanted]]] = block[wanted]
    return _portrait(
        counts,
        totals,
        rows,
        source.samples,
        source.genes["gene_id"].to_numpy(),
        data,
        targets,
        seed,
    )


def portrait(
    counts: np.ndarray,
    totals: np.ndarray,
    samples: pd.DataFrame,
    genes: np.ndarray,
    data: Data,
    targets: pd.DataFrame | None,
    seed: int,
) -> CohortStatistics:
    """The portrait of counts (N, G) with totals (N,); `targets` has perturbation and gene_id. Empty samples are left out."""
    rows = measured_rows(samples, data, seed)
    return _portrait(counts[rows], totals, rows, samples, genes, data, targets, seed)


def _portrait(
    counts: np.ndarray,
    totals: np.ndarray,
    rows: np.ndarray,
    samples: pd.DataFrame,
    genes: np.ndarray,
    data: Data,
    targets: pd.DataFrame | None,
    seed: int,
) -> CohortStatistics:
    """From the counts of the measured rows, and totals and samples of all."""
    totals = totals.astype(np.float64)  # unsigned ones cannot be negated
    kept = totals[rows] > 0
    sizes, rows, counts = np.sort(totals[totals > 0]), rows[kept], counts[kept]
    expressed = counts.any(axis=0)
    counts, genes, depth = counts[:, expressed], genes[expressed], totals[rows]
    groups = Groups(samples.iloc[rows], data)
    factor = np.median(sizes) / depth
    # By groups, whose order does not depend on that of the samples, and without a copy of all counts.
    mean = sum((counts[group] * factor[group, None]).sum(axis=0) for group in groups.all) / len(
        rows
    )
    bcv = biological_variation(counts, factor, groups)
    bcv_curve = curve(mean, bcv, np.zeros_like(bcv), mean >= 1)
    zeros, poisson = zero_shares(counts, depth, groups)
    expression = log_cpm(counts, depth)
    pearson, spearman = replicate_correlations(expression, groups, seed)
    shares = differential_shares(expression, mean, groups)
    single = "no two samples of one condition and study"
    reliable = (mean >= BCV_FROM) & np.isfinite(bcv)
    return CohortStatistics(
        samples=len(samples),
        measured=len(rows),
        genes=len(genes),
        gene_mean=Number.median(mean, "no counts"),
        bcv=Number.median(bcv[reliable], single),
        bcv_scatter=bcv_scatter(bcv_curve, groups),
        zero_share=Number((counts == 0).mean().item(), over=counts.size),
        zero_excess=Number.mean((zeros - poisson)[np.isfinite(zeros)], single),
        library_size=Number.median(sizes, "no counts"),
        library_variation=Number(float(sizes.std() / sizes.mean()), over=len(sizes)),
        replicates=Number.median(np.array([len(group) for group in groups.all]), "no samples"),
        replicate_pearson=Number.median(pearson, single),
        replicate_spearman=Number.median(spearman, single),
        differential_share=Number.median(
            shares,
            f"no condition with {MINIMUM} samples and {MINIMUM} controls of its study and context",
        ),
        **target_numbers(expression, genes, groups, targets),
        bcv_curve=bcv_curve,
        zero_curve=curve(mean, zeros, poisson, mean > 0, average=True),
    )


def biological_variation(counts: np.ndarray, factor: np.ndarray, groups: Groups) -> np.ndarray:
    """(G,) square root of the dispersion by moments, pooled over replicate groups with their degrees of freedom; NaN without.

    Depth-adjusted counts of a group have mean m and variance m * mean(factor) + dispersion * m^2 (edgeR's BCV squared).
    Pooling numerators and denominators, both unbiased, before dividing keeps small groups from biasing the ratio.
    """
    extra, square = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for group in groups.all:
        if len(group) < 2:
            continue
        adjusted = counts[group] * factor[group, None]
        mean, variance = adjusted.mean(axis=0), adjusted.var(axis=0, ddof=1)
        extra += (len(group) - 1) * (variance - mean * factor[group].mean())
        square += (len(group) - 1) * (mean**2 - variance / len(group))
    return np.sqrt(
        np.divide(np.maximum(extra, 0), square, out=np.full_like(extra, np.nan), where=square > 0)
    )


def bcv_scatter(found: Curve, groups: Groups) -> Number:
    """How much genes of one mean differ in BCV: the median over bins of the interquartile range of ln BCV / 1.349.

    Less what a variance from f degrees of freedom scatters by itself: ln s^2 has variance trigamma(f / 2).
    """
    freedom = sum(len(group) - 1 for group in groups.all)
    spreads = [
        np.log(high / low) / 1.349
        for mean, low, high in zip(found.mean, found.low, found.high, strict=True)
        if mean >= SCATTER_FROM and low > 0
    ]
    if not spreads or not freedom:
        return Number(
            None, reason=f"too few genes with a mean of {SCATTER_FROM:g} counts in replicates"
        )
    return Number(
        float(np.sqrt(max(np.median(spreads) ** 2 - polygamma(1, freedom / 2) / 4, 0))),
        over=len(spreads),
    )


def zero_shares(
    counts: np.ndarray, depth: np.ndarray, groups: Groups
) -> tuple[np.ndarray, np.ndarray]:
    """(G,) share of zeros in groups of replicates, and that of Poisson counts; NaN without a group of two.

    Given the sum of a gene over a group, Poisson counts are multinomial by depth: P(zero) = (1 - depth share)^sum, with
    no mean to estimate. (With estimated means, exp(-mean) expects too many zeros wherever replicates are few.)
    """
    zeros, expected, number = np.zeros(counts.shape[1]), np.zeros(counts.shape[1]), 0
    for group in groups.all:
        if len(group) < 2:
            continue
        missed = np.log1p(-depth[group] / depth[group].sum())
        zeros += (counts[group] == 0).sum(axis=0)
        expected += np.exp(missed[:, None] * counts[group].sum(axis=0)).sum(axis=0)
        number += len(group)
    return (
        (zeros / number, expected / number)
        if number
        else (np.full_like(zeros, np.nan), np.full_like(zeros, np.nan))
    )


def replicate_correlations(
    expression: np.ndarray, groups: Groups, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's and Spearman's correlation over genes of log-CPM (N, G), each for up to PAIRS disjoint pairs of replicates."""
    rng = np.random.default_rng(seed)
    pairs = [rng.permutation(group)[: len(group) // 2 * 2].reshape(-1, 2) for group in groups.all]
    pairs = rng.permutation(np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs]))[:PAIRS]

    def correlation(values: np.ndarray) -> np.ndarray:
        centred = values - values.mean(axis=2, keepdims=True, dtype=np.float64)
        centred /= np.maximum(np.sqrt((centred**2).sum(axis=2, keepdims=True)), 1e-12)
        return (centred[:, 0] * centred[:, 1]).sum(axis=1)

    values = expression[pairs]  # (pairs, 2, G)
    return (
        (correlation(values), correlation(rankdata(values, axis=2)))
        if len(pairs)
        else (np.empty(0), np.empty(0))
    )


def differential_shares(expression: np.ndarray, mean: np.ndarray, groups: Groups) -> np.ndarray:
    """(contrasts,) share of differential genes among those with a mean of TESTED_FROM counts."""
    tested = expression[:, mean >= TESTED_FROM]
    if not tested.shape[1]:
        return np.empty(0)
    return np.array(
        [
            differential_genes(tested[treated], tested[control], FDR)[0].mean()
            for treated, control in groups.contrasts()
        ]
    )


def target_numbers(
    expression: np.ndarray, genes: np.ndarray, groups: Groups, targets: pd.DataFrame | None
) -> dict[str, Number]:
    """The four numbers of a Portrait that concern the target of a genetic perturbation, over contrasts.

    Rank 1 of the absolute change of mean log-CPM (N, G) moves most; a gene that moves as much as the target is before it.
    """
    reason, target = "no target genes are known", {}
    if targets is not None and len(targets):
        reason = "no perturbation of a measured target gene has enough samples and controls"
        position = {gene: index for index, gene in enumerate(genes)}
        target = {
            name: position[gene]
            for name, gene in zip(targets["perturbation"], targets["gene_id"], strict=True)
            if gene in position
        }
    ranks, folds = [], []
    for treated, control in groups.contrasts():
        index = target.get(groups.perturbation[treated[0]])
        if index is not None:
            change = np.abs(
                expression[treated].mean(axis=0, dtype=np.float64)
                - expression[control].mean(axis=0, dtype=np.float64)
            )
            ranks.append((change >= change[index]).sum())
            folds.append(np.exp(change[index]))
    rank = np.array(ranks)
    return {
        "target_fold": Number.median(np.array(folds), reason),
        "target_first": Number.mean(rank <= 1, reason),
        "target_top": Number.mean(rank <= max(1, TOP * len(genes)), reason),
        "target_rank": Number.median(rank / len(genes), reason),
    }


def curve(
    mean: np.ndarray,
    values: np.ndarray,
    poisson: np.ndarray,
    shown: np.ndarray,
    average: bool = False,
) -> Curve:
    """Values (G,) by bins of the mean (G,), over the genes that are `shown`."""
    chosen = shown & np.isfinite(values)
    place = np.digitize(mean, BINS)
    bins = [np.flatnonzero(chosen & (place == index)) for index in range(1, len(BINS))]
    rows = [
        (
            np.median(mean[genes]),
            (np.mean if average else np.median)(values[genes]),
            *np.quantile(values[genes], [0.25, 0.75]),
            poisson[genes].mean(),
        )
        for genes in bins
        if len(genes) >= BIN_GENES
    ]
    return (
        Curve(*(tuple(map(float, column)) for column in zip(*rows, strict=True)))
        if rows
        else Curve((), (), (), (), ())
    )


def real_portraits() -> dict[str, CohortStatistics]:
    """Of the two real cohorts, measured by this code (tests/test_credibility.py measures them again where they are)."""
    return {
        name: CohortStatistics.from_json(record)
        for name, record in json.loads(REAL.read_text(encoding="utf-8")).items()
    }


def comparison_table(portraits: dict[str, CohortStatistics]) -> pd.DataFrame:
    """One row a quantity: quantity, unit, a column per cohort (value, 5 to 95 %), published, source, meaning; all text."""
    rows = []
    for name, (unit, meaning) in QUANTITIES.items():
        published = PUBLISHED.get(name, Published("", ""))
        cells = {cohort: _cell(getattr(portrait, name)) for cohort, portrait in portraits.items()}
        rows.append(
            {
                "quantity": name,
                "unit": unit,
                **cells,
                "published": published.expected,
                "source": published.source,
                "meaning": meaning,
            }
        )
    return pd.DataFrame(rows)


def _cell(number: Number) -> str:
    if number.value is None:
        return f"– ({number.reason})"
    spread = (
        f" ({_digits(number.quantiles[0])} to {_digits(number.quantiles[-1])})"
        if number.over > 1 and number.quantiles
        else ""
    )
    return _digits(number.value) + spread


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
