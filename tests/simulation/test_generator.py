"""The simulator: the moments of its counts, the laws of its effects, and the design of its studies."""

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.simulation import generator
from pipeline.gem.simulation.generator import (
    AGES,
    CONTROL,
    DIRECT_FOLD,
    DONOR_SCALE,
    STUDY_SCALE,
    TIME_CONSTANT,
    Levels,
    Truth,
    age_missing_probability,
    draw_counts,
    draw_truth,
)
from pipeline.gem.simulation.oracle import MetadataOracle, OmniscientOracle, Tables
from pipeline.gem.simulation.study_design import draw_design, expected_log_fractions


@pytest.fixture(scope="module")
def settings(params):
    return params.synthesize


@pytest.fixture(scope="module")
def truth(settings) -> Truth:
    return draw_truth(settings, np.random.default_rng(1))


@pytest.fixture(scope="module")
def design(settings, truth):
    return draw_design(settings, truth, np.random.default_rng(2))


@pytest.fixture(scope="module")
def large(settings):
    """(truth, design) of many studies and samples over few genes: for shares and frequencies."""
    many = settings.model_copy(update={"samples": 20_000, "studies": 400, "genes": 20})
    rng = np.random.default_rng(3)
    truth = draw_truth(many, rng)
    return truth, draw_design(many, truth, rng)


def queries(truth: Truth, perturbation, dose, time, context=0) -> Levels:
    """Samples that differ in perturbation (index), dose (uM) and time (hours) only."""
    perturbation, dose, time, context = (
        np.atleast_1d(values) for values in np.broadcast_arrays(perturbation, dose, time, context)
    )
    zero = np.zeros(perturbation.shape, dtype=np.int64)
    return Levels(
        zero, context, zero, zero, zero, zero, perturbation, dose.astype(float), time.astype(float)
    )


def of_kind(truth: Truth, kind: str) -> int:
    """A perturbation of the kind that acts, in a context where its mechanisms are expressed."""
    return int(np.flatnonzero((truth.perturbation_type == kind) & (truth.active == 1))[0])


# --- counts ---------------------------------------------------------------------------------------------------------


def test_counts_are_negative_binomial_in_mean_and_variance(rng):
    log_fraction = np.log(np.array([[0.6, 0.3, 0.09, 0.01]]))
    dispersion, draws = np.array([0.01, 0.1, 0.5, 2.0]), 40_000
    counts = draw_counts(
        np.repeat(log_fraction, draws, axis=0), np.full(draws, 1000.0), dispersion, rng
    )
    mean = 1000 * np.exp(log_fraction[0])
    variance = mean + dispersion * mean**2
    assert np.issubdtype(counts.dtype, np.integer)
    assert (np.abs(counts.mean(axis=0) - mean) < 4.5 * np.sqrt(variance / draws)).all()
    kurtosis = ((counts - counts.mean(axis=0)) ** 4).mean(axis=0) / counts.var(axis=0) ** 2
    assert (np.abs(counts.var(axis=0) / variance - 1) < 4.5 * np.sqrt((kurtosis - 1) / draws)).all()


def test_counts_grow_with_the_library_size(rng):
    sizes = np.repeat([100.0, 10_000.0], 5000)
    counts = draw_counts(np.full((10_000, 10), -np.log(10)), sizes, np.full(10, 0.1), rng)
    np.testing.assert_allclose(counts[5000:].mean() / counts[:5000].mean(), 100, rtol=0.02)


@pytest.mark.parametrize("preset", ["bulk", "single_cell"])
def test_dispersion_follows_splatters_formula(settings, preset):
    truth = draw_truth(
        settings.model_copy(update={"genes": 3000, "preset": preset}), np.random.default_rng(0)
    )
    depth = {"bulk": 1e7, "single_cell": 2e4 * 3000 / 20_000}[preset]
    trend = 0.1 + 1 / np.sqrt(depth * np.exp(truth.baseline))
    # dispersion / trend^2 = 60 / chi2_60: its inverse has mean 1 and variance 2 / 60.
    inverse = trend**2 / truth.dispersion
    assert inverse.mean() == pytest.approx(1, abs=4.5 * np.sqrt(2 / 60 / 3000))
    assert inverse.var() == pytest.approx(2 / 60, rel=0.15)


