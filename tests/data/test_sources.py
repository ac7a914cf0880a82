"""Sources of raw counts: Parquet and AnnData are equivalent, invalid counts are located."""

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
from pipeline.gem.data.sources import MAX_COUNT, check_counts, checked_chunks, open_source
from pipeline.gem.data.storage import h5ad
from pipeline.gem.preparation.prepare import write_cohort

SAMPLES, GENES = 60, 12


@pytest.fixture
def declare(params):
    """The declarations of params.yaml for the columns of `table`, with changes."""

    def with_changes(source: Path, **changes) -> Data:
        covariates = {
            "technical": {"study": {"kind": "categorical"}},
            "biological": {
                "tissue": {"kind": "categorical"},
                "age": {"kind": "numeric", "scale": "linear"},
            },
            "perturbation": {"perturbation": {"kind": "categorical"}},
        }
        values = params.data.model_dump(mode="json") | {
            "source": str(source),
            "covariates": covariates,
            "context_columns": ["tissue"],
            "date_column": "date" if source.is_dir() else None,  # AnnData stores no plain dates
            "target_gene": None,
        }
        return Data.model_validate(values | changes)

    return with_changes


@pytest.fixture
def prepared(params, tmp_path):
    def prepare(data: Data, name: str = "cohort") -> Cohort:
        write_cohort(open_source(data), data, params.splits, tmp_path / name)
        return Cohort(tmp_path / name)

    return prepare


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


def gene_names(number: int = GENES) -> list[str]:
    return [f"g{index}" for index in range(number)]


def write_counts(folder: Path, names, counts, file: str = "counts-0.parquet") -> None:
    (folder / "counts").mkdir(exist_ok=True)
    lists = counts if isinstance(counts, pa.Array) else list(counts)
    pq.write_table(pa.table({"sample_id": list(names), "counts": lists}), folder / "counts" / file)


def write_parquet(folder: Path, samples=None, counts=None, genes=None) -> Path:
    samples = table() if samples is None else samples
    counts = poisson() if counts is None else counts
    folder.mkdir()
    samples.to_parquet(folder / "samples.parquet", index=False)
    names = gene_names(counts.shape[1]) if genes is None else genes
    pd.DataFrame({"gene_id": names}).to_parquet(folder / "genes.parquet", index=False)
    write_counts(folder, samples["sample_id"], counts)
    return folder


def write_h5ad(
    path: Path, counts, samples=None, layers=None, genes=None, index="sample_id", raw=None
) -> Path:
    """`raw`: counts of genes g0, g1, ... of its own, as after a gene selection in X."""
    samples = table() if samples is None else samples
    obs = samples.set_index(index) if index else samples.rename(index=lambda row: f"row{row}")
    obs.index = obs.index.astype(str)
    var = pd.DataFrame(index=gene_names() if genes is None else genes)
    adata = anndata.AnnData(X=counts, obs=obs, var=var, layers=layers)
    if raw is not None:
        raw_var = pd.DataFrame(index=gene_names(raw.shape[1]))
        adata.raw = anndata.AnnData(X=raw, obs=obs, var=raw_var)
    adata.write_h5ad(path)
    return path


def counts_of(data: Data) -> np.ndarray:
    source = open_source(data)
    counts = np.full((len(source.samples), len(source.genes)), -1)
    for rows, block in checked_chunks(source, data.source):
        counts[rows] = block
    return counts


def message_of(data: Data) -> str:
    with pytest.raises(GemError) as caught:
        counts_of(data)
    return str(caught.value)


# AnnData and Parquet

COUNTS = poisson()
REAL, LOG, CSR = COUNTS.astype(np.float32), np.log1p(COUNTS), scipy.sparse.csr_matrix(COUNTS * 1.0)
FORMS = {
    "csr": ({"counts": CSR}, {}),
    "csc": ({"counts": scipy.sparse.csc_matrix(REAL)}, {}),
    "dense": ({"counts": REAL}, {}),
    "int64": ({"counts": COUNTS.astype(np.int64)}, {}),
    "layer": ({"counts": LOG, "layers": {"raw": CSR}}, {"layer": "raw"}),
    "dense layer": ({"counts": None, "layers": {"raw": COUNTS}}, {"layer": "raw"}),
    "raw": ({"counts": LOG[:, 3:6], "genes": ["g3", "g4", "g5"], "raw": CSR}, {"layer": ".raw"}),
    "dense raw": ({"counts": LOG, "raw": REAL}, {"layer": ".raw"}),
    "column of names": ({"counts": REAL, "index": None}, {"sample_id": "sample_id"}),
}


