"""A matrix of counts in an AnnData file, read in blocks of bounded size. N samples, G genes."""

import h5py
import numpy as np

from pipeline.gem.common.errors import InputError
from pipeline.gem.data.storage.hdf5 import H5adFile
from pipeline.gem.data.storage.reading import RESTORE, check_memory, file_errors

_FORMATS = {"csr_matrix": "csr", "csc_matrix": "csc", "csr": "csr", "csc": "csc"}


class DenseCounts:
    """An array (N, G)."""

    def __init__(self, file: H5adFile, key: str):
        self._where, self._values = file.where(key), file.dataset(key)
        self.shape = tuple(self._values.shape)
        _check_type(self._values, self._where)

    def block(self, start: int, stop: int, _limit: int) -> np.ndarray:
        """(B, G) counts of some rows."""
        with file_errors(self._where):
            return self._values[start:stop]


class SparseCounts:
    """A compressed matrix (N, G): by samples (csr) or by genes (csc).

    Several entries of one sample and gene are added up.
    """

    def __init__(self, file: H5adFile, key: str):
        self._where = file.where(key)
        encoding = file.text(key, "encoding-type") or file.text(key, "h5sparse_format")
        self._format = _FORMATS.get(encoding)
        if self._format is None:
            raise InputError(
                f"{self._where} cannot be read as a sparse matrix (encoding-type {encoding!r}); "
                "expected csr_matrix or csc_matrix: write it again with anndata"
            )
        with file_errors(f"{self._where}: shape"):
            attributes = file.member(key).attrs
            shape = attributes["shape" if "shape" in attributes else "h5sparse_shape"]
            samples, genes = (int(length) for length in shape)
        self.shape = (samples, genes)
        self._data, self._indices, indptr = (
            self._vector(file, f"{key}/{name}") for name in ("data", "indices", "indptr")
        )
        _check_type(self._data, self._where)
        self._starts = self._read_starts(indptr)

    def _vector(self, file: H5adFile, key: str) -> h5py.Dataset:
        dataset = file.dataset(key)
        if dataset.ndim != 1 or not (key.endswith("/data") or dataset.dtype.kind in "iu"):
            raise InputError(
                f"{file.where(key)}: {dataset.dtype} of shape {dataset.shape}; expected a list of "
                f"{'numbers' if key.endswith('/data') else 'integers'}; {RESTORE}"
            )
        return dataset

    def _read_starts(self, indptr: h5py.Dataset) -> np.ndarray:
        """(N + 1,) or (G + 1,) the first entry of each sample or gene, and the number of all."""
        where, entries = f"{self._where}/indptr", len(self._data)
        if len(self._indices) != entries:
            raise InputError(
                f"{self._where}: {entries} data and {len(self._indices)} indices; expected as many "
                f"of one as of the other; {RESTORE}"
            )
        expected = self._lengths()[0] + 1
        if len(indptr) != expected:
            raise InputError(f"{where}: {len(indptr)} values; expected {expected}; {RESTORE}")
        check_memory(where, f"{expected:,} values", 16 * expected)
        with file_errors(where):
            starts = indptr[:]
        if starts[0] != 0 or starts[-1] != entries:
            raise InputError(
                f"{where}: from {starts[0]} to {starts[-1]}; expected 0 to {entries}, the number "
                f"of entries; {RESTORE}"
            )
        falling = np.flatnonzero(starts[1:] < starts[:-1])
        if len(falling):
            row = falling[0]
            raise InputError(
                f"{where}: value {row + 1} is {starts[row + 1]}, below the one before, "
                f"{starts[row]}; {RESTORE}"
            )
        return starts.astype(np.int64)

    def _lengths(self) -> tuple[int, ...]:
        """(N, G) if stored by samples, (G, N) by genes."""
        return self.shape if self._format == "csr" else self.shape[::-1]

    def block(self, start: int, stop: int, limit: int) -> np.ndarray:
        """(B, G) counts of some rows, read from at most `limit` entries at a time.

        Of a matrix by genes all entries are read: its rows are spread over the file.
        """
        genes = self.shape[1]
        counts = np.zeros((stop - start, genes), dtype=self._sum_type())
        by_samples = self._format == "csr"
        first, last = (start, stop) if by_samples else (0, genes)
        starts = self._starts[first : last + 1]
        for begin in range(starts[0], starts[-1], limit):
            end = min(begin + limit, starts[-1])
            with file_errors(self._where):
                data, indices = self._data[begin:end], self._indices[begin:end]
            self._check_indices(indices, begin)
            lines = np.repeat(np.arange(first, last), np.diff(starts.clip(begin, end)))
            if by_samples:
                positions = (lines - start) * genes + indices.astype(np.int64)
            else:
                inside = (indices >= start) & (indices < stop)
                data, rows = data[inside], indices[inside].astype(np.int64) - start
                positions = rows * genes + lines[inside]
            np.add.at(counts.reshape(-1), positions, data.astype(counts.dtype))
        return counts

    def _sum_type(self) -> np.dtype:
        """A type in which sums of counts do not overflow."""
        dtype = self._data.dtype
        if dtype.kind == "f":
            return np.promote_types(dtype, np.float32)
        return dtype if dtype == np.uint64 else np.dtype(np.int64)

    def _check_indices(self, indices: np.ndarray, begin: int) -> None:
        width = self._lengths()[1]
        outside = np.flatnonzero((indices < 0) | (indices >= width))
        if len(outside):
            entry = begin + outside[0]
            row = np.searchsorted(self._starts, entry, side="right") - 1
            kinds = ("row", "column") if self._format == "csr" else ("column", "row")
            raise InputError(
                f"{self._where}/indices: an entry of {kinds[0]} {row} is in {kinds[1]} "
                f"{indices[outside[0]]}; expected 0 to {width - 1}; {RESTORE}"
            )


def _check_type(values: h5py.Dataset, where: str) -> None:
    if values.dtype.kind not in "biuf":
        raise InputError(f"{where}: counts of type {values.dtype}; expected whole numbers")
