"""Sparse rows of metadata as tensors.

U rows, E entries of all of them, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.sparse import csr_array
from torch import Tensor


@dataclass(frozen=True)
class MetadataRows:
    """Rows of one covariate group, in the form that `embedding_bag` takes."""

    columns: Tensor  # (E,) int64 column of each entry, row after row
    values: Tensor  # (E,) float32
    offsets: Tensor  # (U + 1,) int64 first entry of each row, and E

    @classmethod
    def from_sparse(cls, matrix: csr_array, device: torch.device) -> "MetadataRows":
        """Of a matrix (U, C)."""
        columns, offsets = (
            torch.from_numpy(part).long().to(device) for part in (matrix.indices, matrix.indptr)
        )
        return cls(columns, torch.from_numpy(matrix.data).to(device), offsets)

    def to_sparse(self, width: int) -> csr_array:
        """(U, `width`)"""
        parts = self.values, self.columns, self.offsets
        return csr_array(tuple(part.cpu().numpy() for part in parts), shape=(len(self), width))

    @classmethod
    def join(cls, parts: Sequence["MetadataRows"]) -> "MetadataRows":
        """The rows of all parts, part after part."""
        offsets, entries = [parts[0].offsets], len(parts[0].columns)
        for part in parts[1:]:
            offsets.append(part.offsets[1:] + entries)
            entries += len(part.columns)
        columns = torch.cat([part.columns for part in parts])
        return cls(columns, torch.cat([part.values for part in parts]), torch.cat(offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self) -> Tensor:
        """(E,) row of each entry."""
        rows = torch.arange(len(self), device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=len(self.columns))

    def __getitem__(self, index: Tensor) -> "MetadataRows":
        """The rows `index` (int64), in its order."""
        starts, sizes = self.offsets[index], self.offsets.diff()[index]
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        entries = torch.arange(int(offsets[-1]), device=offsets.device)
        shift = (starts - offsets[:-1]).repeat_interleave(sizes, output_size=len(entries))
        entries = entries + shift
        return MetadataRows(self.columns[entries], self.values[entries], offsets)

    def scale(self, factors: Tensor | float) -> "MetadataRows":
        """The same entries with their values times `factors` (E,) or one factor."""
        return replace(self, values=self.values * factors)

    def none(self) -> "MetadataRows":
        """No rows."""
        return MetadataRows(self.columns[:0], self.values[:0], self.offsets[:1])
