"""Effects of a synthetic cohort: dose, time, programs, direct effects, donors, and the file."""

import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
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


def levels(perturbation, dose=np.nan, time=np.nan, context=0) -> Levels:
    """Samples with these perturbations (index), doses (uM), times (hours) and contexts."""
    arrays = np.broadcast_arrays(perturbation, dose, time, context)
    perturbation, dose, time, context = (np.atleast_1d(array) for array in arrays)
    zero = np.zeros(perturbation.shape, dtype=np.int64)
    numbers = dose.astype(float), time.astype(float)
    return Levels(zero, context, zero, zero, zero, zero, perturbation, *numbers)


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
    program = no_target.predictable_program(levels(np.arange(1, len(truth.embedding)), context=1))
    np.testing.assert_allclose(program, expected, atol=1e-12)
    assert np.linalg.matrix_rank(expected) <= len(truth.mechanism)


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


def test_truth_survives_a_round_trip_through_its_file(truth, tmp_path):
    truth.save(tmp_path)
    loaded = Truth.load(tmp_path)
    for field in fields(Truth):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(truth, field.name))


def test_the_last_bit_of_a_processor_does_not_change_the_file(truth, tmp_path):
    """Exponentials and logarithms differ by a unit in the last place between instruction sets."""
    neighbours = {
        field.name: np.where(values == 0, values, np.nextafter(values, np.inf))
        for field in fields(Truth)
        if (values := getattr(truth, field.name)).dtype.kind == "f"
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
    assert [Path(member.filename).stem for member in members] == [f.name for f in fields(Truth)]
    for member in members:
        assert (member.extract_version, member.extra) == (20, b"")
        assert member.date_time == (1980, 1, 1, 0, 0, 0)
