"""The studies of a synthetic cohort: who is measured under which conditions, and what is recorded of it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Synthesize
from pipeline.gem.simulation.generator import (
    BULK_SPREAD,
    CELL_SPREAD,
    DISEASES,
    LAYOUTS,
    PLATFORMS,
    SELECTIONS,
    SEXES,
    Truth,
    age_missing_probability,
    index_of,
    log_fractions,
    typical_depth,
)

DOSES = ("100 nM", "1 uM", "10 uM")
TIMES = ("6 hours", "24 hours", "3 days")
FIRST_DATE, YEARS = pd.Timestamp("2013-01-01"), 12
REPLICATES = 3  # samples of a condition at least


@dataclass(frozen=True)
class Design:
    """Who was measured: the metadata as recorded, and what only the simulator knows."""

    samples: pd.DataFrame  # recorded metadata, sample_id first
    stratum: np.ndarray  # (N,)
    donor: np.ndarray  # (N,) within the stratum
    library_size: np.ndarray  # (N,) expected total counts


def draw_design(params: Synthesize, truth: Truth, rng: np.random.Generator) -> Design:
    """Studies with dates, contexts, perturbations, controls, strata and donors; then what was recorded of them."""
    shares = rng.lognormal(0, 0.3, params.studies)
    sizes = np.diff(
        np.concatenate(
            [[0], np.round(np.cumsum(shares / shares.sum()) * params.samples).astype(int)]
        )
    )
    dates = np.sort(rng.uniform(0, 365.25 * YEARS, params.studies))
    rota = _rota(params.perturbations, params.studies * params.perturbations_per_study, rng)
    frames = []
    for index, name in enumerate(truth.studies):
        offered = rota[
            index * params.perturbations_per_study : (index + 1) * params.perturbations_per_study
        ]
        frame = _draw_study(params, truth, np.unique(offered), int(sizes[index]), rng)
        # Platforms succeed one another in time, with overlap.
        era = np.exp(
            -(
                (dates[index] / (365.25 * YEARS) * (len(PLATFORMS) - 1) - np.arange(len(PLATFORMS)))
                ** 2
            )
            / 0.5
        )
        frame.insert(0, "study", name)
        frame.insert(
            1,
            "study_date",
            (FIRST_DATE + pd.Timedelta(days=int(dates[index]))).strftime("%Y-%m-%d"),
        )
        frame.insert(2, "library_selection", rng.choice(SELECTIONS, p=[0.7, 0.3]))
        frame.insert(3, "library_layout", rng.choice(LAYOUTS, p=[0.6, 0.4]))
        frame.insert(4, "platform", rng.choice(PLATFORMS, p=era / era.sum()))
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    stratum = rng.integers(0, params.strata_per_study, len(table))
    donor = rng.integers(0, params.donors_per_stratum, len(table))
    samples = _record_donors(table, truth, stratum, rng)
    samples.insert(0, "sample_id", [f"S{index + 1:06d}" for index in range(len(samples))])
    if params.preset == "bulk":
        library_size = typical_depth(params) * rng.uniform(*BULK_SPREAD, len(samples))
    else:
        library_size = rng.lognormal(np.log(typical_depth(params)), CELL_SPREAD, len(samples))
    return Design(samples, stratum, donor, library_size)


def _rota(perturbations: int, slots: int, rng: np.random.Generator) -> np.ndarray:
    """Perturbation indices (from 1) for all studies in a row: every one comes up equally often."""
    rounds = -(-slots // perturbations)
    return np.concatenate([rng.permutation(perturbations) + 1 for _ in range(rounds)])[:slots]


def _draw_study(
    params: Synthesize, truth: Truth, offered: np.ndarray, size: int, rng: np.random.Generator
) -> pd.DataFrame:
    """One study's samples: contexts of one tissue where it has enough, controls, then conditions in turn."""
    home = rng.integers(params.tissues)
    order = rng.permutation(len(truth.context))
    at_home = order // params.cell_types_per_tissue == home
    contexts = np.concatenate([order[at_home], order[~at_home]])[: params.contexts_per_study]
    conditions = []
    for perturbation in offered:
        compound = truth.perturbation_type[perturbation] == "compound"
        doses = rng.choice(DOSES, 2, replace=False) if compound else [None]
        time = rng.choice(TIMES)
        conditions += [
            (context, perturbation, dose, time) for context in contexts for dose in doses
        ]
    controls = min(max(round(params.control_share * size), len(contexts)), size)
    rng.shuffle(conditions)
    rows = [(contexts[index % len(contexts)], 0, None, None) for index in range(controls)]
    # Whole conditions with their replicates, not a thin spread.
    treated = max(size - controls, 0)
    chosen = conditions[: max(1, min(len(conditions), treated // REPLICATES))]
    rows += [chosen[index % len(chosen)] for index in range(treated)]
    names, pairs = truth.perturbations, truth.contexts
    return pd.DataFrame(
        {
            "tissue": [pairs[context][0] for context, *_ in rows],
            "cell_type": [pairs[context][1] for context, *_ in rows],
            "perturbation": [names[perturbation] for _, perturbation, _, _ in rows],
            "perturbation_type": [
                str(truth.perturbation_type[perturbation]) for _, perturbation, _, _ in rows
            ],
            "perturbation_dose": [None if dose is None else str(dose) for *_, dose, _ in rows],
            "perturbation_time": [None if time is None else str(time) for *_, time in rows],
        }
    )


def _record_donors(
    table: pd.DataFrame, truth: Truth, stratum: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """Adds disease, sex and age as recorded: some missing, a few sexes wrong."""
    study = index_of(table["study"], truth.studies)
    age, sex = truth.stratum_age[study, stratum], truth.stratum_sex[study, stratum]
    recorded_sex = np.where(rng.random(len(table)) < truth.wrong_sex, 1 - sex, sex)
    hidden_sex = rng.random(len(table)) < truth.missing_sex
    hidden_age = rng.random(len(table)) < age_missing_probability(truth, age)
    traits = pd.DataFrame(
        {
            "disease": np.array(DISEASES)[truth.stratum_disease[study, stratum]],
            "sex": np.where(hidden_sex, None, np.array(SEXES, dtype=object)[recorded_sex]),
            "age_years": np.where(hidden_age, np.nan, age),
        }
    )
    place = table.columns.get_loc("perturbation")
    return pd.concat([table.iloc[:, :place], traits, table.iloc[:, place:]], axis=1)


def expected_log_fractions(truth: Truth, design: Design, rows: slice) -> np.ndarray:
    """(N, G) log of the expected share of each gene in the named samples of a design."""
    return log_fractions(truth, design.samples.iloc[rows], design.stratum[rows], design.donor[rows])
