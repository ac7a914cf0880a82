"""Effects of a synthetic cohort: dose, time, programs, direct effects, donors, and the file."""

import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.simulation.generator import AGES, DONOR_SCALE, STUDY_SCALE, draw_truth
from pipeline.gem.simulation.truth import (
    DIRECT_FOLD,
    MEDIAN_POTENCY,
    TIME_CONSTANT,
    Levels,
    Truth,
)


@pytest.fixture(scope="module")
def truth(params) -> Truth:
    return draw_truth(params.synthesize, np.random.default_rng(1))


def levels(perturbation, dose=np.nan, time=np.nan, context=0, partner=0) -> Levels:
    """Samples with these perturbations (index), doses (uM), times (hours), contexts and second
    perturbations."""
    arrays = np.broadcast_arrays(perturbation, dose, time, context, partner)
    perturbation, dose, time, context, partner = (np.atleast_1d(array) for array in arrays)
    zero = np.zeros(perturbation.shape, dtype=np.int64)
    numbers = dose.astype(float), time.astype(float)
    return Levels(zero, context, zero, zero, zero, zero, perturbation, *numbers, partner)


def active_perturbation(truth: Truth, kind: str) -> int:
    return int(np.flatnonzero((truth.perturbation_type == kind) & (truth.active == 1))[0])


def test_half_effective_dose_gives_half_the_effect(truth):
    compound = active_perturbation(truth, "compound")
    half = MEDIAN_POTENCY * np.exp(truth.embedding[compound] @ truth.potency_map)
    strength = truth.strength(levels(compound, [half, 1e12, 1e-12, np.nan]))
    np.testing.assert_allclose(strength, [0.5, 1, 0, 1], atol=1e-9)
    effects = truth.perturbation_effects(levels(compound, [half, 1e12]))
    assert np.abs(effects[1]).max() > 0.1
    np.testing.assert_allclose(effects[0], effects[1] / 2, atol=1e-9)


@pytest.mark.parametrize("kind", ["compound", "crispri", "overexpression"])
def test_effect_saturates_exponentially_in_time(truth, kind):
    tau = TIME_CONSTANT[kind]
    times = [0.0, tau * np.log(2), tau, 1e9, np.nan]
    strength = truth.strength(levels(active_perturbation(truth, kind), time=times))
    np.testing.assert_allclose(strength, [0, 0.5, 1 - np.exp(-1), 1, 1], atol=1e-12)


def test_effect_increases_with_dose_and_time(truth):
    compound = active_perturbation(truth, "compound")
    assert (np.diff(truth.strength(levels(compound, [0.1, 1.0, 10.0], 24.0))) > 0).all()
    assert (np.diff(truth.strength(levels(compound, 1.0, [6.0, 24.0, 72.0]))) > 0).all()


def test_controls_and_inactive_perturbations_have_no_effect(truth):
    inactive, contexts = np.flatnonzero(truth.active == 0), np.arange(len(truth.context))
    assert inactive[0] == 0
    for index in inactive:
        assert not truth.perturbation_effects(levels(index, context=contexts)).any()
    all_active = replace(truth, active=np.ones_like(truth.active))
    assert not all_active.perturbation_effects(levels(0, context=contexts)).any()


def test_crispri_lowers_its_target_and_overexpression_raises_it(truth):
    # Without programs and residuals, the direct effect is the only one.
    mechanism, residual = np.zeros_like(truth.mechanism), np.zeros_like(truth.residual)
    direct = replace(truth, mechanism=mechanism, residual=residual)
    for kind, sign in (("crispri", -1), ("overexpression", 1)):
        index = active_perturbation(truth, kind)
        expected = np.zeros_like(truth.baseline)
        expected[truth.target[index]] = sign * np.log(DIRECT_FOLD)
        np.testing.assert_allclose(direct.perturbation_effects(levels(index))[0], expected)
    compound = active_perturbation(truth, "compound")
    assert truth.target[compound] == -1
    assert not direct.perturbation_effects(levels(compound)).any()


def test_programs_are_low_rank_and_follow_from_the_embedding(truth):
    loading = np.clip(truth.loading_offset + truth.embedding @ truth.loading_map, 0, 1)
    expected = (truth.response[1, :-1] * loading[1:]) @ truth.mechanism
    no_target = replace(truth, target=np.full_like(truth.target, -1))
    samples = levels(np.arange(1, len(truth.embedding)), context=1)
    program = no_target.predictable_response(samples, [np.ones(len(samples.study))])
    np.testing.assert_allclose(program, expected, atol=1e-12)
    assert np.linalg.matrix_rank(expected) <= len(truth.mechanism)


@pytest.fixture(scope="module")
def with_options(params):
    """A truth of these settings beside those of `params`."""

    def draw(**settings) -> Truth:
        changed = params.synthesize.model_copy(update=settings)
        return draw_truth(changed, np.random.default_rng(1))

    return draw


