"""A small simulated cohort, and a slow simulation of its hidden factors one sample at a time.

The simulation is written independently from the rules of the simulator, for tests of the oracles.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from pipeline.gem.simulation import generator
from pipeline.gem.simulation.expected_log_cpm import ExpectationCache
from pipeline.gem.simulation.generator import draw_counts, draw_truth
from pipeline.gem.simulation.oracle import MetadataOracle, OmniscientOracle, ReferenceControls
from pipeline.gem.simulation.study_design import StudyDesign, draw_design
from pipeline.gem.simulation.truth import (
    DIRECT_FOLD,
    DISEASES,
    LAYOUTS,
    PLATFORMS,
    SELECTIONS,
    SEXES,
    Truth,
)

DRAWS = 2000  # simulations of one sample
PROPOSALS = 150_000  # hidden donors proposed for one sample
DISEASE_SHARES = [0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3]
DOSES = {"100 nM": 0.1, "1 uM": 1.0, "10 uM": 10.0}
HOURS = {"6 hours": 6, "24 hours": 24, "3 days": 72}
TIME_CONSTANTS = {"compound": 12, "crispri": 48, "overexpression": 24}


@dataclass(frozen=True)
class SimulatedCohort:
    """A cohort with its truth."""

    truth: Truth
    design: StudyDesign
    log_fraction: np.ndarray
    counts: np.ndarray

    @classmethod
    def draw(cls, settings, seed: int, **changes) -> "SimulatedCohort":
        """`changes` replace fields of the truth."""
        rng = np.random.default_rng(seed)
        truth = replace(draw_truth(settings, rng), **changes)
        design = draw_design(settings, truth, rng)
        fractions = design.log_fractions(truth)
        counts = draw_counts(fractions, design.library_size, truth.dispersion, rng)
        return cls(truth, design, fractions, counts)

    @property
    def samples(self) -> pd.DataFrame:
        return self.design.samples

    @property
    def totals(self) -> np.ndarray:
        return self.counts.sum(axis=1)

    @property
    def expression(self) -> np.ndarray:
        return np.log1p(1e6 * self.counts / self.totals[:, None])

    @property
    def omniscient_oracle(self) -> OmniscientOracle:
        return OmniscientOracle(ExpectationCache(self.truth))

    @property
    def omniscient(self) -> np.ndarray:
        return self.omniscient_oracle.predict(self.log_fraction, self.totals)

    def oracle(self, studies: bool = True, perturbations: bool = True) -> MetadataOracle:
        """With all studies in training, or none; all perturbations, or none."""
        training_studies = set(self.truth.studies if studies else ())
        training_perturbations = set(self.truth.perturbations if perturbations else ())
        return MetadataOracle(self.truth, training_studies, training_perturbations)

    def references(self, rows: np.ndarray | slice = slice(None)) -> ReferenceControls:
        """Another control of the study of each sample."""
        rng, study = np.random.default_rng(5), self.samples["study"].to_numpy()
        control = (self.samples["perturbation"] == "control").to_numpy()
        pools = {name: np.flatnonzero(control & (study == name)) for name in np.unique(study)}
        positions = np.array(
            [
                rng.choice(pools[study[row]][pools[study[row]] != row])
                for row in np.arange(len(study))[rows]
            ]
        )
        stratum, donor = self.design.stratum[positions], self.design.donor[positions]
        return ReferenceControls(self.samples.iloc[positions], stratum, donor)


def simulate_log_mu(
    truth: Truth,
    row: pd.Series,
    study_known: bool,
    perturbation_known: bool,
    reference: tuple[int, int] | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """(DRAWS, G) log mu of one sample, hidden factors drawn by rejection sampling.

    Donors are proposed by the simulator's rules and accepted if they would be recorded as the
    sample is. `reference` is (stratum, donor) of a control of the same unknown study, whose effects
    are then known.
    """
    study, (_, strata, donors, genes) = truth.studies.index(row["study"]), truth.donor.shape
    disease = DISEASES.index(row["disease"])
    context = truth.contexts.index((row["tissue"], row["cell_type"]))
    tissues = list(dict.fromkeys(tissue for tissue, _ in truth.contexts))
    stratum = rng.integers(0, strata, PROPOSALS)
    sex, age = rng.integers(0, 2, PROPOSALS), rng.integers(20, 81, PROPOSALS)
    stratum_disease = rng.choice(4, PROPOSALS, p=DISEASE_SHARES)
    in_known_stratum = np.full(PROPOSALS, study_known)
    if reference is not None:
        in_known_stratum = stratum == reference[0]
    sex[in_known_stratum] = truth.stratum_sex[study, stratum[in_known_stratum]]
    age[in_known_stratum] = truth.stratum_age[study, stratum[in_known_stratum]]
    stratum_disease[in_known_stratum] = truth.stratum_disease[study, stratum[in_known_stratum]]
    recorded_sex = np.where(rng.random(PROPOSALS) < truth.wrong_sex, 1 - sex, sex)
    recorded_sex = np.where(rng.random(PROPOSALS) < truth.missing_sex, -1, recorded_sex)
    age_missing = rng.random(PROPOSALS) < truth.missing_age * (1 + (age - 50) / 60)
    accepted = stratum_disease == disease
    accepted &= recorded_sex == (-1 if row["sex"] is None else SEXES.index(row["sex"]))
    if np.isnan(row["age_years"]):
        accepted &= age_missing
    else:
        accepted &= ~age_missing & (age == row["age_years"])
    proposals = np.flatnonzero(accepted)
    # If few are accepted (an age is one of 61), each serves several draws with different donors.
    assert len(proposals) > 50
    proposals = np.resize(proposals, DRAWS)
    base = truth.baseline + truth.context[context]
    base = base + truth.disease[tissues.index(row["tissue"]), disease]
    base = base + truth.library_selection[SELECTIONS.index(row["library_selection"])]
    base = base + truth.library_layout[LAYOUTS.index(row["library_layout"])]
    base = base + truth.platform[PLATFORMS.index(row["platform"])]
    log_mu = np.tile(base, (DRAWS, 1))
    log_mu += np.where(sex[proposals] == 1, 0.5, -0.5)[:, None] * truth.sex
    log_mu += ((age[proposals] - 50) / 20)[:, None] * truth.age
    donor = rng.integers(0, donors, DRAWS)
    every = np.arange(DRAWS)
    if study_known:
        log_mu += truth.study[study] + truth.donor[study, stratum[proposals], donor]
    elif reference is None:
        log_mu += rng.normal(0, generator.STUDY_SCALE, (DRAWS, genes))
        log_mu += simulate_donors(donors, genes, rng)[every, donor]
    else:
        effect = truth.donor[study, reference[0], reference[1]]
        same_stratum = simulate_donors(donors, genes, rng, reference[1], effect)[every, donor]
        other_stratum = simulate_donors(donors, genes, rng)[every, donor]
        in_same = (stratum[proposals] == reference[0])[:, None]
        log_mu += truth.study[study] + np.where(in_same, same_stratum, other_stratum)
    return log_mu + simulate_perturbation(truth, row, context, perturbation_known, rng)


def simulate_donors(
    donors: int,
    genes: int,
    rng: np.random.Generator,
    known_donor: int | None = None,
    effect: np.ndarray | None = None,
) -> np.ndarray:
    """(DRAWS, D, G) centred donor effects of a stratum, conditional on the effect (G,) of the donor
    `known_donor` by Matheron's rule."""
    draws = rng.normal(0, generator.DONOR_SCALE, (DRAWS, donors, genes))
    draws -= draws.mean(axis=1, keepdims=True)
    if known_donor is None:
        return draws
    centring = np.eye(donors) - 1 / donors
    covariance = centring @ centring.T
    gain = covariance[:, known_donor] / covariance[known_donor, known_donor]
    return draws + gain[:, None] * (effect - draws[:, known_donor])[:, None, :]


