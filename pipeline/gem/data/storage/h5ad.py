"""AnnData files as a source of raw counts."""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from pipeline.gem.common.errors import InputError, did_you_mean, examples
from pipeline.gem.data.storage.counts import DenseCounts, SparseCounts
from pipeline.gem.data.storage.hdf5 import H5adFile
from pipeline.gem.data.storage.reading import CHUNK_VALUES, check_regular, try_in_child
from pipeline.gem.data.tables import plain_frame, with_names

RAW = ".raw"  # as a layer: AnnData's .raw; a layer of the name "raw" is a plain layer


class H5adSource:
    """An AnnData file: obs as samples, var as genes, raw counts from X, a layer or .raw.

    Only names and the `columns` of obs are held in memory; nothing else of the file is read. It is
    open only while it is read. `layer` is None for X and ".raw" for .raw (with the genes of .raw);
    `sample_id` is a column of obs, None for its index. `layer_option` is the user's name of the
    layer option in messages.
    """

    def __init__(
        self,
        path: Path,
        layer: str | None = None,
        sample_id: str | None = None,
        columns: Collection[str] = (),
        layer_option: str = "data.layer",
    ):
        self.path, self.layer, self.layer_option = path, layer, layer_option
        check_regular(path)
        try_in_child(lambda: self._open(columns, sample_id), path)
        self._open(columns, sample_id)

    def _open(self, columns: Collection[str], sample_id: str | None) -> None:
        """Reads the tables; checks that the matrix fits."""
        path, layer = self.path, self.layer
        with H5adFile(path) as file:
            key, genes = self._find_matrix(file)
            obs, self.columns = file.table("obs", {*columns, sample_id} - {None})
            var, _ = file.table(genes, ())
            if sample_id is not None and sample_id not in obs:
                suggestion = did_you_mean(sample_id, self.columns)
                raise InputError(
                    f"{path}: data.sample_id: no column {sample_id} in obs{suggestion}; "
                    "null takes the obs index"
                )
            names = obs.index.to_series() if sample_id is None else obs[sample_id]
            obs = plain_frame(obs.drop(columns=sample_id or []))
            self.samples = with_names(obs, names, "sample_id", f"{path}: obs")
            self.genes = with_names(var, var.index.to_series(), "gene_id", f"{path}: {genes}")
            others = [name for name in self._layers(file) if name != (layer or "null")]
            if others:
                self.advice = f"point {self.layer_option} at the raw counts: {examples(others)}"
            else:
                self.advice = "this file holds no other matrix; use one with raw counts"
            self._matrix(file, key)

    def _layers(self, file: H5adFile) -> list[str]:
        """Valid values of the layer option."""
        parts = file.names("/")
        layers = (["null"] if "X" in parts else []) + file.names("layers")
        return layers + ([RAW] if "raw" in parts else [])

    def _find_matrix(self, file: H5adFile) -> tuple[str, str]:
        """Keys of the matrix and of the table of its genes. InputError if the file has none."""
        keys = {None: ("X", "var"), RAW: ("raw/X", "raw/var")}
        key, genes = keys.get(self.layer, (f"layers/{self.layer}", "var"))
        if self.layer == RAW and file.member(f"layers/{RAW}") is not None:
            raise InputError(
                f"{self.path}: {self.layer_option}: {RAW} names a layer and the .raw of this file; "
                "rename the layer"
            )
        if file.member(key) is None:
            descriptions = {None: f"no X, and {self.layer_option} is null", RAW: "no .raw"}
            description = descriptions.get(self.layer, f"no layer {self.layer!r}")
            layers = examples(self._layers(file)) or "nothing: the file holds no counts"
            raise InputError(f"{self.path}: {description}; {self.layer_option} can be {layers}")
        return key, genes

    def _matrix(self, file: H5adFile, key: str) -> DenseCounts | SparseCounts:
        """The matrix, of the shape of its tables."""
        is_group = hasattr(file.member(key), "keys")
        matrix = SparseCounts(file, key) if is_group else DenseCounts(file, key)
        shape = (len(self.samples), len(self.genes))
        if matrix.shape != shape:
            raise InputError(
                f"{file.where(key)}: counts of shape {matrix.shape}; "
                f"expected samples x genes, {shape}"
            )
        return matrix

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows = max(1, CHUNK_VALUES // max(1, len(self.genes)))
        with H5adFile(self.path) as file:
            matrix = self._matrix(file, self._find_matrix(file)[0])
            for start in range(0, len(self.samples), rows):
                stop = min(start + rows, len(self.samples))
                yield np.arange(start, stop), matrix.block(start, stop, CHUNK_VALUES)
