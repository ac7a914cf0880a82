"""The ideal predictors against brute force: sums over counts, and simulation of what is hidden by the simulator's rules.

The simulation of hidden causes below is written anew from the rules of the simulator, slowly, one sample at a time.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from scipy.stats import nbinom

from pipeline.gem import simulator
from pipeline.gem.design import draw_design, expected_log_fractions
from pipeline.gem.oracle import ExpectationTable, MetadataOracle, OmniscientOracle, Tables, expected_log_cpm
from pipeline.gem.simulator import DISEASES, SEXES, Truth, draw_counts, draw_truth

DRAWS = 2000       # simulations of one sample
QUERIES = 4        # samples of each kind


# --- the expectation over count noise -------------------------------------------------------------------------------


def brute_force(mean: float, dispersion: float, total: float) -> float:
    """The sum over counts, up to a tail of 1e-16 and beyond it by the largest term."""
    size, success = 1 / dispersion, 1 / (1 + dispersion * mean)
    counts = np.arange(int(nbinom.isf(1e-16, size, success)) + 50)
    return float(np.sum(nbinom.pmf(counts, size, success) * np.log1p(1e6 * counts / total)))


@pytest.mark.parametrize("total", [1e3, 2e4, 1e7])
@pytest.mark.parametrize("dispersion", [1e-3, 0.01, 0.3, 3.0, 50.0])
def test_the_expectation_is_the_sum_over_negative_binomial_counts(dispersion, total):
    means = np.array([1e-4, 0.01, 0.5, 3.0, 40.0, 1000.0])
    expected = [brute_force(mean, dispersion, total) for mean in means]
    np.testing.assert_allclose(expected_log_cpm(means, np.array(dispersion), np.array(total)), expected, atol=1e-8)


def test_the_expectation_of_a_large_count_is_the_sum_over_counts():
    assert float(expected_log_cpm(np.array(2e5), np.array(0.01), np.array(1e7))) == pytest.approx(brute_force(2e5, 0.01, 1e7), abs=1e-8)


def test_the_expectation_agrees_with_simulated_counts(rng):
    fraction, dispersion, total = np.array([1e-6, 1e-4, 0.01, 0.3]), np.array([4.0, 0.5, 0.1, 0.02]), 1e5
    counts = draw_counts(np.log(np.tile(fraction, (40_000, 1))), np.full(40_000, total), dispersion, rng)
    expression = np.log1p(1e6 * counts / total)
    error = expression.std(axis=0) / np.sqrt(40_000)
    assert (np.abs(expected_log_cpm(fraction * total, dispersion, np.array(total)) - expression.mean(axis=0)) < 4.5 * error).all()


def test_the_expectation_is_below_the_log_cpm_of_the_mean_and_meets_it_without_noise():
    means, total = np.array([0.1, 10.0, 1000.0]), np.array(1e5)
    plain = np.log1p(1e6 * means / total)
    assert (expected_log_cpm(means, np.array(0.2), total) < plain).all()  # Jensen
    assert float(expected_log_cpm(np.array(1e8), np.array(1e-10), np.array(1e9))) == pytest.approx(np.log1p(1e5), abs=1e-7)
    assert float(expected_log_cpm(np.array(0.0), np.array(0.2), total)) == 0


# --- its table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("totals", [(7e6, 1.4e7), (9e3, 4.5e4), (1e6, 1e6)])
def test_the_table_agrees_with_the_exact_expectation(rng, totals):
    dispersion = np.exp(rng.uniform(np.log(0.01), np.log(30), 12))
    log_fraction, depth = rng.uniform(-20, 0, (60, 12)), np.exp(rng.uniform(*np.log(totals), 60))
    depth[:2] = totals
    table = ExpectationTable.build(dispersion, -20.0, 0.0, np.array(totals))
    exact = expected_log_cpm(np.exp(log_fraction) * depth[:, None], dispersion, depth[:, None])
    np.testing.assert_allclose(table(log_fraction, depth), exact, atol=1e-4)


def test_a_blurred_table_is_the_expectation_over_normal_noise(rng):
    dispersion, blur, depth = np.array([0.01, 0.1, 1.0, 10.0]), 0.24, np.full(30, 1e6)
    log_fraction = rng.uniform(-16, -1, (30, 4))
    table = ExpectationTable.build(dispersion, -18.0, 0.0, depth, blur)
    nodes, weights = np.polynomial.hermite.hermgauss(60)
    expected = sum(
        weight / np.sqrt(np.pi) * expected_log_cpm(np.exp(log_fraction + np.sqrt(2) * blur * node) * 1e6, dispersion, np.array(1e6))
        for node, weight in zip(nodes, weights, strict=True)
    )
    np.testing.assert_allclose(table(log_fraction, depth), expected, atol=1e-4)


# --- the metadata oracle against simulation of what is hidden -------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A small cohort with everything known about it."""

    truth: Truth
    samples: pd.DataFrame
    log_fraction: np.ndarray
    counts: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        return self.counts.sum(axis=1)

    @property
    def expression(self) -> np.ndarray:
        return np.log1p(1e6 * self.counts / self.totals[:, None])


