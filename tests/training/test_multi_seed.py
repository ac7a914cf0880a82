"""Fits of several seeds in processes of their own."""

import multiprocessing
import pickle

import pytest
import torch

from pipeline.gem.common.errors import DivergedError
from pipeline.gem.training import multi_seed
from pipeline.gem.training.distributed import take_gpu
from pipeline.gem.training.multi_seed import (
    fit_and_refit,
    fit_seeds,
    parallel_fits,
    processes_of,
)
from pipeline.gem.training.trainer import EpochMetrics, FitResult


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(multi_seed, "cores", lambda: 2)


@pytest.fixture
def forked(monkeypatch):
    """Processes that import nothing again, where what they fit is not the question."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multi_seed.multiprocessing, "get_context", lambda _: fork)


@pytest.mark.integration
def test_parallel_fits_are_equal_to_sequential_ones(two_cores, data, params, cohort):
    changed = params.override({"train.seeds": [1, 2], "train.epochs": 2})
    epochs: list[tuple[int, EpochMetrics]] = []
    results = fit_seeds(data, changed, cohort, lambda *epoch: epochs.append(epoch), {})
    sequential = [fit_and_refit(data, changed, cohort, seed) for seed in (1, 2)]
    for result, expected in zip(results, sequential, strict=True):
        assert result.gem.to_bytes() == expected.gem.to_bytes()
        assert result.refit.gem.to_bytes() == expected.refit.gem.to_bytes()
    numbers = [(seed, epoch.stage, epoch.epoch) for seed, epoch in epochs]
    stages = [("refit", 1), ("train", 1), ("train", 2)]
    assert sorted(numbers) == [(seed, *stage) for seed in (1, 2) for stage in stages]


@pytest.mark.integration
def test_divergence_in_a_process_is_raised_here(two_cores, forked, data, params, cohort):
    without_bounds = {"seeds": (1, 2), "learning_rate": 1e30, "gradient_clip": 1e30}
    changed = params.model_copy(update={"train": params.train.model_copy(update=without_bounds)})
    with pytest.raises(DivergedError, match="training diverged at step"):
        fit_seeds(data, changed, cohort, lambda seed, epoch: None, {})


@pytest.mark.parametrize(
    ("device", "seeds", "fits"), [("cpu", 5, 2), ("cpu", 1, 1), ("cuda", 5, 3), ("cuda", 2, 2)]
)
def test_seeds_are_fitted_on_the_cores_or_on_the_gpus(
    two_cores, params, monkeypatch, device, seeds, fits
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    train = params.override({"train.seeds": list(range(seeds))}).train
    assert parallel_fits(train, torch.device(device)) == fits
    assert processes_of(train, torch.device(device)) == (fits + 1 if fits > 1 else 1)


def test_processes_take_turns_with_the_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [take_gpu(number).index for number in range(5)] == [0, 1, 2, 0, 1]
    assert [device.index for device in chosen] == [0, 1, 2, 0, 1]


@pytest.mark.integration
def test_each_of_the_parallel_fits_has_a_place_of_its_own(params, forked, monkeypatch):
    """Five fits in two places: the place of one that ended is given to the next."""
    monkeypatch.setattr(multi_seed, "_run_job", _report_place)
    places, finish = [], multi_seed._receive

    def receive(receiver, seed, process):
        message = finish(receiver, seed, process)
        places.append(message.gem)
        return message

    monkeypatch.setattr(multi_seed, "_receive", receive)
    jobs = [multi_seed._Job(None, params, seed, None, "cpu") for seed in range(5)]
    results = multi_seed._fit_in_processes(jobs, 2, lambda *_: None, lambda: None)
    assert len(results) == 5 and set(places) == {0, 1}


def _report_place(job, place, sender):
    sender.send_bytes(pickle.dumps(FitResult(place, [], job.seed, None)))
