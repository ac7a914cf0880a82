"""Batches, epochs and weight decay by cohort size; learning rate and KL weight by step."""

import math

import pytest

from pipeline.gem.training.optimization.schedule import TrainingSchedule, kl_warmup, one_cycle


@pytest.mark.parametrize(
    ("samples", "batch_size", "epochs", "patience"),
    [
        (9600, 64, 30, 10),
        (1280, 64, 30, 10),
        (640, 32, 30, 10),
        (160, 8, 30, 10),
        (68, 8, 67, 23),
        (8, 8, 600, 200),
        (1, 8, 600, 200),
    ],
)
def test_small_cohorts_get_smaller_batches_then_more_epochs_up_to_min_steps(
    params, samples, batch_size, epochs, patience
):
    settings = {"epochs": 30, "min_steps": 600, "patience": 10, "batch_size": 64}
    train = params.train.model_copy(update=settings)
    schedule = TrainingSchedule.of(samples, train)
    expected = batch_size, epochs, patience
    assert (schedule.batch_size, schedule.epochs, schedule.patience) == expected
    assert schedule.epochs * math.ceil(samples / schedule.batch_size) >= 600
    unchanged = TrainingSchedule.of(samples, train.model_copy(update={"min_steps": 0}))
    assert (unchanged.batch_size, unchanged.epochs, unchanged.patience) == (64, 30, 10)


def test_batches_above_64_samples_leave_48_steps_an_epoch(params):
    settings = {"epochs": 30, "min_steps": 300, "batch_size": 128}
    train = params.train.model_copy(update=settings)
    sizes = {640: 64, 3120: 65, 4800: 100, 6166: 128, 10**6: 128}
    assert {samples: TrainingSchedule.of(samples, train).batch_size for samples in sizes} == sizes
    assert TrainingSchedule.of(640, train.model_copy(update={"min_steps": 0})).batch_size == 128


def test_adam_follows_the_batch_size_by_the_square_root_rule(params):
    """In k times as many samples a step: k times the variance of the gradient's mean is gone, so
    steps are longer by the root of k, and means and decay forget k times as fast a step."""
    settings = {"learning_rate": 1.5e-3, "weight_decay": 0.2, "batch_size": 128}
    settings |= {"epochs": 30, "min_steps": 300}
    train = params.train.model_copy(update=settings)
    for samples, growth in ((64, 1), (640, 1), (10**6, 2)):
        schedule = TrainingSchedule.of(samples, train)
        assert schedule.learning_rate == pytest.approx(1.5e-3 * growth**0.5)
        assert schedule.betas == pytest.approx((1 - 0.1 * growth, 1 - 0.001 * growth))
        decay = schedule.learning_rate * schedule.weight_decay
        assert decay == pytest.approx(1.5e-3 * 0.2 * growth)
    huge = train.model_copy(update={"batch_size": 4096})
    assert TrainingSchedule.of(10**6, huge).betas == (0.0, pytest.approx(1 - 0.064))


def test_kl_warmup_rises_linearly_to_one():
    assert [kl_warmup(step, 100, 0.2) for step in (0, 10, 20, 99)] == [0, 0.5, 1, 1]
    assert kl_warmup(0, 100, 0) == 1


def test_one_cycle_starts_low_peaks_once_and_ends_at_zero():
    rates = [one_cycle(step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 250
    assert rates[-1] == pytest.approx(0.0)
