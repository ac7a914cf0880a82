"""Fits of several seeds in processes of their own."""

import pytest

from pipeline.gem.common.errors import DivergedError
from pipeline.gem.training import multi_seed
from pipeline.gem.training.multi_seed import fit_seeds
from pipeline.gem.training.trainer import fit


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(multi_seed, "cores", lambda: 2)


@pytest.mark.integration
def test_parallel_fits_are_equal_to_sequential_ones(two_cores, data, params, cohort):
    changed = params.override({"train.seeds": [1, 2], "train.epochs": 2})
    epochs: list[tuple[int, int]] = []
    results = fit_seeds(
        data, changed, cohort.folder, lambda seed, epoch: epochs.append((seed, epoch.epoch)), {}
    )
    sequential = [fit(data, changed, seed) for seed in (1, 2)]
    assert [result.gem.to_bytes() for result in results] == [
        result.gem.to_bytes() for result in sequential
    ]
    assert sorted(epochs) == [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.integration
def test_divergence_in_a_process_is_raised_here(two_cores, data, params, cohort):
    without_bounds = {"seeds": (1, 2), "learning_rate": 1e30, "gradient_clip": 1e30}
    changed = params.model_copy(update={"train": params.train.model_copy(update=without_bounds)})
    with pytest.raises(DivergedError, match="training diverged at step"):
        fit_seeds(data, changed, cohort.folder, lambda seed, epoch: None, {})
