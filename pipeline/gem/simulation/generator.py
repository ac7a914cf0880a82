"""A synthetic RNA-seq cohort whose truth is known: its parameters, and the counts they give. design.py says who is measured.

Natural-log scale, then counts:

    log mu = baseline + context + disease + sex + age                          (biological)
           + library selection + layout + platform + study + donor             (technical)
           + strength(dose, time) * response(context) * program(perturbation)  (perturbation)
           + direct effect on the target gene
    counts ~ NegativeBinomial(library size * softmax(log mu), dispersion)

G genes, C contexts (tissue and cell type), S studies, R strata of a study, D donors of a stratum,
P perturbations (0 is the control), K mechanisms, E embedding features.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Synthesize
from pipeline.gem.data.units import parse_quantity

# Splatter (Zappia et al., Genome Biology 2017), defaults of its gene means, outliers, batches and dispersion.
MEAN_SHAPE, MEAN_RATE = 0.6, 0.3
OUTLIER_SHARE, OUTLIER_LOCATION, OUTLIER_SCALE = 0.05, 4.0, 0.5
BATCH_LOCATION, BATCH_SCALE = 0.1, 0.1
BCV_FLOOR, BCV_DEGREES = 0.1, 60
# compcodeR (Soneson, Bioinformatics 2014) for bulk depth; the median of current perturbation screens for single cells.
BULK_DEPTH, BULK_SPREAD = 1e7, (0.7, 1.4)
CELL_DEPTH, CELL_SPREAD = 2e4, 0.2
TRANSCRIPTOME = 20_000  # genes that share a cell's counts: a cohort of fewer is a sample of them, with its share of the depth
# edgeR's convention: biological coefficient of variation 0.1 between isogenic samples, 0.4 between unrelated humans.
# Matched donors of one stratum (cell lines, litter mates, age-matched volunteers) are nearer to the first.
DONOR_SCALE = 0.15
STUDY_SCALE = 0.2
# Share of genes and natural-log scale of effects of the biology.
TISSUE_EFFECT, CELL_TYPE_EFFECT, DISEASE_EFFECT = (0.4, 0.7), (0.3, 0.4), (0.15, 0.5)
SEX_EFFECT, AGE_EFFECT = (0.02, 1.0), (0.2, 0.15)
SELECTION_FACTOR = (
    3.0  # poly-A capture against ribosomal depletion moves genes more than an ordinary batch does
)
# 1 to 10 % of the genes of a program change, half of them down, by factors of 1.2 to 5.
PROGRAM_SHARE, PROGRAM_FOLD = (0.01, 0.10), (1.2, 5.0)
RESIDUAL_SHARE, RESIDUAL_FOLD = 0.01, (1.2, 3.0)
RESPONSE_SCALE = 0.5  # spread over contexts of the log response to a mechanism
LOADING_SCALE, TYPICAL_LOADING, STRESS_LOADING = (
    1.5,
    0.0,
    0.5,
)  # half use a mechanism, two thirds cause stress
MEDIAN_POTENCY, POTENCY_SCALE = 0.3, 1.0  # uM, and the spread of its logarithm
SILENT_SHARE = 0.25  # share of contexts that do not respond to a mechanism at all: its pathway is not expressed
DIRECT_FOLD = (
    8.0  # on the target gene itself: CRISPRi leaves about an eighth (Replogle et al., Cell 2022)
)
HILL_SLOPE = 1.0
TIME_CONSTANT = {
    "control": 24.0,
    "compound": 12.0,
    "crispri": 48.0,
    "overexpression": 24.0,
}  # hours
DIRECTION = {"crispri": -1.0, "overexpression": 1.0}

SELECTIONS = ("polyA", "ribo_depletion")
LAYOUTS = ("paired", "single")
PLATFORMS = ("HiSeq 2500", "HiSeq 4000", "NovaSeq 6000")
DISEASES = ("healthy", "disease_a", "disease_b", "disease_c")
SEXES = ("female", "male")
AGES = (20, 80)
TYPES = ("compound", "crispri", "overexpression")
TYPE_SHARES = (0.5, 0.3, 0.2)
CONTROL = "control"


@dataclass(frozen=True)
class Truth:
    """Everything the counts are drawn from. Effects are natural-log, shapes as in the module's legend."""

    baseline: np.ndarray  # (G,)
    dispersion: np.ndarray  # (G,) variance = mean + dispersion * mean^2
    context: np.ndarray  # (C, G)
    disease: np.ndarray  # (tissues, 4, G) a disease differs between tissues; healthy is zero
    sex: np.ndarray  # (G,) male minus female
    age: np.ndarray  # (G,) per 20 years
    library_selection: np.ndarray  # (2, G)
    library_layout: np.ndarray  # (2, G)
    platform: np.ndarray  # (3, G)
    study: np.ndarray  # (S, G)
    donor: np.ndarray  # (S, R, D, G), centred over the donors of a stratum
    stratum_sex: np.ndarray  # (S, R) index into SEXES
    stratum_age: np.ndarray  # (S, R) years
    stratum_disease: np.ndarray  # (S, R) index into DISEASES
    mechanism: np.ndarray  # (K, G)
    response: np.ndarray  # (C, K + 1), the last for what is peculiar to a perturbation
    embedding: np.ndarray  # (P, E) observable
    loading_map: np.ndarray  # (E, K) loading = offset + embedding @ loading_map, between 0 and 1
    loading_offset: np.ndarray  # (K,)
    potency_map: (
        np.ndarray
    )  # (E,) half-effective dose = MEDIAN_POTENCY * exp(embedding @ potency_map)
    residual: np.ndarray  # (P, G) what the embedding does not tell
    active: np.ndarray  # (P,) 0 for the control and for perturbations without effect
    target: np.ndarray  # (P,) gene index, -1 without
    perturbation_type: np.ndarray  # (P,) names
    missing_age: np.ndarray  # () share of ages not recorded at 50 years
    missing_sex: np.ndarray  # ()
    wrong_sex: np.ndarray  # ()
    null_share: np.ndarray  # ()
    gene_id: np.ndarray  # (G,) names

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            folder / "parameters.npz",
            **{field.name: getattr(self, field.name) for field in fields(self)},
        )

    @classmethod
    def load(cls, folder: Path) -> "Truth":
        with np.load(folder / "parameters.npz", allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    @property
    def studies(self) -> list[str]:
        return [f"study_{index + 1:03d}" for index in range(len(self.study))]

    @property
    def perturbations(self) -> list[str]:
        """Names by index; the type is part of the name, as in a compound library or a guide library."""
        return [CONTROL] + [
            f"{kind}_{index:03d}" for index, kind in enumerate(self.perturbation_type[1:], start=1)
        ]

    @property
    def contexts(self) -> list[tuple[str, str]]:
        """(tissue, cell type) by index."""
        per_tissue = len(self.context) // len(self.disease)
        return [
            (
                f"tissue_{1 + index // per_tissue}",
                f"cell_type_{1 + index // per_tissue}_{1 + index % per_tissue}",
            )
            for index in range(len(self.context))
        ]

    @property
    def loading(self) -> np.ndarray:
        """(P, K) how strongly each perturbation, if it acts at all, moves each mechanism."""
        return np.clip(self.loading_offset + self.embedding @ self.loading_map, 0, 1)

    def known_effects(self, levels: "Levels") -> np.ndarray:
        """(N, G) the part of log mu that the recorded metadata always tell."""
        return (
            self.baseline
            + self.context[levels.context]
            + self.disease[
                levels.context // (len(self.context) // len(self.disease)), levels.disease
            ]
            + self.library_selection[levels.library_selection]
            + self.library_layout[levels.library_layout]
            + self.platform[levels.platform]
        )

    def donor_trait_effects(self, sex: np.ndarray, age: np.ndarray) -> np.ndarray:
        """(N, G) of sex (index) and age (years)."""
        return (sex - 0.5)[:, None] * self.sex + ((age - 50) / 20)[:, None] * self.age

    def strength(self, levels: "Levels") -> np.ndarray:
        """(N,) hill(dose) * (1 - exp(-time / tau)); full effect where no dose applies, tau by type."""
        half_dose = MEDIAN_POTENCY * np.exp(self.embedding[levels.perturbation] @ self.potency_map)
        dose = levels.dose**HILL_SLOPE
        hill = np.where(np.isnan(levels.dose), 1.0, dose / (dose + half_dose**HILL_SLOPE))
        constant = np.array([TIME_CONSTANT[kind] for kind in self.perturbation_type])[
            levels.perturbation
        ]
        return hill * np.where(np.isnan(levels.time), 1.0, 1 - np.exp(-levels.time / constant))

    def predictable_program(self, levels: "Levels") -> np.ndarray:
        """(N, G) the effect that follows from embedding, context, dose, time and target, if the perturbation acts.

        What follows from the target takes its time; the target itself was hit before the clock started.
        """
        program = (
            self.response[levels.context, :-1] * self.loading[levels.perturbation]
        ) @ self.mechanism
        program *= self.strength(levels)[:, None]
        target = self.target[levels.perturbation]
        genetic = np.flatnonzero(target >= 0)
        direction = np.array([DIRECTION.get(kind, 0.0) for kind in self.perturbation_type])[
            levels.perturbation
        ]
        program[genetic, target[genetic]] += direction[genetic] * np.log(DIRECT_FOLD)
        program[levels.perturbation == 0] = 0
        return program

    def residual_scale(self, levels: "Levels") -> np.ndarray:
        """(N,) what multiplies a perturbation's peculiar effect."""
        return self.strength(levels) * self.response[levels.context, -1]

    def perturbation_effects(self, levels: "Levels") -> np.ndarray:
        """(N, G) the whole effect of each sample's perturbation."""
        peculiar = self.residual_scale(levels)[:, None] * self.residual[levels.perturbation]
        return self.active[levels.perturbation][:, None] * (
            self.predictable_program(levels) + peculiar
        )

    def levels(self, samples: pd.DataFrame) -> "Levels":
        """The recorded metadata as indices into the truth's arrays."""
        contexts = {context: index for index, context in enumerate(self.contexts)}
        return Levels(
            study=samples["study"]
            .map({name: index for index, name in enumerate(self.studies)})
            .to_numpy(),
            context=np.array(
                [
                    contexts[pair]
                    for pair in zip(samples["tissue"], samples["cell_type"], strict=True)
                ]
            ),
            disease=index_of(samples["disease"], DISEASES),
            library_selection=index_of(samples["library_selection"], SELECTIONS),
            library_layout=index_of(samples["library_layout"], LAYOUTS),
            platform=index_of(samples["platform"], PLATFORMS),
            perturbation=index_of(samples["perturbation"], self.perturbations),
            dose=_quantities(samples["perturbation_dose"]),
            time=_quantities(samples["perturbation_time"]),
        )


@dataclass(frozen=True)
class Levels:
    """N samples as indices into a Truth; dose in uM and time in hours, NaN where none applies."""

    study: np.ndarray
    context: np.ndarray
    disease: np.ndarray
    library_selection: np.ndarray
    library_layout: np.ndarray
    platform: np.ndarray
    perturbation: np.ndarray
    dose: np.ndarray
    time: np.ndarray

    def rows(self, chosen: np.ndarray) -> "Levels":
        return Levels(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def index_of(column: pd.Series, names) -> np.ndarray:
    return column.map({name: index for index, name in enumerate(names)}).to_numpy(dtype=np.int64)


def _quantities(column: pd.Series) -> np.ndarray:
    return np.array([np.nan if pd.isna(value) else parse_quantity(value)[0] for value in column])


def age_missing_probability(truth: Truth, age: np.ndarray) -> np.ndarray:
    """Ages go unrecorded more often the older the donor: not missing at random."""
    return np.clip(truth.missing_age * (1 + (age - 50) / 60), 0, 1)


def _sparse(
    rng: np.random.Generator, rows: int, genes: int, share_and_scale: tuple[float, float]
) -> np.ndarray:
    share, scale = share_and_scale
    return rng.normal(0, scale, (rows, genes)) * (rng.random((rows, genes)) < share)


def _signed_folds(
    rng: np.random.Generator, shape: tuple[int, int], folds: tuple[float, float]
) -> np.ndarray:
    """Natural-log fold changes, half of them down."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(*np.log(folds), shape)


def _batch_factors(rng: np.random.Generator, rows: int, genes: int) -> np.ndarray:
    """Splatter's log-normal batch factors, half of them below one."""
    return rng.choice([-1.0, 1.0], (rows, genes)) * rng.normal(
        BATCH_LOCATION, BATCH_SCALE, (rows, genes)
    )


def typical_depth(params: Synthesize) -> float:
    """Counts of a typical sample over the genes of the cohort: what `depth` asks for, else the preset's."""
    if params.depth is not None:
        return float(params.depth)
    return (
        BULK_DEPTH
        if params.preset == "bulk"
        else CELL_DEPTH * min(1.0, params.genes / TRANSCRIPTOME)
    )


def draw_truth(params: Synthesize, rng: np.random.Generator) -> Truth:
    """The parameters of a cohort, from one generator."""
    genes, contexts = params.genes, params.tissues * params.cell_types_per_tissue
    means = rng.gamma(MEAN_SHAPE, 1 / MEAN_RATE, genes)
    outlier = rng.random(genes) < OUTLIER_SHARE
    means = np.where(
        outlier, np.median(means) * rng.lognormal(OUTLIER_LOCATION, OUTLIER_SCALE, genes), means
    )
    means = np.maximum(means / means.sum(), 1e-12)
    depth = typical_depth(params)
    bcv = (BCV_FLOOR + 1 / np.sqrt(means * depth)) * np.sqrt(
        BCV_DEGREES / rng.chisquare(BCV_DEGREES, genes)
    )
    tissue = _sparse(rng, params.tissues, genes, TISSUE_EFFECT)
    disease = np.stack(
        [_sparse(rng, len(DISEASES), genes, DISEASE_EFFECT) for _ in range(params.tissues)]
    )
    disease[:, 0] = 0
    donor = rng.normal(
        0, DONOR_SCALE, (params.studies, params.strata_per_study, params.donors_per_stratum, genes)
    )
    return Truth(
        baseline=np.log(means),
        dispersion=bcv**2,
        context=np.repeat(tissue, params.cell_types_per_tissue, axis=0)
        + _sparse(rng, contexts, genes, CELL_TYPE_EFFECT),
        disease=disease,
        sex=_sparse(rng, 1, genes, SEX_EFFECT)[0],
        age=_sparse(rng, 1, genes, AGE_EFFECT)[0],
        library_selection=SELECTION_FACTOR * _batch_factors(rng, len(SELECTIONS), genes),
        library_layout=_batch_factors(rng, len(LAYOUTS), genes),
        platform=_batch_factors(rng, len(PLATFORMS), genes),
        study=rng.normal(0, STUDY_SCALE, (params.studies, genes)),
        donor=donor - donor.mean(axis=2, keepdims=True),
        **_draw_strata(params, rng),
        **_draw_programs(params, rng, contexts),
        missing_age=np.array(params.missing_age),
        missing_sex=np.array(params.missing_sex),
        wrong_sex=np.array(params.wrong_sex),
        null_share=np.array(params.null_share),
        gene_id=np.array([f"GENE{index + 1:05d}" for index in range(genes)]),
    )


def _draw_strata(params: Synthesize, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shape = (params.studies, params.strata_per_study)
    return {
        "stratum_sex": rng.integers(0, 2, shape),
        "stratum_age": rng.integers(AGES[0], AGES[1] + 1, shape),
        "stratum_disease": rng.choice(len(DISEASES), shape, p=[0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3]),
    }


def _draw_programs(
    params: Synthesize, rng: np.random.Generator, contexts: int
) -> dict[str, np.ndarray]:
    """Mechanisms, who uses them, how contexts respond. The first mechanism is the stress that most cause."""
    genes, mechanisms, features, rows = (
        params.genes,
        params.mechanisms,
        params.embedding_size,
        params.perturbations + 1,
    )
    shares = rng.uniform(*PROGRAM_SHARE, (mechanisms, 1))
    in_program = rng.random((mechanisms, genes)) < shares
    kinds = np.concatenate([["control"], rng.choice(TYPES, params.perturbations, p=TYPE_SHARES)])
    responses = (contexts, mechanisms + 1)
    offset = np.full(mechanisms, TYPICAL_LOADING)
    offset[0] = STRESS_LOADING
    active = (rng.random(rows) >= params.null_share).astype(float)
    active[0] = 0
    target = np.where(np.isin(kinds, list(DIRECTION)), rng.integers(0, genes, rows), -1)
    residual = _signed_folds(rng, (rows, genes), RESIDUAL_FOLD) * (
        rng.random((rows, genes)) < RESIDUAL_SHARE
    )
    residual[0] = 0
    return {
        "mechanism": in_program * _signed_folds(rng, (mechanisms, genes), PROGRAM_FOLD),
        "response": np.exp(rng.normal(0, RESPONSE_SCALE, responses))
        * (rng.random(responses) >= SILENT_SHARE),
        "embedding": rng.normal(0, 1, (rows, features)),
        "loading_map": rng.normal(0, LOADING_SCALE / np.sqrt(features), (features, mechanisms)),
        "loading_offset": offset,
        "potency_map": rng.normal(0, POTENCY_SCALE / np.sqrt(features), features),
        "residual": residual,
        "active": active,
        "target": target,
        "perturbation_type": kinds,
    }


def log_fractions(
    truth: Truth, samples: pd.DataFrame, stratum: np.ndarray, donor: np.ndarray
) -> np.ndarray:
    """(N, G) log of the expected share of each gene, every hidden cause known: stratum (N,) and donor (N,)."""
    levels = truth.levels(samples)
    log_mu = truth.known_effects(levels)
    log_mu += truth.donor_trait_effects(
        truth.stratum_sex[levels.study, stratum], truth.stratum_age[levels.study, stratum]
    )
    log_mu += truth.study[levels.study]
    log_mu += truth.donor[levels.study, stratum, donor]
    log_mu += truth.perturbation_effects(levels)
    log_mu -= log_mu.max(axis=1, keepdims=True)
    return log_mu - np.log(np.exp(log_mu).sum(axis=1, keepdims=True))


def draw_counts(
    log_fraction: np.ndarray,
    library_size: np.ndarray,
    dispersion: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """(N, G) negative-binomial counts as a Gamma mixture of Poissons: variance = mean + dispersion * mean^2."""
    mean = np.exp(log_fraction) * library_size[:, None]
    return rng.poisson(rng.gamma(1 / dispersion, dispersion, mean.shape) * mean)