def test_what_a_setting_adds_leaves_the_rest_of_the_truth_as_it_is(truth, with_options):
    added = with_options(
        context_specific_share=0.3,
        saturation_fold=8.0,
        hill_spread=0.5,
        interaction_spread=0.5,
        subpopulations=2,
    )
    for name, values in present(truth).items():
        np.testing.assert_array_equal(getattr(added, name), values)


def test_a_hill_coefficient_of_its_own_makes_the_dose_response_of_a_compound_steep(with_options):
    truth = with_options(hill_spread=2.0)
    compound = active_perturbation(truth, "compound")
    half = MEDIAN_POTENCY * np.exp(truth.embedding[compound] @ truth.potency_map)
    steepness = np.exp(truth.embedding[compound] @ truth.hill_map)
    assert abs(steepness - 1) > 0.1
    strength = truth.strength(levels(compound, [half, 3 * half, half / 3]))
    np.testing.assert_allclose(strength, [0.5, 1 / (1 + 3**-steepness), 1 / (1 + 3**steepness)])


def test_hill_coefficients_have_the_declared_spread(with_options):
    truth = with_options(hill_spread=0.5, perturbations=2000, embedding_size=200, genes=20)
    log_hill = truth.embedding @ truth.hill_map
    assert log_hill.std() == pytest.approx(0.5, rel=0.2)


def test_log_fold_changes_saturate(truth):
    limit = 1.5
    limited = replace(truth, saturation=np.array(limit))
    samples = levels(np.arange(1, len(truth.embedding)))
    full, effects = (each.perturbation_effects(samples) for each in (truth, limited))
    assert np.abs(full).max() > limit > np.abs(effects).max()
    ratio = (1 - np.exp(-2 * full / limit)) / (1 + np.exp(-2 * full / limit))
    np.testing.assert_allclose(effects, limit * ratio, atol=1e-6)
    small = (np.abs(full) < 0.1) & (full != 0)
    np.testing.assert_allclose(effects[small], full[small], rtol=0.01)


def test_contexts_share_a_program_but_for_the_declared_part(with_options):
    """Without residuals and direct effects, and with equal responses, the correlation over genes of
    a perturbation in two contexts is one less the share of context-specific programs."""
    share = 0.36
    truth = with_options(
        context_specific_share=share, genes=20_000, response_spread=0.0, silent_share=0.0
    )
    no_residual, no_target = 0 * truth.residual, np.full_like(truth.target, -1)
    truth = replace(truth, residual=no_residual, target=no_target)
    strongest = int(np.argmax(truth.active * truth.loading.sum(axis=1)))
    first, second = truth.perturbation_effects(levels(strongest, context=[0, 1]))
    assert first @ second / np.sqrt((first @ first) * (second @ second)) == pytest.approx(
        1 - share, abs=0.05
    )
    none = replace(truth, context_program=None, context_share=None)
    alone = none.perturbation_effects(levels(strongest))[0]
    assert np.mean(first**2) == pytest.approx(np.mean(alone**2), rel=0.05)
    np.testing.assert_allclose(none.perturbation_effects(levels(strongest, context=1))[0], alone)


def test_two_perturbations_add_up_to_their_interaction(with_options):
    truth = with_options(interaction_spread=1.0, double_share=0.5)
    first, second = np.flatnonzero(truth.active)[:2]
    no_target = replace(truth, target=np.full_like(truth.target, -1))
    single = [no_target.perturbation_effects(levels(index))[0] for index in (first, second)]
    factor = np.exp(truth.embedding[first] @ truth.interaction_map @ truth.embedding[second])
    assert abs(factor - 1) > 0.01
    for pair in ((first, second), (second, first)):
        double = no_target.perturbation_effects(levels(pair[0], partner=pair[1]))[0]
        np.testing.assert_allclose(double, factor * (single[0] + single[1]), atol=1e-12)
    # Direct effects add; an inactive partner changes nothing.
    target = truth.perturbation_effects(levels(first, partner=second))[0]
    direct = [
        (truth.perturbation_effects(levels(index)) - no_target.perturbation_effects(levels(index)))
        for index in (first, second)
    ]
    double = no_target.perturbation_effects(levels(first, partner=second))[0]
    np.testing.assert_allclose(target, double + (direct[0] + direct[1])[0], atol=1e-12)
    idle = replace(truth, active=np.where(np.arange(len(truth.active)) == second, 0, truth.active))
    np.testing.assert_allclose(
        idle.perturbation_effects(levels(first, partner=second)),
        idle.perturbation_effects(levels(first)),
    )


