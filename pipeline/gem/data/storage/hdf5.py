"""AnnData files, part by part: a part is checked before it is read, and others are never read.

What is checked: links stay in the file, data is in the file as declared, filters are known, memory
suffices. The HDF5 library itself reads what it is told to, from any device, or as zeros.
"""

import math
import os
import re
import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd

from pipeline.gem.common.errors import InputError
from pipeline.gem.data.storage.reading import RESTORE, check_memory, check_regular, file_errors

with suppress(ImportError, OSError):  # not required; it brings filters
    import hdf5plugin  # noqa: F401

MAX_CHUNK = 2**30  # bytes; a chunk is read as a whole
_MAX_LINKS = 16  # in a row
_TABLE_ENCODINGS = (("dataframe", "0.1.0"), ("dataframe", "0.2.0"))
_TEXT_BYTES = 100  # of a short text in memory


class H5adFile:
    """An .h5ad, open for reading. A context manager; all methods raise InputError."""

    def __init__(self, path: Path):
        self.path = path
        check_regular(path)
        self._size = path.stat().st_size
        with file_errors(path, f"expected AnnData in HDF5: {RESTORE}"):
            self._file = h5py.File(path, "r")

    def __enter__(self) -> "H5adFile":
        return self

    def __exit__(self, *_) -> None:
        with suppress(Exception):  # HDF5 closes a damaged file too
            self._file.close()

    def where(self, key: str) -> str:
        return f"{self.path}: {key}"

    def member(self, key: str, links: int = 0) -> h5py.Group | h5py.Dataset | None:
        """The object of a path such as obs/age; None if absent. No link leaves the file."""
        node, done = self._file, ""
        for part in filter(None, key.split("/")):
            if not isinstance(node, h5py.Group):
                return None
            with file_errors(self.where(key)):
                link = node.get(part, getlink=True)
                if link is None:
                    return None
                if isinstance(link, h5py.HardLink):
                    node = node[part]
            done = f"{done}/{part}"
            if not isinstance(link, h5py.HardLink):
                node = self._follow(link, done, links)
        return node

    def _follow(self, link, key: str, links: int) -> h5py.Group | h5py.Dataset:
        key = key.lstrip("/")
        if not isinstance(link, h5py.SoftLink):
            target = getattr(link, "filename", "elsewhere")
            raise InputError(
                f"{self.where(key)} is a link to another file ({target}); copy the data into this "
                "file"
            )
        target = link.path if link.path.startswith("/") else f"{os.path.dirname(key)}/{link.path}"
        node = self.member(target, links + 1) if links < _MAX_LINKS else None
        if node is None:
            raise InputError(
                f"{self.where(key)} is a link to {link.path}, which leads nowhere; {RESTORE}"
            )
        return node

    def names(self, key: str) -> list[str]:
        """Names in a group; none if there is no such group."""
        group = self.member(key)
        with file_errors(self.where(key)):
            return list(group) if isinstance(group, h5py.Group) else []

    def text(self, key: str, name: str) -> str | None:
        """An attribute as text; None if absent."""
        with file_errors(self.where(key)):
            attributes = self.member(key).attrs
            if name not in attributes:
                return None
            value = attributes[name]
            return value.decode() if isinstance(value, bytes) else str(value)

    def dataset(self, key: str) -> h5py.Dataset:
        """A dataset whose declared content is in the file and can be decoded here."""
        where, dataset = self.where(key), self.member(key)
        if not isinstance(dataset, h5py.Dataset):
            kind = "absent" if dataset is None else "not an array"
            raise InputError(f"{where}: {kind}; {RESTORE}")
        with file_errors(where):
            if dataset.shape is None:
                raise InputError(f"{where}: an array without a shape; {RESTORE}")
            if dataset.is_virtual or dataset.external:
                raise InputError(f"{where}: its data is in other files; copy it into this file")
            self._check_filters(dataset, where)
            self._check_stored(dataset, where)
            return dataset

    def _check_filters(self, dataset: h5py.Dataset, where: str) -> None:
        plist = dataset.id.get_create_plist()
        for position in range(plist.get_nfilters()):
            code, _, _, description = plist.get_filter(position)
            if not h5py.h5z.filter_avail(code):
                name = re.split("[;:]", description.decode(errors="replace"))[0] or "no name"
                raise InputError(
                    f"{where}: compressed by the filter {code} ({name}), which is not installed; "
                    "write it again with gzip, or install hdf5plugin"
                )

    def _check_stored(self, dataset: h5py.Dataset, where: str) -> None:
        """What was never written would be read as zeros, in whatever size it is declared."""
        declared, itemsize = dataset.size, dataset.dtype.itemsize
        if dataset.chunks is None:
            stored = 0 if not dataset.id.get_storage_size() else self._size // max(1, itemsize)
        else:
            chunk = math.prod(dataset.chunks)
            if chunk * itemsize > MAX_CHUNK:
                raise InputError(
                    f"{where}: stored in chunks of {chunk * itemsize / 1e9:.1f} GB; write it again "
                    "with smaller chunks"
                )
            needed = math.prod(
                -(-length // width)
                for length, width in zip(dataset.shape, dataset.chunks, strict=True)
            )
            stored = declared if not needed or dataset.id.get_num_chunks() >= needed else 0
        if stored < declared:
            raise InputError(
                f"{where}: {dataset.shape} values are declared, but not all are in the file; "
                f"{RESTORE}"
            )

    def table(self, key: str, columns: Collection[str]) -> tuple[pd.DataFrame, list[str]]:
        """(those of `columns` that a table has, with its index; the names of all its columns)."""
        group = self.member(key)
        if group is None:
            raise InputError(f"{self.path}: cannot be read as AnnData (no {key}); {RESTORE}")
        encoding = self.text(key, "encoding-type"), self.text(key, "encoding-version")
        if not isinstance(group, h5py.Group) or encoding not in _TABLE_ENCODINGS:
            version = "an old format" if encoding == (None, None) else f"the format {encoding}"
            raise InputError(
                f"{self.where(key)} is stored in {version}; "
                "read the file with the anndata that wrote it and write it again with anndata 0.12"
            )
        with file_errors(self.where(key)):
            names = [str(name) for name in np.atleast_1d(group.attrs["column-order"])]
            index = self._column(f"{key}/{self.text(key, '_index')}")
        table = pd.DataFrame(index=pd.Index(index))
        for name in dict.fromkeys(name for name in names if name in columns):
            column = self._column(f"{key}/{name}")
            if len(column) != len(table):
                raise InputError(
                    f"{self.where(f'{key}/{name}')}: {len(column)} values; expected one for each "
                    f"of {len(table)} rows; {RESTORE}"
                )
            table[name] = column
        return table, names

    def _column(self, key: str) -> np.ndarray | pd.api.extensions.ExtensionArray:
        """A column of a table: texts, numbers, booleans or categories."""
        element = self.member(key)
        parts = [key]
        if isinstance(element, h5py.Group):
            parts = [f"{key}/{name}" for name in self.names(key)]
        for part in parts:
            self._check_values(part)
        with file_errors(self.where(key)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the format is old
            column = anndata.io.read_elem(element)
            if isinstance(element, h5py.Dataset) and "categories" in element.attrs:
                column = self._legacy_categories(element, column)
            column = np.atleast_1d(column) if np.isscalar(column) else column
            if getattr(column, "ndim", 0) != 1:
                raise InputError(f"{self.where(key)}: not a column of one value per row; {RESTORE}")
            return column

    def _legacy_categories(self, element: h5py.Dataset, codes: np.ndarray) -> pd.Categorical:
        """Of a file of anndata 0.7: a column of codes that refers to its categories."""
        categories = element.parent[element.attrs["categories"]]
        self._check_values(categories.name)
        ordered = bool(categories.attrs.get("ordered", False))
        return pd.Categorical.from_codes(codes, anndata.io.read_elem(categories), ordered=ordered)

    def _check_values(self, key: str) -> None:
        dataset, where = self.dataset(key), self.where(key)
        with file_errors(where):
            text = h5py.check_string_dtype(dataset.dtype) is not None
            if not text and dataset.dtype.kind not in "biuf":
                raise InputError(
                    f"{where}: values of type {dataset.dtype}; expected text or numbers"
                )
            # Fixed-length text becomes UCS4, four bytes per character.
            size = _TEXT_BYTES + 5 * dataset.dtype.itemsize if text else dataset.dtype.itemsize
            check_memory(where, f"{dataset.size:,} values", dataset.size * size)