@pytest.fixture(scope="module", params=["bulk", "single_cell"])
def world(request, params) -> World:
    settings = params.synthesize.model_copy(update={"preset": request.param, "genes": 80, "samples": 500, "perturbations": 12, "studies": 12})
    rng = np.random.default_rng(8)
    truth = draw_truth(settings, rng)
    design = draw_design(settings, truth, rng)
    fractions = expected_log_fractions(truth, design, slice(None))
    return World(truth, design.samples, fractions, draw_counts(fractions, design.library_size, truth.dispersion, rng))


def hidden_log_mu(truth: Truth, row: pd.Series, seen_study: bool, seen_perturbation: bool, rng: np.random.Generator) -> np.ndarray:
    """(DRAWS, G) log mu of one sample: its hidden causes drawn by the simulator's rules, given what was recorded."""
    study, genes = truth.studies.index(row["study"]), len(truth.baseline)
    disease = DISEASES.index(row["disease"])
    context = truth.contexts.index((row["tissue"], row["cell_type"]))
    tissue = [name for name, _ in dict.fromkeys((tissue, None) for tissue, _ in truth.contexts)].index(row["tissue"])
    proposals = 150_000
    if seen_study:
        stratum = rng.integers(0, truth.stratum_sex.shape[1], proposals)
        sex, age, of_disease = truth.stratum_sex[study, stratum], truth.stratum_age[study, stratum], truth.stratum_disease[study, stratum]
    else:
        stratum = np.zeros(proposals, dtype=int)
        sex, age, of_disease = rng.integers(0, 2, proposals), rng.integers(20, 81, proposals), np.full(proposals, disease)
    # What would be recorded of each proposal; those recorded as this sample was are kept.
    written = np.where(rng.random(proposals) < truth.wrong_sex, 1 - sex, sex)
    written = np.where(rng.random(proposals) < truth.missing_sex, -1, written)
    hidden = rng.random(proposals) < truth.missing_age * (1 + (age - 50) / 60)
    accepted = of_disease == disease
    accepted &= written == (-1 if row["sex"] is None else SEXES.index(row["sex"]))
    accepted &= hidden if np.isnan(row["age_years"]) else ~hidden & (age == row["age_years"])
    chosen = np.flatnonzero(accepted)[:DRAWS]
    chosen = np.resize(chosen, DRAWS) if len(chosen) < DRAWS else chosen
    assert len(chosen) == DRAWS
    log_mu = np.tile(truth.baseline + truth.context[context] + truth.disease[tissue, disease], (DRAWS, 1))
    log_mu += truth.library_selection[simulator.SELECTIONS.index(row["library_selection"])]
    log_mu += truth.library_layout[simulator.LAYOUTS.index(row["library_layout"])]
    log_mu += truth.platform[simulator.PLATFORMS.index(row["platform"])]
    log_mu += np.where(sex[chosen] == 1, 0.5, -0.5)[:, None] * truth.sex + ((age[chosen] - 50) / 20)[:, None] * truth.age
    donors = truth.donor.shape[2]
    if seen_study:
        log_mu += truth.study[study] + truth.donor[study, stratum[chosen], rng.integers(0, donors, DRAWS)]
    else:
        fresh = rng.normal(0, simulator.DONOR_SCALE, (DRAWS, donors, genes))
        log_mu += rng.normal(0, simulator.STUDY_SCALE, (DRAWS, genes)) + fresh[:, 0] - fresh.mean(axis=1)
    return log_mu + hidden_perturbation(truth, row, context, seen_perturbation, rng)


