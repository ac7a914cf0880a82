"""Gene selection by counts, list and variance, from training samples only; targets are kept."""

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError
from pipeline.gem.preparation.gene_selection import residual_variance, select_genes
from pipeline.gem.preparation.qc import summarise_counts

SAMPLES, GENES = 40, 30
ROLES = np.array(["train", "train", "train", "test", "validation"] * (SAMPLES // 5))
TRAINING = ROLES == "train"


class ArraySource:
    """A source in memory, in chunks of `rows`."""

    advice = "look elsewhere"

    def __init__(self, counts: np.ndarray, rows: int = 7):
        self.counts, self.rows = counts, rows
        self.samples = pd.DataFrame({"sample_id": [f"s{number}" for number in range(len(counts))]})
        self.genes = pd.DataFrame({"gene_id": [f"g{number}" for number in range(counts.shape[1])]})

    def chunks(self):
        for start in range(0, len(self.counts), self.rows):
            counts = self.counts[start : start + self.rows]
            yield np.arange(start, start + len(counts)), counts


@pytest.fixture
def declare(params):
    def with_changes(**changes) -> Data:
        values = params.data.model_dump(mode="json") | {"source": "here", "min_gene_samples": 0}
        return Data.model_validate(values | changes)

    return with_changes


@pytest.fixture
def counts(rng) -> np.ndarray:
    """(40, 30) Poisson counts of unequal depth; genes 3 and 5 are higher in every second sample."""
    depth, mean = rng.uniform(0.5, 2, SAMPLES), np.linspace(2, 400, GENES)
    expected = depth[:, None] * mean
    expected[::2, 3] *= 4
    expected[::2, 5] *= 2
    return rng.poisson(expected)


def select(
    counts: np.ndarray, data: Data, gene_list=None, targets=(), rows: int = 7, roles=ROLES
) -> tuple[list[str], list[str]]:
    """(names of the kept genes, notes)"""
    source = ArraySource(counts, rows)
    summary = summarise_counts(source, roles, data)
    kept, notes = select_genes(source, summary, gene_list, set(targets), data)
    return source.genes["gene_id"][kept].tolist(), notes


# counts


def test_without_a_rule_every_gene_is_kept_without_notes(counts, declare):
    counts[:, 4] = 0
    assert select(counts, declare()) == ([f"g{number}" for number in range(GENES)], [])


def test_genes_below_the_minimum_of_training_counts_are_excluded(counts, declare):
    counts[:, :3] = 0
    counts[np.flatnonzero(TRAINING)[0], :2] = 9, 10
    counts[~TRAINING, 2] = 500
    kept, notes = select(counts, declare(min_gene_total=10))
    assert kept == ["g1", *(f"g{number}" for number in range(3, GENES))]
    assert notes == ["2 of 30 genes excluded: fewer than 10 counts over all training samples"]
    assert select(counts, declare(min_gene_samples=1, min_gene_total=10))[1] == [
        "1 of 30 genes excluded: detected in fewer than 1 training samples",
        "1 of 29 genes excluded: fewer than 10 counts over all training samples",
    ]


def test_a_minimum_that_no_gene_reaches_is_refused(counts, declare):
    message = r"no gene has 1000000 counts over the training samples; lower data.min_gene_total"
    with pytest.raises(InputError, match=message):
        select(counts, declare(min_gene_total=10**6))


# variance


def test_residual_variance_agrees_with_its_definition(counts, declare):
    source, genes = ArraySource(counts), np.arange(GENES) % 3 > 0
    summary = summarise_counts(source, ROLES, declare())
    train = counts[TRAINING].astype(float)
    expected = train.sum(axis=1, keepdims=True) * train.sum(axis=0) / train.sum()
    residual = (train - expected) / np.sqrt(expected + expected**2 / 100)
    residual = residual.clip(-np.sqrt(len(train)), np.sqrt(len(train)))
    variance = residual_variance(source, summary, genes, declare())
    np.testing.assert_allclose(variance, residual[:, genes].var(axis=0), rtol=1e-10)


def test_residual_variance_is_near_one_without_biological_variation(rng, declare):
    mean = rng.uniform(0.5, 2, 1000)[:, None] * np.linspace(5, 500, 20)
    source = ArraySource(rng.negative_binomial(100, 100 / (100 + mean)), 100)
    summary = summarise_counts(source, np.full(1000, "train"), declare())
    variance = residual_variance(source, summary, np.ones(20, dtype=bool), declare())
    assert np.abs(variance - 1).max() < 0.2


def test_the_most_variable_genes_are_kept_and_not_the_most_expressed(counts, declare):
    kept, notes = select(counts, declare(highly_variable=2))
    assert kept == ["g3", "g5"]
    assert notes == [
        "28 of 30 genes excluded: not among the 2 with the highest variance of Pearson residuals "
        "over training samples"
    ]


def test_test_and_validation_counts_do_not_influence_the_selection(counts, declare, rng):
    noisy = counts.copy()
    noisy[~TRAINING] = rng.integers(0, 5000, noisy[~TRAINING].shape)
    rules = declare(min_gene_samples=5, min_gene_total=100, highly_variable=7)
    assert select(noisy, rules) == select(counts, rules)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_selection_does_not_depend_on_the_chunks(counts, declare, rows):
    rules = declare(highly_variable=9)
    assert select(counts, rules, rows=rows) == select(counts, rules)


def test_the_first_of_equally_variable_genes_are_kept(declare):
    counts = np.tile([[5, 5, 5, 5], [9, 9, 9, 9]], (SAMPLES // 2, 1))
    assert select(counts, declare(highly_variable=2))[0] == ["g0", "g1"]


def test_a_number_above_that_of_genes_keeps_all(counts, declare):
    assert select(counts, declare(highly_variable=1000)) == select(counts, declare())


def test_variance_of_one_training_sample_is_refused(counts, declare):
    roles = np.array(["train", *["test"] * (SAMPLES - 1)])
    with pytest.raises(InputError, match=r"data.highly_variable needs at least two"):
        select(counts, declare(highly_variable=2), roles=roles)


# lists and targets


def test_listed_genes_are_kept_in_the_order_of_the_source(counts, declare):
    kept, notes = select(counts, declare(), gene_list=["g9", "g2", "g2"])
    assert kept == ["g2", "g9"] and notes == ["28 of 30 genes excluded: not in data.gene_list"]


def test_an_undetected_gene_of_the_list_is_excluded_by_name(counts, declare):
    counts[TRAINING, 2] = 0
    kept, notes = select(counts, declare(min_gene_samples=3), gene_list=["g2", "g9"])
    assert kept == ["g9"]
    assert "genes g2 of data.gene_list excluded: too few counts in training" in notes
    with pytest.raises(InputError, match=r"no gene of data.gene_list is left"):
        select(counts, declare(min_gene_samples=3), gene_list=["g2"])


def test_variable_genes_are_selected_within_the_list(counts, declare):
    assert select(counts, declare(highly_variable=1), gene_list=["g5", "g9"])[0] == ["g5"]


@pytest.mark.parametrize(
    ("gene_list", "highly_variable", "kept"), [(["g9"], None, "g9"), (None, 1, "g3")]
)
def test_detected_targets_are_kept_in_addition(counts, declare, gene_list, highly_variable, kept):
    counts[TRAINING, 2] = 0
    data = declare(min_gene_samples=3, highly_variable=highly_variable)
    names, notes = select(counts, data, gene_list, targets={"g2", "g7"})
    assert set(names) == {"g7", kept}
    assert "genes g7 kept as targets of perturbations" in notes
