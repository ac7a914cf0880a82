"""Sources that are damaged, hostile or of another program: one line with file, part and advice."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError
from pipeline.gem.data import shards
from pipeline.gem.data.sources import checked_chunks, open_source
from pipeline.gem.data.storage import counts as counts_module
from pipeline.gem.data.storage import h5ad
from pipeline.gem.data.storage import reading as reading_module

SAMPLES, GENES = 12, 5
COUNTS = np.arange(SAMPLES * GENES).reshape(SAMPLES, GENES) % 7 + 1
CSR = scipy.sparse.csr_matrix(COUNTS.astype(np.float32))


@pytest.fixture
def declare(params) -> Callable[[Path], Data]:
    def of_source(path: Path) -> Data:
        covariates = {
            "technical": {},
            "biological": {"tissue": {"kind": "categorical"}},
            "perturbation": {"dose": {"kind": "numeric", "scale": "linear"}},
        }
        values = params.data.model_dump(mode="json") | {
            "source": str(path),
            "covariates": covariates,
            "context_columns": ["tissue"],
            "study_column": None,
            "date_column": None,
            "control": None,
            "target_gene": None,
        }
        return Data.model_validate(values)

    return of_source


def table() -> pd.DataFrame:
    names = [f"s{number}" for number in range(SAMPLES)]
    tissues = pd.Categorical(["lung", "liver"] * (SAMPLES // 2))
    return pd.DataFrame({"tissue": tissues, "dose": np.arange(SAMPLES) / 2}, index=names)


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, bytes]:
    """Intact files by form."""
    folder, var = tmp_path_factory.mktemp("templates"), pd.DataFrame(index=[*"abcde"])
    forms = {"csr": CSR, "csc": CSR.tocsc(), "dense": CSR.toarray()}
    for form, matrix in forms.items():
        content = anndata.AnnData(matrix, table(), var, layers={"other": CSR})
        content.write_h5ad(folder / form)
    return {form: (folder / form).read_bytes() for form in forms}


@pytest.fixture
def malformed(templates, tmp_path):
    """Writes an intact file of a form and changes it."""

    def write(change: Callable[[h5py.File], None], form: str = "csr") -> Path:
        path = tmp_path / "source.h5ad"
        path.write_bytes(templates[form])
        with h5py.File(path, "a") as file:
            change(file)
        return path

    return write


def read(data: Data) -> np.ndarray:
    source = open_source(data)
    blocks = [block for _, block in checked_chunks(source, data.source)]
    return np.concatenate(blocks)


def problem_of(data: Data) -> str:
    with pytest.raises(InputError) as caught:
        read(data)
    (problem,) = caught.value.problems
    assert len(problem) <= 300 and problem.isprintable() and Path(data.source).name in problem
    return problem


# changes of an h5ad


def replace(key: str, values=None, **settings) -> Callable[[h5py.File], None]:
    """Writes other values, or a dataset with other settings, with the attributes of the first."""

    def change(file: h5py.File) -> None:
        attributes = dict(file[key].attrs)
        content = {} if values is None else {"data": values}
        del file[key]
        dataset = file.create_dataset(key, **content, **settings)
        dataset.attrs.update(attributes)

    return change


def value(key: str, position: int, number) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[key][position] = number

    return change


def attribute(key: str, name: str, content) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        if content is None:
            del file[key].attrs[name]
        else:
            file[key].attrs[name] = content

    return change


def remove(key: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[key]

    return change


def link(key: str, target) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[key]
        file[key] = target

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=CSR.data.shape, dtype=np.float32)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "data", shape=CSR.data.shape)
    del file["X/data"]
    file.create_virtual_dataset("X/data", layout)


def with_filter(key: str, code: int) -> Callable[[h5py.File], None]:
    """Compresses by a filter that is nowhere: its chunk holds what another program wrote."""

    def change(file: h5py.File) -> None:
        parent, name, old = file[key].parent, key.split("/")[-1], file[key]
        attributes, kind, shape = dict(old.attrs), old.id.get_type(), old.shape
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk(shape)
        settings.set_filter(code, h5py.h5z.FLAG_OPTIONAL)
        del file[key]
        space = h5py.h5s.create_simple(shape)
        identifier = h5py.h5d.create(parent.id, name.encode(), kind, space, settings)
        identifier.write_direct_chunk((0,) * len(shape), b"\x28\xb5\x2f\xfd zstd")
        file[key].attrs.update(attributes)

    return change


def references(file: h5py.File) -> None:
    kind = h5py.special_dtype(ref=h5py.Reference)
    values = np.array([file["X"].ref] * SAMPLES, dtype=kind)
    replace("obs/dose", values)(file)


def cycle(file: h5py.File) -> None:
    del file["obs/dose"]
    file["obs/dose"] = h5py.SoftLink("/obs/other")
    file["obs/other"] = h5py.SoftLink("/obs/dose")


def no_category(file: h5py.File) -> None:
    replace("obs/tissue/categories", np.array([np.nan, 1]))(file)
    file["obs/tissue/categories"].attrs["encoding-type"] = "array"


HUGE = 10**12
H5AD = {
    # sparse matrices
    "indptr falls": (value("X/indptr", 3, 55), "X/indptr: value 4 is 20, below the one before, 55"),
    "indptr starts late": (value("X/indptr", 0, 2), "X/indptr: from 2 to 60; expected 0 to 60"),
    "indptr ends late": (value("X/indptr", -1, 99), "X/indptr: from 0 to 99; expected 0 to 60"),
    "indptr negative": (value("X/indptr", 3, -1), "X/indptr: value 3 is -1, below"),
    "indptr short": (replace("X/indptr", np.arange(4)), "X/indptr: 4 values; expected 13"),
    "indptr of fractions": (replace("X/indptr", np.zeros(13)), "expected a list of integers"),
    "index too large": (value("X/indices", 7, 5), "an entry of row 1 is in column 5; expected 0"),
    "index far too large": (value("X/indices", 7, 2**30), "row 1 is in column 1073741824"),
    "index negative": (value("X/indices", 59, -1), "an entry of row 11 is in column -1"),
    "indices of fractions": (replace("X/indices", np.zeros(60)), "expected a list of integers"),
    "indices in a table": (replace("X/indices", np.zeros((6, 10), int)), "of shape (6, 10)"),
    "data short": (replace("X/data", np.ones(59)), "X: 59 data and 60 indices"),
    "data of text": (replace("X/data", ["1"] * 60), "X: counts of type object; expected whole"),
    "data complex": (replace("X/data", np.ones(60, complex)), "X: counts of type complex128"),
    "no data": (remove("X/data"), "X/data: absent"),
    "no shape": (attribute("X", "shape", None), "X: shape: cannot be read"),
    "shape of text": (attribute("X", "shape", "large"), "X: shape: cannot be read"),
    "shape of another": (attribute("X", "shape", (12, 6)), "counts of shape (12, 6); expected"),
    "shape huge": (attribute("X", "shape", (HUGE, 5)), "X/indptr: 13 values; expected 1000000"),
    "shape negative": (attribute("X", "shape", (-1, -1)), "X/indptr: 13 values; expected 0"),
    "unknown encoding": (attribute("X", "encoding-type", "coo_matrix"), "encoding-type 'coo_m"),
    "no encoding": (attribute("X", "encoding-type", None), "encoding-type None"),
    "encoding of numbers": (attribute("X", "encoding-type", np.arange(3)), "expected csr_matrix"),
    "negative count": (value("X/data", 7, -3), "sample s1, gene c: count -3.0 is negative"),
    "NaN": (value("X/data", 7, np.nan), "sample s1, gene c: count nan is not finite"),
    # storage
    "unknown filter": (with_filter("X/data", 32015), "X/data: compressed by the filter 32015"),
    "filter of obs": (with_filter("obs/dose", 32001), "obs/dose: compressed by the filter 32001"),
    "virtual": (virtual, "X/data: its data is in other files"),
    "external data": (
        replace("X/data", shape=60, dtype="f4", external=[("/dev/zero", 0, 240)]),
        "X/data: its data is in other files",
    ),
    "link to a file": (link("X", h5py.ExternalLink("/dev/zero", "/X")), "X is a link to another"),
    "link out of a link": (link("obs/dose", h5py.ExternalLink("a.h5", "b")), "obs/dose is a link"),
    "link to nowhere": (link("X/data", h5py.SoftLink("/Y")), "X/data is a link to /Y, which lea"),
    "links in a circle": (cycle, "which leads nowhere"),
    "chunks not written": (
        replace("X/data", shape=60, dtype="f4", chunks=(10,)),
        "X/data: (60,) values are declared, but not all are in the file",
    ),
    "data not written": (replace("X/data", shape=60, dtype="f4"), "X/data: (60,) values are decl"),
    "huge data": (replace("X/data", shape=HUGE, dtype="f4", chunks=(1024,)), "not all are in"),
    "huge indptr": (replace("X/indptr", shape=HUGE, dtype="i8", chunks=(1024,)), "not all are"),
    "huge names": (
        replace("obs/_index", shape=HUGE, dtype=h5py.string_dtype(), chunks=(1024,)),
        "obs/_index: (1000000000000,) values are declared, but not all are in the file",
    ),
    "huge chunks": (
        replace("obs/dose", shape=12, dtype="f8", chunks=(2**28,), maxshape=(None,)),
        "obs/dose: stored in chunks of 2.1 GB",
    ),
    "a named type": (link("X/data", np.dtype("f4")), "X/data: not an array"),
    "a group as data": (replace("X/data", dtype="f4", data=h5py.Empty("f4")), "without a shape"),
    # tables
    "no obs": (remove("obs"), "cannot be read as AnnData (no obs)"),
    "no var": (remove("var"), "cannot be read as AnnData (no var)"),
    "obs is an array": (link("obs", np.arange(3)), "obs is stored in an old format"),
    "obs of the future": (attribute("obs", "encoding-version", "9.9"), "the format ('dataframe'"),
    "no column order": (attribute("obs", "column-order", None), "obs: cannot be read"),
    "no index": (attribute("obs", "_index", "gone"), "obs/gone: absent"),
    "column gone": (remove("obs/dose"), "obs/dose: absent"),
    "column short": (replace("obs/dose", np.arange(3.0)), "obs/dose: 3 values; expected one"),
    "column of rows": (replace("obs/dose", np.ones((12, 2))), "obs/dose: not a column"),
    "column scalar": (replace("obs/dose", 1.0), "obs/dose: 1 values; expected one for each of 12"),
    "column of references": (references, "obs/dose: values of type object; expected text"),
    "column of the future": (
        attribute("obs/dose", "encoding-type", "array-of-tomorrow"),
        "obs/dose: cannot be read (an encoding that this anndata does not know)",
    ),
    "code out of range": (value("obs/tissue/codes", 2, 9), "obs/tissue: cannot be read (codes nee"),
    "categories twice": (
        replace("obs/tissue/categories", ["lung", "lung"]),
        "obs/tissue: cannot be read (Categorical categories must be unique)",
    ),
    "categories missing": (
        no_category,
        "obs/tissue: cannot be read (Categorical categories cannot be null)",
    ),
    "no codes": (remove("obs/tissue/codes"), "obs/tissue: cannot be read"),
    "not UTF-8": (value("obs/_index", 0, b"\xff\xfe"), "obs/_index: cannot be read (its text is"),
    "gene names not UTF-8": (value("var/_index", 0, b"\xc3("), "its text is not UTF-8"),
    "samples of no name": (remove("obs/_index"), "obs/_index: absent"),
}


@pytest.mark.parametrize(("change", "message"), H5AD.values(), ids=H5AD)
def test_a_malformed_h5ad_is_one_line_with_part_and_advice(declare, malformed, change, message):
    assert message in problem_of(declare(malformed(change)))


DENSE = {
    "text": (replace("X", [["1"] * GENES] * SAMPLES), "X: counts of type object"),
    "complex": (replace("X", COUNTS + 0j), "X: counts of type complex128"),
    "compound": (replace("X", np.zeros((12, 5), "i4,i4")), "X: counts of type [("),
    "transposed": (replace("X", COUNTS.T), "X: counts of shape (5, 12); expected samples x genes"),
    "one dimension": (replace("X", COUNTS.ravel()), "X: counts of shape (60,)"),
    "scalar": (replace("X", 1), "X: counts of shape ()"),
    "no rows": (replace("X", np.zeros((0, 5))), "X: counts of shape (0, 5)"),
    "huge": (replace("X", shape=(HUGE, 5), dtype="i4", chunks=(64, 5)), "not all are in the file"),
    "filtered": (with_filter("X", 32008), "write it again with gzip, or install hdf5plugin"),
    "unwritten": (replace("X", shape=(12, 5), dtype="i4", chunks=(6, 5)), "not all are in the fi"),
}


@pytest.mark.parametrize(("change", "message"), DENSE.values(), ids=DENSE)
def test_a_malformed_dense_matrix_is_one_line(declare, malformed, change, message):
    assert message in problem_of(declare(malformed(change, "dense")))


def test_an_index_of_a_matrix_by_genes_is_located(declare, malformed):
    path = malformed(value("X/indices", 30, 12), "csc")
    assert "an entry of column 2 is in row 12; expected 0 to 11" in problem_of(declare(path))


IRRELEVANT = {
    "column in an unknown encoding": attribute("obs/extra", "encoding-type", "array-of-tomorrow"),
    "column behind a link": link("obs/extra", h5py.ExternalLink("/dev/zero", "x")),
    "column in an unknown filter": with_filter("obs/extra", 32015),
    "column huge": replace("obs/extra", shape=HUGE, dtype="i4", chunks=(64,)),
    "column gone": remove("obs/extra"),
    "column of var": link("var/extra", h5py.SoftLink("/nowhere")),
    "layer": value("layers/other/indices", 0, 10**6),
    "uns": attribute("uns", "encoding-type", "unknown"),
    "obsm": link("obsm", h5py.ExternalLink("/dev/zero", "x")),
    "a circle of groups": lambda file: file["uns"].__setitem__("self", file["/"]),
}


@pytest.mark.parametrize("change", IRRELEVANT.values(), ids=IRRELEVANT)
def test_what_nobody_declared_is_not_read(declare, malformed, change):
    def with_columns(file: h5py.File) -> None:
        for key in ("obs/extra", "var/extra"):
            file[key] = np.arange(SAMPLES, dtype=float)
            columns = file[key].parent.attrs["column-order"]
            file[key].parent.attrs["column-order"] = [*columns, "extra"]
        change(file)

    assert np.array_equal(read(declare(malformed(with_columns))), COUNTS)


def shuffled(file: h5py.File) -> None:
    """Entries of each row in reverse, the first entry split into two."""
    starts, first = CSR.indptr, CSR.data[0]
    order = np.arange(len(CSR.data)).reshape(SAMPLES, GENES)[:, ::-1].ravel()
    data, indices = CSR.data[order], CSR.indices[order]
    data[GENES - 1] = first - 1
    replace("X/data", np.append([1], data).astype(np.uint8))(file)
    replace("X/indices", np.append([0], indices))(file)
    replace("X/indptr", np.append([0], starts[1:] + 1))(file)


@pytest.mark.parametrize("limit", [2**23, 3], ids=["at once", "in pieces"])
def test_entries_in_any_order_and_in_parts_are_added_up(declare, malformed, monkeypatch, limit):
    monkeypatch.setattr(h5ad, "CHUNK_VALUES", limit)
    assert np.array_equal(read(declare(malformed(shuffled))), COUNTS)


def test_sums_of_small_integers_do_not_overflow(declare, malformed):
    def change(file: h5py.File) -> None:
        replace("X/data", np.full(60, 200, np.uint8))(file)
        replace("X/indices", np.zeros(60, int))(file)

    counts = read(declare(malformed(change)))
    assert (counts[:, 0] == 1000).all() and not counts[:, 1:].any()


@pytest.mark.parametrize("link", [h5py.SoftLink("/layers/other"), "hard"], ids=["soft", "hard"])
def test_a_link_within_the_file_is_followed(declare, malformed, link):
    def change(file: h5py.File) -> None:
        del file["X"]
        file["X"] = file["layers/other"] if link == "hard" else link

    assert np.array_equal(read(declare(malformed(change))), COUNTS)


# files


def make(path: Path, content: str) -> None:
    match content:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "link to itself":
            path.symlink_to(path)
        case "text":
            path.write_text("sample,gene\n")
        case "empty":
            path.touch()
        case "unreadable":
            path.touch(0)


FILES = {
    "fifo": "not a regular file",
    "device": "not a regular file",
    "link to itself": "does not exist",
    "text": "cannot be read (",
    "empty": "cannot be read (",
}


@pytest.mark.parametrize(("content", "message"), FILES.items())
def test_what_is_no_hdf5_file_is_one_line(declare, tmp_path, content, message):
    make(tmp_path / "source.h5ad", content)
    assert message in problem_of(declare(tmp_path / "source.h5ad"))


def test_a_file_that_another_program_writes_is_one_line(declare, malformed):
    path = malformed(lambda _: None)
    code = (
        "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print('open', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        writer.stdout.readline()
        problem = problem_of(declare(path))
        writer.communicate(b"\n")
    assert "another program has it open for writing" in problem


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_cut_file_is_one_line(declare, templates, tmp_path, form):
    path, content = tmp_path / "source.h5ad", templates[form]
    for size in np.linspace(0, len(content) - 1, 6, dtype=int):
        path.write_bytes(content[:size])
        assert "source.h5ad" in problem_of(declare(path))


def test_a_file_in_which_hdf5_does_not_end_is_one_line(declare, malformed, monkeypatch):
    """Zeros in place of the texts that attributes refer to, as in a download with holes."""
    path = malformed(lambda _: None)
    content = path.read_bytes()
    for start in range(len(content)):
        if content.startswith(b"GCOL", start):
            content = content[: start + 16] + bytes(4080) + content[start + 4096 :]
    path.write_bytes(content)
    monkeypatch.setattr(reading_module, "CHILD_SECONDS", 1)
    assert "HDF5 does not end while reading it" in problem_of(declare(path))


def test_a_crash_while_reading_is_one_line(declare, malformed, monkeypatch):
    path = malformed(lambda _: None)
    parent = os.getpid()

    def crash(*_) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), 11)

    monkeypatch.setattr(counts_module.SparseCounts, "__init__", crash)
    assert "HDF5 ends by SIGSEGV while reading it" in problem_of(declare(path))


def test_a_size_that_is_declared_takes_no_memory(declare, malformed):
    """A thousand times the memory of the machine, in obs, in the matrix and in a chunk."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("huge data", "huge indptr", "huge names", "huge chunks", "shape huge"):
        problem_of(declare(malformed(H5AD[name][0])))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000, f"{grown} kB"