def test_interactions_have_the_declared_spread(with_options):
    truth = with_options(interaction_spread=0.4, perturbations=300, embedding_size=30, genes=20)
    exponents = truth.embedding[1:] @ truth.interaction_map @ truth.embedding[1:].T
    off_diagonal = exponents[~np.eye(len(exponents), dtype=bool)]
    assert off_diagonal.std() == pytest.approx(0.4, rel=0.1)


def test_a_study_does_not_detect_the_declared_share_of_weak_genes(with_options):
    truth = with_options(undetected_share=0.2, studies=400, genes=200)
    undetected = np.isneginf(truth.study)
    weak = truth.baseline < np.median(truth.baseline)
    assert not undetected[:, ~weak].any()
    assert undetected[:, weak].mean() == pytest.approx(0.2, abs=4.5 * np.sqrt(0.16 / 40_000))
    np.testing.assert_allclose(truth.undetected_probability, 0.2 * weak)


def test_subpopulations_differ_around_the_mean_of_their_context(with_options):
    truth = with_options(subpopulations=4, genes=2000)
    assert truth.subpopulation.shape == (len(truth.context), 4, 2000)
    np.testing.assert_allclose(truth.subpopulation_share.sum(axis=1), 1, atol=1e-6)
    mean = np.einsum("cq,cqg->cg", truth.subpopulation_share, truth.subpopulation)
    np.testing.assert_allclose(mean, 0, atol=1e-6)
    assert truth.subpopulation.std() > 0.1


def test_names_of_two_perturbations_are_read_as_a_set(truth):
    names = truth.perturbations
    samples = pd.DataFrame({"perturbation": [names[0], names[3], f"{names[2]}|{names[1]}"]})
    assert truth.perturbations_in(samples).tolist() == [[0, 0], [3, 0], [2, 1]]


def test_effects_differ_between_contexts(truth):
    compound, contexts = active_perturbation(truth, "compound"), np.arange(len(truth.context))
    effects = truth.perturbation_effects(levels(compound, context=contexts))
    assert (np.abs(effects[1:] - effects[0]).max(axis=1) > 0.01).all()


def test_donor_effects_are_centred_within_a_stratum_and_have_the_declared_variance(params):
    settings = params.synthesize.model_copy(update={"genes": 500, "studies": 40})
    truth = draw_truth(settings, np.random.default_rng(0))
    np.testing.assert_allclose(truth.donor.mean(axis=2), 0, atol=1e-7)
    donors = truth.donor.shape[2]
    assert truth.donor.var() == pytest.approx(DONOR_SCALE**2 * (1 - 1 / donors), rel=0.02)
    assert truth.study.var() == pytest.approx(STUDY_SCALE**2, rel=0.05)


def test_healthy_has_no_disease_effect(truth):
    assert not truth.disease[:, 0].any()
    assert truth.disease[:, 1:].any()


def test_mean_probability_of_a_missing_age_is_the_declared_rate(truth):
    ages = np.arange(AGES[0], AGES[1] + 1)
    assert truth.age_missing_probability(ages).mean() == pytest.approx(float(truth.missing_age))


def present(truth: Truth) -> dict[str, np.ndarray]:
    """The arrays of a truth; those of settings that are off are absent."""
    arrays = {field.name: getattr(truth, field.name) for field in fields(Truth)}
    return {name: values for name, values in arrays.items() if values is not None}


def test_truth_survives_a_round_trip_through_its_file(truth, every_option, tmp_path):
    assert len(present(truth)) < len(present(every_option.truth)) == len(fields(Truth))
    for each in (truth, every_option.truth):
        each.save(tmp_path)
        loaded = present(Truth.load(tmp_path))
        assert loaded.keys() == present(each).keys()
        for name, values in present(each).items():
            np.testing.assert_array_equal(loaded[name], values)


def test_the_last_bit_of_a_processor_does_not_change_the_file(truth, tmp_path):
    """Exponentials and logarithms differ by a unit in the last place between instruction sets."""
    neighbours = {
        name: np.where(values == 0, values, np.nextafter(values, np.inf))
        for name, values in present(truth).items()
        if values.dtype.kind == "f"
    }
    truth.save(tmp_path / "here")
    replace(truth, **neighbours).save(tmp_path / "elsewhere")
    here, elsewhere = ((tmp_path / name / "parameters.npz") for name in ("here", "elsewhere"))
    assert neighbours and here.read_bytes() == elsewhere.read_bytes()


def test_the_headers_of_the_file_are_those_of_every_python(truth, tmp_path):
    """numpy.savez asks for large-file headers, which versions of Python write differently."""
    truth.save(tmp_path)
    with zipfile.ZipFile(tmp_path / "parameters.npz") as archive:
        members = archive.infolist()
    assert [Path(member.filename).stem for member in members] == list(present(truth))
    for member in members:
        assert (member.extract_version, member.extra) == (20, b"")
        assert member.date_time == (1980, 1, 1, 0, 0, 0)