def test_expected_shares_sum_to_one(truth, design):
    found = np.exp(expected_log_fractions(truth, design, slice(0, 200)))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    assert np.exp(truth.baseline).sum() == pytest.approx(1)


# --- effects --------------------------------------------------------------------------------------------------------


def test_the_half_effective_dose_gives_half_the_effect(truth):
    compound = of_kind(truth, "compound")
    half = generator.MEDIAN_POTENCY * np.exp(truth.embedding[compound] @ truth.potency_map)
    strength = truth.strength(queries(truth, compound, [half, 1e12, 1e-12, np.nan], np.nan))
    np.testing.assert_allclose(strength, [0.5, 1, 0, 1], atol=1e-9)
    effects = truth.perturbation_effects(queries(truth, compound, [half, 1e12], np.nan))
    assert np.abs(effects[1]).max() > 0.1
    np.testing.assert_allclose(effects[0], effects[1] / 2, atol=1e-9)


def test_the_effect_approaches_its_height_exponentially_in_time(truth):
    for kind in ("compound", "crispri", "overexpression"):
        constant = TIME_CONSTANT[kind]
        strength = truth.strength(
            queries(
                truth,
                of_kind(truth, kind),
                np.nan,
                [0.0, constant * np.log(2), constant, 1e9, np.nan],
            )
        )
        np.testing.assert_allclose(strength, [0, 0.5, 1 - np.exp(-1), 1, 1], atol=1e-12)


def test_the_effect_rises_with_dose_and_time(truth):
    compound = of_kind(truth, "compound")
    assert (np.diff(truth.strength(queries(truth, compound, [0.1, 1.0, 10.0], 24.0))) > 0).all()
    assert (np.diff(truth.strength(queries(truth, compound, 1.0, [6.0, 24.0, 72.0]))) > 0).all()


def test_controls_and_null_perturbations_have_no_effect(truth):
    null = np.flatnonzero(truth.active == 0)
    contexts = np.arange(len(truth.context))
    assert null[0] == 0
    for index in null:
        assert not truth.perturbation_effects(
            queries(truth, int(index), np.nan, np.nan, contexts)
        ).any()
    as_if_active = replace(truth, active=np.ones_like(truth.active))
    assert not as_if_active.perturbation_effects(queries(truth, 0, np.nan, np.nan, contexts)).any()


def test_the_share_of_null_perturbations_is_the_one_asked_for(settings):
    many = settings.model_copy(update={"perturbations": 4000, "genes": 20})
    truth = draw_truth(many, np.random.default_rng(0))
    assert (truth.active[1:] == 0).mean() == pytest.approx(
        many.null_share, abs=4.5 * np.sqrt(0.15 * 0.85 / 4000)
    )


def test_a_knock_down_lowers_its_target_and_an_overexpression_raises_it(truth):
    # Without the programs, what is left is the direct effect alone.
    direct = replace(
        truth, mechanism=np.zeros_like(truth.mechanism), residual=np.zeros_like(truth.residual)
    )
    for kind, sign in (("crispri", -1), ("overexpression", 1)):
        index = of_kind(truth, kind)
        effect = direct.perturbation_effects(queries(truth, index, np.nan, np.nan))[0]
        expected = np.zeros_like(effect)
        expected[truth.target[index]] = sign * np.log(DIRECT_FOLD)
        np.testing.assert_allclose(effect, expected)
    compound = of_kind(truth, "compound")
    assert truth.target[compound] == -1
    assert not direct.perturbation_effects(queries(truth, compound, np.nan, np.nan)).any()


def test_the_effect_of_a_program_is_low_rank_and_follows_from_the_embedding(truth):
    loading = np.clip(truth.loading_offset + truth.embedding @ truth.loading_map, 0, 1)
    no_target = replace(truth, target=np.full_like(truth.target, -1))
    levels = queries(truth, np.arange(1, len(truth.embedding)), np.nan, np.nan, 1)
    expected = (truth.response[1, :-1] * loading[1:]) @ truth.mechanism
    np.testing.assert_allclose(no_target.predictable_program(levels), expected, atol=1e-12)
    assert np.linalg.matrix_rank(expected) <= len(truth.mechanism)


