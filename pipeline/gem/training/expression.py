"""The expression of some splits, batch by batch: counts held in memory, or streamed from the
cohort.

Counts stay the integers of the cohort until a batch becomes log-CPM in float32, 1 to 2 % of the
time of a step. The samples lie in random order on disk. An epoch permutes their row groups, fills
buffers with the next of them and permutes the buffers. Counts in memory are taken in the same
order, so that the memory of a machine changes the speed of a fit and none of its bits.

Of more than BUFFER_GROUPS row groups the permuted samples are cut into lanes of equal length, and
every batch takes its samples from all lanes in turns. A rank (distributed.py) works on the samples
of some lanes and reads only these. Fewer row groups are one lane, which every rank reads.

N samples, B of a batch, G genes.
"""

import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from pipeline.gem.training.data_parallel import share_of

BUFFER_GROUPS = 16  # row groups that are permuted together, over all lanes
LANES = 8  # at least; 1, 2, 4 or 8 ranks have the same batches
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}  # types that torch can index


class RowGroup(NamedTuple):
    """Samples `start` to `stop`."""

    path: Path
    number: int  # in the file
    start: int
    stop: int
    before: int = 0  # samples of this row group on disk that come before `start`


@dataclass(frozen=True)
class Buffer:
    """Row groups that are in memory together, and the order of their samples in an epoch."""

    groups: list[RowGroup]
    order: np.ndarray  # (K,) positions in the concatenated groups

    def rows(self) -> np.ndarray:
        """(K,) rows of the split in this order."""
        rows = [np.arange(group.start, group.stop) for group in self.groups]
        return np.concatenate(rows)[self.order]


class EpochOrder:
    """The order of an epoch's samples, every one once: batches of `size`, whose sample i is the
    next of lane i modulo the number of lanes. The arguments but `ranks` determine it, and the
    number of lanes."""

    def __init__(self, groups: Sequence[RowGroup], seed: int, epoch: int, size: int, ranks: int):
        number = 1 if len(groups) <= BUFFER_GROUPS else ranks * -(-LANES // ranks)
        rng = np.random.default_rng([seed, epoch])
        samples = sum(group.stop - group.start for group in groups)
        full, rest = divmod(samples, size)
        sizes = [
            full * len(range(lane, size, number)) + len(range(lane, rest, number))
            for lane in range(number)
        ]
        permuted = [groups[position] for position in rng.permutation(len(groups))]
        together = max(1, BUFFER_GROUPS // number)
        self.size, self.lanes = size, []
        for lane in _cut(permuted, sizes):
            # Each file is read forwards.
            parts = [
                sorted(lane[first : first + together], key=attrgetter("start"))
                for first in range(0, len(lane), together)
            ]
            lengths = [sum(group.stop - group.start for group in part) for part in parts]
            self.lanes.append(
                [Buffer(*pair) for pair in zip(parts, map(rng.permutation, lengths), strict=True)]
            )
        self._rows = np.empty(samples, dtype=np.int64)
        lane_of = np.arange(samples) % size % number
        for lane, buffers in enumerate(self.lanes):
            if buffers:
                self._rows[lane_of == lane] = np.concatenate([part.rows() for part in buffers])

    def batches(self) -> Iterator[np.ndarray]:
        """(B,) rows of each batch."""
        for start in range(0, len(self._rows), self.size):
            yield self._rows[start : start + self.size]


def _cut(groups: Iterable[RowGroup], sizes: Sequence[int]) -> list[list[RowGroup]]:
    """The groups in order, cut into consecutive parts with these numbers of samples."""
    parts: list[list[RowGroup]] = [[] for _ in sizes]
    waiting = deque(groups)
    for part, left in zip(parts, sizes, strict=True):
        while left:
            group = waiting.popleft()
            if group.stop - group.start > left:
                middle = group.start + left
                waiting.appendleft(group._replace(start=middle, before=group.before + left))
                group = group._replace(stop=middle)
            part.append(group)
            left -= group.stop - group.start
    return parts


class Expression(ABC):
    """Counts and log-CPM of splits. Rows are those of `cohort.rows(splits)`."""

    def __init__(
        self,
        cohort: Cohort,
        splits: Sequence[str],
        device: torch.device,
        with_counts: bool = False,
    ):
        """`with_counts`: also the integer counts, for observation models of counts."""
        self.cohort, self.splits, self.device = cohort, splits, device
        self.with_counts, self.genes = with_counts, len(cohort.genes)
        totals = cohort.rows(splits)["total"].to_numpy(dtype=np.float64)
        self._scale = torch.from_numpy((CPM / totals).astype(np.float32)).to(device)  # (N,)
        self._groups = self._row_groups()

    def __len__(self) -> int:
        return len(self._scale)

    @abstractmethod
    def batches(
        self, seed: int, epoch: int, size: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Observed]]:
        """(rows (B,), the expression of a rank's `share_of` them): every sample once, in the order
        of `EpochOrder`."""

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
        """Of splits that fill the shards of their roles, as the training split; none of others."""
        groups, start = [], 0
        for role in dict.fromkeys(map(role_of, self.splits)):
            for path in self.cohort.shards(role):
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

    def __init__(
        self,
        cohort: Cohort,
        splits: Sequence[str],
        device: torch.device,
        with_counts: bool = False,
    ):
        super().__init__(cohort, splits, device, with_counts)
        counts = torch.from_numpy(cohort.counts(splits))
        self._dtype = counts.dtype
        self._counts = counts.view(_SIGNED.get(self._dtype, self._dtype)).to(device)

    def batches(
        self, seed: int, epoch: int, size: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Observed]]:
        for batch in EpochOrder(self._groups, seed, epoch, size, ranks).batches():
            rows = torch.from_numpy(batch).to(self.device)
            yield rows, self.rows(rows[share_of(len(rows), rank, ranks)[0]])

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
        splits: Sequence[str],
        device: torch.device,
        with_counts: bool = False,
        controls: np.ndarray = np.empty(0, dtype=np.int64),  # noqa: B008 (never written)
    ):
        super().__init__(cohort, splits, device, with_counts)
        self._dtype, self._controls = cohort.integer_type(splits), controls
        self._file = tempfile.TemporaryFile(dir=cohort.folder.parent)  # noqa: SIM115 (as below)
        weakref.finalize(self, self._file.close)
        if len(controls):
            for start, counts in self._count_blocks():
                first, last = np.searchsorted(controls, [start, start + len(counts)])
                counts[controls[first:last] - start].astype(self._dtype).tofile(self._file)
            self._file.flush()

    def batches(
        self, seed: int, epoch: int, size: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Observed]]:
        order = EpochOrder(self._groups, seed, epoch, size, ranks)
        number = len(order.lanes)
        # A single lane is read by every rank, which then takes its share.
        first, step = (rank, ranks) if number > 1 else (0, 1)
        with ThreadPoolExecutor(1) as reader:
            lanes = [_Lane(buffers, self._read, reader) for buffers in order.lanes[first::step]]
            try:
                for batch in order.batches():
                    rows = batch[first::step]
                    counts = np.empty((len(rows), self.genes), dtype=self._dtype)
                    for position, lane in enumerate(lanes):
                        lane.fill(counts[position :: len(lanes)])
                    if number == 1 and ranks > 1:
                        share, _ = share_of(len(batch), rank, ranks)
                        rows, counts = rows[share], counts[share]
                    observed = self._batch(rows, counts)[1] if len(rows) else self._stand_in()
                    yield torch.from_numpy(batch).to(self.device), observed
            finally:
                reader.shutdown(cancel_futures=True)

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
        for block in self.cohort.blocks(self.splits):
            rest = np.concatenate([rest, block]) if len(rest) else block
            while len(rest) >= size:
                yield start, rest[:size]
                start, rest = start + size, rest[size:]
        if len(rest):
            yield start, rest

    def _stand_in(self) -> Observed:
        """Of a rank without a sample in a batch: one of weight 0, whose terms are finite."""
        counts = torch.ones(1, self.genes, dtype=torch.int32, device=self.device)
        return Observed(torch.zeros_like(counts, dtype=torch.float32), counts)

    def _read(self, buffer: Buffer) -> np.ndarray:
        """(K, G) counts of the groups of a buffer, in their order."""
        counts, start = np.empty((len(buffer.order), self.genes), dtype=self._dtype), 0
        for path, groups in groupby(buffer.groups, key=attrgetter("path")):
            listed = list(groups)
            for group, block in zip(
                listed, read_groups(path, [group.number for group in listed]), strict=True
            ):
                size = group.stop - group.start
                counts[start : start + size] = block[group.before : group.before + size]
                start += size
        return counts


