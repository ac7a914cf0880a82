"""Reference samples: forms of files, matching of genes, checks."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from pipeline.gem.common.errors import InputError
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.prediction import reference_samples
from pipeline.gem.prediction.reference_samples import ReferenceFile


def write_h5ad(counts: pd.DataFrame, folder: Path) -> Path:
    obs, var = pd.DataFrame(index=counts.index), pd.DataFrame(index=counts.columns)
    anndata.AnnData(counts.to_numpy(np.float32), obs, var).write_h5ad(folder / "x.h5ad")
    return folder / "x.h5ad"


def write_wide(counts: pd.DataFrame, folder: Path) -> Path:
    table = counts.reset_index().assign(total=1, age_years=30, remark="text")
    table.to_parquet(folder / "x.parquet", index=False)
    return folder / "x.parquet"


def write_lists(counts: pd.DataFrame, folder: Path, name: str = "x") -> Path:
    lists = pd.DataFrame({"sample_id": counts.index, "counts": list(counts.to_numpy())})
    lists.to_parquet(folder / f"{name}.parquet", index=False)
    genes = pd.DataFrame({"gene_id": counts.columns})
    genes.to_parquet(folder / f"{name}.genes.parquet", index=False)
    return folder / f"{name}.parquet"


def write_folder(counts: pd.DataFrame, folder: Path) -> Path:
    (folder / "counts").mkdir()
    lists = write_lists(counts, folder, "genes")
    (folder / "genes.genes.parquet").rename(folder / "genes_only.parquet")
    lists.rename(folder / "counts" / "all.parquet")
    (folder / "genes_only.parquet").rename(folder / "genes.parquet")
    counts.index.to_frame().to_parquet(folder / "samples.parquet", index=False)
    return folder


@pytest.mark.parametrize("write", [write_h5ad, write_wide, write_lists, write_folder])
def test_every_form_of_a_file_has_the_same_samples(tmp_path, gem, reference, write, monkeypatch):
    monkeypatch.setattr(reference_samples, "CHUNK_VALUES", 2 * len(gem.genes))
    samples = ReferenceFile.open(write(reference, tmp_path), gem)
    assert samples.names.tolist() == reference.index.tolist()
    expected = log_cpm(reference.to_numpy(), reference.sum(axis=1).to_numpy())
    np.testing.assert_array_equal(samples.read(), expected)


def test_genes_are_matched_by_name_and_surplus_genes_count_in_the_totals(gem, reference, caplog):
    permuted = reference.iloc[:, ::-1].assign(foreign=reference.sum(axis=1))
    expression = ReferenceFile.of_frame(permuted, gem).read()
    totals = 2 * reference.sum(axis=1).to_numpy()
    np.testing.assert_array_equal(expression, log_cpm(reference.to_numpy(), totals))
    assert "1 genes are unknown to the model; they count in the totals only: foreign" in caplog.text
    assert "another order" in caplog.text


def test_missing_genes_are_listed(gem, reference):
    message = (
        rf"6 of the model's {len(gem.genes)} genes are missing: "
        rf"{', '.join(reference.columns[:5])}; 1 unknown to the model: x"
    )
    with pytest.raises(InputError, match=message):
        ReferenceFile.of_frame(reference.iloc[:, 6:].assign(x=1), gem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda counts: pd.concat([counts, counts.iloc[:, :1]], axis=1),
            "gene_id .* more than once",
        ),
        (lambda counts: counts.iloc[[0, 0]], "sample_id .* more than once"),
        (lambda counts: counts.head(0), "no samples"),
        (lambda counts: counts * 0, "have no counts"),
        (lambda counts: counts + 0.5, "fractional"),
    ],
)
def test_counts_that_are_not_usable_are_refused(gem, reference, change, message):
    with pytest.raises(InputError, match=message):
        ReferenceFile.of_frame(change(reference), gem).read()


def test_a_layer_that_an_h5ad_lacks_is_reported_by_the_name_of_the_option(tmp_path, gem, reference):
    path = write_h5ad(reference, tmp_path)
    with pytest.raises(InputError, match="no layer 'raw'; --layer can be"):
        ReferenceFile.open(path, gem, "raw")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder / "x.h5ad", "absent"),
        (lambda folder: write(folder / "x.txt"), "neither a folder nor .h5ad nor .parquet"),
        (lambda folder: write(folder / "x.parquet"), "cannot be read"),
    ],
)
def test_a_file_that_is_no_reference_is_refused(tmp_path, gem, prepare, message):
    with pytest.raises(InputError, match=message):
        ReferenceFile.open(prepare(tmp_path), gem)


def write(path: Path) -> Path:
    path.write_bytes(b"text")
    return path


def test_a_table_of_lists_needs_its_genes(tmp_path, gem, reference):
    path = write_lists(reference, tmp_path)
    (tmp_path / "x.genes.parquet").unlink()
    with pytest.raises(InputError, match=r"x\.genes\.parquet: absent; it names the genes"):
        ReferenceFile.open(path, gem)