def test_contexts_respond_differently(truth):
    compound = of_kind(truth, "compound")
    effects = truth.perturbation_effects(
        queries(truth, compound, np.nan, np.nan, np.arange(len(truth.context)))
    )
    assert (np.abs(effects[1:] - effects[0]).max(axis=1) > 0.01).all()


def test_donors_are_centred_within_a_stratum_and_vary_as_declared(settings):
    truth = draw_truth(
        settings.model_copy(update={"genes": 500, "studies": 40}), np.random.default_rng(0)
    )
    np.testing.assert_allclose(truth.donor.mean(axis=2), 0, atol=1e-12)
    donors = truth.donor.shape[2]
    assert truth.donor.var() == pytest.approx(DONOR_SCALE**2 * (1 - 1 / donors), rel=0.02)
    assert truth.study.var() == pytest.approx(STUDY_SCALE**2, rel=0.05)


def test_healthy_is_the_absence_of_disease(truth):
    assert not truth.disease[:, 0].any()
    assert truth.disease[:, 1:].any()


# --- design ---------------------------------------------------------------------------------------------------------


def test_ages_go_missing_more_often_with_age_at_the_overall_rate_asked_for(large):
    truth, design = large
    study = (
        design.samples["study"]
        .map({name: index for index, name in enumerate(truth.studies)})
        .to_numpy()
    )
    age, missing = (
        truth.stratum_age[study, design.stratum],
        design.samples["age_years"].isna().to_numpy(),
    )
    error = np.sqrt(0.25 * 0.75 / len(missing)) + 0.25 / 60 * age.std() / np.sqrt(
        truth.stratum_age.size
    )
    assert missing.mean() == pytest.approx(float(truth.missing_age), abs=4.5 * error)
    thirds = [
        missing[(age >= low) & (age < high)].mean() for low, high in ((20, 40), (40, 60), (60, 81))
    ]
    assert thirds[0] < thirds[1] < thirds[2]
    expected = age_missing_probability(truth, age)
    for low, high in ((20, 40), (40, 60), (60, 81)):
        inside = (age >= low) & (age < high)
        assert missing[inside].mean() == pytest.approx(
            expected[inside].mean(), abs=4.5 * 0.5 / np.sqrt(inside.sum())
        )


def test_the_mean_probability_of_a_missing_age_over_the_ages_is_the_overall_rate(truth):
    ages = np.arange(AGES[0], AGES[1] + 1)
    assert age_missing_probability(truth, ages).mean() == pytest.approx(float(truth.missing_age))


def test_sex_is_missing_and_wrong_at_the_rates_asked_for(large):
    truth, design = large
    study = (
        design.samples["study"]
        .map({name: index for index, name in enumerate(truth.studies)})
        .to_numpy()
    )
    sex, recorded = truth.stratum_sex[study, design.stratum], design.samples["sex"]
    number = len(recorded)
    assert recorded.isna().mean() == pytest.approx(
        float(truth.missing_sex), abs=4.5 * 0.4 / np.sqrt(number)
    )
    known = recorded.notna().to_numpy()
    wrong = recorded[known].map({"female": 0, "male": 1}).to_numpy() != sex[known]
    assert wrong.mean() == pytest.approx(
        float(truth.wrong_sex), abs=4.5 * 0.1 / np.sqrt(known.sum())
    )


def test_recorded_ages_and_diseases_are_those_of_the_stratum(large):
    truth, design = large
    study = (
        design.samples["study"]
        .map({name: index for index, name in enumerate(truth.studies)})
        .to_numpy()
    )
    known = design.samples["age_years"].notna().to_numpy()
    np.testing.assert_array_equal(
        design.samples["age_years"].to_numpy()[known],
        truth.stratum_age[study, design.stratum][known],
    )
    diseases = np.array(generator.DISEASES)[truth.stratum_disease[study, design.stratum]]
    np.testing.assert_array_equal(design.samples["disease"].to_numpy(), diseases)


