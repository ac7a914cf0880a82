"""One pass over the visible samples: sums, axes, and memory that does not grow with samples."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array
from sklearn.decomposition import PCA

from pipeline.gem.data.splits import TRAIN, VISIBLE
from pipeline.gem.evaluation.baselines import visible_samples
from pipeline.gem.evaluation.baselines.profiles import (
    Profiles,
    ProfileSums,
    SparseSums,
    one_hot,
)
from pipeline.gem.evaluation.baselines.visible_samples import VisibleSamples, principal_axes


def test_principal_axes_are_those_of_a_full_decomposition(rng):
    signal = rng.normal(0, 1, (300, 4)) @ rng.normal(0, 3, (4, 70))
    expression = (signal + rng.normal(0, 0.1, (300, 70))).astype(np.float32)
    axes = principal_axes(expression)
    assert axes.shape == (70, 50)
    np.testing.assert_allclose(axes.T @ axes, np.eye(50), atol=1e-4)
    reference = PCA(4, svd_solver="full").fit(expression.astype(float)).components_
    np.testing.assert_allclose(np.abs(np.sum(reference * axes[:, :4].T, axis=1)), 1, atol=1e-4)
    assert principal_axes(expression[:20, :8]).shape == (8, 8)


def test_one_pass_keeps_rows_of_all_visible_samples(cohort):
    expression = cohort.expression(VISIBLE)
    kept = np.array([0, 3, len(cohort.rows([TRAIN])), len(expression) - 1])
    visible = VisibleSamples.read(cohort, kept)
    assert visible.samples["sample_id"].tolist() == cohort.rows(VISIBLE)["sample_id"].tolist()
    np.testing.assert_array_equal(visible.kept[kept[[2, 0, 3, 2]]], expression[kept[[2, 0, 3, 2]]])


@pytest.mark.parametrize("most", [100, 10**6])
def test_axes_are_those_of_samples_spread_over_training_and_validation(cohort, monkeypatch, most):
    monkeypatch.setattr(visible_samples, "AXES_SAMPLES", most)
    expression = cohort.expression(VISIBLE)
    number = min(most, len(expression))
    rows = [row * len(expression) // number for row in range(number)]
    axes = VisibleSamples.read(cohort, np.empty(0, int)).axes
    np.testing.assert_array_equal(axes, principal_axes(expression[rows]))
    assert len(set(rows)) == number and rows[-1] > len(cohort.rows([TRAIN]))


def test_the_normal_equations_are_those_of_the_whole_centred_design(cohort):
    visible, expression = VisibleSamples.read(cohort, np.empty(0, int)), cohort.expression(VISIBLE)
    encoded = visible.identities.encode(visible.samples)
    parts = [group.matrix().toarray().astype(float) for group in encoded.values()]
    design = np.concatenate(parts, axis=1)
    centred = design - design.mean(axis=0)
    expected = centred.T @ (expression - expression.mean(axis=0, dtype=float))
    np.testing.assert_allclose(visible.equations.right(), expected, rtol=1e-7, atol=1e-4)
    np.testing.assert_allclose(visible.equations.gram.toarray(), design.T @ design, atol=1e-9)


@pytest.mark.parametrize("blocks", [1, 4])
def test_sums_do_not_depend_on_the_blocks(rng, blocks):
    weights = csr_array(rng.normal(size=(50, 9)) * (rng.random((50, 9)) < 0.3))
    values = rng.normal(size=(50, 4))
    sums = SparseSums(lambda rows: weights[rows], 9, 4)
    for block in np.array_split(values, blocks):
        sums.add(block)
    np.testing.assert_allclose(sums.values, weights.T @ values, atol=1e-12)


def test_a_code_of_minus_one_is_an_empty_row():
    expected = [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    np.testing.assert_array_equal(one_hot(np.array([1, -1, 0]), 3).toarray(), expected)


def table(rng, samples: int) -> pd.DataFrame:
    perturbation = rng.choice(["control", "x", "y"], samples)
    dose = np.where(perturbation == "x", rng.choice(["100 nM", "1 uM"], samples), None)
    return pd.DataFrame(
        {
            "study": rng.choice(["a", "b"], samples),
            "tissue": rng.choice(["liver", "lung", None], samples),
            "perturbation": perturbation,
            "perturbation_dose": dose,
        }
    )


def test_profiles_of_the_first_samples_are_those_of_a_table_without_the_others(dosed, rng):
    samples, expression = table(rng, 60), rng.normal(5, 1, (60, 3))
    sums = ProfileSums(dosed, samples, 3)
    sums.add(expression[:20])
    part = sums.profiles()
    sums.add(expression[20:])
    expected = [
        Profiles.of(dosed, samples[:stop], [expression[:stop]]) for stop in (20, len(samples))
    ]
    assert len(expected[0].groups.sizes) < len(expected[1].groups.sizes)
    for profiles, other in zip((part, sums.profiles()), expected, strict=True):
        pd.testing.assert_frame_equal(profiles.groups.samples, other.groups.samples)
        np.testing.assert_array_equal(profiles.groups.sizes, other.groups.sizes)
        np.testing.assert_allclose(profiles.groups.values, other.groups.values, atol=1e-12)
        assert profiles.control_groups == other.control_groups
        for field in ("sizes", "group"):
            own, others = (getattr(each.treated_cells, field) for each in (profiles, other))
            np.testing.assert_array_equal(own, others)
        squares = profiles.squares.loc[other.squares.index]
        np.testing.assert_allclose(squares, other.squares, atol=1e-12)


def test_shifts_are_the_means_of_differences_to_the_matched_controls(dosed, rng):
    samples, expression = table(rng, 200), rng.normal(5, 1, (200, 3))
    profiles, control = Profiles.of(dosed, samples, [expression]), samples["perturbation"]
    matched = profiles.control_means.lookup(
        [key.fillna("?") for key in keys_by_hand(samples, dosed)]
    )
    shifts = (expression - matched)[control == "x"]
    weights = csr_array((profiles.treated.samples["perturbation"] == "x").to_numpy()[None, :] * 1.0)
    weights = weights.multiply(profiles.treated.sizes / len(shifts)).tocsr()
    np.testing.assert_allclose(profiles.shifts.means(weights)[0], shifts.mean(axis=0), atol=1e-12)


def keys_by_hand(samples: pd.DataFrame, data) -> list[pd.Series]:
    context = samples[list(data.context_columns)].fillna("?").agg(" / ".join, axis=1)
    everything = pd.Series("all", index=samples.index)
    return [context + " / " + samples["study"], context, everything]


def peak(rng, dosed, samples: int) -> int:
    """Bytes of Python and numpy for the profiles of a table, beyond the table itself."""
    rows, block = table(rng, samples), rng.random((1000, 200), dtype=np.float32)
    tracemalloc.start()
    try:
        Profiles.of(dosed, rows, (block for _ in range(samples // len(block))))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_expression(rng, dosed):
    few, many = (peak(rng, dosed, samples) for samples in (2_000, 40_000))
    # 38,000 more samples: 30 MB of float32, and an index and keys of the table.
    assert many - few < 38_000 * 100
