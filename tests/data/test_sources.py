"""Sources of raw counts: Parquet and AnnData say the same, bad counts are named, the input is never written to."""

import os
import re
import stat
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import GemError, InputError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import MAX_COUNT, check_counts, open_source
from pipeline.gem.preparation.prepare import write_cohort

SAMPLES, GENES = 60, 12


@pytest.fixture
def declare(params):
    """data of params.yaml for the columns of `table`, with changes."""

    def with_changes(source: Path, **changes) -> Data:
        kinds = {
            "technical": {"study": {"kind": "categorical"}},
            "biological": {
                "tissue": {"kind": "categorical"},
                "age": {"kind": "numeric", "scale": "linear"},
            },
            "perturbation": {"perturbation": {"kind": "categorical"}},
        }
        values = params.data.model_dump(mode="json") | {
            "source": str(source),
            "covariates": kinds,
            "context_columns": ["tissue"],
        }
        return Data.model_validate(values | {"date_column": "date", "target_gene": None} | changes)

    return with_changes


def table(samples: int = SAMPLES) -> pd.DataFrame:
    number = np.arange(samples)
    return pd.DataFrame(
        {
            "sample_id": [f"s{index:02d}" for index in number],
            "study": [f"study{index % 6}" for index in number],
            "tissue": [f"tissue{index % 3}" for index in number],
            "perturbation": np.array(["control", "a", "b", "c", "d"])[number // 6 % 5],
            "age": (20.0 + number % 50),
            "date": [f"{2010 + index % 6}-01-01" for index in number],
        }
    )


def poisson(samples: int = SAMPLES, genes: int = GENES) -> np.ndarray:
    return np.random.default_rng(1).poisson(5, (samples, genes)).astype(np.int32) + 1


def write_counts(path: Path, names, counts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(
            {
                "sample_id": list(names),
                "counts": counts if isinstance(counts, pa.Array) else list(counts),
            }
        ),
        path,
    )


def write_parquet(folder: Path, samples: pd.DataFrame, counts: np.ndarray, genes=None) -> Path:
    folder.mkdir()
    samples.to_parquet(folder / "samples.parquet", index=False)
    pd.DataFrame(
        {"gene_id": [f"g{index}" for index in range(counts.shape[1])] if genes is None else genes}
    ).to_parquet(folder / "genes.parquet", index=False)
    write_counts(folder / "counts" / "counts-0.parquet", samples["sample_id"], counts)
    return folder


def write_h5ad(
    path: Path,
    samples: pd.DataFrame,
    counts,
    layers=None,
    genes=None,
    index: str | None = "sample_id",
    raw=None,
) -> Path:
    """`raw` are counts of genes g0, g1, ... of its own, as after a selection of genes in X."""
    var = pd.DataFrame(index=[f"g{number}" for number in range(GENES)] if genes is None else genes)
    obs = (
        samples.set_index(index)
        if index
        else samples.set_axis([f"row{number}" for number in range(len(samples))])
    )
    obs.index = obs.index.astype(str)
    table = anndata.AnnData(X=counts, obs=obs, var=var, layers=layers)
    if raw is not None:
        table.raw = anndata.AnnData(
            X=raw, obs=obs, var=pd.DataFrame(index=[f"g{number}" for number in range(raw.shape[1])])
        )
    table.write_h5ad(path)
    return path


def anndata_group(path: Path, place: str | None):
    """The matrix on disk."""
    return h5py.File(path, "r")[{None: "X", ".raw": "raw/X"}.get(place, f"layers/{place}")]


def prepared(data: Data, splits, folder: Path) -> Cohort:
    write_cohort(open_source(data), data, splits, folder)
    return Cohort(folder)


def refused(data: Data, splits, folder: Path) -> str:
    with pytest.raises(GemError) as caught:
        write_cohort(open_source(data), data, splits, folder / "refused")
    assert not (folder / "refused" / "manifest.json").exists()
    return str(caught.value)


# AnnData and Parquet


@pytest.mark.parametrize(
    "stored",
    ["csr", "csc", "dense", "int64", "layer", "dense layer", "raw", "dense raw", "column of names"],
)
def test_an_h5ad_gives_the_same_cohort_as_parquet(declare, params, tmp_path, stored):
    samples, counts = table(), poisson()
    real, log = counts.astype(np.float32), np.log1p(counts)
    data = declare(tmp_path / "source.h5ad", date_column=None)
    match stored:
        case "csr":
            write_h5ad(tmp_path / "source.h5ad", samples, scipy.sparse.csr_matrix(real))
        case "csc":
            write_h5ad(tmp_path / "source.h5ad", samples, scipy.sparse.csc_matrix(real))
        case "dense":
            write_h5ad(tmp_path / "source.h5ad", samples, real)
        case "int64":
            write_h5ad(tmp_path / "source.h5ad", samples, counts.astype(np.int64))
        case "layer":
            write_h5ad(
                tmp_path / "source.h5ad", samples, log, {"raw": scipy.sparse.csr_matrix(real)}
            )
            data = declare(tmp_path / "source.h5ad", layer="raw", date_column=None)
        case "dense layer":
            write_h5ad(tmp_path / "source.h5ad", samples, None, {"raw": counts})
            data = declare(tmp_path / "source.h5ad", layer="raw", date_column=None)
        case "raw" | "dense raw":
            matrix = real if stored == "dense raw" else scipy.sparse.csr_matrix(real)
            write_h5ad(
                tmp_path / "source.h5ad", samples, log[:, 3:6], genes=["g3", "g4", "g5"], raw=matrix
            )
            data = declare(tmp_path / "source.h5ad", layer=".raw", date_column=None)
        case "column of names":
            write_h5ad(tmp_path / "source.h5ad", samples, real, index=None)
            data = declare(tmp_path / "source.h5ad", sample_id="sample_id", date_column=None)
    one = prepared(data, params.splits, tmp_path / "one")
    other = prepared(
        declare(write_parquet(tmp_path / "folder", samples, counts), date_column=None),
        params.splits,
        tmp_path / "other",
    )
    assert one.genes.tolist() == other.genes.tolist()
    pd.testing.assert_frame_equal(
        one.samples, other.samples, check_dtype=False, check_categorical=False
    )
    for role in ("train", "test_random"):
        assert np.array_equal(one.counts([role]), other.counts([role]))
    assert one.manifest["shards"] == other.manifest["shards"]
    assert one.train_validation_sha256 == other.train_validation_sha256


def test_dates_of_an_h5ad_order_the_studies_as_those_of_parquet_do(declare, params, tmp_path):
    """AnnData turns a column of repeated text into a categorical one."""
    splits = params.splits.model_copy(update={"study": 0.2})
    one = prepared(
        declare(write_h5ad(tmp_path / "source.h5ad", table(), poisson())), splits, tmp_path / "one"
    )
    other = prepared(
        declare(write_parquet(tmp_path / "folder", table(), poisson())), splits, tmp_path / "other"
    )
    assert one.samples["split"].tolist() == other.samples["split"].tolist()


def test_without_a_column_of_names_the_obs_index_names_the_samples(declare, params, tmp_path):
    samples = table().assign(sample_id=[str(number) for number in range(SAMPLES)])
    write_h5ad(tmp_path / "source.h5ad", samples, poisson())
    cohort = prepared(
        declare(tmp_path / "source.h5ad", date_column=None), params.splits, tmp_path / "cohort"
    )
    assert cohort.samples["sample_id"].tolist() == samples["sample_id"].tolist()


def test_a_declared_column_of_names_may_stand_beside_another_named_sample_id(
    declare, params, tmp_path
):
    samples = table().assign(name=[f"name{number}" for number in range(SAMPLES)])
    write_h5ad(tmp_path / "source.h5ad", samples, poisson(), index=None)
    data = declare(tmp_path / "source.h5ad", sample_id="name", date_column=None)
    try:
        cohort = prepared(data, params.splits, tmp_path / "cohort")
    except InputError as error:
        assert "sample_id" in str(error)
    else:
        assert cohort.samples["sample_id"].tolist() == samples["name"].tolist()


def test_a_mistyped_column_of_names_is_refused(declare, tmp_path):
    write_h5ad(
        tmp_path / "source.h5ad",
        table().rename(columns={"sample_id": "sample_name"}),
        poisson(),
        index=None,
    )
    with pytest.raises(InputError, match="smaple_name"):
        open_source(declare(tmp_path / "source.h5ad", sample_id="smaple_name"))


def test_a_declared_column_of_names_names_the_samples_of_a_folder_too(declare, params, tmp_path):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    table().rename(columns={"sample_id": "name"}).to_parquet(
        folder / "samples.parquet", index=False
    )
    cohort = prepared(declare(folder, sample_id="name"), params.splits, tmp_path / "cohort")
    assert cohort.samples["sample_id"].tolist() == table()["sample_id"].tolist()
    with pytest.raises(InputError, match=r"no column nmae; did you mean name\?"):
        open_source(declare(folder, sample_id="nmae"))


def test_a_wrong_layer_is_refused_with_the_layers_there_are(declare, tmp_path):
    write_h5ad(
        tmp_path / "source.h5ad", table(), poisson(), {"raw": poisson(), "spliced": poisson()}
    )
    with pytest.raises(InputError, match=r"no layer 'rwa'.*raw, spliced"):
        open_source(declare(tmp_path / "source.h5ad", layer="rwa"))


def test_a_layer_called_raw_and_the_raw_of_a_file_are_two_things(declare, tmp_path):
    layer, raw = poisson(), poisson() + 1000
    path = write_h5ad(tmp_path / "source.h5ad", table(), np.log1p(layer), {"raw": layer}, raw=raw)
    for name, expected in (("raw", layer), (".raw", raw)):
        assert np.array_equal(
            np.concatenate(
                [counts for _, counts in open_source(declare(path, layer=name)).chunks()]
            ),
            expected,
        )


def test_a_layer_that_cannot_be_told_from_raw_is_refused(declare, tmp_path):
    path = write_h5ad(
        tmp_path / "source.h5ad", table(), poisson(), {".raw": poisson()}, raw=poisson()
    )
    with pytest.raises(
        InputError, match=r"\.raw names a layer and the \.raw of this file; rename the layer"
    ):
        open_source(declare(path, layer=".raw"))


def test_a_matrix_that_is_not_there_is_refused_with_those_that_are(declare, tmp_path):
    with_raw = write_h5ad(tmp_path / "raw.h5ad", table(), poisson(), raw=poisson())
    with pytest.raises(InputError, match=r"no layer 'raw'; data.layer can be null, \.raw$"):
        open_source(declare(with_raw, layer="raw"))
    without = write_h5ad(tmp_path / "layer.h5ad", table(), poisson(), {"counts": poisson()})
    with pytest.raises(InputError, match=r"no \.raw; data.layer can be null, counts$"):
        open_source(declare(without, layer=".raw"))
    with pytest.raises(
        InputError, match=r"no X, and data.layer is null; data.layer can be nothing"
    ):
        open_source(declare(write_h5ad(tmp_path / "empty.h5ad", table(), None)))


@pytest.mark.parametrize("bad", [-1.0, 2.5, np.nan], ids=["negative", "fractional", "not finite"])
def test_counts_that_are_not_raw_are_refused_with_the_matrices_that_may_be(
    declare, params, tmp_path, bad
):
    counts = poisson().astype(np.float32)
    counts[2, 2] = bad
    path = write_h5ad(
        tmp_path / "source.h5ad",
        table(),
        counts,
        {"counts": poisson(), "log": counts},
        raw=poisson(),
    )
    for layer, others in ((None, "counts, log, .raw"), ("log", "null, counts, .raw")):
        assert refused(
            declare(path, layer=layer, date_column=None), params.splits, tmp_path
        ).endswith(f"point data.layer at the raw counts: {others}")
    alone = write_h5ad(tmp_path / "alone.h5ad", table(), counts)
    assert "this file holds no other matrix" in refused(
        declare(alone, date_column=None), params.splits, tmp_path
    )
    folder = write_parquet(tmp_path / "folder", table(), counts)
    assert f"write the raw counts into {folder / 'counts'}" in refused(
        declare(folder), params.splits, tmp_path
    )


def test_log_normalised_counts_of_an_h5ad_name_the_layer_of_raw_counts(declare, params, tmp_path):
    path = write_h5ad(
        tmp_path / "source.h5ad",
        table(),
        scipy.sparse.csr_matrix(np.log1p(poisson())),
        {"counts": poisson()},
    )
    said = refused(declare(path, date_column=None), params.splits, tmp_path)
    assert said.endswith("looks log-normalised: point data.layer at the raw counts: counts")


@pytest.mark.parametrize(
    "form",
    [np.asarray, scipy.sparse.csr_matrix, scipy.sparse.csc_matrix],
    ids=["dense", "csr", "csc"],
)
@pytest.mark.parametrize("place", [None, "counts", ".raw"], ids=["X", "layer", "raw"])
def test_counts_are_read_in_chunks_from_every_place_and_form(
    declare, tmp_path, monkeypatch, form, place
):
    counts = poisson().astype(np.float32)
    layers, raw = (
        ({"counts": form(counts)} if place == "counts" else None),
        (form(counts) if place == ".raw" else None),
    )
    path = write_h5ad(
        tmp_path / "source.h5ad",
        table(),
        form(counts) if place is None else np.log1p(counts),
        layers,
        raw=raw,
    )
    read = []
    if form is not np.asarray:
        kind = type(anndata.io.sparse_dataset(anndata_group(path, place)))
        whole = kind.__getitem__
        monkeypatch.setattr(
            kind, "__getitem__", lambda matrix, index: read.append(whole(matrix, index)) or read[-1]
        )
    monkeypatch.setattr("pipeline.gem.data.sources.CHUNK_VALUES", 7 * GENES)
    chunks = list(open_source(declare(path, layer=place)).chunks())
    assert [len(rows) for rows, _ in chunks] == [7] * 8 + [4]
    assert np.array_equal(np.concatenate([block for _, block in chunks]), counts)
    assert all(np.prod(part.shape) <= 7 * GENES for part in read) and bool(read) == (
        form is not np.asarray
    )


ODD = {
    "ordered": pd.Categorical(
        ["low", "high"] * (SAMPLES // 2), categories=["none", "low", "high"], ordered=True
    ),
    "booleans": pd.array([True, False, None] * (SAMPLES // 3), dtype="boolean"),
    "integers": pd.array([1, 2, None] * (SAMPLES // 3), dtype="Int64"),
    "text": pd.array(["x", "y", None] * (SAMPLES // 3), dtype="string"),
    "categories of numbers": pd.Categorical([1, 2, None] * (SAMPLES // 3)),
}


@pytest.mark.parametrize("column", ODD.values(), ids=ODD)
def test_an_obs_column_of_every_type_is_a_covariate_a_context_and_a_control(
    declare, params, tmp_path, column
):
    """What is missing stays missing, and says the same as in a folder of Parquet files."""
    samples = table().assign(tissue=column)
    value = str(column[1])
    declared = {
        "date_column": None,
        "control": {"column": "tissue", "value": value},
        "context_columns": ["tissue"],
    }
    with anndata.settings.override(allow_write_nullable_strings=True):
        write_h5ad(tmp_path / "source.h5ad", samples, poisson())
    one = prepared(declare(tmp_path / "source.h5ad", **declared), params.splits, tmp_path / "one")
    other = prepared(
        declare(write_parquet(tmp_path / "folder", samples, poisson()), **declared),
        params.splits,
        tmp_path / "other",
    )
    assert one.samples["tissue"].tolist() == [
        None if pd.isna(cell) else str(cell) for cell in column
    ]
    assert (
        one.manifest["missing"] == other.manifest["missing"]
        and one.train_validation_sha256 == other.train_validation_sha256
    )
    assert value in one.rows(["train"])["tissue"].tolist()


def test_a_matrix_that_does_not_fit_its_tables_is_refused(declare, tmp_path):
    path = write_h5ad(tmp_path / "source.h5ad", table(), poisson())
    with h5py.File(path, "a") as file:
        del file["X"]
        file["X"] = poisson()[:, :5]
    with pytest.raises(
        InputError, match=r"counts of shape \(60, 5\); expected samples x genes, \(60, 12\)"
    ):
        open_source(declare(path))


def test_an_h5ad_without_x_says_so(declare, params, tmp_path):
    write_h5ad(tmp_path / "source.h5ad", table(), None, {"raw": poisson()})
    assert "data.layer" in refused(
        declare(tmp_path / "source.h5ad", date_column=None), params.splits, tmp_path
    )


def test_duplicate_names_are_refused_in_both_kinds(declare, params, tmp_path):
    genes = ["g0", "g1", "g0", *(f"g{number}" for number in range(3, GENES))]
    samples = table().assign(sample_id=["s00", "s00", *table()["sample_id"][2:]])
    with pytest.warns(UserWarning, match="names are not unique"):
        write_h5ad(tmp_path / "source.h5ad", samples, poisson(), genes=genes)
    folder = write_parquet(tmp_path / "folder", samples, poisson(), genes)
    for path in (tmp_path / "source.h5ad", folder):
        message = refused(declare(path, date_column=None), params.splits, tmp_path)
        assert (
            "sample_id s00 stands more than once" in message
            and "gene_id g0 stands more than once" in message
        )


@pytest.mark.parametrize("content", [b"", b"not HDF5", None])
def test_a_file_that_is_no_anndata_is_refused_by_name(declare, tmp_path, content):
    path = tmp_path / "source.h5ad"
    if content is None:
        h5py.File(path, "w").close()
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"source\.h5ad"):
        open_source(declare(path))


# parts that are missing


@pytest.mark.parametrize("part", ["samples.parquet", "genes.parquet", "counts"])
def test_a_missing_part_of_a_folder_is_named(declare, tmp_path, part):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(InputError, match=rf"{re.escape(part)}: absent"):
        open_source(declare(folder))


@pytest.mark.parametrize("name", ["absent", "absent.h5ad", "file.txt"])
def test_a_source_that_is_neither_folder_nor_h5ad_is_refused(declare, tmp_path, name):
    (tmp_path / "file.txt").write_text("counts")
    with pytest.raises(InputError, match=f"data.source: .*{name}"):
        open_source(declare(tmp_path / name))


@pytest.mark.parametrize(
    ("file", "key"), [("samples.parquet", "sample_id"), ("genes.parquet", "gene_id")]
)
def test_a_table_without_its_names_says_which_columns_it_has(declare, tmp_path, file, key):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    pd.DataFrame({"name": ["x"]}).to_parquet(folder / file)
    with pytest.raises(InputError, match=f"{file}: no column {key}; known: name"):
        open_source(declare(folder))


@pytest.mark.parametrize("file", ["samples.parquet", "genes.parquet"])
def test_an_empty_file_is_refused_by_name(declare, tmp_path, file):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    (folder / file).write_bytes(b"")
    with pytest.raises(InputError, match=rf"{re.escape(file)}: cannot be read"):
        open_source(declare(folder))


# bad counts

BAD = [
    (-1, np.int32, "count -1 is negative"),
    (-1.0, np.float32, "count -1.0 is negative"),
    (60.5, np.float32, "count 60.5 is fractional; expected raw counts"),
    (np.nan, np.float64, "count nan is not finite"),
    (np.inf, np.float32, "count inf is not finite"),
    (-np.inf, np.float32, "count -inf is not finite"),
    (2**24 + 1, np.int32, "count 16777217 is above 2^24"),
    (2**63, np.uint64, "count 9223372036854775808 is above 2^24"),
]


@pytest.mark.parametrize(("value", "dtype", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_count_is_named_by_sample_gene_and_value(
    declare, params, tmp_path, value, dtype, message
):
    counts = poisson().astype(dtype)
    counts[7, 3] = value
    folder = write_parquet(tmp_path / "folder", table(), counts)
    assert f"sample s07, gene g3: {message}" in refused(declare(folder), params.splits, tmp_path)


@pytest.mark.parametrize("value", [-1.0, 60.5, np.nan])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_bad_count_of_an_h5ad_is_named_by_sample_gene_and_value(
    declare, params, tmp_path, value, sparse
):
    counts = poisson().astype(np.float32)
    counts[7, 3] = value
    write_h5ad(
        tmp_path / "source.h5ad", table(), scipy.sparse.csr_matrix(counts) if sparse else counts
    )
    assert f"sample s07, gene g3: count {value}" in refused(
        declare(tmp_path / "source.h5ad", date_column=None), params.splits, tmp_path
    )


def test_log_normalised_counts_are_called_so(declare, params, tmp_path):
    folder = write_parquet(tmp_path / "folder", table(), np.log1p(poisson()))
    assert "looks log-normalised" in refused(declare(folder), params.splits, tmp_path)


def test_the_highest_count_is_allowed_and_one_more_is_not():
    names = np.array(["a"])
    assert check_counts(np.array([[MAX_COUNT]]), names, names, "x", "advice").tolist() == [
        [MAX_COUNT]
    ]
    with pytest.raises(InputError):
        check_counts(np.array([[MAX_COUNT + 1]]), names, names, "x", "advice")


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int64, np.uint64, np.float32, np.float64, bool]
)
def test_whole_counts_of_every_type_are_the_same_counts(dtype):
    checked = check_counts(
        np.array([[0, 1]], dtype=dtype), np.array(["s"]), np.array(["a", "b"]), "x", "advice"
    )
    assert checked.dtype == np.int64 and checked.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "counts", [np.array([["1", "2"]]), np.array([[1, None]], dtype=object), np.array([[1j, 2]])]
)
def test_counts_that_are_no_numbers_are_refused(counts):
    with pytest.raises(InputError, match="expected whole numbers"):
        check_counts(counts, np.array(["s"]), np.array(["a", "b"]), "x", "advice")


# rows of counts


def test_permuted_rows_in_several_shards_give_the_same_cohort(declare, params, tmp_path, rng):
    samples, counts = table(), poisson()
    plain = prepared(
        declare(write_parquet(tmp_path / "plain", samples, counts)), params.splits, tmp_path / "one"
    )
    folder = write_parquet(tmp_path / "permuted", samples, counts)
    (folder / "counts" / "counts-0.parquet").unlink()
    for number, rows in enumerate(np.array_split(rng.permutation(SAMPLES), 4)):
        write_counts(
            folder / "counts" / f"part-{number}.parquet",
            samples["sample_id"].iloc[rows],
            counts[rows],
        )
    permuted = prepared(declare(folder), params.splits, tmp_path / "other")
    pd.testing.assert_frame_equal(plain.samples, permuted.samples)
    for split in ("train", "test_random", "validation"):
        assert np.array_equal(plain.counts([split]), permuted.counts([split]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*range(50)], "no counts for samples s50, s51"),
        ([*range(60), 3], "samples s03 have counts twice"),
        ([*range(60), 60], "samples s99 are not in"),
    ],
    ids=["missing", "twice in a shard", "unknown"],
)
def test_rows_that_are_missing_double_or_unknown_are_named(
    declare, params, tmp_path, rows, message
):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    names = [*table()["sample_id"], "s99"]
    counts = np.concatenate([poisson(), poisson(1)])
    write_counts(folder / "counts" / "counts-0.parquet", [names[row] for row in rows], counts[rows])
    assert message in refused(declare(folder), params.splits, tmp_path)


def test_a_row_that_stands_in_two_shards_is_named(declare, params, tmp_path):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    write_counts(folder / "counts" / "counts-1.parquet", ["s03"], poisson(1))
    assert "samples s03 have counts twice" in refused(declare(folder), params.splits, tmp_path)


def test_sample_names_that_are_integers_in_every_table_are_the_same_names(
    declare, params, tmp_path
):
    folder = write_parquet(tmp_path / "folder", table().assign(sample_id=range(SAMPLES)), poisson())
    assert prepared(declare(folder), params.splits, tmp_path / "cohort").samples[
        "sample_id"
    ].tolist() == [str(number) for number in range(SAMPLES)]


def test_a_missing_sample_name_is_refused_as_missing(declare, params, tmp_path):
    folder = write_parquet(
        tmp_path / "folder", table().assign(sample_id=[None, *table()["sample_id"][1:]]), poisson()
    )
    message = refused(declare(folder), params.splits, tmp_path)
    assert "samples.parquet" in message and "missing" in message


@pytest.mark.parametrize(
    "column",
    [
        pa.array(range(SAMPLES)),
        pa.array([str(number) for number in range(SAMPLES)]),
        pa.array([[str(count) for count in row] for row in poisson().tolist()]),
        pa.array([None, *poisson().tolist()[1:]], pa.list_(pa.int32())),
        pa.array([poisson().tolist()[0][:-1], *poisson().tolist()[1:]]),
        pa.array([[None, *row[1:]] for row in poisson().tolist()]),
        pa.array([[[count] for count in row] for row in poisson().tolist()]),
    ],
    ids=["number", "text", "list of text", "null row", "short row", "null count", "list of lists"],
)
def test_a_column_of_counts_of_another_form_is_refused_by_name(declare, params, tmp_path, column):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    write_counts(folder / "counts" / "counts-0.parquet", table()["sample_id"], column)
    assert str(folder) in refused(declare(folder), params.splits, tmp_path)


@pytest.mark.parametrize(
    "kind", [pa.large_list(pa.int32()), pa.list_(pa.uint16()), pa.list_(pa.float64())], ids=str
)
def test_lists_of_counts_of_every_type_are_read(declare, params, tmp_path, kind):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    write_counts(
        folder / "counts" / "counts-0.parquet",
        table()["sample_id"],
        pa.array(poisson().tolist(), kind),
    )
    assert (
        prepared(declare(folder), params.splits, tmp_path / "cohort").manifest["samples"] == SAMPLES
    )


def test_lists_of_fixed_size_are_read_or_refused_by_name(declare, params, tmp_path):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    write_counts(
        folder / "counts" / "counts-0.parquet",
        table()["sample_id"],
        pa.FixedSizeListArray.from_arrays(pa.array(poisson().ravel()), GENES),
    )
    try:
        assert (
            prepared(declare(folder), params.splits, tmp_path / "cohort").manifest["samples"]
            == SAMPLES
        )
    except GemError as error:
        assert "counts-0.parquet" in str(error)


def test_a_shard_without_rows_does_not_matter(declare, params, tmp_path):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    empty = pq.read_table(folder / "counts" / "counts-0.parquet").slice(0, 0)
    with pq.ParquetWriter(folder / "counts" / "counts-1.parquet", empty.schema) as writer:
        writer.write_table(empty)
    assert (
        prepared(declare(folder), params.splits, tmp_path / "cohort").manifest["samples"] == SAMPLES
    )


@pytest.mark.parametrize("content", [b"", b"PAR1 torn"])
def test_a_torn_shard_of_a_source_is_named(declare, params, tmp_path, content):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    (folder / "counts" / "torn.parquet").write_bytes(content)
    assert "torn.parquet: cannot be read" in refused(declare(folder), params.splits, tmp_path)


# odd tables


@pytest.mark.parametrize(("samples", "genes"), [(0, GENES), (SAMPLES, 0)])
@pytest.mark.parametrize("kind", ["parquet", "h5ad"])
def test_a_source_without_samples_or_genes_is_refused_in_words(
    declare, params, tmp_path, samples, genes, kind
):
    counts = np.zeros((samples, genes), dtype=np.int32)
    if kind == "h5ad":
        path = write_h5ad(
            tmp_path / "source.h5ad",
            table(samples),
            counts,
            genes=[f"g{number}" for number in range(genes)],
        )
    else:
        path = write_parquet(
            tmp_path / "folder", table(samples), np.zeros((samples, genes), dtype=np.int32)
        )
        write_counts(
            path / "counts" / "counts-0.parquet",
            table(samples)["sample_id"],
            pa.array(counts.tolist(), pa.list_(pa.int32())),
        )
    said = refused(declare(path, control=None, date_column=None), params.splits, tmp_path)
    assert f"no {'genes' if samples else 'samples'}; expected one at least" in said


@pytest.mark.parametrize("column", ["tissue", "study", "perturbation", "age"])
def test_a_covariate_missing_everywhere_is_allowed_and_counted(declare, params, tmp_path, column):
    empty = pd.Series([None] * SAMPLES, dtype=object if column != "age" else float)
    folder = write_parquet(tmp_path / "folder", table().assign(**{column: empty}), poisson())
    data = declare(folder, control=None) if column == "perturbation" else declare(folder)
    assert prepared(data, params.splits, tmp_path / "cohort").manifest["missing"] == {
        "study": 0,
        "tissue": 0,
        "age": 0,
        "perturbation": 0,
    } | {column: SAMPLES}


@pytest.mark.parametrize(
    "column",
    [
        ["x"] * SAMPLES,
        [True, False] * (SAMPLES // 2),
        pd.Categorical(["x", "y"] * (SAMPLES // 2), categories=["unused", "y", "x"]),
        [1, 2] * (SAMPLES // 2),
    ],
    ids=["one level", "boolean", "unused levels", "integers"],
)
@pytest.mark.parametrize("kind", ["parquet", "h5ad"])
def test_a_covariate_of_any_type_becomes_text(declare, params, tmp_path, column, kind):
    samples = table().assign(tissue=column)
    path = (
        write_h5ad(tmp_path / "source.h5ad", samples, poisson())
        if kind == "h5ad"
        else write_parquet(tmp_path / "folder", samples, poisson())
    )
    cohort = prepared(declare(path, date_column=None), params.splits, tmp_path / "cohort")
    assert cohort.samples["tissue"].tolist() == [str(value) for value in column]


def test_a_single_sample_makes_a_cohort_of_training_alone(declare, params, tmp_path):
    cohort = prepared(
        declare(write_parquet(tmp_path / "folder", table(1), poisson(1))),
        params.splits,
        tmp_path / "cohort",
    )
    assert cohort.manifest["splits"] == {"train": 1}


def test_sample_names_with_paths_stay_names(declare, params, tmp_path):
    names = [f"../../../escape/{number}" for number in range(SAMPLES)]
    before = {path.name for path in tmp_path.iterdir()}
    cohort = prepared(
        declare(write_parquet(tmp_path / "folder", table().assign(sample_id=names), poisson())),
        params.splits,
        tmp_path / "cohort",
    )
    assert cohort.samples["sample_id"].tolist() == names
    assert {path.name for path in tmp_path.iterdir()} == before | {"folder", "cohort"}


def test_everything_wrong_with_the_tables_is_said_at_once(declare, params, tmp_path):
    samples = table().assign(
        sample_id=["s00", "s00", *table()["sample_id"][2:]], age=["old"] * SAMPLES, total=1
    )
    folder = write_parquet(
        tmp_path / "folder",
        samples,
        poisson(),
        ["g0", "g0", *(f"g{number}" for number in range(2, GENES))],
    )
    data = declare(
        folder,
        context_columns=["tisue"],
        date_column="dat",
        study_column="studdy",
        control={"column": "perturbation", "value": "ctrl"},
    )
    message = refused(data, params.splits, tmp_path)
    for part in (
        "sample_id s00",
        "gene_id g0",
        "did you mean tissue?",
        "did you mean date?",
        "did you mean study?",
        "'old'",
        "named total",
        "perturbation = ctrl",
    ):
        assert part in message, part


def test_a_missing_control_column_is_named(declare, params, tmp_path):
    folder = write_parquet(tmp_path / "folder", table(), poisson())
    message = refused(
        declare(folder, control={"column": "perturbatio", "value": "control"}),
        params.splits,
        tmp_path,
    )
    assert "data.control.column: no column perturbatio; did you mean perturbation?" in message


# the input stays as it is


@pytest.mark.parametrize("kind", ["parquet", "h5ad"])
def test_a_read_only_source_works_and_nothing_is_written_beside_it(declare, params, tmp_path, kind):
    parent = tmp_path / "input"
    parent.mkdir()
    path = (
        write_h5ad(parent / "source.h5ad", table(), poisson())
        if kind == "h5ad"
        else write_parquet(parent / "folder", table(), poisson())
    )
    everything = [parent, *parent.rglob("*")]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in everything}
    for file in everything:
        file.chmod(stat.S_IRUSR | (stat.S_IXUSR if file.is_dir() else 0))
    try:
        prepared(declare(path, date_column=None), params.splits, tmp_path / "cohort")
        assert {
            file: (file.stat().st_mtime_ns, file.stat().st_size)
            for file in [parent, *parent.rglob("*")]
        } == before
    finally:
        for file in everything:
            os.chmod(file, 0o755)
