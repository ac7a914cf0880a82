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

# Settings that params.yaml leaves off, all at once.
EVERY_OPTION = {
    "program_share": 0.2,
    "context_specific_share": 0.4,
    "saturation_fold": 6.0,
    "hill_spread": 0.7,
    "double_share": 0.4,
    "interaction_spread": 0.6,
    "dispersion_degrees": 4.0,
    "depth_spread": 0.7,
    "undetected_share": 0.1,
    "subpopulations": 3,
}
KINDS = {
    "bulk": {"preset": "bulk"},
    "single_cell": {"preset": "single_cell", "depth": 20_000},
    "every_option": {"preset": "single_cell", "depth": 200_000} | EVERY_OPTION,
}


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
    def hidden(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Stratum, donor and subpopulation of each sample."""
        return self.design.stratum, self.design.donor, self.design.subpopulation

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
    pair_known: bool | None = None,
) -> np.ndarray:
    """(DRAWS, G) log mu of one sample, hidden factors drawn by rejection sampling.

    `pair_known`: whether the pairs of context and perturbation are in training, None: as
    `perturbation_known`.

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
        if truth.undetected_probability is not None:
            log_mu[rng.random((DRAWS, genes)) < truth.undetected_probability] = -np.inf
    else:
        effect = truth.donor[study, reference[0], reference[1]]
        same_stratum = simulate_donors(donors, genes, rng, reference[1], effect)[every, donor]
        other_stratum = simulate_donors(donors, genes, rng)[every, donor]
        in_same = (stratum[proposals] == reference[0])[:, None]
        log_mu += truth.study[study] + np.where(in_same, same_stratum, other_stratum)
    if truth.subpopulation is not None:
        shares = truth.subpopulation_share[context]
        state = rng.choice(len(shares), DRAWS, p=shares / shares.sum())
        log_mu += truth.subpopulation[context, state]
    known = perturbation_known, perturbation_known if pair_known is None else pair_known
    return log_mu + simulate_perturbations(truth, row, context, known, rng)


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


def simulate_perturbations(
    truth: Truth,
    row: pd.Series,
    context: int,
    known: tuple[bool, bool],
    rng: np.random.Generator,
) -> np.ndarray:
    """(DRAWS, G) the effect of one perturbation or two. `known`: whether the perturbations, and
    their pairs with the context, are in training; what is not known is drawn."""
    genes, names = len(truth.baseline), row["perturbation"].split("|")
    parts, everyone_active, embeddings = [], np.ones((DRAWS, 1)), []
    for name in names:
        index = truth.perturbations.index(name)
        if index == 0:
            return np.zeros((DRAWS, genes))
        active = np.full((DRAWS, 1), truth.active[index])
        if not known[0]:
            active = (rng.random((DRAWS, 1)) >= truth.null_share).astype(float)
        everyone_active = everyone_active * active
        embeddings.append(truth.embedding[index])
        program = simulate_program(truth, row, index, context, known, rng)
        direct = np.zeros(genes)
        if (kind := str(truth.perturbation_type[index])) != "compound":
            direct[truth.target[index]] = {"crispri": -1, "overexpression": 1}[kind] * np.log(8)
        parts.append((active, program, direct))
    factor = 1.0
    if len(names) == 2 and truth.interaction_map is not None:
        exponent = embeddings[0] @ truth.interaction_map @ embeddings[1]
        factor = np.where(everyone_active == 1, np.exp(exponent), 1.0)
    response = sum(active * (factor * program + direct) for active, program, direct in parts)
    if truth.saturation is None:
        return np.broadcast_to(response, (DRAWS, genes))
    limit = float(truth.saturation)
    positive, negative = np.exp(response / limit), np.exp(-response / limit)
    return limit * (positive - negative) / (positive + negative)


def simulate_program(
    truth: Truth,
    row: pd.Series,
    index: int,
    context: int,
    known: tuple[bool, bool],
    rng: np.random.Generator,
) -> np.ndarray:
    """(DRAWS, G) the program of an active perturbation, without its direct effect."""
    genes, strength = len(truth.baseline), 1.0
    kind = str(truth.perturbation_type[index])
    if row["perturbation_dose"] is not None and kind == "compound":
        ratio = 0.3 * np.exp(truth.embedding[index] @ truth.potency_map)
        ratio /= DOSES[row["perturbation_dose"]]
        hill = 1.0
        if truth.hill_map is not None:
            hill = np.exp(truth.embedding[index] @ truth.hill_map)
        strength /= 1 + ratio**hill
    strength *= 1 - np.exp(-HOURS[row["perturbation_time"]] / TIME_CONSTANTS[kind])
    shared = np.zeros(genes)
    for mechanism in range(len(truth.mechanism)):
        loading = truth.loading_offset[mechanism]
        loading += truth.embedding[index] @ truth.loading_map[:, mechanism]
        usage = truth.response[context, mechanism] * min(max(loading, 0), 1)
        shared += usage * truth.mechanism[mechanism]
    residual = truth.residual[index]
    if not known[0]:
        residual = simulate_sparse(generator.RESIDUAL.share, generator.RESIDUAL.folds, genes, rng)
    own, share = 0.0, 0.0
    if truth.context_program is not None:
        share = float(truth.context_share)
        own = truth.context_program[index, context]
        if not known[1]:
            low, high = np.log(generator.CONTEXT_PROGRAM.folds)
            mean_square = (high**3 - low**3) / 3 / (high - low) * generator.CONTEXT_PROGRAM.share
            own = simulate_sparse(
                generator.CONTEXT_PROGRAM.share, generator.CONTEXT_PROGRAM.folds, genes, rng
            )
            own = own / np.sqrt(mean_square)
        own = own * np.sqrt(np.mean(shared**2))
    program = np.sqrt(1 - share) * shared + np.sqrt(share) * own
    program = program + truth.response[context, -1] * residual
    return np.broadcast_to(strength * program, (DRAWS, genes))


def simulate_sparse(
    share: float, folds: tuple[float, float], genes: int, rng: np.random.Generator
) -> np.ndarray:
    """(DRAWS, G) signed log folds of a share of the genes."""
    size = rng.uniform(*np.log(folds), (DRAWS, genes))
    return rng.choice([-1, 1], size.shape) * size * (rng.random(size.shape) < share)
