"""Which genes are kept: by counts, by a list, by variance; of training alone, with what perturbations hit, always the same."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError
from pipeline.gem.preparation.gene_selection import read_gene_list, residual_variance, select_genes
from pipeline.gem.preparation.qc import summarise_counts

SAMPLES, GENES = 40, 30


class Counts:
    """A source in memory, in chunks of `rows`."""

    advice = "look elsewhere"

    def __init__(self, counts: np.ndarray, rows: int = 7):
        self.counts, self.rows = counts, rows
        self.samples = pd.DataFrame({"sample_id": [f"s{number}" for number in range(len(counts))]})
        self.genes = pd.DataFrame({"gene_id": [f"g{number}" for number in range(counts.shape[1])]})

    def chunks(self):
        for start in range(0, len(self.counts), self.rows):
            yield (
                np.arange(start, min(start + self.rows, len(self.counts))),
                self.counts[start : start + self.rows],
            )


@pytest.fixture
def declare(params):
    def with_changes(**changes) -> Data:
        return Data.model_validate(
            params.data.model_dump(mode="json")
            | {"source": "here", "min_gene_samples": 0}
            | changes
        )

    return with_changes


@pytest.fixture
def counts(rng) -> np.ndarray:
    """(40, 30) Poisson counts of unequal depth; gene 3 doubles in every second sample, gene 5 less so."""
    depth, mean = rng.uniform(0.5, 2, SAMPLES), np.linspace(2, 400, GENES)
    expected = depth[:, None] * mean
    expected[::2, 3] *= 4
    expected[::2, 5] *= 2
    return rng.poisson(expected)


ROLES = np.array(["train", "train", "train", "test", "validation"] * (SAMPLES // 5))
TRAINING = ROLES == "train"


def selected(
    counts: np.ndarray, data: Data, listed=None, targets=(), rows: int = 7
) -> tuple[list[str], list[str]]:
    source = Counts(counts, rows)
    kept, notes = select_genes(
        source, summarise_counts(source, ROLES, data), listed, set(targets), data
    )
    return source.genes["gene_id"][kept].tolist(), notes


# counts


def test_without_a_rule_every_gene_is_kept_and_nothing_is_said(counts, declare):
    counts[:, 4] = 0
    assert selected(counts, declare()) == ([f"g{number}" for number in range(GENES)], [])


def test_a_gene_needs_as_many_training_counts_as_are_asked_for(counts, declare):
    counts[:, :3] = 0
    (
        counts[np.flatnonzero(TRAINING)[0], 0],
        counts[np.flatnonzero(TRAINING)[0], 1],
        counts[~TRAINING, 2],
    ) = 9, 10, 500
    kept, notes = selected(counts, declare(min_gene_total=10))
    assert kept == ["g1", *(f"g{number}" for number in range(3, GENES))]
    assert notes == ["2 of 30 genes are left out: fewer than 10 counts over all training samples"]
    kept, notes = selected(counts, declare(min_gene_samples=1, min_gene_total=10))
    assert notes == [
        "1 of 30 genes are left out: counted in fewer than 1 training samples",
        "1 of 29 genes are left out: fewer than 10 counts over all training samples",
    ]


def test_a_minimum_that_no_gene_reaches_is_refused(counts, declare):
    with pytest.raises(
        InputError,
        match=r"no gene has 1000000 counts over the training samples; lower data.min_gene_total",
    ):
        selected(counts, declare(min_gene_total=10**6))


# variance


def test_the_variance_of_residuals_is_that_of_their_definition(counts, declare):
    source, genes = Counts(counts), np.arange(GENES) % 3 > 0
    census = summarise_counts(source, ROLES, declare())
    train = counts[TRAINING].astype(float)
    expected = train.sum(axis=1, keepdims=True) * train.sum(axis=0) / train.sum()
    residual = ((train - expected) / np.sqrt(expected + expected**2 / 100)).clip(
        -np.sqrt(len(train)), np.sqrt(len(train))
    )
    np.testing.assert_allclose(
        residual_variance(source, census, genes, declare()),
        residual[:, genes].var(axis=0),
        rtol=1e-10,
    )


def test_a_gene_as_constant_as_counting_allows_has_variance_near_one(rng, declare):
    counts = rng.negative_binomial(
        100, 100 / (100 + rng.uniform(0.5, 2, 1000)[:, None] * np.linspace(5, 500, 20))
    )
    source = Counts(counts, 100)
    variance = residual_variance(
        source,
        summarise_counts(source, np.full(1000, "train"), declare()),
        np.ones(20, dtype=bool),
        declare(),
    )
    assert np.abs(variance - 1).max() < 0.2


def test_the_most_variable_genes_are_those_that_differ_between_samples_and_not_the_loudest(
    counts, declare
):
    kept, notes = selected(counts, declare(highly_variable=2))
    assert kept == ["g3", "g5"]
    assert notes == [
        "28 of 30 genes are left out: not among the 2 whose Pearson residuals vary most between training samples"
    ]


def test_a_test_or_validation_sample_chooses_no_gene(counts, declare, rng):
    noisy = counts.copy()
    noisy[~TRAINING] = rng.integers(0, 5000, noisy[~TRAINING].shape)
    rules = declare(min_gene_samples=5, min_gene_total=100, highly_variable=7)
    assert selected(noisy, rules) == selected(counts, rules)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_choice_does_not_depend_on_the_chunks(counts, declare, rows):
    assert selected(counts, declare(highly_variable=9), rows=rows) == selected(
        counts, declare(highly_variable=9)
    )


def test_of_equally_variable_genes_the_first_are_kept(declare):
    counts = np.tile([[5, 5, 5, 5], [9, 9, 9, 9]], (SAMPLES // 2, 1))
    assert selected(counts, declare(highly_variable=2))[0] == ["g0", "g1"]


def test_more_variable_genes_than_there_are_means_all(counts, declare):
    assert selected(counts, declare(highly_variable=1000)) == selected(counts, declare())


def test_one_training_sample_has_no_variance(counts, declare):
    with pytest.raises(
        InputError, match=r"data.highly_variable needs two training samples at least"
    ):
        source = Counts(counts)
        census = summarise_counts(source, np.array(["train", *["test"] * (SAMPLES - 1)]), declare())
        select_genes(source, census, None, set(), declare(highly_variable=2))


# lists and targets


def test_a_list_keeps_its_genes_in_the_order_of_the_source(counts, declare):
    kept, notes = selected(counts, declare(), listed=["g9", "g2", "g2"])
    assert kept == ["g2", "g9"] and notes == ["28 of 30 genes are left out: not in data.gene_list"]


def test_a_silent_gene_of_the_list_is_left_out_by_name(counts, declare):
    counts[TRAINING, 2] = 0
    kept, notes = selected(counts, declare(min_gene_samples=3), listed=["g2", "g9"])
    assert (
        kept == ["g9"]
        and "genes g2 of data.gene_list are left out all the same: training counts them too little"
        in notes
    )
    with pytest.raises(InputError, match=r"no gene is left of data.gene_list"):
        selected(counts, declare(min_gene_samples=3), listed=["g2"])


def test_variable_genes_are_chosen_within_the_list(counts, declare):
    assert selected(counts, declare(highly_variable=1), listed=["g5", "g9"])[0] == ["g5"]


@pytest.mark.parametrize(
    "rule", [{"listed": ["g9"]}, {"highly_variable": 1}], ids=["list", "variance"]
)
def test_what_a_perturbation_hits_stays_with_the_chosen_unless_it_is_silent(counts, declare, rule):
    counts[TRAINING, 2] = 0
    listed = rule.get("listed")
    data = declare(min_gene_samples=3, highly_variable=rule.get("highly_variable"))
    kept, notes = selected(counts, data, listed, targets={"g2", "g7"})
    assert kept == sorted({"g7", "g9" if listed else "g3"}, key=lambda name: int(name[1:]))
    assert "genes g7 are kept beside these: perturbations of this cohort hit them" in notes


LISTS = {
    "genes.txt": lambda path: path.write_text("g1\n\n  g2 \ng2\n"),
    "genes": lambda path: path.write_text("g1\r\ng2\r\n"),
    "genes.csv": lambda path: path.write_text("symbol,gene_id\nA,g1\nB,g2\n,\n"),
    "genes.parquet": lambda path: pd.DataFrame({"gene_id": ["g1", "g2", None]}).to_parquet(path),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_every_form_names_the_same_genes(declare, tmp_path, name):
    LISTS[name](tmp_path / name)
    assert set(
        read_gene_list(declare(gene_list=str(tmp_path / name)), pd.Series(["g1", "g2", "g3"]))
    ) == {"g1", "g2"}


BAD_LISTS = [
    ("genes.txt", "g1\nG2\ng3.1\n", "genes G2, g3.1 are not in here"),
    ("genes.txt", "\n\n", "no gene; name one at least"),
    ("genes.txt", b"\xff\xfe\x00", "cannot be read as a list of genes"),
    ("genes.csv", "gene,symbol\ng1,A\n", "no column gene_id; found gene, symbol"),
    ("genes.csv", "", "not a CSV table"),
    ("genes.parquet", "g1\n", "not a Parquet table"),
    ("absent.txt", None, "absent; data.gene_list names it"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    BAD_LISTS,
    ids=[f"{name}: {message}" for name, _, message in BAD_LISTS],
)
def test_a_list_that_is_none_or_names_unknown_genes_is_refused(
    declare, tmp_path: Path, name, content, message
):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"{name}: {message}"):
        read_gene_list(declare(gene_list=str(tmp_path / name)), pd.Series(["g1", "g2", "g3"]))
