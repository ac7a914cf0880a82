"""Draws the parameters of a synthetic cohort and its counts.

The distributions are Splatter's (Zappia et al., Genome Biology 2017) where it has one. The legend
of shapes is that of truth.py.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Synthesize
from pipeline.gem.simulation.truth import (
    DIRECTION,
    DISEASES,
    LAYOUTS,
    PLATFORMS,
    SELECTIONS,
    Folds,
    Truth,
)

# Splatter's defaults of gene means, outliers, batches and dispersion.
MEAN_SHAPE, MEAN_RATE = 0.6, 0.3
OUTLIER_SHARE, OUTLIER_LOCATION, OUTLIER_SCALE = 0.05, 4.0, 0.5
BATCH_LOCATION, BATCH_SCALE = 0.1, 0.1
BCV_FLOOR = 0.1
# compcodeR (Soneson, Bioinformatics 2014) for bulk; the median of perturbation screens for cells.
BULK_DEPTH, BULK_SPREAD = 1e7, (0.7, 1.4)
CELL_DEPTH, CELL_SPREAD = 2e4, 0.2
# Genes that share the counts of a cell: a cohort of fewer genes has its share of the depth.
TRANSCRIPTOME = 20_000
# edgeR's convention: biological coefficient of variation 0.1 between isogenic samples, 0.4 between
# unrelated humans. Matched donors of one stratum (cell lines, litter mates) are nearer to the
# first.
DONOR_SCALE = 0.15
STUDY_SCALE = 0.2
# (share of genes, natural-log scale) of biological effects
TISSUE_EFFECT, CELL_TYPE_EFFECT, DISEASE_EFFECT = (0.4, 0.7), (0.3, 0.4), (0.15, 0.5)
SEX_EFFECT, AGE_EFFECT = (0.02, 1.0), (0.2, 0.15)
# Poly-A capture against ribosomal depletion moves genes more than an ordinary batch does.
SELECTION_FACTOR = 3.0
# The smallest program has a tenth of the genes of the largest; half of them go down, by factors of
# 1.2 to 5.
PROGRAM_FOLD = (1.2, 5.0)
# Half of the perturbations use a mechanism, two thirds cause stress.
LOADING_SCALE, TYPICAL_LOADING, STRESS_LOADING = 1.5, 0.0, 0.5
POTENCY_SCALE = 1.0  # spread of the logarithm of potency
AGES = (20, 80)  # years
DISEASE_SHARES = (0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3)  # of strata, in the order of DISEASES
# Genes below this quantile of expression may escape a study: its library or annotation lacks them.
DETECTION_QUANTILE = 0.5
SUBPOPULATION_EFFECT = (0.3, 0.7)  # share of genes, scale: cell states differ as cell types do
TYPES, TYPE_SHARES = ("compound", "crispri", "overexpression"), (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class SparseEffects:
    """Effects of genes: zero, or a signed log fold change, uniform between two folds."""

    share: float  # of genes with an effect
    folds: Folds
    unit: bool = False  # divided by the root of the mean square

    @property
    def _scale(self) -> float:
        low, high = np.log(self.folds)
        mean_square = self.share * (low**2 + low * high + high**2) / 3
        return float(mean_square**-0.5) if self.unit else 1.0

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        effects = np.zeros(shape)
        row, gene = np.nonzero(rng.random(shape, dtype=np.float32) < self.share)
        signs = rng.choice([-1.0, 1.0], len(row))
        effects[row, gene] = signs * rng.uniform(*np.log(self.folds), len(row)) * self._scale
        return effects

    def quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """(nodes, weights) of the effect on one gene."""
        low, high = np.log(self.folds)
        nodes, weights = np.polynomial.legendre.leggauss(2)
        sizes = (low + high) / 2 + (high - low) / 2 * nodes
        weights = weights / weights.sum() / 2 * self.share
        nodes = np.concatenate([[0.0], sizes, -sizes]) * self._scale
        return nodes, np.concatenate([[1 - self.share], weights, weights])


RESIDUAL = SparseEffects(0.01, (1.2, 3.0))  # of a perturbation, beside what its embedding implies
CONTEXT_PROGRAM = SparseEffects(0.1, PROGRAM_FOLD, unit=True)  # of a perturbation in one context


def typical_depth(params: Synthesize) -> float:
    """Counts of a typical sample over the genes of the cohort: `depth`, else the preset's."""
    if params.depth is not None:
        return float(params.depth)
    if params.preset == "bulk":
        return BULK_DEPTH
    return CELL_DEPTH * min(1.0, params.genes / TRANSCRIPTOME)


