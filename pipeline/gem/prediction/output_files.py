"""Predictions on disk, written block by block: a Parquet table of lists, or an AnnData .h5ad.

n rows of a block, G genes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.files import replacing
from pipeline.gem.prediction.reference_samples import genes_file

_SPARSE = 1 / 3  # share of counts above zero in the first block, below which zeros are not stored
_CHUNK_VALUES = 2**18  # of one compressed piece of an .h5ad


@contextmanager
def open_output(
    path: Path, genes: np.ndarray, about: Mapping[str, object]
) -> Iterator["ParquetOutput | H5adOutput"]:
    """A writer; the files appear when all is written, or not at all. `about` says where the numbers come from.

    InputError for a name that says no known format.
    """
    if path.suffix == ".h5ad":
        with replacing(path) as temporary, h5py.File(temporary, "w") as file:
            output = H5adOutput(file, genes, about)
            yield output
            output.finish()
    elif path.suffix == ".parquet":
        with replacing(path) as temporary, replacing(genes_file(path)) as beside:
            pq.write_table(pa.table({"gene_id": pa.array(genes.tolist(), pa.string())}), beside)
            output = ParquetOutput(temporary, about)
            try:
                yield output
            finally:
                output.close()
    else:
        raise InputError(f"{path}: neither .parquet nor .h5ad")


class ParquetOutput:
    """The columns of a block, then lists in the order of the genes.

    Bytes of counts are stored apart, high ones and low ones (BYTE_STREAM_SPLIT), which makes lz4 twice as fast and the file
    a third smaller than lists with zstd.
    """

    def __init__(self, path: Path, about: Mapping[str, object]):
        self.path, self.about, self._writer = path, about, None

    def write(
        self,
        columns: pa.Table,
        counts: np.ndarray,
        latents: Mapping[str, np.ndarray],
        ends: Mapping[str, np.ndarray],
    ) -> None:
        """A block: columns (n,), counts (n, G), latents by group (n, L_g), further counts by name (n, G)."""
        lists = (
            {f"latent_{group}": values for group, values in latents.items()}
            | {"counts": counts}
            | dict(ends)
        )
        plain = columns.column_names
        for name, values in lists.items():
            columns = columns.append_column(*_list_column(name, values))
        if self._writer is None:
            metadata = {f"gem.{name}": str(value) for name, value in self.about.items()}
            encodings = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists}
            self._writer = pq.ParquetWriter(
                self.path, columns.schema.with_metadata(metadata), compression="lz4", use_dictionary=plain, column_encoding=encodings,
                write_statistics=plain, write_page_checksum=True,
            )  # fmt: skip
        self._writer.write_table(columns)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _list_column(name: str, values: np.ndarray) -> tuple[pa.Field, pa.Array]:
    """A column of lists over the memory of values (n, k)."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    kind = pa.list_(pa.field("element", flat.type, nullable=False))
    offsets = pa.array(np.arange(0, values.size + 1, max(1, values.shape[1]), dtype=np.int32))
    return pa.field(name, kind, nullable=False), pa.ListArray.from_arrays(offsets, flat, type=kind)


class H5adOutput:
    """AnnData's format on disk: counts in X, columns in obs, genes in var, latents in obsm, further counts in layers."""

    def __init__(self, file: h5py.File, genes: np.ndarray, about: Mapping[str, object]):
        self.file, self.genes, self.rows = file, genes, 0
        self.matrices: dict[str, _Dense | _Sparse] = {}
        self.columns: dict[str, _Column] = {}
        _encode(file, "anndata", "0.1.0")
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns", "uns/gem"):
            _encode(file.create_group(name), "dict", "0.1.0")
        for name, value in about.items():
            text = isinstance(value, str)
            _encode(
                file["uns/gem"].create_dataset(name, data=value),
                "string" if text else "numeric-scalar",
                "0.2.0",
            )
        var = _frame(file, "var", [])
        _texts(var, "_index", genes.tolist())

    def write(
        self,
        columns: pa.Table,
        counts: np.ndarray,
        latents: Mapping[str, np.ndarray],
        ends: Mapping[str, np.ndarray],
    ) -> None:
        """As of a Parquet output."""
        if not self.matrices:
            self._create(columns, counts, latents, ends)
        named = (
            {"X": counts}
            | {f"obsm/latent_{group}": values for group, values in latents.items()}
            | {f"layers/{name}": part for name, part in ends.items()}
        )
        for name, values in named.items():
            self.matrices[name].append(values)
        for name, column in self.columns.items():
            column.append(columns[name])
        self.rows += len(counts)

    def _create(
        self,
        columns: pa.Table,
        counts: np.ndarray,
        latents: Mapping[str, np.ndarray],
        ends: Mapping[str, np.ndarray],
    ) -> None:
        kind = _Sparse if np.count_nonzero(counts) < _SPARSE * counts.size else _Dense
        self.matrices = {
            name: kind(self.file, name, counts.shape[1], np.int32)
            for name in ("X", *(f"layers/{end}" for end in ends))
        }
        self.matrices |= {
            f"obsm/latent_{group}": _Dense(
                self.file, f"obsm/latent_{group}", part.shape[1], np.float32
            )
            for group, part in latents.items()
        }
        obs = _frame(self.file, "obs", columns.column_names)
        self.columns = {field.name: _Column(obs, field) for field in columns.schema}

    def finish(self) -> None:
        for part in (*self.matrices.values(), *self.columns.values()):
            part.finish()
        _texts(self.file["obs"], "_index", [str(row) for row in range(self.rows)])