@pytest.mark.parametrize(("content", "options"), FORMS.values(), ids=FORMS)
def test_an_h5ad_is_the_same_source_as_a_parquet_folder(declare, tmp_path, content, options):
    data = declare(write_h5ad(tmp_path / "source.h5ad", **content), **options)
    source, expected = open_source(data), table()
    assert source.genes["gene_id"].tolist() == gene_names()
    assert source.samples["sample_id"].tolist() == expected["sample_id"].tolist()
    assert source.samples["tissue"].tolist() == expected["tissue"].tolist()
    assert np.array_equal(counts_of(data), COUNTS)


def test_an_h5ad_gives_the_same_cohort_as_a_parquet_folder(declare, prepared, tmp_path):
    """AnnData stores repeated text as categories, and so the dates that order the studies."""
    h5ad = declare(write_h5ad(tmp_path / "source.h5ad", REAL), date_column="date")
    one = prepared(h5ad, "one")
    other = prepared(declare(write_parquet(tmp_path / "folder")), "other")
    assert one.samples["split"].tolist() == other.samples["split"].tolist()
    assert one.manifest["shards"] == other.manifest["shards"]
    assert one.train_validation_sha256 == other.train_validation_sha256


def test_a_column_of_names_replaces_a_column_sample_id(declare, tmp_path):
    samples = table().assign(name=[f"name{number}" for number in range(SAMPLES)])
    path = write_h5ad(tmp_path / "source.h5ad", COUNTS, samples, index=None)
    source = open_source(declare(path, sample_id="name"))
    assert source.samples["sample_id"].tolist() == samples["name"].tolist()
    assert "name" not in source.samples


def test_a_column_of_names_names_the_samples_of_a_folder(declare, tmp_path):
    folder = write_parquet(tmp_path / "folder")
    samples = table().rename(columns={"sample_id": "name"})
    samples.to_parquet(folder / "samples.parquet", index=False)
    assert np.array_equal(counts_of(declare(folder, sample_id="name")), COUNTS)
    message = message_of(declare(folder, sample_id="nmae"))
    assert "no column nmae; did you mean name?" in message


def test_an_unknown_column_of_names_is_an_error(declare, tmp_path):
    path = write_h5ad(tmp_path / "source.h5ad", COUNTS)
    message = message_of(declare(path, sample_id="tisue"))
    assert "data.sample_id: no column tisue in obs; did you mean tissue?" in message


def test_a_layer_of_the_name_raw_is_not_the_raw_of_a_file(declare, tmp_path):
    raw = COUNTS + 1000
    path = write_h5ad(tmp_path / "source.h5ad", LOG, layers={"raw": COUNTS}, raw=raw)
    assert np.array_equal(counts_of(declare(path, layer="raw")), COUNTS)
    assert np.array_equal(counts_of(declare(path, layer=".raw")), raw)


@pytest.mark.parametrize(
    ("content", "layer", "message"),
    [
        ({"counts": COUNTS, "layers": {"a": COUNTS, "b": COUNTS}}, "c", "can be null, a, b"),
        ({"counts": COUNTS, "raw": COUNTS}, "raw", "no layer 'raw'; data.layer can be null, .raw"),
        ({"counts": COUNTS, "layers": {"a": COUNTS}}, ".raw", "no .raw; data.layer can be null, a"),
        ({"counts": None}, None, "no X, and data.layer is null; data.layer can be nothing"),
        (
            {"counts": COUNTS, "layers": {".raw": COUNTS}, "raw": COUNTS},
            ".raw",
            ".raw names a layer and the .raw of this file; rename the layer",
        ),
    ],
)
def test_a_missing_or_ambiguous_layer_is_an_error_with_the_layers(
    declare, tmp_path, content, layer, message
):
    path = write_h5ad(tmp_path / "source.h5ad", **content)
    assert message in message_of(declare(path, layer=layer))