def draw_truth(params: Synthesize, rng: np.random.Generator) -> Truth:
    """The parameters of a cohort."""
    genes, contexts = params.genes, params.tissues * params.cell_types_per_tissue
    means = _draw_mean_shares(genes, rng)
    bcv_trend = BCV_FLOOR + 1 / np.sqrt(means * typical_depth(params))
    degrees = params.dispersion_degrees
    bcv = bcv_trend * np.sqrt(degrees / rng.chisquare(degrees, genes))
    tissue = _sparse(rng, (params.tissues, genes), *TISSUE_EFFECT)
    diseases = (len(DISEASES), genes)
    disease = np.stack([_sparse(rng, diseases, *DISEASE_EFFECT) for _ in range(params.tissues)])
    disease[:, 0] = 0
    donors = (params.studies, params.strata_per_study, params.donors_per_stratum, genes)
    donor = rng.normal(0, DONOR_SCALE, donors)
    cell_type = _sparse(rng, (contexts, genes), *CELL_TYPE_EFFECT)
    truth = Truth(
        baseline=np.log(means),
        dispersion=bcv**2,
        context=np.repeat(tissue, params.cell_types_per_tissue, axis=0) + cell_type,
        disease=disease,
        sex=_sparse(rng, (genes,), *SEX_EFFECT),
        age=_sparse(rng, (genes,), *AGE_EFFECT),
        library_selection=SELECTION_FACTOR * _batch_factors(rng, (len(SELECTIONS), genes)),
        library_layout=_batch_factors(rng, (len(LAYOUTS), genes)),
        platform=_batch_factors(rng, (len(PLATFORMS), genes)),
        study=rng.normal(0, STUDY_SCALE, (params.studies, genes)),
        donor=donor - donor.mean(axis=2, keepdims=True),
        **_draw_strata(params, rng),
        **_draw_perturbations(params, rng, contexts),
        missing_age=np.array(params.missing_age),
        missing_sex=np.array(params.missing_sex),
        wrong_sex=np.array(params.wrong_sex),
        null_share=np.array(params.null_share),
        gene_id=np.array([f"GENE{index + 1:05d}" for index in range(genes)]),
    )
    # Drawn last: what a cohort has not does not change the rest of it.
    return replace(truth, **_draw_options(params, truth, rng))