def test_more_rows_than_memory_are_refused_with_an_estimate(declare, malformed, monkeypatch):
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    message = "obs/_index: 12 values needs about 0.0 GB of memory"
    assert message in problem_of(declare(malformed(lambda _: None)))


# folders


def write_folder(folder: Path) -> Path:
    (folder / "counts").mkdir(parents=True)
    samples = table().reset_index(names="sample_id")
    samples.to_parquet(folder / "samples.parquet", index=False)
    pd.DataFrame({"gene_id": [*"abcde"]}).to_parquet(folder / "genes.parquet", index=False)
    write_counts(folder / "counts" / "c.parquet")
    return folder


def write_counts(path: Path, names=None, lists=None, **settings) -> None:
    names = list(table().index) if names is None else names
    lists = COUNTS.tolist() if lists is None else lists
    pq.write_table(pa.table({"sample_id": names, "counts": lists}), path, **settings)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)


def bomb(folder: Path) -> None:
    """A row of 10^5 equal counts in some bytes."""
    counts = pa.ListArray.from_arrays([0, 10**5], pa.array(np.ones(10**5, np.uint8)))
    write_counts(folder / "counts" / "c.parquet", ["s0"], counts, compression="zstd")


def long_text(folder: Path) -> None:
    """A text of 10^6 characters in 10^5 rows, one copy of it in the file."""
    codes = pa.array(np.zeros(10**5, np.int32))
    tissue = pa.DictionaryArray.from_arrays(codes, ["x" * 10**6])
    names = [f"s{number}" for number in range(10**5)]
    samples = pa.table({"sample_id": names, "tissue": tissue, "dose": np.zeros(10**5)})
    pq.write_table(
        samples.cast(samples.schema.set(1, pa.field("tissue", tissue.type))),
        folder / "samples.parquet",
    )


