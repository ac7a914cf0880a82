"""The training loop: learning, reproducibility, model selection, divergence."""

import math
from copy import copy
from dataclasses import replace

import pytest
import torch
from support.networks import dense

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.errors import DivergedError, InputError
from pipeline.gem.model.observation import Observed
from pipeline.gem.model.predictive import predictive_log_likelihood
from pipeline.gem.training.dataset import EncodedSplit, TrainingData
from pipeline.gem.training.distributed import choose_device
from pipeline.gem.training.trainer import Trainer, build_model, fit

CPU = torch.device("cpu")
# Enough for the tiny cohort to improve on the training mean; a few seconds.
SHORT = {"train.epochs": 25, "train.learning_rate": 5e-3, "train.batch_size": 16}


@pytest.fixture(scope="module")
def result(data, params):
    return fit(data, params.override(SHORT), seed=1)


def trainer(data, params, **train) -> Trainer:
    changed = params.override({f"train.{name}": value for name, value in train.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gem = build_model(data, changed)
    return Trainer(data, changed.train, gem, torch.Generator().manual_seed(0))


def whole(split: EncodedSplit) -> Observed:
    return split.expression.rows(torch.arange(len(split)))


def mse_of_training_mean(data) -> float:
    train, validation = (whole(split).expression for split in (data.train, data.validation))
    return float((validation - train.mean(0)).square().mean())


def test_kl_stays_above_zero_in_every_group(result):
    last = result.history[-1]
    assert min(last.kl_technical, last.kl_biological, last.kl_perturbation) > 0.1


def test_predictive_likelihood_beats_the_training_mean(result, data):
    """The floor: a Normal per gene with the mean and variance of the training split."""
    train, validation = (whole(split).expression for split in (data.train, data.validation))
    normal = torch.distributions.Normal(train.mean(0), train.std(0))
    floor = float(normal.log_prob(validation).sum(1).mean())
    assert result.best.validation_predictive_log_likelihood > floor + 5


def test_prediction_from_metadata_halves_the_error_of_the_training_mean(result, data):
    assert result.best.validation_mse < 0.5 * mse_of_training_mean(data)


@pytest.mark.parametrize("observation", ["negative_binomial", "multinomial"])
@pytest.mark.slow
def test_a_model_of_counts_halves_the_error_of_the_training_mean(cohort, params, observation):
    data = TrainingData.load(cohort, CPU, with_counts=True)
    result = fit(data, params.override(SHORT | {"model.observation": observation}), seed=1)
    scores = [epoch.validation_predictive_log_likelihood for epoch in result.history]
    assert max(scores) > scores[0]
    assert result.best.validation_mse < 0.5 * mse_of_training_mean(data)
    assert min(getattr(result.best, f"kl_{group}") for group in GROUPS) > 0.1


def test_a_model_of_counts_needs_data_with_counts(data, params):
    with pytest.raises(ValueError, match="negative_binomial needs data with counts"):
        fit(data, params.override({"model.observation": "negative_binomial"}), seed=1)


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(data, params):
    first, again, other = (fit(data, params, seed).gem.to_bytes() for seed in (3, 3, 4))
    assert first == again != other


def test_a_fit_leaves_the_global_random_state_alone(data, params):
    before = torch.random.get_rng_state()
    fit(data, params.override({"train.epochs": 1}), seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_weights_of_the_epoch_with_the_best_score_are_kept(cohort, data, params):
    changed = SHORT | {"train.learning_rate": 0.03, "train.patience": 3}
    result = fit(data, params.override(changed), seed=1)
    scores = [epoch.validation_predictive_log_likelihood for epoch in result.history]
    assert result.best.validation_predictive_log_likelihood == max(scores)
    assert result.best.epoch < len(scores), "a later epoch was worse"
    inputs = result.gem.decoder_input(cohort.rows([data.selection_split]), unknown="missing")
    generator, draws = torch.Generator().manual_seed(0), params.train.predictive_draws
    again, _ = predictive_log_likelihood(
        result.gem.network, whole(data.validation), inputs, draws, generator
    )
    assert float(again.mean()) == pytest.approx(max(scores), rel=1e-6)


def test_unset_technical_latents_are_resolved_by_the_fit(data, params):
    changed = params.override({"model.latent.technical": None, "train.epochs": 1})
    gem = fit(data, changed, seed=1).gem
    assert gem.network.sizes["technical"] == gem.params.latent.technical == 64


def test_patience_ends_a_fit_that_no_longer_improves(data, params):
    changed = {"train.epochs": 60, "train.patience": 2, "train.learning_rate": 0.05}
    result = fit(data, params.override(changed), seed=1)
    assert len(result.history) == result.best.epoch + 2 < 60


def test_without_a_validation_split_all_epochs_are_trained_and_the_last_is_kept(data, params):
    unsplit = replace(data, validation=None, selection_split=None)
    result = fit(unsplit, params.override({"train.epochs": 4, "train.patience": 1}), seed=1)
    assert (len(result.history), result.best.epoch) == (4, 4)
    assert result.best.validation_mse is None


def test_divergence_names_the_step_and_the_term(data, params):
    expression = copy(data.train.expression)
    expression._scale = torch.full_like(expression._scale, float("nan"))
    broken = replace(data, train=replace(data.train, expression=expression))
    with pytest.raises(DivergedError, match=r"step \d+ of \d+: .*nll_reconstruction.* not finite"):
        fit(broken, params, seed=1)


def test_cuda_is_refused_where_there_is_none(params):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match="device is cuda"):
        choose_device(params.override({"train.device": "cuda"}).train)
    assert choose_device(params.override({"train.device": "auto"}).train) == CPU


def test_every_epoch_has_finite_metrics_under_stable_names(result):
    assert {
        "train/loss",
        "train/kl_technical",
        "validation/predictive_log_likelihood",
        "validation/evidence_lower_bound",
        "validation/mse",
    } <= set(result.history[0].metrics())
    for epoch in result.history:
        assert all(math.isfinite(value) for value in epoch.metrics().values())


def test_batches_mask_exactly_the_columns_of_the_study(data, params):
    technical = data.train.metadata["technical"]
    masked = trainer(data, params).mask_study(technical)
    study, *others = data.encoder.columns("technical")
    assert study.field.name == "study" and study.own.start == 0
    before, after = (dense(rows, others[-1].own.stop) for rows in (technical, masked))
    assert (after[:, study.own] == 0).all()
    torch.testing.assert_close(after[:, study.own.stop :], before[:, study.own.stop :])
    without = trainer(data, params, unseen_study_weight=0.0)
    assert without.gem.hidden_study is None and len(without.mask_study(technical)) == 0


def test_batches_mask_fields_of_their_own_metadata_rows(data, params):
    batch = next(trainer(data, params, partial_metadata_weight=1.0).batches(1))
    assert set(batch.partial_metadata) == set(GROUPS[1:]), "the technical prior is linear"
    for group, masked in batch.partial_metadata.items():
        kept, rows = masked.values != 0, batch.metadata[group]
        assert torch.equal(masked.columns, rows.columns)
        assert torch.equal(masked.values[kept], rows.values[kept])
        assert 0.2 < kept.sum() / (rows.values != 0).sum() < 0.8
    without = next(trainer(data, params, partial_metadata_weight=0.0).batches(1))
    assert without.partial_metadata == {}