@pytest.mark.parametrize("value", [-1.0, 2.5, np.nan], ids=["negative", "fractional", "NaN"])
def test_counts_that_are_not_raw_are_an_error_with_the_other_matrices(declare, tmp_path, value):
    counts = REAL.copy()
    counts[2, 2] = value
    layers = {"counts": COUNTS, "log": counts}
    path = write_h5ad(tmp_path / "source.h5ad", counts, layers=layers, raw=COUNTS)
    for layer, others in ((None, "counts, log, .raw"), ("log", "null, counts, .raw")):
        message = message_of(declare(path, layer=layer))
        assert message.endswith(f"point data.layer at the raw counts: {others}")
    single = write_h5ad(tmp_path / "single.h5ad", counts)
    assert "this file holds no other matrix" in message_of(declare(single))
    folder = write_parquet(tmp_path / "folder", counts=counts)
    assert f"write the raw counts into {folder / 'counts'}" in message_of(declare(folder))


def test_log_normalised_counts_are_recognised(declare, tmp_path):
    path = write_h5ad(tmp_path / "source.h5ad", scipy.sparse.csr_matrix(LOG))
    assert "looks log-normalised: this file holds" in message_of(declare(path))


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("layer", [None, "counts", ".raw"], ids=["X", "layer", "raw"])
def test_counts_are_read_in_chunks_of_bounded_size(declare, tmp_path, monkeypatch, form, layer):
    forms = {"csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix, "dense": np.asarray}
    matrix = forms[form](REAL)
    path = write_h5ad(
        tmp_path / "source.h5ad",
        matrix if layer is None else LOG,
        layers={"counts": matrix} if layer == "counts" else None,
        raw=matrix if layer == ".raw" else None,
    )
    source, sizes, getitem = open_source(declare(path, layer=layer)), [], h5py.Dataset.__getitem__

    def recording(dataset, index):
        part = getitem(dataset, index)
        sizes.append(part.size)
        return part

    monkeypatch.setattr(h5py.Dataset, "__getitem__", recording)
    monkeypatch.setattr(h5ad, "CHUNK_VALUES", 7 * GENES)
    chunks = list(source.chunks())
    assert [len(rows) for rows, _ in chunks] == [7] * 8 + [4]
    assert np.array_equal(np.concatenate([block for _, block in chunks]), REAL)
    assert sizes and max(sizes) <= 7 * GENES


COLUMNS = {
    "ordered": pd.Categorical(
        ["low", "high"] * (SAMPLES // 2), categories=["none", "low", "high"], ordered=True
    ),
    "booleans": pd.array([True, False, None] * (SAMPLES // 3), dtype="boolean"),
    "integers": pd.array([1, 2, None] * (SAMPLES // 3), dtype="Int64"),
    "text": pd.array(["x", "y", None] * (SAMPLES // 3), dtype="string"),
    "categories of numbers": pd.Categorical([1, 2, None] * (SAMPLES // 3)),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_an_obs_column_of_every_type_is_a_covariate_a_context_and_a_control(
    declare, prepared, tmp_path, column
):
    samples, value = table().assign(tissue=column), str(column[1])
    options = {"date_column": None, "control": {"column": "tissue", "value": value}}
    with anndata.settings.override(allow_write_nullable_strings=True):
        path = write_h5ad(tmp_path / "source.h5ad", COUNTS, samples)
    one = prepared(declare(path, **options), "one")
    other = prepared(declare(write_parquet(tmp_path / "folder", samples), **options), "other")
    expected = [None if pd.isna(cell) else str(cell) for cell in column]
    texts = one.samples.sort_values("sample_id")["tissue"].astype(object)
    assert texts.where(texts.notna(), None).tolist() == expected
    assert one.manifest["missing"] == other.manifest["missing"]
    assert one.train_validation_sha256 == other.train_validation_sha256


# damaged and incomplete sources


def test_a_matrix_of_another_shape_than_its_tables_is_an_error(declare, tmp_path):
    path = write_h5ad(tmp_path / "source.h5ad", COUNTS)
    with h5py.File(path, "a") as file:
        del file["X"]
        file["X"] = COUNTS[:, :5]
    expected = "counts of shape (60, 5); expected samples x genes, (60, 12)"
    assert expected in message_of(declare(path))


@pytest.mark.parametrize("content", [b"", b"not HDF5", None])
def test_a_file_that_is_not_anndata_is_an_error_with_its_path(declare, tmp_path, content):
    path = tmp_path / "source.h5ad"
    if content is None:
        h5py.File(path, "w").close()
    else:
        path.write_bytes(content)
    assert "source.h5ad" in message_of(declare(path))


@pytest.mark.parametrize("part", ["samples.parquet", "genes.parquet", "counts"])
def test_a_missing_part_of_a_folder_is_an_error(declare, tmp_path, part):
    folder = write_parquet(tmp_path / "folder")
    (folder / part).rename(folder / "elsewhere")
    assert f"{part}: absent" in message_of(declare(folder))


@pytest.mark.parametrize("name", ["absent", "absent.h5ad", "file.txt"])
def test_a_source_is_a_folder_or_an_h5ad(declare, tmp_path, name):
    (tmp_path / "file.txt").write_text("counts")
    assert re.search(f"data.source: .*{name}", message_of(declare(tmp_path / name)))


@pytest.mark.parametrize(("file", "key"), [("samples", "sample_id"), ("genes", "gene_id")])
def test_a_table_without_names_or_content_is_an_error(declare, tmp_path, file, key):
    path = write_parquet(tmp_path / "folder") / f"{file}.parquet"
    pd.DataFrame({"name": ["x"]}).to_parquet(path)
    message = message_of(declare(path.parent))
    assert f"{file}.parquet: no column {key}; known: name" in message
    path.write_bytes(b"")
    assert f"{file}.parquet: cannot be read" in message_of(declare(path.parent))


@pytest.mark.parametrize("content", [b"", b"PAR1 torn"])
def test_a_damaged_shard_is_an_error_with_its_path(declare, tmp_path, content):
    folder = write_parquet(tmp_path / "folder")
    (folder / "counts" / "torn.parquet").write_bytes(content)
    assert "torn.parquet: cannot be read" in message_of(declare(folder))


# invalid counts

INVALID = [
    (-1, np.int32, "count -1 is negative"),
    (-1.0, np.float32, "count -1.0 is negative"),
    (60.5, np.float32, "count 60.5 is fractional; expected raw counts"),
    (np.nan, np.float64, "count nan is not finite"),
    (-np.inf, np.float32, "count -inf is not finite"),
    (2**24 + 1, np.int32, "count 16777217 is above 2^24"),
    (2**63, np.uint64, "count 9223372036854775808 is above 2^24"),
]


@pytest.mark.parametrize(("value", "dtype", "message"), INVALID, ids=[row[2] for row in INVALID])
def test_an_invalid_count_is_located_by_sample_gene_and_value(
    declare, tmp_path, value, dtype, message
):
    counts = poisson().astype(dtype)
    counts[7, 3] = value
    expected = f"sample s07, gene g3: {message}"
    assert expected in message_of(declare(write_parquet(tmp_path / "folder", counts=counts)))
    if dtype == np.float32:
        for form in (np.asarray, scipy.sparse.csr_matrix):
            path = write_h5ad(tmp_path / f"{form.__name__}.h5ad", form(counts))
            assert expected in message_of(declare(path))


def check(counts: np.ndarray) -> np.ndarray:
    names = np.array(["a", "b"])
    return check_counts(counts, names, names, "x", "advice")


def test_the_highest_count_is_valid():
    assert check(np.array([[MAX_COUNT]])).tolist() == [[MAX_COUNT]]


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int64, np.uint64, np.float32, np.float64, bool]
)
def test_whole_counts_of_every_type_are_valid(dtype):
    checked = check(np.array([[0, 1]], dtype=dtype))
    assert checked.dtype == np.int64 and checked.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    "counts", [np.array([["1", "2"]]), np.array([[1, None]], dtype=object), np.array([[1j, 2]])]
)
def test_counts_must_be_numbers(counts):
    with pytest.raises(InputError, match="expected whole numbers"):
        check(counts)


# rows of counts


def test_rows_may_be_permuted_over_several_shards(declare, tmp_path, rng):
    folder = write_parquet(tmp_path / "folder")
    names, permuted = table()["sample_id"].to_numpy(), rng.permutation(SAMPLES)
    write_counts(folder, [], pa.array([], pa.list_(pa.int32())))
    for number, rows in enumerate(np.array_split(permuted, 4)):
        write_counts(folder, names[rows], COUNTS[rows], f"part-{number}.parquet")
    assert np.array_equal(counts_of(declare(folder)), COUNTS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*range(50)], "no counts for samples s50, s51"),
        ([*range(60), 3], "samples s03 have counts twice"),
        ([*range(60), 60], "samples s99 are not in"),
    ],
    ids=["missing", "duplicate", "unknown"],
)
def test_missing_duplicate_and_unknown_rows_are_errors(declare, tmp_path, rows, message):
    folder = write_parquet(tmp_path / "folder")
    names, counts = [*table()["sample_id"], "s99"], np.concatenate([COUNTS, poisson(1)])
    write_counts(folder, [names[row] for row in rows], counts[rows])
    assert message in message_of(declare(folder))


def test_a_sample_in_two_shards_is_an_error(declare, tmp_path):
    folder = write_parquet(tmp_path / "folder")
    write_counts(folder, ["s03"], poisson(1), "counts-1.parquet")
    assert "samples s03 have counts twice" in message_of(declare(folder))


def test_sample_names_may_be_integers(declare, tmp_path):
    folder = write_parquet(tmp_path / "folder", table().assign(sample_id=range(SAMPLES)))
    assert np.array_equal(counts_of(declare(folder)), COUNTS)


def test_a_missing_sample_name_is_an_error(declare, tmp_path):
    folder = write_parquet(tmp_path / "folder")
    names = [None, *table()["sample_id"][1:]]
    table().assign(sample_id=names).to_parquet(folder / "samples.parquet")
    assert "samples.parquet: sample_id is missing in rows 0" in message_of(declare(folder))


LISTS = COUNTS.tolist()


@pytest.mark.parametrize(
    "column",
    [
        pa.array(range(SAMPLES)),
        pa.array([[str(count) for count in row] for row in LISTS]),
        pa.array([None, *LISTS[1:]], pa.list_(pa.int32())),
        pa.array([LISTS[0][:-1], *LISTS[1:]]),
        pa.array([[None, *row[1:]] for row in LISTS]),
        pa.array([[[count] for count in row] for row in LISTS]),
    ],
    ids=["number", "list of text", "null row", "short row", "null count", "list of lists"],
)
def test_counts_must_be_lists_of_numbers_of_equal_length(declare, tmp_path, column):
    folder = write_parquet(tmp_path / "folder")
    write_counts(folder, table()["sample_id"], column)
    assert str(folder) in message_of(declare(folder))


@pytest.mark.parametrize(
    "kind",
    [pa.large_list(pa.int32()), pa.list_(pa.uint16()), pa.list_(pa.float64())],
    ids=str,
)
def test_lists_of_every_numeric_type_are_read(declare, tmp_path, kind):
    folder = write_parquet(tmp_path / "folder")
    write_counts(folder, table()["sample_id"], pa.array(LISTS, kind))
    assert np.array_equal(counts_of(declare(folder)), COUNTS)


# cohorts of unusual sources


@pytest.mark.parametrize(("samples", "genes"), [(0, GENES), (SAMPLES, 0)])
@pytest.mark.parametrize("kind", ["parquet", "h5ad"])
def test_a_source_needs_samples_and_genes(declare, prepared, tmp_path, samples, genes, kind):
    counts, rows = np.zeros((samples, genes), dtype=np.int32), table(samples)
    if kind == "h5ad":
        path = write_h5ad(tmp_path / "source.h5ad", counts, rows, genes=gene_names(genes))
    else:
        path = write_parquet(tmp_path / "folder", rows, counts)
        write_counts(path, rows["sample_id"], pa.array(counts.tolist(), pa.list_(pa.int32())))
    missing = "genes" if samples else "samples"
    with pytest.raises(InputError, match=f"no {missing}; expected at least one"):
        prepared(declare(path, control=None, date_column=None))


@pytest.mark.parametrize("column", ["tissue", "study", "perturbation", "age"])
def test_a_covariate_may_be_missing_throughout(declare, prepared, tmp_path, column):
    empty = pd.Series([None] * SAMPLES, dtype=object if column != "age" else float)
    folder = write_parquet(tmp_path / "folder", table().assign(**{column: empty}))
    changes = {"control": None} if column == "perturbation" else {}
    missing = prepared(declare(folder, **changes)).manifest["missing"]
    assert missing == dict.fromkeys(["study", "tissue", "age", "perturbation"], 0) | {
        column: SAMPLES
    }


def test_a_single_sample_is_a_training_split(declare, prepared, tmp_path):
    cohort = prepared(declare(write_parquet(tmp_path / "folder", table(1), poisson(1))))
    assert cohort.manifest["splits"] == {"train": 1}


def test_sample_names_with_slashes_are_not_paths(declare, prepared, tmp_path):
    names = [f"../../../escape/{number}" for number in range(SAMPLES)]
    folder = write_parquet(tmp_path / "folder", table().assign(sample_id=names))
    assert sorted(prepared(declare(folder)).samples["sample_id"]) == sorted(names)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "cohort"}


@pytest.mark.parametrize("kind", ["parquet", "h5ad"])
def test_duplicate_names_are_errors(declare, prepared, tmp_path, kind):
    genes = ["g0", "g0", *gene_names()[2:]]
    samples = table().assign(sample_id=["s00", "s00", *table()["sample_id"][2:]])
    if kind == "parquet":
        path = write_parquet(tmp_path / "folder", samples, genes=genes)
    else:
        with pytest.warns(UserWarning, match="names are not unique"):
            path = write_h5ad(tmp_path / "source.h5ad", COUNTS, samples, genes=genes)
    with pytest.raises(InputError) as caught:
        prepared(declare(path))
    assert "sample_id s00 stands more than once" in str(caught.value)
    assert "gene_id g0 stands more than once" in str(caught.value)


def test_all_problems_of_the_tables_are_reported_at_once(declare, prepared, tmp_path):
    samples = table().assign(age=["old"] * SAMPLES, total="high")
    data = declare(
        write_parquet(tmp_path / "folder", samples),
        context_columns=["tisue", "total"],
        date_column="dat",
        study_column="studdy",
        level_column="studyy",
        control={"column": "perturbatio", "value": "control"},
    )
    with pytest.raises(InputError) as caught:
        prepared(data)
    assert not (tmp_path / "cohort" / "manifest.json").exists()
    for part in (
        "no column tisue; did you mean tissue?",
        "no column dat; did you mean date?",
        "no column studdy; did you mean study?",
        "data.level_column: no column studyy; did you mean study?",
        "data.control.column: no column perturbatio; did you mean perturbation?",
        "'old'",
        "no column can be called total",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize("kind", ["parquet", "h5ad"])
def test_a_read_only_source_is_read_and_not_changed(declare, prepared, tmp_path, kind):
    parent = tmp_path / "input"
    parent.mkdir()
    if kind == "h5ad":
        path = write_h5ad(parent / "source.h5ad", COUNTS)
    else:
        path = write_parquet(parent / "folder")

    def state() -> dict:
        files = [parent, *parent.rglob("*")]
        return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}

    before = state()
    for file in before:
        file.chmod(stat.S_IRUSR | (stat.S_IXUSR if file.is_dir() else 0))
    try:
        prepared(declare(path))
        assert state() == before
    finally:
        for file in before:
            os.chmod(file, 0o755)
