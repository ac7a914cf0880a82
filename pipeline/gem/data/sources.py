"""Sources of raw counts: a folder of Parquet files or an AnnData .h5ad, read in chunks.

A source has `samples` (sample_id first), `genes` (gene_id first) and `chunks()`. Nothing is
written beside the input.

B samples of a chunk, G genes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data
from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.shards import read_shard
from pipeline.gem.data.tables import identifier_series, plain_frame, read_table

MAX_COUNT = 2**24  # float32 holds every integer up to here
CHUNK_VALUES = 2**23  # counts read at a time
RAW = ".raw"  # as a layer: AnnData's .raw; a layer of the name "raw" is a plain layer


class Source(Protocol):
    samples: pd.DataFrame
    genes: pd.DataFrame
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
        return ParquetSource(path, data.sample_id)
    if path.suffix.lower() == ".h5ad":
        return H5adSource(path, data.layer, data.sample_id)
    raise InputError(f"data.source: {path} is neither a folder nor an .h5ad file")


def checked_chunks(source: Source, where: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions (B,), valid counts (B, G) int64) of all samples; InputError as `check_counts`."""
    samples = source.samples["sample_id"].to_numpy()
    genes = source.genes["gene_id"].to_numpy()
    for rows, counts in source.chunks():
        yield rows, check_counts(counts, samples[rows], genes, where, source.advice)


class ParquetSource:
    """samples.parquet, genes.parquet and counts/*.parquet in a folder.

    `sample_id` is the column of sample names if it is not sample_id.
    """

    def __init__(self, folder: Path, sample_id: str | None = None):
        parts = ("samples.parquet", "genes.parquet", "counts")
        absent = [folder / name for name in parts if not (folder / name).exists()]
        if absent:
            content = "a source folder holds samples.parquet, genes.parquet and counts/*.parquet"
            raise InputError(*(f"{path}: absent; {content}" for path in absent))
        self.folder = folder
        self.advice = f"write the raw counts into {folder / 'counts'}"
        self.samples = _read_table(
            folder / "samples.parquet", sample_id or "sample_id", "sample_id"
        )
        self.genes = _read_table(folder / "genes.parquet", "gene_id", "gene_id")

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        sample_ids = self.samples["sample_id"]
        position = pd.Series(np.arange(len(sample_ids)), index=sample_ids)
        read = np.zeros(len(sample_ids), dtype=bool)
        for path in sorted((self.folder / "counts").glob("[!.]*.parquet")):  # ._x: of macOS
            for names, counts in read_shard(path, len(self.genes)):
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


