"""Fits that are stopped and go on: the same bits as one that was not, at whatever epoch."""

import os

import numpy as np
import pytest
import torch

from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import fit

# Dropout draws from torch's own state, metadata dropout from the fit's: both must go on.
CHANGES = {
    "train.epochs": 7,
    "train.patience": 2,
    "model.dropout": 0.2,
    "train.metadata_dropout.perturbation": 0.1,
    "train.learning_rate": 5e-3,
}


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def data(cohort) -> TrainingData:
    return TrainingData.load(cohort, torch.device("cpu"))


@pytest.fixture(scope="module")
def chosen(params):
    return params.override(CHANGES)


@pytest.fixture(scope="module")
def whole(data, chosen):
    return fit(data, chosen, seed=1)


def stop_at(last: int):
    def told(epoch) -> None:
        if epoch.epoch == last:
            raise Stop

    return told


def records(finished) -> list[dict]:
    return [
        {name: value for name, value in epoch.metrics().items() if name != "train/seconds"}
        for epoch in finished.history
    ]


@pytest.mark.parametrize("stops", [[1], [2], [3, 5], [1, 2, 3, 4, 5, 6, 7]])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(data, chosen, whole, tmp_path, stops):
    checkpoint = Checkpoint.of(chosen, "data", 1, tmp_path)
    for last in stops:
        with pytest.raises(Stop):
            fit(data, chosen, 1, stop_at(last), checkpoint)
        torch.manual_seed(99)  # whatever ran between
    seen = []
    again = fit(data, chosen, 1, seen.append, checkpoint)
    assert again.gem.to_bytes() == whole.gem.to_bytes() and records(again) == records(whole)
    assert [epoch.epoch for epoch in seen] == list(range(1, len(whole.history) + 1)), (
        "epochs before are told again"
    )


def test_epochs_that_are_kept_are_not_trained_again(data, chosen, tmp_path, monkeypatch):
    from pipeline.gem.training import trainer

    checkpoint, trained, real = (
        Checkpoint.of(chosen, "data", 1, tmp_path),
        [],
        trainer.Trainer._epoch,
    )
    monkeypatch.setattr(
        trainer.Trainer, "_epoch", lambda loop, number: trained.append(number) or real(loop, number)
    )
    with pytest.raises(Stop):
        fit(data, chosen, 1, stop_at(2), checkpoint)
    finished = fit(data, chosen, 1, checkpoint=checkpoint)
    assert trained == list(range(1, len(finished.history) + 1))


def test_a_fit_with_a_checkpoint_is_one_without(data, chosen, whole, tmp_path):
    assert (
        fit(data, chosen, 1, checkpoint=Checkpoint.of(chosen, "data", 1, tmp_path)).gem.to_bytes()
        == whole.gem.to_bytes()
    )


def test_other_settings_data_or_seeds_have_a_file_of_their_own(chosen, tmp_path):
    files = [
        Checkpoint.of(chosen, "data", 1, tmp_path),
        Checkpoint.of(chosen, "data", 2, tmp_path),
        Checkpoint.of(chosen, "other", 1, tmp_path),
        Checkpoint.of(chosen.override({"train.epochs": 8}), "data", 1, tmp_path),
    ]
    assert len({file.path for file in files}) == 4
    assert Checkpoint.of(chosen.override({"train.seeds": [1, 2]}), "data", 1, tmp_path) == files[0]


def test_a_damaged_file_is_said_and_counts_as_none(data, chosen, whole, tmp_path, capsys):
    checkpoint = Checkpoint.of(chosen, "data", 1, tmp_path)
    with pytest.raises(Stop):
        fit(data, chosen, 1, stop_at(2), checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:2000])
    assert fit(data, chosen, 1, checkpoint=checkpoint).gem.to_bytes() == whole.gem.to_bytes()
    assert f"warning: {checkpoint.path}: cannot be read" in capsys.readouterr().err


def test_nothing_but_tensors_and_plain_values_is_read(tmp_path, capsys):
    checkpoint = Checkpoint(tmp_path / "one.pt")
    torch.save({"history": np.array([object()], dtype=object)}, checkpoint.path)
    assert checkpoint.load() is None and "cannot be read" in capsys.readouterr().err


def test_a_fit_that_has_ended_is_told_again_and_not_trained(
    data, chosen, whole, tmp_path, monkeypatch
):
    from pipeline.gem.training import trainer

    checkpoint = Checkpoint.of(chosen, "data", 1, tmp_path)
    fit(data, chosen, 1, checkpoint=checkpoint)
    checkpoint.end()
    assert not checkpoint.path.exists()
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "_epoch", lambda loop, number: pytest.fail("it trains"))
        seen = []
        again = fit(data, chosen, 1, seen.append, checkpoint)
    assert (
        again.gem.to_bytes() == whole.gem.to_bytes()
        and seen == again.history
        and records(again) == records(whole)
    )
    checkpoint.forget()
    checkpoint.forget()
    assert checkpoint.load() is None


def test_the_newest_ends_are_kept(tmp_path):
    checkpoints = [Checkpoint(tmp_path / f"{number}.pt") for number in range(10)]
    for age, checkpoint in enumerate(checkpoints):
        checkpoint.save({"a": torch.ones(2)})
        checkpoint.end()
        os.utime(checkpoint.ended, (1000 + age, 1000 + age))
    checkpoints[0].end()  # it is not there any more
    assert [checkpoint.load() is not None for checkpoint in checkpoints] == 2 * [False] + 8 * [True]
    checkpoints[2].end()  # used once more
    last = Checkpoint(tmp_path / "last.pt")
    last.save({"a": torch.ones(2)})
    last.end()
    assert [checkpoint.load() is not None for checkpoint in checkpoints] == [
        False,
        False,
        True,
        False,
    ] + 6 * [True]
