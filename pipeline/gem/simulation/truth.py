"""The parameters of a synthetic RNA-seq cohort (`Truth`) and the expression they imply.

On the natural-log scale, up to a normaliser of each sample:

    log mu = baseline + context + disease + sex + age                          (biological)
           + library selection + layout + platform + study + donor             (technical)
           + strength(dose, time) * response(context) * program(perturbation)  (perturbation)
           + direct effect on the target gene
    counts ~ NegativeBinomial(library size * softmax(log mu), dispersion)

N samples, G genes, C contexts (tissue and cell type), S studies, R strata of a study, D donors of a
stratum, P perturbations (0 is the control), K mechanisms, E embedding features.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.files import write_atomically
from pipeline.gem.data.units import parse_quantity

SELECTIONS = ("polyA", "ribo_depletion")
LAYOUTS = ("paired", "single")
PLATFORMS = ("HiSeq 2500", "HiSeq 4000", "NovaSeq 6000")
DISEASES = ("healthy", "disease_a", "disease_b", "disease_c")
SEXES = ("female", "male")
CONTROL = "control"

MEDIAN_POTENCY = 0.3  # uM, the half-effective dose of a median compound
TIME_CONSTANT = {
    "control": 24.0,
    "compound": 12.0,
    "crispri": 48.0,
    "overexpression": 24.0,
}  # hours
DIRECTION = {"crispri": -1.0, "overexpression": 1.0}  # of the direct effect on the target gene
# CRISPRi leaves about an eighth of its target (Replogle et al., Cell 2022).
DIRECT_FOLD = 8.0


@dataclass(frozen=True)
class Levels:
    """N samples as indices into a Truth, with dose in uM and time in hours (NaN where absent)."""

    study: np.ndarray
    context: np.ndarray
    disease: np.ndarray
    library_selection: np.ndarray
    library_layout: np.ndarray
    platform: np.ndarray
    perturbation: np.ndarray
    dose: np.ndarray
    time: np.ndarray

    def take(self, rows: np.ndarray) -> "Levels":
        return Levels(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class Truth:
    """All parameters that counts are drawn from. Effects are on the natural-log scale.

    Real numbers are rounded to single precision: the last bits of float64 exponentials and
    logarithms differ between processors, and the files of a cohort do not.
    """

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
    donor: np.ndarray  # (S, R, D, G) centred over the donors of a stratum
    stratum_sex: np.ndarray  # (S, R) index into SEXES
    stratum_age: np.ndarray  # (S, R) years
    stratum_disease: np.ndarray  # (S, R) index into DISEASES
    mechanism: np.ndarray  # (K, G)
    response: np.ndarray  # (C, K + 1) the last column scales the residual
    embedding: np.ndarray  # (P, E) observable
    loading_map: np.ndarray  # (E, K) loading = clip(offset + embedding @ loading_map, 0, 1)
    loading_offset: np.ndarray  # (K,)
    potency_map: np.ndarray  # (E,) half dose = MEDIAN_POTENCY * exp(embedding @ potency_map)
    residual: np.ndarray  # (P, G) effect that the embedding does not determine
    active: np.ndarray  # (P,) 0 for the control and for perturbations without effect
    target: np.ndarray  # (P,) gene index, -1 without a target gene
    perturbation_type: np.ndarray  # (P,) names
    missing_age: np.ndarray  # () share of ages not recorded at 50 years
    missing_sex: np.ndarray  # ()
    wrong_sex: np.ndarray  # ()
    null_share: np.ndarray  # ()
    gene_id: np.ndarray  # (G,) names

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if values.dtype.kind == "f":
                rounded = values.astype(np.float32).astype(np.float64)
                object.__setattr__(self, field.name, rounded)

    def save(self, folder: Path) -> None:
        """As numpy.savez, whose headers depend on the version of Python."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for field in fields(self):
                array = io.BytesIO()
                np.lib.format.write_array(array, getattr(self, field.name), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{field.name}.npy"), array.getvalue())
        write_atomically(folder / "parameters.npz", content.getvalue())

    @classmethod
    def load(cls, folder: Path) -> "Truth":
        with np.load(folder / "parameters.npz", allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})

    @property
    def studies(self) -> list[str]:
        return [f"study_{index + 1:03d}" for index in range(len(self.study))]

    @property
    def perturbations(self) -> list[str]:
        """Names by index; the type is part of the name, as in a compound or a guide library."""
        kinds = enumerate(self.perturbation_type[1:], start=1)
        return [CONTROL, *(f"{kind}_{index:03d}" for index, kind in kinds)]

    @property
    def contexts(self) -> list[tuple[str, str]]:
        """(tissue, cell type) by index."""
        tissues, per_tissue = len(self.disease), len(self.context) // len(self.disease)
        return [
            (f"tissue_{tissue}", f"cell_type_{tissue}_{cell_type}")
            for tissue in range(1, tissues + 1)
            for cell_type in range(1, per_tissue + 1)
        ]

    @property
    def loading(self) -> np.ndarray:
        """(P, K) strength with which each perturbation, if active, moves each mechanism."""
        return np.clip(self.loading_offset + self.embedding @ self.loading_map, 0, 1)

    def levels(self, samples: pd.DataFrame) -> Levels:
        """The recorded metadata (N rows) as indices into the truth's arrays."""
        pairs = pd.Series(list(zip(samples["tissue"], samples["cell_type"], strict=True)))
        return Levels(
            study=index_of(samples["study"], self.studies),
            context=index_of(pairs, self.contexts),
            disease=index_of(samples["disease"], DISEASES),
            library_selection=index_of(samples["library_selection"], SELECTIONS),
            library_layout=index_of(samples["library_layout"], LAYOUTS),
            platform=index_of(samples["platform"], PLATFORMS),
            perturbation=index_of(samples["perturbation"], self.perturbations),
            dose=_quantities(samples["perturbation_dose"]),
            time=_quantities(samples["perturbation_time"]),
        )

    def base_log_mu(self, levels: Levels) -> np.ndarray:
        """(N, G) the part of log mu that follows from the metadata that are never missing."""
        tissue = levels.context // (len(self.context) // len(self.disease))
        return (
            self.baseline
            + self.context[levels.context]
            + self.disease[tissue, levels.disease]
            + self.library_selection[levels.library_selection]
            + self.library_layout[levels.library_layout]
            + self.platform[levels.platform]
        )

    def donor_trait_effects(self, sex: np.ndarray, age: np.ndarray) -> np.ndarray:
        """(N, G) effects of sex (index) and age (years)."""
        return (sex - 0.5)[:, None] * self.sex + ((age - 50) / 20)[:, None] * self.age

    def strength(self, levels: Levels) -> np.ndarray:
        """(N,) dose / (dose + half dose) * (1 - exp(-time / tau)), tau by type; 1 for an absent
        dose or time."""
        half_dose = MEDIAN_POTENCY * np.exp(self.embedding[levels.perturbation] @ self.potency_map)
        response = np.where(np.isnan(levels.dose), 1.0, levels.dose / (levels.dose + half_dose))
        tau = np.array([TIME_CONSTANT[kind] for kind in self.perturbation_type])
        decay = np.exp(-levels.time / tau[levels.perturbation])
        return response * np.where(np.isnan(levels.time), 1.0, 1 - decay)

    def predictable_program(self, levels: Levels) -> np.ndarray:
        """(N, G) the effect of an active perturbation that follows from its embedding, context,
        dose, time and target gene.

        The programs build up with time; the direct effect on the target gene is immediate.
        """
        usage = self.response[levels.context, :-1] * self.loading[levels.perturbation]
        program = usage @ self.mechanism
        program *= self.strength(levels)[:, None]
        target = self.target[levels.perturbation]
        genetic = np.flatnonzero(target >= 0)
        signs = np.array([DIRECTION.get(kind, 0.0) for kind in self.perturbation_type])
        direction = signs[levels.perturbation[genetic]]
        program[genetic, target[genetic]] += direction * np.log(DIRECT_FOLD)
        program[levels.perturbation == 0] = 0
        return program

    def residual_scale(self, levels: Levels) -> np.ndarray:
        """(N,) factor of a perturbation's residual effect."""
        return self.strength(levels) * self.response[levels.context, -1]

    def perturbation_effects(self, levels: Levels) -> np.ndarray:
        """(N, G) the whole effect of each sample's perturbation."""
        residual = self.residual_scale(levels)[:, None] * self.residual[levels.perturbation]
        active = self.active[levels.perturbation][:, None]
        return active * (self.predictable_program(levels) + residual)

    def age_missing_probability(self, age: np.ndarray) -> np.ndarray:
        """Probability that an age (years) is not recorded: it rises with age, so that ages are
        missing not at random."""
        return np.clip(self.missing_age * (1 + (age - 50) / 60), 0, 1)


def index_of(column: pd.Series, names: Sequence) -> np.ndarray:
    """(N,) position of each value of a column in `names`."""
    codes = {name: index for index, name in enumerate(names)}
    return column.astype(object).map(codes).to_numpy(dtype=np.int64)


def _quantities(column: pd.Series) -> np.ndarray:
    return np.array([np.nan if pd.isna(value) else parse_quantity(value)[0] for value in column])
