"""The ideal predictors: closed forms, their order, calibration of their draws, true effects."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from support.resimulation import SimulatedCohort

from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.references import choose_references
from pipeline.gem.data.splits import is_control
from pipeline.gem.evaluation.baselines.profiles import Profiles
from pipeline.gem.evaluation.baselines.ridge import Design, NormalEquations, Ridge
from pipeline.gem.evaluation.baselines.simple import Additive, training_mean
from pipeline.gem.simulation import hidden_factors
from pipeline.gem.simulation.generator import DISEASE_SHARES, draw_truth, log_fractions
from pipeline.gem.simulation.oracle import (
    CHANGED_FOLD,
    MetadataOracle,
    OmniscientOracle,
    ReferenceControls,
    true_effects,
)
from pipeline.gem.simulation.truth import Truth

# closed forms


def test_oracles_agree_on_complete_records_without_study_and_donor_effects(small, monkeypatch):
    monkeypatch.setattr(hidden_factors, "STUDY_SCALE", 0.0)
    monkeypatch.setattr(hidden_factors, "DONOR_SCALE", 0.0)
    settings = small.model_copy(update={"wrong_sex": 0.0})
    truth = SimulatedCohort.draw(settings, 1).truth
    simulated = SimulatedCohort.draw(settings, 1, study=0 * truth.study, donor=0 * truth.donor)
    is_complete = simulated.samples[["sex", "age_years"]].notna().all(axis=1)
    rows = np.flatnonzero(is_complete)
    query = simulated.samples.iloc[rows], simulated.totals[rows]
    unknown_study = simulated.oracle(studies=False)
    for predicted in (
        simulated.oracle().predict(*query),
        unknown_study.predict(*query),
        unknown_study.predict(*query, simulated.references(rows)),
    ):
        np.testing.assert_allclose(predicted, simulated.omniscient[rows], atol=2e-5)


@pytest.mark.parametrize("donors", [1, 2])
def test_reference_oracle_equals_the_oracle_that_it_is_equivalent_to(small, donors):
    """One donor per study: the reference reveals all hidden factors. Two donors: their centred
    effects are opposite, so that one reveals the other, as for a study in training."""
    settings = small.model_copy(update={"strata_per_study": 1, "donors_per_stratum": donors})
    simulated = SimulatedCohort.draw(settings, 1 + donors)
    query = simulated.samples, simulated.totals
    oracle = simulated.oracle(studies=False)
    equivalent = simulated.omniscient if donors == 1 else simulated.oracle().predict(*query)
    predicted = oracle.predict(*query, simulated.references())
    np.testing.assert_allclose(predicted, equivalent, atol=2e-5)


@pytest.mark.parametrize("missing_age", [0.0, 0.5])
def test_oracles_are_the_conditional_mean_of_log_mu_at_great_depth(small, missing_age):
    """Without count noise, log-CPM is log mu up to a normaliser that all genes of a sample share:
    contrasts between genes are linear."""
    changes = {"wrong_sex": 0.0, "missing_age": missing_age, "missing_sex": 0.0}
    settings = small.model_copy(update=changes)
    genes = settings.genes
    baseline = np.random.default_rng(0).uniform(-5, -4, genes)
    simulated = SimulatedCohort.draw(
        settings, 4, dispersion=np.full(genes, 1e-7), baseline=baseline
    )
    truth, rows = simulated.truth, np.arange(0, 1200, 10)
    samples, totals = simulated.samples.iloc[rows], np.full(len(rows), 1e9)
    references = simulated.references(rows)
    oracle, levels = simulated.oracle(studies=False), truth.levels(samples)
    base = truth.base_log_mu(levels) + truth.perturbation_effects(levels)
    sex = (samples["sex"] == "male").to_numpy().astype(int)
    # Missing ages lean to the old, as missing_age * (1 + (age - 50) / 60), on a range of 20 to 80.
    years, age = np.arange(20, 81), samples["age_years"].to_numpy()
    missing = missing_age * (1 + (years - 50) / 60)
    mean_missing_age = np.sum(missing * years) / max(missing.sum(), 1e-9)
    unknown_donor = truth.donor_trait_effects(sex, np.where(np.isnan(age), mean_missing_age, age))

    def contrasts(values: np.ndarray) -> np.ndarray:
        return values - values.mean(axis=1, keepdims=True)

    def predicted_contrasts(predicted: np.ndarray) -> np.ndarray:
        return contrasts(np.log(np.expm1(predicted)))  # without the pseudo-count of log1p

    np.testing.assert_allclose(
        predicted_contrasts(oracle.predict(samples, totals)),
        contrasts(base + unknown_donor),
        atol=1e-3,
    )
    # Posterior odds of the reference's stratum; the prior odds are 1 to R - 1 = 2. The record fits
    # the stratum or not; it fits another stratum with the probability of its disease, sex and age.
    index = levels.study, references.stratum
    fits = (truth.stratum_sex[index] == sex) & (truth.stratum_disease[index] == levels.disease)
    fits &= np.isnan(age) | (age == truth.stratum_age[index])
    missing_there = np.interp(truth.stratum_age[index], years, missing)
    same = fits * np.where(np.isnan(age), missing_there, 1.0)
    disease_share = np.array([0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3])[levels.disease]
    other = disease_share / 2 * np.where(np.isnan(age), missing.mean(), 1 / 61)
    assert settings.strata_per_study == 3
    posterior = (same / (same + 2 * other))[:, None]
    reference_traits = truth.donor_trait_effects(sex, truth.stratum_age[index])
    traits = posterior * reference_traits + (1 - posterior) * unknown_donor
    np.testing.assert_allclose(
        predicted_contrasts(oracle.predict(samples, totals, references)),
        contrasts(base + truth.study[levels.study] + traits),
        atol=1e-3,
    )


def test_a_reference_is_ignored_for_a_training_study_or_from_another_study(simulated):
    query = simulated.samples.iloc[:200], simulated.totals[:200]
    same_study = simulated.references(slice(200))
    other_study = simulated.references(slice(1000, 1200))
    studies = query[0]["study"].to_numpy()
    assert not (studies == other_study.samples["study"].to_numpy()).any()
    for oracle, references in (
        (simulated.oracle(), same_study),
        (simulated.oracle(studies=False), other_study),
    ):
        np.testing.assert_array_equal(oracle.predict(*query, references), oracle.predict(*query))


def test_disease_shares_of_strata_are_those_that_the_oracle_uses(small):
    settings = small.model_copy(update={"studies": 4000, "genes": 20})
    disease = draw_truth(settings, np.random.default_rng(0)).stratum_disease
    shares = np.bincount(disease.ravel()) / disease.size
    assert (np.abs(shares - DISEASE_SHARES) < 4.5 * np.sqrt(shares / disease.size)).all()


def test_impossible_metadata_raise_value_error(small):
    simulated = SimulatedCohort.draw(small.model_copy(update={"missing_age": 0.0}), 5)
    samples = simulated.samples.iloc[:7].assign(age_years=np.nan)
    with pytest.raises(ValueError, match="7 samples with a sex, age and disease"):
        simulated.oracle().predict(samples, simulated.totals[:7])


# order of the predictors


def assert_not_worse(
    first: np.ndarray, second: np.ndarray, observed: np.ndarray, studies: pd.Series
) -> None:
    """Paired difference of squared errors, by study because errors within a study correlate."""
    difference = ((second - observed) ** 2 - (first - observed) ** 2).mean(axis=1)
    by_study = pd.Series(difference).groupby(studies.to_numpy()).mean()
    slack = 2 * by_study.sem() if len(by_study) > 2 else 0.0
    assert by_study.mean() >= -slack


def test_oracles_with_more_information_have_smaller_errors(simulated):
    query, observed = (simulated.samples, simulated.totals), simulated.expression
    unknown_study = simulated.oracle(studies=False)
    ladder = [
        simulated.omniscient,
        simulated.oracle().predict(*query),
        unknown_study.predict(*query, simulated.references()),
        unknown_study.predict(*query),
        np.broadcast_to(observed.mean(axis=0), observed.shape),
    ]
    errors = [np.mean((predicted - observed) ** 2) for predicted in ladder]
    assert errors == sorted(errors)
    for better, worse in pairwise(ladder):
        assert_not_worse(better, worse, observed, simulated.samples["study"])


def test_no_fitted_predictor_beats_the_oracles_on_the_tiny_cohort(cohort):
    truth, train = Truth.load(cohort.truth_folder), cohort.rows(["train"])
    genes = pd.Index(truth.gene_id).get_indexer(cohort.genes)
    expression = cohort.expression(["train"])
    hidden = pd.read_parquet(cohort.truth_folder / "samples.parquet").set_index("sample_id")

    def strata_and_donors(samples: pd.DataFrame) -> np.ndarray:
        return hidden.loc[samples["sample_id"], ["stratum", "donor"]].to_numpy().T

    metadata = MetadataOracle(truth, set(train["study"]), set(train["perturbation"]))
    omniscient = OmniscientOracle(metadata.expectations)
    encoder = MetadataEncoder.fit(train, cohort.declared.covariates)
    design = Design(encoder, train)
    equations = NormalEquations.of(design.rows, design.columns, [expression])
    ridge = Ridge.fit(encoder, equations)
    profiles = Profiles.of(cohort.declared, train, [expression])
    additive = Additive(profiles)
    for split in ("test_random", "test_combination", "test_perturbation", "test_study"):
        samples, observed = cohort.rows([split]), cohort.expression([split])
        totals = samples["total"].to_numpy()
        own_controls = samples[is_control(samples, cohort.declared).to_numpy()]
        pool = pd.concat([train, own_controls]) if split == "test_study" else train
        reference = pool.iloc[choose_references(samples, pool, cohort.declared, 0)]
        references = ReferenceControls(reference, *strata_and_donors(reference))
        fractions = log_fractions(truth, samples, *strata_and_donors(samples))
        ladder = [
            omniscient.predict(fractions, totals)[:, genes],
            metadata.predict(samples, totals, references)[:, genes],
            metadata.predict(samples, totals)[:, genes],
        ]
        for better, worse in pairwise(ladder):
            assert_not_worse(better, worse, observed, samples["study"])
        mean = training_mean(profiles, len(samples))
        for fitted in (ridge.predict(samples), additive.predict(samples), mean):
            assert_not_worse(ladder[2], fitted, observed, samples["study"])
        if split == "test_random":
            oracle_error = np.mean((ladder[2] - observed) ** 2)
            assert oracle_error < np.mean((ridge.predict(samples) - observed) ** 2)


def test_the_metadata_oracle_is_not_worse_than_one_with_less_information(simulated):
    samples, totals, observed = simulated.samples, simulated.totals, simulated.expression
    oracle = simulated.oracle()
    predicted = oracle.predict(samples, totals)
    no_study = simulated.oracle(studies=False).predict(samples, totals)
    no_perturbation = simulated.oracle(perturbations=False).predict(samples, totals)
    as_controls = oracle.predict(samples.assign(perturbation="control"), totals)
    rivals = [no_study, no_perturbation, as_controls]
    for rival in rivals:
        assert np.mean((rival - observed) ** 2) > np.mean((predicted - observed) ** 2)
    rivals.append(oracle.predict(samples.assign(sex=None), totals))
    rivals.append(oracle.predict(samples.assign(age_years=np.nan), totals))
    for rival in rivals:
        assert_not_worse(predicted, rival, observed, samples["study"])


def test_predicting_unknown_perturbations_beats_treating_them_as_controls(simulated):
    treated = (simulated.samples["perturbation"] != "control").to_numpy()
    samples, totals = simulated.samples[treated], simulated.totals[treated]
    oracle = simulated.oracle(perturbations=False)
    errors = [
        np.mean((oracle.predict(table, totals) - simulated.expression[treated]) ** 2)
        for table in (samples, samples.assign(perturbation="control"))
    ]
    assert errors[0] < errors[1]


def test_predictions_do_not_depend_on_the_other_rows(simulated):
    truth = simulated.truth
    metadata = MetadataOracle(truth, set(truth.studies[:6]), set(truth.perturbations[:7]))
    oracle, references = metadata, simulated.references()
    whole = oracle.predict(simulated.samples, simulated.totals, references)
    assert np.isfinite(whole).all()
    rows = np.random.default_rng(0).permutation(len(whole))[:40]
    some = ReferenceControls(
        references.samples.iloc[rows], references.stratum[rows], references.donor[rows]
    )
    part = oracle.predict(simulated.samples.iloc[rows], simulated.totals[rows], some)
    np.testing.assert_allclose(part, whole[rows], atol=1e-5)


# draws


@pytest.fixture(scope="module")
def many_studies(small) -> SimulatedCohort:
    """Many studies of few samples, so that hidden effects are drawn often."""
    changes = {"genes": 50, "samples": 1600, "studies": 200, "perturbations": 40}
    return SimulatedCohort.draw(small.model_copy(update=changes), 9)


@pytest.mark.parametrize(
    "name", ["omniscient", "metadata", "unknown studies", "unknown perturbations", "reference"]
)
def test_the_rank_of_an_observation_among_draws_is_uniform(many_studies, name):
    """Probability integral transform: an observation is one more draw, at its library size."""
    samples, sizes = many_studies.samples, many_studies.design.library_size
    rng, unknown_study = np.random.default_rng(4), many_studies.oracle(studies=False)
    oracle, query = {
        "omniscient": (many_studies.omniscient_oracle, (many_studies.log_fraction, sizes)),
        "metadata": (many_studies.oracle(), (samples, sizes)),
        "unknown studies": (unknown_study, (samples, sizes)),
        "unknown perturbations": (many_studies.oracle(perturbations=False), (samples, sizes)),
        "reference": (
            unknown_study,
            (samples, sizes, many_studies.references()),
        ),
    }[name]
    rank, draws = np.zeros(many_studies.counts.shape), 9
    for _ in range(draws):
        counts = oracle.draw(*query, rng=rng)
        jittered = counts + 1e-6 * rng.random(counts.shape)  # ties are broken at random
        rank += jittered < many_studies.counts + 1e-6 * rng.random(counts.shape)
    shares = np.bincount(rank.astype(int).ravel(), minlength=draws + 1) / rank.size
    assert np.abs(shares - 1 / (draws + 1)).max() < 0.006, shares


def test_draws_are_determined_by_the_seed(simulated):
    query = simulated.samples.iloc[:50], simulated.totals[:50]
    first, again, other = (
        simulated.oracle().draw(*query, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# true effects


def untreated(samples: pd.DataFrame) -> pd.DataFrame:
    names = {"perturbation": "control", "perturbation_type": "control"}
    return samples.assign(**names, perturbation_dose=None, perturbation_time=None)


def test_true_effects_are_differences_of_log_fractions_with_and_without_treatment(simulated):
    truth, samples = simulated.truth, simulated.samples
    no_donor = replace(truth, donor=0 * truth.donor, sex=0 * truth.sex, age=0 * truth.age)
    if truth.subpopulation is not None:
        no_donor = replace(no_donor, subpopulation=0 * truth.subpopulation)
    detected = np.isfinite(simulated.log_fraction)
    expected = log_fractions(no_donor, samples, *simulated.hidden)[detected]
    expected -= log_fractions(no_donor, untreated(samples), *simulated.hidden)[detected]
    np.testing.assert_allclose(true_effects(truth, samples)[detected], expected, atol=1e-9)


def test_the_donor_hardly_changes_true_effects(simulated):
    truth, samples = simulated.truth, simulated.samples
    detected = np.isfinite(simulated.log_fraction)
    exact = simulated.log_fraction[detected]
    exact -= log_fractions(truth, untreated(samples), *simulated.hidden)[detected]
    effects = true_effects(truth, samples)[detected]
    difference = effects - exact
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.sqrt(np.mean(exact**2))
    changed, expected = (np.abs(x) >= np.log(CHANGED_FOLD) for x in (effects, exact))
    assert np.mean(changed != expected) < 0.01


def test_controls_and_inactive_perturbations_change_no_gene(simulated):
    truth, samples = simulated.truth, simulated.samples
    inactive = (truth.active[truth.perturbations_in(samples)] == 0).all(axis=1)
    assert inactive.any() and not inactive.all()
    effects = true_effects(truth, samples)
    np.testing.assert_array_equal(effects[inactive], 0)
    assert np.abs(effects[~inactive]).max(axis=1).min() > 0
