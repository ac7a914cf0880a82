"""The parameters of a synthetic RNA-seq cohort (`Truth`) and the expression they imply.

On the natural-log scale, up to a normaliser of each sample:

    log mu = baseline + context + disease + sex + age                          (biological)
           + library selection + layout + platform + study + donor             (technical)
           + strength(dose, time) * response(context) * program(perturbation)  (perturbation)
           + direct effect on the target gene
    counts ~ NegativeBinomial(library size * softmax(log mu), dispersion)

By choice of the settings: a part of the program is of one context only, the fold changes of a
perturbation saturate, the dose response has a Hill coefficient of its own, two perturbations
enhance or suppress each other, a study does not detect some genes, a context has subpopulations.

N samples, G genes, C contexts (tissue and cell type), S studies, R strata of a study, D donors of a
stratum, P perturbations (0 is the control), K mechanisms, E embedding features, Q subpopulations.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.gem.common.files import write_atomically
from pipeline.gem.data.labels import SEPARATOR
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

Folds = tuple[float, float]


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
    partner: np.ndarray  # the second of two perturbations, 0 for one

    def take(self, rows: np.ndarray) -> "Levels":
        return Levels(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def members(self) -> list["Levels"]:
        """The samples with each of their perturbations alone: one list entry, or two."""
        if not self.partner.any():
            return [self]
        alone = np.zeros_like(self.partner)
        second = replace(self, perturbation=self.partner, partner=alone)
        return [replace(self, partner=alone), second]


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
    # None where the settings of the cohort ask for none; then the file has no such array.
    context_program: np.ndarray | None = None  # (P, C, G) of a perturbation in one context only
    context_share: np.ndarray | None = None  # () of the variance of a program that it has
    hill_map: np.ndarray | None = None  # (E,) Hill coefficient = exp(embedding @ hill_map)
    saturation: np.ndarray | None = None  # () log fold change that effects approach
    interaction_map: np.ndarray | None = None  # (E, E) symmetric
    undetected_probability: np.ndarray | None = None  # (G,) that a study does not detect the gene
    subpopulation: np.ndarray | None = None  # (C, Q, G) the mean over a context's cells is zero
    subpopulation_share: np.ndarray | None = None  # (C, Q) of the cells of a context

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if values is not None and values.dtype.kind == "f":
                rounded = values.astype(np.float32).astype(np.float64)
                object.__setattr__(self, field.name, rounded)

    def save(self, folder: Path) -> None:
        """As numpy.savez, whose headers depend on the version of Python."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for field in fields(self):
                if (values := getattr(self, field.name)) is None:
                    continue
                array = io.BytesIO()
                np.lib.format.write_array(array, values, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{field.name}.npy"), array.getvalue())
        write_atomically(folder / "parameters.npz", content.getvalue())

    @classmethod
    def load(cls, folder: Path) -> "Truth":
        with np.load(folder / "parameters.npz", allow_pickle=False) as arrays:
            names = [field.name for field in fields(cls) if field.name in arrays]
            return cls(**{name: arrays[name] for name in names})

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
        first, second = self._perturbation_indices(samples["perturbation"])
        return Levels(
            study=index_of(samples["study"], self.studies),
            context=self.context_index(samples),
            disease=index_of(samples["disease"], DISEASES),
            library_selection=index_of(samples["library_selection"], SELECTIONS),
            library_layout=index_of(samples["library_layout"], LAYOUTS),
            platform=index_of(samples["platform"], PLATFORMS),
            perturbation=first,
            dose=_quantities(samples["perturbation_dose"]),
            time=_quantities(samples["perturbation_time"]),
            partner=second,
        )

    def context_index(self, samples: pd.DataFrame) -> np.ndarray:
        """(N,) index of each sample's context."""
        pairs = pd.Series(list(zip(samples["tissue"], samples["cell_type"], strict=True)))
        return index_of(pairs, self.contexts)

    def perturbations_in(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, 2) index of each sample's perturbations, "a|b" being two; 0 for none."""
        return np.stack(self._perturbation_indices(samples["perturbation"]), axis=1)

    def _perturbation_indices(self, column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
        """(N,) of the first and of the second perturbation of each value, 0 for none."""
        index = {name: number for number, name in enumerate(self.perturbations)}
        texts, values = pd.factorize(column.astype(object))
        parts = [[index[part] for part in value.split(SEPARATOR)] + [0] for value in values]
        pairs = np.array([part[:2] for part in parts], dtype=np.int64).reshape(-1, 2)[texts]
        return pairs[:, 0], pairs[:, 1]

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
        """(N,) dose^n / (dose^n + half dose^n) * (1 - exp(-time / tau)), tau by type, n the Hill
        coefficient; 1 for an absent dose or time. Only compounds have doses."""
        embedding = self.embedding[levels.perturbation]
        dose, half_dose = levels.dose, MEDIAN_POTENCY * np.exp(embedding @ self.potency_map)
        if self.hill_map is not None:
            hill = np.exp(embedding @ self.hill_map)
            dose, half_dose = dose**hill, half_dose**hill
        has_dose = ~np.isnan(dose) & (self.perturbation_type[levels.perturbation] == "compound")
        response = np.where(has_dose, dose / (dose + half_dose), 1.0)
        tau = np.array([TIME_CONSTANT[kind] for kind in self.perturbation_type])
        decay = np.exp(-levels.time / tau[levels.perturbation])
        return response * np.where(np.isnan(levels.time), 1.0, 1 - decay)

    def shared_program(self, levels: Levels) -> np.ndarray:
        """(N, G) the effect of each sample's first perturbation on the programs of mechanisms, at
        full strength and before a part of it is of the context."""
        usage = self.response[levels.context, :-1] * self.loading[levels.perturbation]
        return usage @ self.mechanism

    def predictable_response(self, levels: Levels, active: Sequence[np.ndarray]) -> np.ndarray:
        """(N, G) what follows from the embeddings, context, dose, time and target genes, of active
        perturbations, before saturation.

        `active`: (N,) 0 or 1 for each of `levels.members`. The programs build up with time; the
        direct effect on the target gene is immediate.
        """
        factor, total = self.interaction(levels, active), 0.0
        for member, is_active in zip(levels.members, active, strict=True):
            program = self.shared_program(member)
            program *= self.strength(member)[:, None]
            if self.context_share is not None:
                program *= np.sqrt(1 - self.context_share)
            if factor is not None:
                program *= factor[:, None]
            self._add_direct_effect(member, program)
            program *= (is_active * (member.perturbation > 0))[:, None]
            total = program + total
        return total

    def _add_direct_effect(self, levels: Levels, program: np.ndarray) -> None:
        target = self.target[levels.perturbation]
        genetic = np.flatnonzero(target >= 0)
        signs = np.array([DIRECTION.get(kind, 0.0) for kind in self.perturbation_type])
        direction = signs[levels.perturbation[genetic]]
        program[genetic, target[genetic]] += direction * np.log(DIRECT_FOLD)

    def interaction(self, levels: Levels, active: Sequence[np.ndarray]) -> np.ndarray | None:
        """(N,) factor by which two active perturbations change the sum of their programs, exp of a
        bilinear form of their embeddings; None where all samples have one perturbation.

        The effect of two perturbations is a combination of the single ones (Norman et al., Science
        2019).
        """
        if self.interaction_map is None or len(active) == 1:
            return None
        first, second = (self.embedding[member.perturbation] for member in levels.members)
        exponent = np.einsum("ne,ef,nf->n", first, self.interaction_map, second)
        return np.exp(exponent * active[0] * active[1] * (levels.partner > 0))

    def residual_scale(self, levels: Levels) -> np.ndarray:
        """(N,) factor of the residual effect of the first perturbation."""
        return self.strength(levels) * self.response[levels.context, -1]

    def residual_effect(self, levels: Levels) -> np.ndarray:
        """(N, G) of the first perturbation: what its embedding does not determine."""
        return self.residual_scale(levels)[:, None] * self.residual[levels.perturbation]

    def context_scale(self, levels: Levels) -> np.ndarray:
        """(N,) factor of the program that the first perturbation has in this context only: with
        it that program has its share of the variance over genes."""
        rms = np.sqrt(np.square(self.shared_program(levels)).mean(axis=1))
        return self.strength(levels) * rms * np.sqrt(self.context_share)

    def context_effect(self, levels: Levels) -> np.ndarray:
        """(N, G) the program that the first perturbation has in this context only."""
        program = self.context_program[levels.perturbation, levels.context]
        return self.context_scale(levels)[:, None] * program

    def saturate(self, response: np.ndarray) -> np.ndarray:
        """Log fold changes (N, G), of which large ones approach the limit m: m tanh(x / m)."""
        if self.saturation is None:
            return response
        return self.saturation * np.tanh(response / self.saturation)

    def perturbation_effects(self, levels: Levels) -> np.ndarray:
        """(N, G) the whole effect of each sample's perturbations."""
        active = [self.active[member.perturbation] for member in levels.members]
        effects = self.predictable_response(levels, active)
        factor = self.interaction(levels, active)
        for member, is_active in zip(levels.members, active, strict=True):
            own = self.residual_effect(member)
            if self.context_program is not None:
                own = own + self.context_effect(member)
            if factor is not None:
                own *= factor[:, None]
            effects = effects + is_active[:, None] * own
        return self.saturate(effects)

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
