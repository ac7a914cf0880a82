"""Study design of a synthetic cohort: the samples of each study and their recorded metadata."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Synthesize
from pipeline.gem.data.labels import SEPARATOR
from pipeline.gem.simulation.generator import (
    BULK_SPREAD,
    CELL_SPREAD,
    log_fractions,
    typical_depth,
)
from pipeline.gem.simulation.hidden_factors import draw_subpopulations
from pipeline.gem.simulation.truth import (
    DISEASES,
    LAYOUTS,
    PLATFORMS,
    SELECTIONS,
    SEXES,
    Truth,
    index_of,
)

DOSES = ("100 nM", "1 uM", "10 uM")
TIMES = ("6 hours", "24 hours", "3 days")
FIRST_DATE, DAYS = pd.Timestamp("2013-01-01"), 365.25 * 12
REPLICATES = 3  # minimum number of samples of a condition


@dataclass(frozen=True)
class StudyDesign:
    """The recorded metadata of N samples, and the factors that only the simulator has."""

    samples: pd.DataFrame  # recorded metadata, sample_id first
    stratum: np.ndarray  # (N,)
    donor: np.ndarray  # (N,) index within the stratum
    library_size: np.ndarray  # (N,) expected total counts
    subpopulation: np.ndarray | None = None  # (N,) of a truth that has them

    def log_fractions(self, truth: Truth, rows: slice = slice(None)) -> np.ndarray:
        """(n, G) log of the expected share of each gene in the samples `rows`."""
        subpopulation = None if self.subpopulation is None else self.subpopulation[rows]
        factors = self.stratum[rows], self.donor[rows], subpopulation
        return log_fractions(truth, self.samples.iloc[rows], *factors)


def draw_design(params: Synthesize, truth: Truth, rng: np.random.Generator) -> StudyDesign:
    """Studies with dates, contexts, perturbations, controls, strata and donors, and their
    records."""
    shares = rng.lognormal(0, 0.3, params.studies)
    ends = np.round(np.cumsum(shares / shares.sum()) * params.samples).astype(int)
    sizes = np.diff(ends, prepend=0)
    dates = np.sort(rng.uniform(0, DAYS, params.studies))
    per_study = params.perturbations_per_study
    rotation = _perturbation_rotation(params.perturbations, params.studies * per_study, rng)
    frames = []
    for index, name in enumerate(truth.studies):
        perturbations = np.unique(rotation[index * per_study : (index + 1) * per_study])
        frame = _draw_study(params, truth, perturbations, int(sizes[index]), rng)
        date = FIRST_DATE + pd.Timedelta(days=int(dates[index]))
        # Platforms succeed one another in time, with overlap.
        distance = dates[index] / DAYS * (len(PLATFORMS) - 1) - np.arange(len(PLATFORMS))
        weight = np.exp(-(distance**2) / 0.5)
        frame.insert(0, "study", name)
        frame.insert(1, "study_date", date.strftime("%Y-%m-%d"))
        frame.insert(2, "library_selection", rng.choice(SELECTIONS, p=[0.7, 0.3]))
        frame.insert(3, "library_layout", rng.choice(LAYOUTS, p=[0.6, 0.4]))
        frame.insert(4, "platform", rng.choice(PLATFORMS, p=weight / weight.sum()))
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    stratum = rng.integers(0, params.strata_per_study, len(table))
    donor = rng.integers(0, params.donors_per_stratum, len(table))
    samples = _record_donors(table, truth, stratum, rng)
    samples.insert(0, "sample_id", [f"S{index + 1:06d}" for index in range(len(samples))])
    depth = typical_depth(params)
    if params.preset == "bulk":
        library_size = depth * rng.uniform(*BULK_SPREAD, len(samples))
    else:
        library_size = rng.lognormal(np.log(depth), CELL_SPREAD, len(samples))
    if params.depth_spread:
        log_depth = rng.normal(0, params.depth_spread, params.studies)
        library_size *= np.exp(log_depth)[index_of(samples["study"], truth.studies)]
    subpopulation = draw_subpopulations(truth, truth.levels(samples), rng)
    return StudyDesign(samples, stratum, donor, library_size, subpopulation)


def _perturbation_rotation(perturbations: int, slots: int, rng: np.random.Generator) -> np.ndarray:
    """(slots,) perturbation indices from 1, each equally often, for all studies in a row."""
    rounds = -(-slots // perturbations)
    return np.concatenate([rng.permutation(perturbations) + 1 for _ in range(rounds)])[:slots]


def _draw_study(
    params: Synthesize, truth: Truth, perturbations: np.ndarray, size: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The samples of one study: controls in every context, then conditions with their replicates.

    The contexts are of one tissue as far as it has enough of them.
    """
    main_tissue = rng.integers(params.tissues)
    order = rng.permutation(len(truth.context))
    in_tissue = order // params.cell_types_per_tissue == main_tissue
    contexts = np.concatenate([order[in_tissue], order[~in_tissue]])[: params.contexts_per_study]
    conditions = []
    for members in _treatments(params, perturbations, rng):
        has_compound = "compound" in truth.perturbation_type[list(members)]
        doses = rng.choice(DOSES, 2, replace=False).tolist() if has_compound else [None]
        time = str(rng.choice(TIMES))
        conditions += [(context, members, dose, time) for context in contexts for dose in doses]
    controls = min(max(round(params.control_share * size), len(contexts)), size)
    rng.shuffle(conditions)
    rows = [(contexts[index % len(contexts)], (0,), None, None) for index in range(controls)]
    # Fewer conditions with all of their replicates, instead of all conditions with one sample each.
    treated = max(size - controls, 0)
    conditions = conditions[: max(1, min(len(conditions), treated // REPLICATES))]
    rows += [conditions[index % len(conditions)] for index in range(treated)]
    names, pairs, kinds = np.array(truth.perturbations), truth.contexts, truth.perturbation_type
    cells = [
        (*pairs[context], _label_set(names[[*members]]), _label_set(kinds[[*members]]), dose, time)
        for context, members, dose, time in rows
    ]
    columns = ["tissue", "cell_type", "perturbation", "perturbation_type"]
    columns += ["perturbation_dose", "perturbation_time"]
    return pd.DataFrame(cells, columns=columns)


def _treatments(
    params: Synthesize, perturbations: np.ndarray, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Each perturbation of a study, alone or with another one of the study."""
    treatments = [(int(perturbation),) for perturbation in perturbations]
    if not params.double_share or len(treatments) < 2:
        return treatments
    for number, (perturbation,) in enumerate(treatments):
        if rng.random() < params.double_share:
            partner = rng.choice(perturbations[perturbations != perturbation])
            treatments[number] = (perturbation, int(partner))
    return treatments


def _label_set(labels: np.ndarray) -> str:
    """Distinct labels in alphabetical order, as one label."""
    return SEPARATOR.join(sorted({str(label) for label in labels}))


def _record_donors(
    table: pd.DataFrame, truth: Truth, stratum: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """Adds disease, sex and age as recorded: some missing, a few sexes wrong."""
    study = index_of(table["study"], truth.studies)
    age, sex = truth.stratum_age[study, stratum], truth.stratum_sex[study, stratum]
    recorded_sex = np.where(rng.random(len(table)) < truth.wrong_sex, 1 - sex, sex)
    sex_missing = rng.random(len(table)) < truth.missing_sex
    age_missing = rng.random(len(table)) < truth.age_missing_probability(age)
    traits = {
        "disease": np.array(DISEASES)[truth.stratum_disease[study, stratum]],
        "sex": np.where(sex_missing, None, np.array(SEXES, dtype=object)[recorded_sex]),
        "age_years": np.where(age_missing, np.nan, age),
    }
    before = table.columns.get_loc("perturbation")
    parts = [table.iloc[:, :before], pd.DataFrame(traits), table.iloc[:, before:]]
    return pd.concat(parts, axis=1)
