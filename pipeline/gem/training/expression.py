"""The expression of one split, batch by batch: counts held in memory, or streamed from the cohort.

Counts stay the integers of the cohort until a batch becomes log-CPM in float32, 1 to 2 % of the
time of a step. The samples lie in random order on disk. An epoch permutes their row groups, fills a
buffer with the next of them and permutes the buffer. Counts in memory are taken in the same order,
so that the memory of a machine changes the speed of a fit and none of its bits.

N samples, B of a batch, G genes.
"""

import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.gem.common.capacity import available_memory
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.expression import CPM
from pipeline.gem.data.shards import group_sizes, read_groups, rows_per_group
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

    @property
    @abstractmethod
    def resident_bytes(self) -> int:
        """Memory of the counts, which stays taken."""

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

    @property
    def resident_bytes(self) -> int:
        return self._counts.nbytes

    def rows(self, rows: Tensor) -> Observed:
        return self._observed(rows, self._counts[rows].view(self._dtype))


class StreamedExpression(Expression):
    """Counts stay on disk: two buffers of row groups are in memory, and one block of rows.

    `controls` (M,): the rows that `references` may ask for, ascending. They are copied into a file
    without a name beside the cohort, which is read at random places.
    """

    def __init__(
        self,
        cohort: Cohort,
        split: str,
        device: torch.device,
        with_counts: bool = False,
        controls: np.ndarray = np.empty(0, dtype=np.int64),  # noqa: B008 (never written)
    ):
        super().__init__(cohort, split, device, with_counts)
        self._dtype, self._controls = cohort.integer_type([split]), controls
        self._file = tempfile.TemporaryFile(dir=cohort.folder.parent)  # noqa: SIM115 (as below)
        weakref.finalize(self, self._file.close)
        if len(controls):
            for start, counts in self._count_blocks():
                first, last = np.searchsorted(controls, [start, start + len(counts)])
                counts[controls[first:last] - start].astype(self._dtype).tofile(self._file)
            self._file.flush()

    def batches(self, seed: int, epoch: int, size: int) -> Iterator[tuple[Tensor, Observed]]:
        buffers = shuffled_buffers(self._groups, seed, epoch)
        rest = np.empty(0, dtype=np.int64), np.empty((0, self.genes), dtype=self._dtype)
        for buffer, counts in self._read_ahead(buffers):
            rows, order = buffer.rows(), buffer.order
            # The first batch of a buffer begins with the last samples of the one before.
            start = min(size - len(rest[0]), len(rows)) if len(rest[0]) else 0
            if start:
                taken = rows[:start], counts[order[:start]]
                rest = tuple(np.concatenate(pair) for pair in zip(rest, taken, strict=True))
                if len(rest[0]) < size:
                    continue
                yield self._batch(*rest)
            stop = start + (len(rows) - start) // size * size
            for first in range(start, stop, size):
                part = slice(first, first + size)
                yield self._batch(rows[part], counts[order[part]])
            rest = rows[stop:], counts[order[stop:]]
            del counts  # before the next buffer is waited for
        if len(rest[0]):
            yield self._batch(*rest)

    def blocks(self) -> Iterator[tuple[Tensor, Observed]]:
        for start, counts in self._count_blocks():
            yield self._batch(np.arange(start, start + len(counts)), counts)

    def references(self, rows: Tensor, samples: Tensor, observed: Observed) -> Tensor:
        expression = observed.expression[: len(rows)].clone()
        other = rows != samples
        if other.any():
            wanted = rows[other].cpu().numpy()
            counts = np.empty((len(wanted), self.genes), dtype=self._dtype)
            for row, position in zip(counts, np.searchsorted(self._controls, wanted), strict=True):
                os.preadv(self._file.fileno(), [row], int(position) * row.nbytes)
            expression[other] = self._batch(wanted, counts)[1].expression
        return expression

    @property
    def resident_bytes(self) -> int:
        return 0

    def _batch(self, rows: np.ndarray, counts: np.ndarray) -> tuple[Tensor, Observed]:
        device_rows = torch.from_numpy(rows).to(self.device)
        counts = np.require(counts, requirements="W")  # blocks of Arrow are not
        return device_rows, self._observed(device_rows, torch.from_numpy(counts).to(self.device))

    def _count_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, counts (B, G)) of all samples in order, in blocks of the size that resident
        counts have: sums over blocks then have the same bits."""
        size, start = rows_per_group(self.genes), 0
        rest = np.empty((0, self.genes), dtype=self._dtype)
        for block in self.cohort.blocks([self.split]):
            rest = np.concatenate([rest, block]) if len(rest) else block
            while len(rest) >= size:
                yield start, rest[:size]
                start, rest = start + size, rest[size:]
        if len(rest):
            yield start, rest

    def _read_ahead(self, buffers: Iterable[Buffer]) -> Iterator[tuple[Buffer, np.ndarray]]:
        """Buffers with their counts (K, G); a thread reads the next one meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            pending: deque[Future] = deque()
            for buffer in buffers:
                pending.append(reader.submit(self._read, buffer))
                if len(pending) > 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _read(self, buffer: Buffer) -> tuple[Buffer, np.ndarray]:
        counts, start = np.empty((len(buffer.order), self.genes), dtype=self._dtype), 0
        for path, groups in groupby(buffer.groups, key=attrgetter("path")):
            listed = list(groups)
            stop = start + sum(group.stop - group.start for group in listed)
            read_groups(path, [group.number for group in listed], counts[start:stop])
            start = stop
        return buffer, counts


def open_expression(
    cohort: Cohort,
    split: str,
    device: torch.device,
    with_counts: bool,
    memory: float,
    controls: np.ndarray = np.empty(0, dtype=np.int64),  # noqa: B008 (never written)
) -> Expression:
    """Resident if the counts take at most `memory` bytes, else streamed."""
    samples, genes = cohort.manifest["splits"][split], len(cohort.genes)
    if samples * genes * cohort.integer_type([split]).itemsize <= memory:
        return ResidentExpression(cohort, split, device, with_counts)
    return StreamedExpression(cohort, split, device, with_counts, controls)


def memory_for_counts(share: float, device: torch.device, processes: int = 1) -> float:
    """Bytes: the `share` of the free memory, of the GPU on a GPU, for each of the processes."""
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else available_memory()
    return share * free / processes