FOLDERS = {
    "damaged page": (lambda f: flip(f / "samples.parquet", 30), "samples.parquet: cannot be read"),
    "damaged footer": (lambda f: flip(f / "genes.parquet", -7), "genes.parquet: cannot be read"),
    "counts not Parquet": (
        lambda f: (f / "counts/c.parquet").write_text("sample,counts"),
        "counts/c.parquet: cannot be read (Parquet magic bytes not found",
    ),
    "a copy beside": (
        lambda f: write_counts(f / "counts/c copy.parquet"),
        "c.parquet: samples s0, s1, s2, s3, s4, ... (12 in all) have counts twice",
    ),
    "a folder as counts": (
        lambda f: (f / "counts/d.parquet").mkdir(),
        "counts/d.parquet: not a regular file",
    ),
    "a fifo as genes": (
        lambda f: ((f / "genes.parquet").unlink(), os.mkfifo(f / "genes.parquet")),
        "genes.parquet: not a regular file",
    ),
    "counts is a file": (
        lambda f: (f / "counts").rename(f / "old") and (f / "counts").touch(),
        "counts: cannot be read (",
    ),
    "names twice": (
        lambda f: pq.write_table(
            pa.table([["s0"], ["s1"]], names=["sample_id", "sample_id"]), f / "samples.parquet"
        ),
        "samples.parquet: columns sample_id occur more than once",
    ),
    "counts of text": (
        lambda f: write_counts(f / "counts/c.parquet", lists=[["1"]] * SAMPLES),
        "counts/c.parquet: counts is of type list<element: string>",
    ),
    "a null count": (
        lambda f: write_counts(f / "counts/c.parquet", lists=[[None, 1, 1, 1, 1]] * SAMPLES),
        "sample s0, gene a: count nan is not finite",
    ),
    "a null row": (
        lambda f: write_counts(f / "counts/c.parquet", lists=[None, *COUNTS.tolist()[1:]]),
        "counts/c.parquet: row 0 has 0 counts; expected one for each of 5 genes",
    ),
    "no counts": (lambda f: (f / "counts/c.parquet").unlink(), "no counts for samples s0, s1"),
    "a bomb": (bomb, "c.parquet: row group 0 has 100,000 counts; expected 1 x 5"),
    "a long text": (long_text, "samples.parquet: tissue: its text needs about 100.0 GB"),
}


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_malformed_folder_is_one_line(declare, tmp_path, monkeypatch, change, message):
    free = psutil.virtual_memory()._replace(available=2**34)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(shards, "BATCH_VALUES", 1000)
    folder = write_folder(tmp_path / "folder")
    change(folder)
    assert message in problem_of(declare(folder))


def test_hidden_files_are_ignored_and_others_named(declare, tmp_path, caplog):
    folder = write_folder(tmp_path / "folder")
    for name in ("._c.parquet", ".DS_Store", "notes.txt"):
        (folder / "counts" / name).write_bytes(b"\0\5\26\7")
    (folder / "counts" / ".ipynb_checkpoints").mkdir()
    assert np.array_equal(read(declare(folder)), COUNTS)
    (warning,) = caplog.messages
    assert warning.endswith("counts/notes.txt: ignored; only .parquet files are read")


def test_a_column_that_nobody_declared_may_be_damaged(declare, tmp_path):
    folder = write_folder(tmp_path / "folder")
    samples = table().reset_index(names="sample_id").assign(extra="mark of the damage")
    samples.to_parquet(folder / "samples.parquet", index=False, use_dictionary=False)
    flip(folder / "samples.parquet", (folder / "samples.parquet").read_bytes().index(b"mark") - 3)
    assert np.array_equal(read(declare(folder)), COUNTS)