class H5adSource:
    """An AnnData file: obs as samples, var as genes, raw counts from X, a layer or .raw.

    Only obs and var are held in memory. `layer` is None for X and ".raw" for .raw (with the genes
    of .raw); `sample_id` is a column of obs, None for its index. `layer_option` is the user's name
    of the layer option in messages.
    """

    def __init__(
        self,
        path: Path,
        layer: str | None = None,
        sample_id: str | None = None,
        layer_option: str = "data.layer",
    ):
        import h5py  # as anndata below: takes a second to import, and only this source needs it

        self.path, self.layer, self.layer_option = path, layer, layer_option
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise InputError(f"{path}: cannot be read as AnnData ({error})") from None
        self._matrix, genes = self._find_matrix()
        obs, var = self._table("obs"), self._table(genes)
        if sample_id is not None and sample_id not in obs:
            suggestion = did_you_mean(sample_id, obs.columns)
            raise InputError(
                f"{path}: data.sample_id: no column {sample_id} in obs{suggestion}; "
                "null takes the obs index"
            )
        names = obs.index.to_series() if sample_id is None else obs[sample_id]
        obs = obs.drop(columns=sample_id or [])
        self.samples = _with_names(plain_frame(obs), names, "sample_id", f"{path}: obs")
        self.genes = _with_names(
            plain_frame(var), var.index.to_series(), "gene_id", f"{path}: {genes}"
        )
        shape = (len(obs), len(var))
        if tuple(self._matrix.shape) != shape:
            raise InputError(
                f"{path}: counts of shape {tuple(self._matrix.shape)}; "
                f"expected samples x genes, {shape}"
            )
        others = [name for name in self._layers() if name != (layer or "null")]
        if others:
            self.advice = f"point {layer_option} at the raw counts: {examples(others)}"
        else:
            self.advice = "this file holds no other matrix; use one with raw counts"

    def _layers(self) -> list[str]:
        """Valid values of the layer option."""
        layers = ["null"] if "X" in self._file else []
        layers += list(self._file.get("layers", ()))
        return layers + ([RAW] if "raw" in self._file else [])

    def _find_matrix(self) -> tuple:
        """(matrix on disk, key of the table of its genes). InputError if the file has none."""
        import anndata

        keys = {None: ("X", "var"), RAW: ("raw/X", "raw/var")}
        key, genes = keys.get(self.layer, (f"layers/{self.layer}", "var"))
        if self.layer == RAW and f"layers/{RAW}" in self._file:
            raise InputError(
                f"{self.path}: {self.layer_option}: {RAW} names a layer and the .raw of this file; "
                "rename the layer"
            )
        if key not in self._file:
            descriptions = {None: f"no X, and {self.layer_option} is null", RAW: "no .raw"}
            description = descriptions.get(self.layer, f"no layer {self.layer!r}")
            layers = examples(self._layers()) or "nothing: the file holds no counts"
            raise InputError(f"{self.path}: {description}; {self.layer_option} can be {layers}")
        stored = self._file[key]
        try:
            return (anndata.io.sparse_dataset(stored) if hasattr(stored, "keys") else stored), genes
        except ValueError as error:
            raise InputError(
                f"{self.path}: {key} cannot be read as a sparse matrix ({error})"
            ) from None

    def _table(self, key: str) -> pd.DataFrame:
        """obs or var. InputError if the file has none."""
        import anndata

        try:
            table = anndata.io.read_elem(self._file[key])
        except (OSError, KeyError, ValueError, TypeError) as error:
            reason = next(iter(str(error).splitlines()), key)
            raise InputError(f"{self.path}: cannot be read as AnnData ({reason})") from None
        if not isinstance(table, pd.DataFrame):
            raise InputError(
                f"{self.path}: {key} is stored in an old format; "
                "read the file with anndata and write it again"
            )
        return table

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows = max(1, CHUNK_VALUES // max(1, len(self.genes)))
        for start in range(0, len(self.samples), rows):
            stop = min(start + rows, len(self.samples))
            yield np.arange(start, stop), self._block(start, stop)

    def _block(self, start: int, stop: int) -> np.ndarray:
        """(B, G) counts of some rows.

        A matrix in CSC format is read some genes at a time: its rows are spread over the file.
        """
        csc = getattr(self._matrix, "format", None) == "csc"
        width = max(1, CHUNK_VALUES // len(self.samples) if csc else len(self.genes))
        parts = [
            self._matrix[start:stop, first : first + width]
            for first in range(0, max(1, len(self.genes)), width)
        ]
        dense = [part.toarray() if hasattr(part, "toarray") else np.asarray(part) for part in parts]
        return np.concatenate(dense, axis=1)


def _read_table(path: Path, column: str, key: str) -> pd.DataFrame:
    table = read_table(path)
    if column not in table:
        raise InputError(f"{path}: no column {column}{did_you_mean(column, table.columns)}")
    return _with_names(table.drop(columns=column), table[column], key, str(path))


def _with_names(table: pd.DataFrame, names: pd.Series, key: str, where: str) -> pd.DataFrame:
    """The table with the names of its rows, as text, in a first column `key`.

    It replaces another column of that name. InputError if a name is missing.
    """
    names = identifier_series(names)
    missing = np.flatnonzero(names.isna().to_numpy())
    if len(missing):
        raise InputError(f"{where}: {key} is missing in rows {examples(missing)}; name every row")
    table = table.drop(columns=key, errors="ignore").reset_index(drop=True)
    table.insert(0, key, names.to_numpy(dtype=object))
    return table


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
    return counts.astype(np.int64)


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
