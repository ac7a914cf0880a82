"""Predictions on disk, written block by block: a Parquet table with lists, or an AnnData .h5ad.

n rows of a block, G genes.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix

from pipeline.gem.common.errors import InputError
from pipeline.gem.common.files import atomic_replacement
from pipeline.gem.common.progress import Progress
from pipeline.gem.prediction.predictor import PredictedBlock
from pipeline.gem.prediction.reference_samples import genes_file

SUFFIXES = (".parquet", ".h5ad")
_MAX_SPARSE_SHARE = 1 / 3  # of counts above zero in the first block; above it X is dense
_CHUNK_VALUES = 2**18  # values of a compressed chunk of an .h5ad
_H5_OPTIONS = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


def output_problems(output: Path, model: Path, *inputs: Path | None) -> list[str]:
    """A message for each file that the output would replace although the prediction reads it.

    The name of a file does not matter: it may be a link, or lead through one. Nothing is written
    into a folder that is read.
    """
    outputs = [output, genes_file(output)] if output.suffix == ".parquet" else [output]
    folder = model.parent if (model.parent / "seeds").is_dir() else model  # --model may be a file
    read = [path for path in (model, folder, *inputs) if path is not None and path.exists()]
    read += [genes for path in read if (genes := genes_file(path)).exists()]
    problems = [f"--output: {path} is a folder; name a file" for path in outputs if path.is_dir()]
    for path in read:
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        if any(_is_same(new, file) for new in outputs for file in files):
            problems.append(f"--output: {output} would replace {path}; name another file")
        elif path.is_dir() and any(_is_inside(new, path) for new in outputs):
            problems.append(f"--output: {output} is inside {path}; name another folder")
    return list(dict.fromkeys(problems))


def _is_same(new: Path, file: Path) -> bool:
    """Whether two names are of one file; a link to nothing is of none."""
    return new.exists() and file.exists() and new.samefile(file)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether the file, or the file that it links to, is in the folder or below."""
    places = (Path(os.path.realpath(path.parent)), Path(os.path.realpath(path)).parent)
    parents = (parent for place in places for parent in (place, *place.parents))
    return any(parent.exists() and parent.samefile(folder) for parent in parents)


@contextmanager
def open_output(
    path: Path, genes: np.ndarray, provenance: Mapping[str, object]
) -> Iterator["ParquetOutput | H5adOutput"]:
    """A writer for blocks. The files appear when all blocks are written, or not at all.

    `provenance` is stored in the file. InputError for another suffix than .parquet or .h5ad.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: neither .parquet nor .h5ad")
    with atomic_replacement(path) as temporary:
        if path.suffix == ".h5ad":
            with (
                open(temporary, "w+b") as file,
                _ErrorKeeper(file) as disk,
                h5py.File(disk, "w") as h5,
            ):
                output = H5adOutput(h5, genes, provenance, disk)
                yield output
                output.write_obs()
            return
        with atomic_replacement(genes_file(path)) as genes_path:
            pq.write_table(pa.table({"gene_id": pa.array(genes.tolist(), pa.string())}), genes_path)
            output = ParquetOutput(temporary, provenance)
            try:
                yield output
            finally:
                output.close()


def write_blocks(
    path: Path,
    genes: np.ndarray,
    provenance: Mapping[str, object],
    blocks: Iterable[PredictedBlock],
    progress: Progress,
) -> None:
    """Writes the blocks as they come: one is written while the next one is predicted."""
    with open_output(path, genes, provenance) as output, ThreadPoolExecutor(1) as executor:
        pending: Future | None = None
        for block in blocks:
            if pending is not None:
                pending.result()
            pending = executor.submit(output.write, block)
            progress.advance(len(block.row))
        if pending is not None:
            pending.result()


class ParquetOutput:
    """The columns of a block, then lists in the order of the genes.

    BYTE_STREAM_SPLIT stores the high and low bytes of counts apart. With it, lz4 is twice as fast
    as zstd without it, and the file is a third smaller.
    """

    def __init__(self, path: Path, provenance: Mapping[str, object]):
        self.path, self.provenance = path, provenance
        self._writer: pq.ParquetWriter | None = None

    def write(self, block: PredictedBlock) -> None:
        lists = {f"latent_{group}": values for group, values in block.latents.items()}
        lists |= {"counts": block.counts, **block.interval}
        table = block.columns
        for name, values in lists.items():
            table = table.append_column(*_list_column(name, values))
        if self._writer is None:
            metadata = {f"gem.{name}": str(value) for name, value in self.provenance.items()}
            self._writer = pq.ParquetWriter(
                self.path,
                table.schema.with_metadata(metadata),
                compression="lz4",
                use_dictionary=block.columns.column_names,
                column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists},
                write_statistics=block.columns.column_names,
                write_page_checksum=True,
            )
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _list_column(name: str, values: np.ndarray) -> tuple[pa.Field, pa.Array]:
    """A column of lists that shares the memory of values (n, k)."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    kind = pa.list_(pa.field("element", flat.type, nullable=False))
    offsets = pa.array(np.arange(0, values.size + 1, max(1, values.shape[1]), dtype=np.int32))
    lists = pa.ListArray.from_arrays(offsets, flat, type=kind)
    return pa.field(name, kind, nullable=False), lists