def test_every_study_has_controls_in_every_one_of_its_contexts(large):
    samples = large[1].samples
    pair = [samples["study"], samples["tissue"], samples["cell_type"]]
    assert (samples["perturbation"] == CONTROL).groupby(pair).any().all()


def test_controls_have_no_dose_and_no_time_and_compounds_alone_have_a_dose(design):
    samples = design.samples
    control = samples["perturbation"] == CONTROL
    assert samples.loc[control, ["perturbation_dose", "perturbation_time"]].isna().all(axis=None)
    assert samples.loc[~control, "perturbation_time"].notna().all()
    assert (
        samples["perturbation_dose"].notna() == (samples["perturbation_type"] == "compound")
    ).all()


def test_a_study_has_one_date_one_protocol_and_dates_are_ordered(large):
    samples = large[1].samples
    constant = ["study_date", "library_selection", "library_layout", "platform"]
    assert (samples.groupby("study")[constant].nunique() == 1).all(axis=None)
    dates = samples.drop_duplicates("study").sort_values("study")["study_date"]
    assert dates.is_monotonic_increasing
    assert pd.to_datetime(dates).between("2013-01-01", "2024-12-31").all()


def test_the_cohort_has_the_samples_asked_for_and_their_names_are_unique(settings, design):
    assert len(design.samples) == settings.samples
    assert design.samples["sample_id"].is_unique
    assert len(design.stratum) == len(design.donor) == len(design.library_size) == settings.samples


def test_a_cohort_of_more_studies_than_samples_fill_has_the_samples_asked_for(settings):
    thin = settings.model_copy(update={"samples": 50, "studies": 40, "contexts_per_study": 2})
    rng = np.random.default_rng(0)
    truth = draw_truth(thin, rng)
    assert len(draw_design(thin, truth, rng).samples) == 50


def test_library_sizes_are_those_of_the_preset_or_as_asked(settings, truth):
    cells = 2e4 * settings.genes / 20_000
    for preset, depth, low, high, median in (
        ("bulk", None, 0.7e7, 1.4e7, 1.05e7),
        ("single_cell", None, cells * np.exp(-1), cells * np.exp(1), cells),
        ("bulk", 300_000, 210_000, 420_000, 315_000),
    ):
        sizes = draw_design(
            settings.model_copy(update={"preset": preset, "depth": depth}),
            truth,
            np.random.default_rng(0),
        ).library_size
        assert sizes.min() >= low
        assert sizes.max() <= high
        assert np.median(sizes) == pytest.approx(median, rel=0.06)


# --- reproducibility ------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits(settings):
    def everything(seed):
        rng = np.random.default_rng(seed)
        truth = draw_truth(settings, rng)
        design = draw_design(settings, truth, rng)
        return (
            truth,
            design,
            draw_counts(
                expected_log_fractions(truth, design, slice(None)),
                design.library_size,
                truth.dispersion,
                rng,
            ),
        )

    (first, design, counts), (again, design_again, counts_again), (_, _, other) = (
        everything(5),
        everything(5),
        everything(6),
    )
    for field in fields(Truth):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    pd.testing.assert_frame_equal(design.samples, design_again.samples)
    np.testing.assert_array_equal(counts, counts_again)
    assert counts.shape != other.shape or (counts != other).any()


def test_a_truth_survives_its_file(truth, tmp_path):
    truth.save(tmp_path)
    loaded = Truth.load(tmp_path)
    for field in fields(Truth):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(truth, field.name))


def test_the_oracle_uses_the_effects_the_counts_are_drawn_from(settings):
    # With one stratum of one donor a study hides nothing: the oracle that reads metadata must be the one that knows all.
    open_book = settings.model_copy(
        update={"strata_per_study": 1, "donors_per_stratum": 1, "samples": 200}
    )
    rng = np.random.default_rng(4)
    truth = draw_truth(open_book, rng)
    design = draw_design(open_book, truth, rng)
    oracle = MetadataOracle(truth, set(truth.studies), set(truth.perturbations))
    from_metadata = oracle.predict(design.samples, design.library_size)
    from_everything = OmniscientOracle(Tables(truth)).predict(
        expected_log_fractions(truth, design, slice(None)), design.library_size
    )
    np.testing.assert_allclose(from_metadata, from_everything, atol=1e-4)
