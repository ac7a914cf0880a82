"""Interrupted fits resume to the bits of an uninterrupted one, after any epoch."""

import os
from pathlib import Path

import pytest
import torch

from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.trainer import Trainer, fit

# Dropout draws from torch's global state, metadata dropout from the generator of the fit.
CHANGES = {
    "train.epochs": 7,
    "train.patience": 2,
    "model.dropout": 0.2,
    "train.metadata_dropout.perturbation": 0.1,
    "train.learning_rate": 5e-3,
}


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def changed(params):
    return params.override(CHANGES)


@pytest.fixture(scope="module")
def uninterrupted(data, changed):
    return fit(data, changed, seed=1)


@pytest.fixture
def checkpoint(changed, tmp_path) -> Checkpoint:
    return Checkpoint.of(changed, "data", 1, tmp_path)


def stop_after(last: int):
    def on_epoch(epoch) -> None:
        if epoch.epoch == last:
            raise StopError

    return on_epoch


def metrics(result) -> list[dict]:
    return [epoch.metrics() | {"train/seconds": 0.0} for epoch in result.history]


@pytest.mark.parametrize("stops", [[1], [2], [3, 5], [1, 2, 3, 4, 5, 6, 7]])
def test_a_stopped_fit_resumes_to_equal_bits(data, changed, uninterrupted, checkpoint, stops):
    for last in stops:
        with pytest.raises(StopError):
            fit(data, changed, 1, stop_after(last), checkpoint)
        assert checkpoint.epochs() == last
        torch.manual_seed(99)  # other work in between
    epochs = []
    resumed = fit(data, changed, 1, epochs.append, checkpoint)
    assert resumed.gem.to_bytes() == uninterrupted.gem.to_bytes()
    assert metrics(resumed) == metrics(uninterrupted)
    assert epochs == resumed.history, "earlier epochs are reported again"


def test_saved_epochs_are_not_trained_again(data, changed, checkpoint, monkeypatch):
    trained, run_epoch = [], Trainer._run_epoch
    monkeypatch.setattr(
        Trainer,
        "_run_epoch",
        lambda self, number: trained.append(number) or run_epoch(self, number),
    )
    with pytest.raises(StopError):
        fit(data, changed, 1, stop_after(2), checkpoint)
    result = fit(data, changed, 1, checkpoint=checkpoint)
    assert trained == list(range(1, len(result.history) + 1))


def test_other_settings_data_or_seeds_have_another_checkpoint(changed, checkpoint, tmp_path):
    others = [
        Checkpoint.of(changed, "data", 2, tmp_path),
        Checkpoint.of(changed, "other", 1, tmp_path),
        Checkpoint.of(changed.override({"train.epochs": 8}), "data", 1, tmp_path),
    ]
    assert len({checkpoint, *others}) == 4
    more_seeds = changed.override({"train.seeds": [1, 2]})
    assert Checkpoint.of(more_seeds, "data", 1, tmp_path) == checkpoint


def test_a_damaged_checkpoint_counts_as_none_with_a_warning(
    data, changed, uninterrupted, checkpoint, caplog
):
    with pytest.raises(StopError):
        fit(data, changed, 1, stop_after(2), checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:2000])
    assert checkpoint.epochs() == 0
    result = fit(data, changed, 1, checkpoint=checkpoint)
    assert result.gem.to_bytes() == uninterrupted.gem.to_bytes()
    assert f"{checkpoint.path}: not in the format" in caplog.text


class Trap:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_no_checkpoint_and_its_code_does_not_run(tmp_path, caplog):
    checkpoint = Checkpoint(tmp_path / "hostile.safetensors")
    torch.save({"history": Trap(tmp_path / "ran")}, checkpoint.path)
    assert checkpoint.load() is None and "not in the format" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_a_finished_fit_is_reported_again_but_not_trained(
    data, changed, uninterrupted, checkpoint, monkeypatch
):
    fit(data, changed, 1, checkpoint=checkpoint)
    checkpoint.finish()
    assert not checkpoint.path.exists()
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self, number: pytest.fail("it trains"))
    epochs = []
    cached = fit(data, changed, 1, epochs.append, checkpoint)
    assert cached.gem.to_bytes() == uninterrupted.gem.to_bytes()
    assert epochs == cached.history and metrics(cached) == metrics(uninterrupted)
    checkpoint.discard_finished()
    checkpoint.discard_finished()
    assert checkpoint.load() is None


def test_only_the_newest_finished_fits_are_kept(tmp_path):
    checkpoints = [Checkpoint(tmp_path / f"{number}.safetensors") for number in range(19)]

    def kept() -> list[int]:
        return [number for number, one in enumerate(checkpoints) if one.load() is not None]

    for age, checkpoint in enumerate(checkpoints[:18]):
        checkpoint.save([], {"a": torch.ones(2)})
        checkpoint.finish()
        os.utime(checkpoint.finished_path, (1000 + age, 1000 + age))
    checkpoints[0].finish()  # deleted before
    assert kept() == list(range(2, 18))
    checkpoints[2].finish()  # used again
    checkpoints[18].save([], {"a": torch.ones(2)})
    checkpoints[18].finish()
    assert kept() == [2, *range(4, 19)]