def hidden_perturbation(truth: Truth, row: pd.Series, context: int, seen: bool, rng: np.random.Generator) -> np.ndarray:
    """(DRAWS, G) the effect of a perturbation; of an unseen one the residual and whether it acts are drawn afresh."""
    genes, index = len(truth.baseline), truth.perturbations.index(row["perturbation"])
    if index == 0:
        return np.zeros((DRAWS, genes))
    kind = str(truth.perturbation_type[index])
    strength = 1.0
    if row["perturbation_dose"] is not None:
        dose = {"100 nM": 0.1, "1 uM": 1.0, "10 uM": 10.0}[row["perturbation_dose"]]
        strength *= dose / (dose + 0.3 * np.exp(truth.embedding[index] @ truth.potency_map))
    hours = {"6 hours": 6, "24 hours": 24, "3 days": 72}[row["perturbation_time"]]
    strength *= 1 - np.exp(-hours / {"compound": 12, "crispri": 48, "overexpression": 24}[kind])
    program = np.zeros(genes)
    for mechanism in range(len(truth.mechanism)):
        loading = min(max(truth.loading_offset[mechanism] + truth.embedding[index] @ truth.loading_map[:, mechanism], 0), 1)
        program += truth.response[context, mechanism] * loading * truth.mechanism[mechanism]
    if kind != "compound":
        program[truth.target[index]] += {"crispri": -1, "overexpression": 1}[kind] * np.log(4)
    if seen:
        active, residual = np.full((DRAWS, 1), truth.active[index]), truth.residual[index]
    else:
        active = (rng.random((DRAWS, 1)) >= truth.null_share).astype(float)
        folds = rng.choice([-1, 1], (DRAWS, genes)) * rng.uniform(*np.log(simulator.RESIDUAL_FOLD), (DRAWS, genes))
        residual = folds * (rng.random((DRAWS, genes)) < simulator.RESIDUAL_SHARE)
    return active * strength * (program + truth.response[context, -1] * residual)


