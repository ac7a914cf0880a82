"""The expression of one split, batch by batch: counts held in memory, or streamed from the cohort.

Counts stay the integers of the cohort until a batch becomes log-CPM in float32, 1 to 2 % of the
time of a step. The samples lie in random order on disk. An epoch permutes their row groups, fills a
buffer with the next of them and permutes the buffer. Counts in memory are taken in the same order,
so that the memory of a machine changes the speed of a fit and none of its bits.

N samples, B of a batch, G genes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.expression import CPM
from pipeline.gem.data.shards import group_sizes, rows_per_group
from pipeline.gem.data.splits import role_of
from pipeline.gem.model.observation import GeneMoments, Observed

BUFFER_GROUPS = 16  # row groups that are permuted together
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}  # types that torch can index


class RowGroup(NamedTuple):
    """Samples `start` to `stop` of a split."""

    path: Path
    number: int  # in the file
    start: int
    stop: int


@dataclass(frozen=True)
class Buffer:
    """Row groups that are in memory together, and the order of their samples in an epoch."""

    groups: list[RowGroup]
    order: np.ndarray  # (K,) positions in the concatenated groups

    def rows(self) -> np.ndarray:
        """(K,) rows of the split in this order."""
        rows = [np.arange(group.start, group.stop) for group in self.groups]
        return np.concatenate(rows)[self.order]


def shuffled_buffers(groups: Sequence[RowGroup], seed: int, epoch: int) -> Iterator[Buffer]:
    """The buffers of an epoch: every sample once, in an order that seed and epoch determine."""
    rng = np.random.default_rng([seed, epoch])
    permuted = rng.permutation(len(groups))
    for first in range(0, len(permuted), BUFFER_GROUPS):
        # Each file is read forwards.
        chosen = [groups[number] for number in np.sort(permuted[first : first + BUFFER_GROUPS])]
        size = sum(group.stop - group.start for group in chosen)
        yield Buffer(chosen, rng.permutation(size))


class Expression(ABC):
    """Counts and log-CPM of a split. Rows are those of `cohort.rows([split])`."""

    def __init__(self, cohort: Cohort, split: str, device: torch.device, with_counts: bool = False):
        """`with_counts`: also the integer counts, for observation models of counts."""
        self.cohort, self.split, self.device, self.with_counts = cohort, split, device, with_counts
        self.genes = len(cohort.genes)
        totals = cohort.rows([split])["total"].to_numpy(dtype=np.float64)
        self._scale = torch.from_numpy((CPM / totals).astype(np.float32)).to(device)  # (N,)
        self._groups = self._row_groups()

    def __len__(self) -> int:
        return len(self._scale)

    @abstractmethod
    def batches(self, seed: int, epoch: int, size: int) -> Iterator[tuple[Tensor, Observed]]:
        """(rows (B,), their expression): every sample once, in the order of `shuffled_buffers`."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[Tensor, Observed]]:
        """(rows (B,), their expression) of all samples in order."""

    @abstractmethod
    def references(self, rows: Tensor, samples: Tensor, observed: Observed) -> Tensor:
        """(R, G) log-CPM of the references (R,) of samples (R,), which are the first in `observed`.

        A reference is a control or the sample itself.
        """

    def moments(self) -> GeneMoments:
        return GeneMoments.of(observed.expression for _, observed in self.blocks())

    def _row_groups(self) -> list[RowGroup]:
        """Of a split that fills the shards of its role, as the training split; none of others."""
        groups, start = [], 0
        for path in self.cohort.shards(role_of(self.split)):
            for number, size in enumerate(group_sizes(path)):
                groups.append(RowGroup(path, number, start, start + size))
                start += size
        return groups if start == len(self) else []

    def _observed(self, rows: Tensor, counts: Tensor) -> Observed:
        """Of rows (B,) with counts (B, G) of any integer type."""
        expression = counts.to(torch.float32).mul_(self._scale[rows][:, None]).log1p_()
        return Observed(expression, counts.to(torch.int32) if self.with_counts else None)


class ResidentExpression(Expression):
    """All counts in memory."""

    def __init__(self, cohort: Cohort, split: str, device: torch.device, with_counts: bool = False):
        super().__init__(cohort, split, device, with_counts)
        counts = torch.from_numpy(cohort.counts([split]))
        self._dtype = counts.dtype
        self._counts = counts.view(_SIGNED.get(self._dtype, self._dtype)).to(device)

    def batches(self, seed: int, epoch: int, size: int) -> Iterator[tuple[Tensor, Observed]]:
        buffers = shuffled_buffers(self._groups, seed, epoch)
        order = np.concatenate([buffer.rows() for buffer in buffers])
        for rows in torch.from_numpy(order).to(self.device).split(size):
            yield rows, self.rows(rows)

    def blocks(self) -> Iterator[tuple[Tensor, Observed]]:
        every = torch.arange(len(self), device=self.device)
        for rows in every.split(rows_per_group(self.genes)):
            yield rows, self.rows(rows)

    def references(self, rows: Tensor, samples: Tensor, observed: Observed) -> Tensor:
        return self.rows(rows).expression

    def rows(self, rows: Tensor) -> Observed:
        return self._observed(rows, self._counts[rows].view(self._dtype))