class _Dense:
    """(rows, width) that grows."""

    def __init__(self, file: h5py.File, name: str, width: int, dtype: type):
        chunk = (max(1, min(4096, _CHUNK_VALUES // max(1, width))), max(1, width))
        self.data = file.create_dataset(
            name,
            (0, width),
            dtype,
            maxshape=(None, width),
            chunks=chunk,
            compression="gzip",
            compression_opts=1,
            shuffle=True,
        )
        _encode(self.data, "array", "0.2.0")

    def append(self, values: np.ndarray) -> None:
        _extend(self.data, values)

    def finish(self) -> None:
        """Nothing is left to write."""


class _Sparse:
    """Compressed rows that grow."""

    def __init__(self, file: h5py.File, name: str, width: int, dtype: type):
        self.group, self.width = file.create_group(name), width
        _encode(self.group, "csr_matrix", "0.1.0")
        for part, kind in (("data", dtype), ("indices", np.int32), ("indptr", np.int64)):
            self.group.create_dataset(
                part,
                (0,),
                kind,
                maxshape=(None,),
                chunks=(_CHUNK_VALUES,),
                compression="gzip",
                compression_opts=1,
                shuffle=True,
            )
        _extend(self.group["indptr"], np.zeros(1, dtype=np.int64))

    def append(self, values: np.ndarray) -> None:
        mask = values != 0
        start = len(self.group["data"])
        _extend(self.group["data"], values[mask])
        _extend(self.group["indices"], np.nonzero(mask)[1].astype(np.int32))
        _extend(self.group["indptr"], start + np.cumsum(np.count_nonzero(mask, axis=1)))

    def finish(self) -> None:
        self.group.attrs["shape"] = np.array(
            [len(self.group["indptr"]) - 1, self.width], dtype=np.int64
        )


class _Column:
    """A column of obs that grows: numbers as they are, everything else as categories."""

    def __init__(self, obs: h5py.Group, field: pa.Field):
        self.obs, self.name = obs, field.name.replace("/", "_")  # a slash would open a group
        self.number = (
            pa.types.is_integer(field.type)
            or pa.types.is_floating(field.type)
            or pa.types.is_boolean(field.type)
        )
        self.whole, self.missing, self.categories = pa.types.is_integer(field.type), [], {}
        kind = (
            np.bool_
            if pa.types.is_boolean(field.type)
            else np.int64
            if self.whole
            else np.float64
            if self.number
            else np.int32
        )
        self.data = obs.create_dataset(
            self.name, (0,), kind, maxshape=(None,), chunks=(_CHUNK_VALUES // 16,)
        )

    def append(self, column: pa.ChunkedArray) -> None:
        if not self.number:
            _extend(self.data, self._codes(column))
            return
        missing = pc.is_null(column).to_numpy()
        self.missing += (len(self.data) + np.flatnonzero(missing)).tolist()
        values = column.to_numpy()
        _extend(
            self.data,
            np.where(missing, 0 if self.data.dtype.kind != "f" else np.nan, values).astype(
                self.data.dtype
            ),
        )

    def _codes(self, column: pa.ChunkedArray) -> np.ndarray:
        """(n,) int32 category of each value, -1 where missing."""
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            column = pa.chunked_array(
                [
                    pa.array(
                        [None if value is None else str(value) for value in column.to_pylist()],
                        pa.string(),
                    )
                ]
            )
        coded = pc.dictionary_encode(column).combine_chunks()
        coded = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded
        place = np.array(
            [
                self.categories.setdefault(value, len(self.categories))
                for value in coded.dictionary.to_pylist()
            ]
            + [-1],
            dtype=np.int32,
        )
        return place[
            pc.fill_null(coded.indices, len(coded.dictionary)).to_numpy(zero_copy_only=False)
        ]

    def finish(self) -> None:
        if self.number and self.missing and self.data.dtype.kind != "f":
            values = self.data[:].astype(np.float64)
            values[self.missing] = np.nan
            del self.obs[self.name]
            self.data = self.obs.create_dataset(self.name, data=values)
        if self.number:
            _encode(self.data, "array", "0.2.0")
            return
        self.obs.move(self.name, f"{self.name}.codes")
        group = self.obs.create_group(self.name)
        _encode(group, "categorical", "0.2.0").attrs["ordered"] = False
        self.obs.move(f"{self.name}.codes", f"{self.name}/codes")
        _encode(group["codes"], "array", "0.2.0")
        _texts(group, "categories", list(self.categories))


def _frame(file: h5py.File, name: str, columns: list[str]) -> h5py.Group:
    group = _encode(file.create_group(name), "dataframe", "0.2.0")
    group.attrs["_index"] = "_index"
    group.attrs.create(
        "column-order",
        [column.replace("/", "_") for column in columns],
        dtype=h5py.string_dtype(),
        shape=(len(columns),),
    )
    return group


def _texts(group: h5py.Group, name: str, values: list[str]) -> None:
    _encode(
        group.create_dataset(
            name,
            data=np.array(values, dtype=object),
            dtype=h5py.string_dtype(),
            shape=(len(values),),
        ),
        "string-array",
        "0.2.0",
    )


def _encode(item: h5py.Group | h5py.Dataset, kind: str, version: str) -> h5py.Group | h5py.Dataset:
    item.attrs["encoding-type"], item.attrs["encoding-version"] = kind, version
    return item


def _extend(data: h5py.Dataset, values: np.ndarray) -> None:
    start = len(data)
    data.resize(start + len(values), axis=0)
    data[start:] = values