class _ErrorKeeper:
    """The file below HDF5, which ends the process if it cannot write.

    The first error is kept, later writes do nothing, and the end of the context raises the error.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None
        self.read, self.readinto, self.tell = file.read, file.readinto, file.tell

    def __enter__(self) -> "_ErrorKeeper":
        return self

    def __exit__(self, *_) -> None:
        self.flush()
        self.check()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def write(self, content: bytes) -> int:
        self._run(self.file.write, content)
        return len(content)

    def seek(self, position: int, origin: int = os.SEEK_SET) -> int:
        return self._run(self.file.seek, position, origin) or 0

    def truncate(self, size: int) -> int:
        return self._run(self.file.truncate, size) or 0

    def flush(self) -> None:
        self._run(self.file.flush)

    def _run(self, call: Callable[..., int | None], *arguments: object) -> int | None:
        if self.error is None:
            try:
                return call(*arguments)
            except OSError as error:
                self.error = error
        return None


class H5adOutput:
    """An AnnData file: counts in X, columns in obs, genes in var, latents in obsm, the interval in
    layers, the provenance in uns/gem. obs is held in memory until the end."""

    def __init__(
        self,
        file: h5py.File,
        genes: np.ndarray,
        provenance: Mapping[str, object],
        disk: _ErrorKeeper,
    ):
        import anndata  # takes half a second to import, and only this format needs it

        self.file, self.anndata, self.disk = file, anndata, disk
        self.obs: list[pa.Table] = []
        var, uns = pd.DataFrame(index=genes.astype(str)), {"gem": dict(provenance)}
        anndata.io.write_elem(file, "/", anndata.AnnData(var=var, uns=uns))

    def write(self, block: PredictedBlock) -> None:
        arrays = {"X": block.counts}
        arrays |= {f"obsm/latent_{group}": values for group, values in block.latents.items()}
        arrays |= {f"layers/{name}": values for name, values in block.interval.items()}
        for key, values in arrays.items():
            if self.obs:
                self._append(key, values)
            else:
                self._create(key, values)
        columns = [_obs_column(column) for column in block.columns.columns]
        self.obs.append(pa.table(columns, _obs_names(block.columns.column_names)))
        self.disk.check()

    def _create(self, key: str, values: np.ndarray) -> None:
        write_elem, width = self.anndata.io.write_elem, max(1, values.shape[1])
        share = np.count_nonzero(values) / max(1, values.size)
        if key.startswith("obsm") or share > _MAX_SPARSE_SHARE:
            chunks = (max(1, min(4096, _CHUNK_VALUES // width)), width)
            options = {**_H5_OPTIONS, "chunks": chunks, "maxshape": (None, width)}
            write_elem(self.file, key, values, dataset_kwargs=options)
        else:
            # Later blocks may need row pointers above 2^31.
            options = {**_H5_OPTIONS, "chunks": (_CHUNK_VALUES,), "indptr_dtype": np.int64}
            write_elem(self.file, key, csr_matrix(values), dataset_kwargs=options)

    def _append(self, key: str, values: np.ndarray) -> None:
        stored = self.file[key]
        if isinstance(stored, h5py.Group):
            self.anndata.io.sparse_dataset(stored).append(csr_matrix(values))
            return
        stored.resize(len(stored) + len(values), axis=0)
        stored[-len(values) :] = values

    def write_obs(self) -> None:
        table = pa.concat_tables(self.obs).unify_dictionaries()
        obs = pd.DataFrame({name: _to_pandas(table[name]) for name in table.column_names})
        self.anndata.io.write_elem(self.file, "obs", obs.set_axis(obs.index.astype(str)))


def _obs_names(names: list[str]) -> list[str]:
    """Distinct names without "/", which nests groups of HDF5, and ".", which is a group itself."""
    taken = {name for name in names if "/" not in name and name != "."}
    result = []
    for name in names:
        if name not in taken:
            name = "_" if name == "." else name.replace("/", "_")
            while name in taken:
                name += "_"
            taken.add(name)
        result.append(name)
    return result


def _obs_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers and booleans as they are, everything else as categories of texts."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return column
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, pa.string())])
    return column.dictionary_encode()


def _to_pandas(column: pa.ChunkedArray) -> pd.Series:
    nullable_boolean = pa.types.is_boolean(column.type) and column.null_count
    return column.to_pandas().astype("boolean") if nullable_boolean else column.to_pandas()