def _draw_options(
    params: Synthesize, truth: Truth, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The fields of the truth that are None without their setting."""
    (contexts, genes), options = truth.context.shape, {}
    perturbations, features = truth.embedding.shape
    if params.context_specific_share:
        shape = (perturbations * contexts, genes)
        programs = CONTEXT_PROGRAM.draw(shape, rng).reshape(perturbations, contexts, genes)
        programs[0] = 0
        options["context_program"] = programs
        options["context_share"] = np.array(params.context_specific_share)
    if params.hill_spread:
        options["hill_map"] = rng.normal(0, params.hill_spread / np.sqrt(features), features)
    if params.saturation_fold is not None:
        options["saturation"] = np.log(np.array(params.saturation_fold))
    if params.interaction_spread:
        bilinear = rng.normal(0, params.interaction_spread / features, (features, features))
        options["interaction_map"] = (bilinear + bilinear.T) / np.sqrt(2)
    if params.undetected_share:
        weak = truth.baseline < np.quantile(truth.baseline, DETECTION_QUANTILE)
        undetected = weak & (rng.random(truth.study.shape) < params.undetected_share)
        options["study"] = np.where(undetected, -np.inf, truth.study)
        options["undetected_probability"] = weak * params.undetected_share
    if params.subpopulations > 1:
        options |= _draw_subpopulations(params.subpopulations, truth.context.shape, rng)
    return options


def _draw_subpopulations(
    number: int, shape: tuple[int, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Shares of the subpopulations of each context, uniform, and their effects on genes."""
    contexts, genes = shape
    shares = rng.dirichlet(np.ones(number), contexts)
    effects = _sparse(rng, (contexts, number, genes), *SUBPOPULATION_EFFECT)
    mean = np.einsum("cq,cqg->cg", shares, effects)
    return {"subpopulation": effects - mean[:, None, :], "subpopulation_share": shares}


def _draw_mean_shares(genes: int, rng: np.random.Generator) -> np.ndarray:
    """(G,) expected share of each gene in the counts: Gamma means with log-normal outliers."""
    means = rng.gamma(MEAN_SHAPE, 1 / MEAN_RATE, genes)
    is_outlier = rng.random(genes) < OUTLIER_SHARE
    outliers = np.median(means) * rng.lognormal(OUTLIER_LOCATION, OUTLIER_SCALE, genes)
    means = np.where(is_outlier, outliers, means)
    return np.maximum(means / means.sum(), 1e-12)


def _sparse(
    rng: np.random.Generator, shape: tuple[int, ...], share: float, scale: float
) -> np.ndarray:
    """Normal effects of this scale on this share of the entries."""
    return rng.normal(0, scale, shape) * (rng.random(shape) < share)


def _signed_log_folds(rng: np.random.Generator, shape: tuple[int, int], folds: Folds) -> np.ndarray:
    """Natural-log fold changes, half of them down."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(*np.log(folds), shape)


def _batch_factors(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Splatter's log-normal batch factors, half of them below one, as logarithms."""
    return rng.choice([-1.0, 1.0], shape) * rng.normal(BATCH_LOCATION, BATCH_SCALE, shape)


def _draw_strata(params: Synthesize, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shape = (params.studies, params.strata_per_study)
    return {
        "stratum_sex": rng.integers(0, 2, shape),
        "stratum_age": rng.integers(AGES[0], AGES[1] + 1, shape),
        "stratum_disease": rng.choice(len(DISEASES), shape, p=DISEASE_SHARES),
    }


def _draw_perturbations(
    params: Synthesize, rng: np.random.Generator, contexts: int
) -> dict[str, np.ndarray]:
    """Mechanisms, the perturbations that use them, and the responses of contexts. The first
    mechanism is the stress response."""
    genes, mechanisms = params.genes, params.mechanisms
    features, perturbations = params.embedding_size, params.perturbations + 1
    largest = params.program_share
    shares = rng.uniform(largest / 10, largest, (mechanisms, 1))
    in_program = rng.random((mechanisms, genes)) < shares
    kinds = np.concatenate([["control"], rng.choice(TYPES, params.perturbations, p=TYPE_SHARES)])
    offset = np.full(mechanisms, TYPICAL_LOADING)
    offset[0] = STRESS_LOADING
    active = (rng.random(perturbations) >= params.null_share).astype(float)
    active[0] = 0
    target_genes = rng.integers(0, genes, perturbations)
    residual = _signed_log_folds(rng, (perturbations, genes), RESIDUAL.folds)
    residual *= rng.random(residual.shape) < RESIDUAL.share
    residual[0] = 0
    mechanism = in_program * _signed_log_folds(rng, (mechanisms, genes), PROGRAM_FOLD)
    response = np.exp(rng.normal(0, params.response_spread, (contexts, mechanisms + 1)))
    response *= rng.random(response.shape) >= params.silent_share
    return {
        "mechanism": mechanism,
        "response": response,
        "embedding": rng.normal(0, 1, (perturbations, features)),
        "loading_map": rng.normal(0, LOADING_SCALE / np.sqrt(features), (features, mechanisms)),
        "loading_offset": offset,
        "potency_map": rng.normal(0, POTENCY_SCALE / np.sqrt(features), features),
        "residual": residual,
        "active": active,
        "target": np.where(np.isin(kinds, list(DIRECTION)), target_genes, -1),
        "perturbation_type": kinds,
    }


def log_fractions(
    truth: Truth,
    samples: pd.DataFrame,
    stratum: np.ndarray,
    donor: np.ndarray,
    subpopulation: np.ndarray | None = None,
) -> np.ndarray:
    """(N, G) log of the expected share of each gene; hidden factors (N,), `subpopulation` only of a
    truth that has them."""
    levels = truth.levels(samples)
    log_mu = truth.base_log_mu(levels)
    log_mu += truth.donor_trait_effects(
        truth.stratum_sex[levels.study, stratum], truth.stratum_age[levels.study, stratum]
    )
    log_mu += truth.study[levels.study]
    log_mu += truth.donor[levels.study, stratum, donor]
    log_mu += truth.perturbation_effects(levels)
    if truth.subpopulation is not None:
        log_mu += truth.subpopulation[levels.context, subpopulation]
    log_mu -= log_mu.max(axis=1, keepdims=True)
    return log_mu - np.log(np.exp(log_mu).sum(axis=1, keepdims=True))


def draw_counts(
    log_fraction: np.ndarray,
    library_size: np.ndarray,
    dispersion: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """(N, G) negative-binomial counts, variance = mean + dispersion * mean^2, as a Gamma mixture
    of Poissons."""
    mean = np.exp(log_fraction) * library_size[:, None]
    return rng.poisson(rng.gamma(1 / dispersion, dispersion, mean.shape) * mean)
