"""Sparse rows of metadata as tensors.

U rows, K entries of each, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor


@dataclass(frozen=True)
class MetadataRows:
    """Rows of one covariate group, in the form that `embedding_bag` takes.

    All rows have as many entries as the longest one: the others end with entries of value 0 in
    column 0. So choosing rows, in every step, is one operation instead of ten.
    """

    columns: Tensor  # (U * K,) int64 column of each entry, row after row
    values: Tensor  # (U * K,) float32
    width: int  # K, at least 1

    @classmethod
    def from_sparse(cls, matrix: csr_array, device: torch.device) -> "MetadataRows":
        """Of a matrix (U, C)."""
        entries = np.diff(matrix.indptr)
        width = max(1, int(entries.max(initial=0)))
        filled = np.arange(width) < entries[:, None]
        columns, values = np.zeros(filled.shape, np.int64), np.zeros(filled.shape, np.float32)
        columns[filled], values[filled] = matrix.indices, matrix.data
        tensors = (torch.from_numpy(part.ravel()).to(device) for part in (columns, values))
        return cls(*tensors, width)

    def to_sparse(self, columns: int) -> csr_array:
        """(U, `columns`)"""
        parts = self.values, self.columns, self.offsets
        shape = len(self), columns
        matrix = csr_array(tuple(part.cpu().numpy() for part in parts), shape=shape, copy=True)
        matrix.eliminate_zeros()
        return matrix

    @classmethod
    def join(cls, parts: Sequence["MetadataRows"]) -> "MetadataRows":
        """The rows of all parts, part after part."""
        width = max(part.width for part in parts)
        parts = [part._widened(width) for part in parts]
        columns = torch.cat([part.columns for part in parts])
        return cls(columns, torch.cat([part.values for part in parts]), width)

    def _widened(self, width: int) -> "MetadataRows":
        if width == self.width:
            return self
        columns, values = (
            F.pad(part.view(-1, self.width), (0, width - self.width)).flatten()
            for part in (self.columns, self.values)
        )
        return MetadataRows(columns, values, width)

    def __len__(self) -> int:
        return len(self.columns) // self.width

    @property
    def offsets(self) -> Tensor:
        """(U + 1,) first entry of each row, and the number of entries."""
        return torch.arange(0, len(self.columns) + 1, self.width, device=self.columns.device)

    def row(self) -> Tensor:
        """(U * K,) row of each entry."""
        rows = torch.arange(len(self), device=self.columns.device)
        return rows.repeat_interleave(self.width)

    def __getitem__(self, index: Tensor) -> "MetadataRows":
        """The rows `index` (int64), in its order."""
        columns, values = (
            part.view(-1, self.width).index_select(0, index).flatten()
            for part in (self.columns, self.values)
        )
        return MetadataRows(columns, values, self.width)

    def scale(self, factors: Tensor | float) -> "MetadataRows":
        """The same entries with their values times `factors` (U * K,) or one factor."""
        return replace(self, values=self.values * factors)

    def none(self) -> "MetadataRows":
        """No rows."""
        return MetadataRows(self.columns[:0], self.values[:0], self.width)
