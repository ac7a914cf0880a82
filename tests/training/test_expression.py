"""Counts in memory and counts on disk: the same batches, every sample once, bounded memory."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.ranks import metrics_of, run_ranks
from support.settings import at_source

from pipeline.gem.common.config import Params
from pipeline.gem.common.errors import InputError
from pipeline.gem.data import shards
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.sources import open_source
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.training import expression
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.expression import StreamedExpression
from pipeline.gem.training.trainer import fit

CPU = torch.device("cpu")
GROUP, BUFFER, LANES = 20, 4, 2  # rows, row groups, lanes of one or two ranks


@pytest.fixture(scope="module")
def small_groups(params, source_folder, tmp_path_factory) -> Cohort:
    """The tiny cohort with many small row groups in several shards."""
    data, folder = params.override(at_source(source_folder)).data, tmp_path_factory.mktemp("groups")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP", GROUP)
        patch.setattr(shards, "SHARD_VALUES", 7000)
        write_cohort(open_source(data), data, params.splits, folder / "cohort")
    return Cohort(folder / "cohort")


@pytest.fixture(scope="module")
def both(small_groups) -> tuple[TrainingData, TrainingData]:
    """(resident, streamed)"""
    return tuple(
        TrainingData.load(small_groups, CPU, with_counts=True, memory=memory) for memory in (1e9, 0)
    )


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch):
    monkeypatch.setattr(expression, "BUFFER_GROUPS", BUFFER)
    monkeypatch.setattr(expression, "LANES", LANES)


def epoch_rows(data: TrainingData, seed: int, epoch: int) -> list[int]:
    batches = data.train.expression.batches(seed, epoch, 16)
    return torch.cat([rows for rows, _ in batches]).tolist()


def test_memory_decides_what_is_resident(small_groups, both):
    resident, streamed = both
    counts = resident.train.expression.resident_bytes
    samples, genes = len(resident.train), len(resident.genes)
    assert counts == samples * genes * small_groups.integer_type([TRAIN]).itemsize
    for split in (streamed.train, streamed.validation):
        assert isinstance(split.expression, StreamedExpression)
        assert split.expression.resident_bytes == 0
    part = TrainingData.load(small_groups, CPU, memory=counts)
    assert part.train.expression.resident_bytes == counts
    assert part.validation.expression.resident_bytes == 0


def test_streamed_batches_and_statistics_are_bits_of_the_resident_ones(both):
    resident, streamed = both
    pairs = zip(*(data.train.expression.batches(5, 2, 16) for data in both), strict=True)
    for (rows, observed), (same_rows, same) in pairs:
        assert torch.equal(rows, same_rows)
        assert torch.equal(observed.expression, same.expression)
        assert torch.equal(observed.counts, same.counts)
    assert torch.equal(resident.study_spread, streamed.study_spread)
    for first, second in zip(resident.moments, streamed.moments, strict=True):
        assert torch.equal(first, second)


def test_references_of_any_samples_are_read_from_disk(both):
    resident, streamed = (data.train.expression for data in both)
    samples = torch.randperm(len(resident), generator=torch.Generator().manual_seed(0))
    chosen = both[0].references.draw(samples, torch.Generator().manual_seed(1))
    chosen[::3] = samples[::3]  # as without another control
    assert (chosen != samples).any()
    observed = resident.rows(samples)
    assert torch.equal(
        streamed.references(chosen, samples, observed), resident.rows(chosen).expression
    )


@pytest.mark.parametrize("size", [1, 7, GROUP * BUFFER, 150, 10_000])
def test_an_epoch_has_every_sample_once_in_batches_of_one_size(both, size):
    for data in both:
        sizes = [len(rows) for rows, _ in data.train.expression.batches(1, 1, size)]
        full, rest = divmod(len(data.train), size)
        assert sizes == [size] * full + [rest] * (rest > 0)
        assert sorted(epoch_rows(data, 1, 1)) == list(range(len(data.train)))


def test_the_order_is_another_in_every_epoch_and_mixes_row_groups(both):
    _, data = both
    orders = [epoch_rows(data, seed, epoch) for seed, epoch in ((1, 1), (1, 2), (2, 1))]
    assert len(set(map(tuple, orders))) == 3
    assert epoch_rows(data, 1, 1) == orders[0]
    groups = np.array(orders[0][: GROUP * BUFFER]) // GROUP
    assert len(set(groups[:GROUP])) > 1, "a buffer holds several row groups"
    # Neighbours on disk are about as far apart as any two samples.
    position = np.argsort(orders[0])
    distance = np.abs(np.diff(position)).mean() / len(position)
    assert distance > 0.05


def test_a_buffer_bounds_what_is_in_memory(both):
    """At most two buffers are read and not yet released, whatever the number of samples."""
    _, data = both
    stream, alive, most = data.train.expression, [], 0
    read = stream._read

    def counted(buffer):
        counts = read(buffer)
        alive.append((len(counts), weakref.ref(counts)))
        return counts

    stream._read = counted
    try:
        for _ in stream.batches(1, 1, 16):
            most = max(most, sum(size for size, counts in alive if counts() is not None))
    finally:
        del stream._read
    assert sum(size for size, _ in alive) == len(data.train)
    assert most <= 2 * BUFFER * GROUP < len(data.train)


@pytest.mark.parametrize(("ranks", "size"), [(1, 16), (2, 16), (2, 7), (3, 16), (4, 3), (5, 16)])
def test_ranks_read_the_samples_of_their_shares_and_no_others(both, monkeypatch, ranks, size):
    resident, streamed = (data.train.expression for data in both)
    read, groups = expression.read_groups, [[] for _ in range(ranks)]
    one = [rows for rows, _ in resident.batches(3, 2, size)]
    shares = []
    for rank in range(ranks):

        def counted(path, numbers, rank=rank):
            groups[rank] += [(path, number) for number in numbers]
            return read(path, numbers)

        monkeypatch.setattr(expression, "read_groups", counted)
        shares.append(list(streamed.batches(3, 2, size, rank, ranks)))
    seen = []
    for batch, *of_ranks in zip(one, *shares, strict=True):
        rows = of_ranks[0][0]
        assert all(torch.equal(rows, same) for same, _ in of_ranks)
        if ranks <= LANES:
            assert torch.equal(rows, batch), "the batches of one rank"
        for rank, (_, observed) in enumerate(of_ranks):
            share = rows[rank::ranks]
            seen += share.tolist()
            if len(share):
                assert torch.equal(observed.expression, resident.rows(share).expression)
            else:
                assert len(observed) == 1, "a stand-in"
    assert sorted(seen) == list(range(len(resident)))
    # A row group is read by one rank; where lanes meet, by two.
    number = len(resident._groups)
    assert len({group for of_rank in groups for group in of_rank}) == number
    lanes = ranks * -(-LANES // ranks)
    assert number <= sum(map(len, groups)) < number + lanes
    assert max(map(len, groups)) <= number / ranks + 2 * lanes


def test_few_row_groups_are_one_lane_that_all_ranks_share(both, monkeypatch):
    monkeypatch.setattr(expression, "BUFFER_GROUPS", 1000)
    resident, streamed = (data.train.expression for data in both)
    whole = list(resident.batches(1, 1, 16))
    for rank in range(2):
        parts = streamed.batches(1, 1, 16, rank, 2)
        for (rows, observed), (same, share) in zip(whole, parts, strict=True):
            assert torch.equal(rows, same)
            assert torch.equal(observed.expression[rank::2], share.expression)


def test_two_ranks_of_a_streamed_cohort_resume_as_one_rank_in_memory(both, params, tmp_path):
    resident, streamed = both
    changed = params.override({"train.epochs": 2})
    expected, checkpoint = fit(resident, changed, 1), Checkpoint(tmp_path / "fit.safetensors")

    def stop(epoch):
        raise InputError("here")

    def work(rank):
        with pytest.raises(InputError):
            fit(streamed, changed, 1, stop, checkpoint)
        # The ranks need not have equal memory.
        return fit(resident if rank else streamed, changed, 1, checkpoint=checkpoint)

    first, second = run_ranks(tmp_path, work)
    assert first.gem.to_bytes() == second.gem.to_bytes()
    for epoch, same in zip(metrics_of(first), metrics_of(expected), strict=True):
        assert epoch == pytest.approx(same, rel=1e-5, abs=1e-5)


def test_a_streamed_fit_has_the_bits_of_a_resident_one_interrupted_or_not(
    both, params: Params, tmp_path
):
    resident, streamed = both
    changed = params.override({"train.epochs": 3})
    expected = fit(resident, changed, seed=3)

    class Stop(Exception):
        pass

    def stop(epoch):
        if epoch.epoch == 2:
            raise Stop

    checkpoint = Checkpoint(tmp_path / "fit.safetensors")
    with pytest.raises(Stop):
        fit(streamed, changed, 3, stop, checkpoint)
    again = fit(streamed, changed, 3, checkpoint=checkpoint)
    assert again.gem.to_bytes() == expected.gem.to_bytes()
    same = [replace(epoch, seconds=0.0) for epoch in expected.history]
    assert [replace(epoch, seconds=0.0) for epoch in again.history] == same
