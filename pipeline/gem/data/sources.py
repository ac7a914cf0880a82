"""Sources of raw counts: a folder of Parquet files or an AnnData .h5ad, read in chunks.

A source has `samples` (sample_id first), `genes` (gene_id first) and `chunks()`. Nothing is
written beside the input.

B samples of a chunk, G genes.
"""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.shards import read_shard
from pipeline.gem.data.storage.reading import RESTORE, file_errors
from pipeline.gem.data.tables import read_columns, with_names

logger = logging.getLogger(__name__)
MAX_COUNT = 2**24  # float32 holds every integer up to here


class Source(Protocol):
    samples: pd.DataFrame
    genes: pd.DataFrame
    columns: list[str]  # names of all columns that describe samples, whether read or not
    advice: str  # where raw counts may be if these are none

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions in `samples` (B,), counts (B, G) as stored); every sample occurs once."""


def open_source(data: Data) -> Source:
    """The source that params.yaml declares. InputError if it is absent or incomplete."""
    path = Path(data.source)
    if not path.exists():
        raise InputError(
            f"data.source: {path} does not exist; give a folder of Parquet files or an .h5ad file"
        )
    if path.is_dir():
        # The oracles of a simulation need all columns.
        columns = None if (path / "truth" / "parameters.npz").exists() else data.columns()
        return ParquetSource(path, data.sample_id, columns)
    if path.suffix.lower() == ".h5ad":
        # HDF5 and anndata take a second to import, and only this source needs them.
        from pipeline.gem.data.storage.h5ad import H5adSource

        return H5adSource(path, data.layer, data.sample_id, data.columns())
    raise InputError(f"data.source: {path} is neither a folder nor an .h5ad file")


def checked_chunks(source: Source, where: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions (B,), valid counts (B, G) int64) of all samples; InputError as `check_counts`."""
    samples = source.samples["sample_id"].to_numpy()
    genes = source.genes["gene_id"].to_numpy()
    for rows, counts in source.chunks():
        yield rows, check_counts(counts, samples[rows], genes, where, source.advice)


class ParquetSource:
    """samples.parquet, genes.parquet and counts/*.parquet in a folder.

    `sample_id` is the column of sample names if it is not sample_id; `columns` are those to read
    beside it, None for all. Hidden files are ignored.
    """

    def __init__(
        self,
        folder: Path,
        sample_id: str | None = None,
        columns: Collection[str] | None = (),
    ):
        parts = ("samples.parquet", "genes.parquet", "counts")
        absent = [folder / name for name in parts if not (folder / name).exists()]
        if absent:
            content = "a source folder holds samples.parquet, genes.parquet and counts/*.parquet"
            raise InputError(*(f"{path}: absent; {content}" for path in absent))
        self.folder = folder
        self.advice = f"write the raw counts into {folder / 'counts'}"
        self.samples, self.columns = read_names(
            folder / "samples.parquet", "sample_id", sample_id, columns
        )
        self.genes, _ = read_names(folder / "genes.parquet", "gene_id")
        self._files = _count_files(folder / "counts")

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        sample_ids = self.samples["sample_id"]
        position = pd.Series(np.arange(len(sample_ids)), index=sample_ids)
        read = np.zeros(len(sample_ids), dtype=bool)
        for path in self._files:
            for names, counts in read_shard(path, len(self.genes), RESTORE, InputError):
                rows = position.reindex(names)
                if rows.isna().any():
                    unknown = examples(rows.index[rows.isna()])
                    table = self.folder / "samples.parquet"
                    raise InputError(f"{path}: samples {unknown} are not in {table}")
                rows = rows.to_numpy(dtype=np.int64)
                twice = np.unique(rows[read[rows] | pd.Series(rows).duplicated().to_numpy()])
                if len(twice):
                    names = examples(sample_ids.iloc[twice])
                    raise InputError(f"{path}: samples {names} have counts twice")
                read[rows] = True
                yield rows, counts
        if not read.all():
            names = examples(sample_ids[~read])
            raise InputError(f"{self.folder / 'counts'}: no counts for samples {names}")


def _count_files(folder: Path) -> list[Path]:
    """Parquet files of a folder; a warning names what is ignored, but for hidden files."""
    with file_errors(folder):
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    ignored = [path for path in paths if path.suffix != ".parquet"]
    if ignored:
        logger.warning("%s: ignored; only .parquet files are read", examples(ignored))
    return [path for path in paths if path.suffix == ".parquet"]


def read_names(
    path: Path, key: str, column: str | None = None, columns: Collection[str] | None = ()
) -> tuple[pd.DataFrame, list[str]]:
    """(a table with its names, of a `column`, first as `key`; the names of all its columns).

    Beside the names `columns` are read, all if None.
    """
    column = column or key
    table, names = read_columns(path, None if columns is None else {*columns, column})
    if column not in table:
        raise InputError(f"{path}: no column {column}{did_you_mean(column, names)}")
    return with_names(table.drop(columns=column), table[column], key, str(path)), names


def check_unique(table: pd.DataFrame, key: str, where: str) -> list[str]:
    """One message if names are not unique."""
    duplicates = table[key][table[key].duplicated()].unique()
    if not len(duplicates):
        return []
    return [f"{where}: {key} {examples(duplicates)} stands more than once; names must be unique"]


def check_counts(
    counts: np.ndarray, samples: np.ndarray, genes: np.ndarray, where: str, advice: str
) -> np.ndarray:
    """The counts (B, G) as int64. InputError unless they are whole numbers from 0 to 2^24.

    The message has sample, gene and value of the first invalid count, and the advice.
    """
    if counts.dtype.kind not in "fiub":
        raise InputError(
            f"{where}: counts of type {counts.dtype}; expected whole numbers; {advice}"
        )
    problem = _first_invalid(counts, advice) if counts.size else None
    if problem:
        invalid, message = problem
        row, column = (int(index[0]) for index in np.nonzero(invalid))
        raise InputError(
            f"{where}: sample {samples[row]}, gene {genes[column]}: "
            f"count {counts[row, column]} {message}"
        )
    return counts.astype(np.int64, copy=False)


def _first_invalid(counts: np.ndarray, advice: str) -> tuple[np.ndarray, str] | None:
    """((B, G) mask of invalid counts, the reason), None if all are valid."""
    if counts.dtype.kind == "f":
        finite = np.isfinite(counts)
        if not finite.all():
            return ~finite, f"is not finite; expected whole numbers from 0 to 2^24; {advice}"
        fractional = counts != np.floor(counts)
        if fractional.any():
            expected = "expected raw counts, whole numbers (round the estimates of salmon or RSEM)"
            reason = "looks log-normalised" if counts.max() < 50 else expected
            return fractional, f"is fractional; {reason}: {advice}"
    if counts.min() < 0:
        return counts < 0, f"is negative; expected raw counts: {advice}"
    if counts.max() > MAX_COUNT:
        return counts > MAX_COUNT, "is above 2^24 = 16777216; is it a sum over samples?"
    return None