def simulate_perturbation(
    truth: Truth, row: pd.Series, context: int, is_known: bool, rng: np.random.Generator
) -> np.ndarray:
    """(DRAWS, G) the effect of a perturbation; residual and activity of an unknown one are
    drawn."""
    genes, index = len(truth.baseline), truth.perturbations.index(row["perturbation"])
    if index == 0:
        return np.zeros((DRAWS, genes))
    kind = str(truth.perturbation_type[index])
    strength = 1.0
    if row["perturbation_dose"] is not None:
        dose = DOSES[row["perturbation_dose"]]
        strength *= dose / (dose + 0.3 * np.exp(truth.embedding[index] @ truth.potency_map))
    strength *= 1 - np.exp(-HOURS[row["perturbation_time"]] / TIME_CONSTANTS[kind])
    program = np.zeros(genes)
    for mechanism in range(len(truth.mechanism)):
        loading = truth.loading_offset[mechanism]
        loading += truth.embedding[index] @ truth.loading_map[:, mechanism]
        usage = strength * truth.response[context, mechanism] * min(max(loading, 0), 1)
        program += usage * truth.mechanism[mechanism]
    if kind != "compound":
        direction = {"crispri": -1, "overexpression": 1}[kind]
        program[truth.target[index]] += direction * np.log(DIRECT_FOLD)
    if is_known:
        active, residual = truth.active[index], truth.residual[index]
    else:
        active = (rng.random((DRAWS, 1)) >= truth.null_share).astype(float)
        folds = rng.choice([-1, 1], (DRAWS, genes)) * rng.uniform(
            *np.log(generator.RESIDUAL_FOLD), (DRAWS, genes)
        )
        residual = folds * (rng.random((DRAWS, genes)) < generator.RESIDUAL_SHARE)
    effects = active * (program + strength * truth.response[context, -1] * residual)
    return np.broadcast_to(effects, (DRAWS, genes))