class _Lane:
    """The counts of a lane's samples in order. A thread reads the next buffer meanwhile."""

    def __init__(
        self,
        buffers: Iterable[Buffer],
        read: Callable[[Buffer], np.ndarray],
        reader: ThreadPoolExecutor,
    ):
        self._waiting, self._read, self._reader = iter(buffers), read, reader
        self._order, self._counts = np.empty(0, dtype=np.int64), None
        self._submit()

    def fill(self, counts: np.ndarray) -> None:
        """Writes the next samples into counts (K, G)."""
        start = 0
        while start < len(counts):
            if not len(self._order):
                self._advance()
            chosen = self._order[: len(counts) - start]
            counts[start : start + len(chosen)] = self._counts[chosen]
            self._order, start = self._order[len(chosen) :], start + len(chosen)

    def _advance(self) -> None:
        self._counts = None  # before the next buffer is waited for
        self._order, self._counts = self._buffer.order, self._pending.result()
        self._submit()

    def _submit(self) -> None:
        self._buffer = next(self._waiting, None)
        self._pending = self._buffer and self._reader.submit(self._read, self._buffer)


def open_expression(
    cohort: Cohort,
    splits: Sequence[str],
    device: torch.device,
    with_counts: bool,
    memory: float,
    controls: np.ndarray = np.empty(0, dtype=np.int64),  # noqa: B008 (never written)
) -> Expression:
    """Resident if the counts take at most `memory` bytes, else streamed."""
    samples = sum(cohort.manifest["splits"].get(split, 0) for split in splits)
    if samples * len(cohort.genes) * cohort.integer_type(splits).itemsize <= memory:
        return ResidentExpression(cohort, splits, device, with_counts)
    return StreamedExpression(cohort, splits, device, with_counts, controls)


def memory_for_counts(share: float, device: torch.device, processes: int = 1) -> float:
    """Bytes: the `share` of the free memory, of the GPU on a GPU, for each of the processes."""
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else available_memory()
    return share * free / processes