def simulate(world: World, row: int, seen_study: bool, seen_perturbation: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(mean log-CPM (G,), squared standard error (G,)) of one sample by simulation of all that is hidden and of the counts."""
    log_mu = hidden_log_mu(world.truth, world.samples.iloc[row], seen_study, seen_perturbation, rng)
    fraction = np.exp(log_mu)
    fraction /= fraction.sum(axis=1, keepdims=True)
    mean = fraction * world.totals[row]
    counts = rng.negative_binomial(1 / world.truth.dispersion, 1 / (1 + world.truth.dispersion * mean))
    expression = np.log1p(1e6 * counts / counts.sum(axis=1, keepdims=True))
    return expression.mean(axis=0), expression.var(axis=0) / (DRAWS - 1)


def rows_of_kind(world: World, kind: str) -> np.ndarray:
    sex, age = world.samples["sex"].isna(), world.samples["age_years"].isna()
    treated = world.samples["perturbation"] != "control"
    chosen = {"recorded": ~sex & ~age, "missing": sex & age, "unseen study": age | ~age, "unseen perturbation": treated, "both unseen": treated}[kind]
    rows = np.flatnonzero(chosen)
    return rows[np.linspace(0, len(rows) - 1, QUERIES).astype(int)]


def gap(world: World) -> float:
    """What the oracle is used for: how much better than the training mean it is in mean squared error."""
    oracle = MetadataOracle(world.truth, set(world.truth.studies), set(world.truth.perturbations))
    error = np.mean((oracle.predict(world.samples, world.totals) - world.expression) ** 2)
    return float(np.mean((world.expression.mean(axis=0) - world.expression) ** 2) - error)


@pytest.mark.parametrize("kind", ["recorded", "missing", "unseen study", "unseen perturbation", "both unseen"])
def test_the_metadata_oracle_agrees_with_simulation_to_below_one_percent_of_the_gap_it_is_used_for(world, kind):
    """The approximations (normalisers of what is unseen, total counts as if they were the library size) are in the difference."""
    rng, rows = np.random.default_rng(12), rows_of_kind(world, kind)
    seen_study, seen_perturbation = kind not in ("unseen study", "both unseen"), kind not in ("unseen perturbation", "both unseen")
    studies = set(world.truth.studies) if seen_study else set()
    perturbations = set(world.truth.perturbations) if seen_perturbation else {"control"}
    oracle = MetadataOracle(world.truth, studies, perturbations)
    predicted = oracle.predict(world.samples.iloc[rows], world.totals[rows])
    simulated = [simulate(world, row, seen_study, seen_perturbation, rng) for row in rows]
    mean, squared_error = (np.stack(part) for part in zip(*simulated, strict=True))
    bias = float(np.mean((predicted - mean) ** 2 - squared_error))
    share = bias / gap(world)
    print(f"approximation error of the metadata oracle, {kind}: {bias:.2e} log-CPM squared, {share:.3%} of the gap")
    assert share < 0.01
    # No gene is off by more than its Monte-Carlo error and the approximations allow.
    assert (np.abs(predicted - mean) < 5 * np.sqrt(squared_error) + 0.03).all()


# --- order of the predictors ----------------------------------------------------------------------------------------


def assert_not_worse(first: np.ndarray, second: np.ndarray, observed: np.ndarray, studies: pd.Series) -> None:
    """Paired difference of squared errors, by study (what its samples share makes their errors alike)."""
    difference = ((second - observed) ** 2 - (first - observed) ** 2).mean(axis=1)
    by_study = pd.Series(difference).groupby(studies.to_numpy()).mean()
    assert by_study.mean() > -2 * by_study.sem()


def test_the_omniscient_is_not_beaten_by_the_metadata_oracle_nor_that_by_the_training_mean(world):
    omniscient = OmniscientOracle(Tables(world.truth)).predict(world.log_fraction, world.totals)
    metadata = MetadataOracle(world.truth, set(world.truth.studies), set(world.truth.perturbations)).predict(world.samples, world.totals)
    mean = np.broadcast_to(world.expression.mean(axis=0), world.expression.shape)
    errors = [np.mean((predicted - world.expression) ** 2) for predicted in (omniscient, metadata, mean)]
    assert errors[0] < errors[1] < errors[2]
    assert_not_worse(omniscient, metadata, world.expression, world.samples["study"])


def test_the_oracle_is_not_beaten_by_any_that_knows_the_true_effects_and_less_of_the_sample(world):
    truth, samples, totals = world.truth, world.samples, world.totals
    studies, perturbations = set(truth.studies), set(truth.perturbations)
    oracle = MetadataOracle(truth, studies, perturbations)
    predicted = oracle.predict(samples, totals)
    rivals = {
        "without recorded sex": oracle.predict(samples.assign(sex=None), totals),
        "without recorded age": oracle.predict(samples.assign(age_years=np.nan), totals),
        "without the study": MetadataOracle(truth, set(), perturbations).predict(samples, totals),
        "without the perturbation": MetadataOracle(truth, studies, {"control"}).predict(samples, totals),
        "everything is a control": oracle.predict(samples.assign(perturbation="control"), totals),
    }
    for rival in rivals.values():
        assert_not_worse(predicted, rival, world.expression, samples["study"])
    for name in ("without the study", "without the perturbation", "everything is a control"):
        assert np.mean((rivals[name] - world.expression) ** 2) > np.mean((predicted - world.expression) ** 2), name


def test_knowing_the_perturbations_map_is_better_than_taking_unseen_ones_for_controls(world):
    treated = (world.samples["perturbation"] != "control").to_numpy()
    samples, totals, observed = world.samples[treated], world.totals[treated], world.expression[treated]
    unseen = MetadataOracle(world.truth, set(world.truth.studies), {"control"})
    errors = [np.mean((unseen.predict(table, totals) - observed) ** 2) for table in (samples, samples.assign(perturbation="control"))]
    assert errors[0] < errors[1]


def test_the_oracle_predicts_row_by_row(world):
    """Neither the order nor the company of the rows matters, though rows are handled in blocks and kinds together."""
    studies, perturbations = set(world.truth.studies[:6]), set(world.truth.perturbations[:7])
    oracle = MetadataOracle(world.truth, studies, perturbations)
    whole = oracle.predict(world.samples, world.totals)
    assert np.isfinite(whole).all()
    rows = np.random.default_rng(0).permutation(len(whole))[:40]
    # The table of another set of library sizes has other nodes: equal to its interpolation error.
    np.testing.assert_allclose(oracle.predict(world.samples.iloc[rows], world.totals[rows]), whole[rows], atol=1e-4)


# --- the error of the omniscient ------------------------------------------------------------------------------------


def test_the_error_of_the_omniscient_oracle_is_nothing_beside_the_gap(world):
    """Against fresh simulations of the same samples, the noise of their mean subtracted."""
    rows, draws, rng = np.arange(0, 500, 8), 100, np.random.default_rng(0)
    predicted = OmniscientOracle(Tables(world.truth)).predict(world.log_fraction[rows], world.totals[rows])
    simulated = []
    for _ in range(draws):
        counts = draw_counts(world.log_fraction[rows], world.totals[rows], world.truth.dispersion, rng)
        simulated.append(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e6))
    error = np.mean((np.mean(simulated, axis=0) - predicted) ** 2 - np.var(simulated, axis=0, ddof=1) / draws)
    assert abs(error) < 0.01 * gap(world)
