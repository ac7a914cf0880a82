"""The refit of a model: what it starts from, what it sees, and that it resumes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.settings import at_source

from pipeline.gem.common.config import Numeric
from pipeline.gem.common.errors import StoppedError
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.sources import open_source
from pipeline.gem.data.splits import TRAIN, VISIBLE, role_of
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.query import decode
from pipeline.gem.preparation.prepare import write_cohort
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.multi_seed import fit_and_refit
from pipeline.gem.training.optimization.schedule import TrainingSchedule
from pipeline.gem.training.optimization.warm_start import warm_start
from pipeline.gem.training.trainer import build_model, fit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def short(params):
    return params.override({"train.epochs": 4, "train.refit": 0.5})


@pytest.fixture(scope="module")
def fitted(data, short):
    return fit(data, short, seed=1)


@pytest.fixture(scope="module")
def visible(cohort, data) -> TrainingData:
    return TrainingData.load_visible(cohort, data.encoder, CPU)


def mean_prediction(gem, samples) -> np.ndarray:
    """(N, G) at the mean of the prior."""
    query = gem.decoder_input(samples, unknown="missing")
    with torch.no_grad():
        return decode(gem.network, query, query.latents.mean).numpy()


def test_a_refit_sees_all_samples_but_those_of_the_test(cohort, visible):
    roles = cohort.samples["split"].map(role_of)
    assert len(visible.train) == (roles != "test").sum() > (roles == "train").sum()
    assert visible.validation is None
    first = torch.cat([observed.expression for _, observed in visible.train.expression.blocks()])
    np.testing.assert_allclose(first.numpy(), cohort.expression(VISIBLE), rtol=1e-6)
    rows = [rows for rows, _ in visible.train.expression.batches(1, 1, 16)]
    assert sorted(torch.cat(rows).tolist()) == list(range(len(visible.train)))


def test_the_encoder_of_a_refit_has_further_labels_and_the_scales_of_the_first(cohort, data):
    own, extended = data.encoder, data.encoder.extended(cohort.rows(VISIBLE))
    again = MetadataEncoder.fit(cohort.rows(VISIBLE), cohort.declared.covariates, cohort.features)
    added = 0
    for field, other, fresh in zip(own.fields, extended.fields, again.fields, strict=True):
        assert other.levels == fresh.levels and set(field.levels) <= set(other.levels)
        assert other.scaling == field.scaling and other.features is field.features
        added += len(other.levels) - len(field.levels)
        if isinstance(field.covariate, Numeric):
            assert fresh.scaling != field.scaling  # so the test above would notice
    assert added > 0
    assert extended.dependencies == again.dependencies


def test_a_warm_start_predicts_as_the_model_that_it_starts_from(fitted, visible, cohort, short):
    """Also for labels that are new to it: their weights are zero, and they were unknown before."""
    same_sizes = short.model_copy(update={"model": fitted.gem.params})
    gem = warm_start(build_model(visible, same_sizes), fitted.gem)
    gem.network.eval()
    assert set(gem.metadata.fields[0].levels) > set(fitted.gem.metadata.fields[0].levels)
    samples = cohort.rows([TRAIN]).head(50)
    np.testing.assert_allclose(
        mean_prediction(gem, samples), mean_prediction(fitted.gem, samples), atol=1e-5
    )
    # A new study is a study, so that its variance is the one of PRIOR; its mean is that of none.
    samples = cohort.rows(["validation_study", "validation_perturbation"])
    np.testing.assert_allclose(
        mean_prediction(gem, samples), mean_prediction(fitted.gem, samples), atol=1e-5
    )
    expression = cohort.expression([TRAIN])[:20]
    own, other = (each.probabilities(each.posterior(expression).mean) for each in (gem, fitted.gem))
    for field in fitted.gem.metadata.heads():
        position = [gem_levels(gem, field.name).index(level) for level in field.levels]
        assert gem.temperatures[field.name] == fitted.gem.temperatures[field.name]
        known = own[field.name][:, position]
        known /= known.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(known, other[field.name], atol=1e-5)


def test_a_warm_start_takes_no_weights_of_covariates_that_training_never_had(data, short, cohort):
    """Neither of labels nor of numbers, also where a whole group had no value: those weights were
    not trained."""
    empty = {
        group: [replace(field, levels=()) for field in fields]
        for group, fields in data.encoder.groups.items()
    }
    start = TrainedGEM.build(data.genes, MetadataEncoder(empty), data.targets, short.model)
    gem = warm_start(build_model(data, short), start)
    samples = cohort.rows([TRAIN]).head(50)
    np.testing.assert_allclose(
        mean_prediction(gem, samples), mean_prediction(start, samples), atol=1e-5
    )


def gem_levels(gem, name: str) -> list[str]:
    return list(next(field.levels for field in gem.metadata.fields if field.name == name))


def test_a_refit_lowers_the_error_on_new_entities_of_the_validation(data, short, cohort):
    result = fit_and_refit(data, short, cohort, seed=1)
    assert [epoch.stage for epoch in result.refit.history] == ["refit", "refit"]
    assert result.gem.refit is False and result.refit.gem.refit is True
    assert all(name.startswith("refit/") for name in result.refit.history[0].metrics())
    for split in ("validation_perturbation", "validation_study"):
        samples, observed = cohort.rows([split]), cohort.expression([split])
        before, after = (
            ((mean_prediction(gem, samples) - observed) ** 2).mean()
            for gem in (result.gem, result.refit.gem)
        )
        assert after < before


def test_a_stopped_refit_resumes_to_equal_bits(data, short, cohort, tmp_path):
    expected = fit_and_refit(data, short, cohort, seed=1)
    checkpoint, seen = Checkpoint(tmp_path / "fit.safetensors"), []

    def stop(epoch):
        seen.append((epoch.stage, epoch.epoch))
        if seen[-1] == ("refit", 1):
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        fit_and_refit(data, short, cohort, 1, stop, checkpoint)
    resumed = fit_and_refit(
        data, short, cohort, 1, lambda epoch: seen.append((epoch.stage, epoch.epoch)), checkpoint
    )
    assert resumed.gem.to_bytes() == expected.gem.to_bytes()
    assert resumed.refit.gem.to_bytes() == expected.refit.gem.to_bytes()
    checkpoint.finish()
    assert not checkpoint.path.exists() and not checkpoint.of_refit().path.exists()
    checkpoint.discard_finished()
    assert not list(tmp_path.iterdir())


def test_without_validation_samples_or_with_refit_zero_there_is_none(
    data, short, cohort, params, source_folder, tmp_path
):
    assert fit_and_refit(data, short.override({"train.refit": 0}), cohort, 1).refit is None
    shares = {f"splits.{name}": 0.0 for name in ("validation", "validation_combination")}
    held_out = {f"splits.{name}": 0.0 for name in ("perturbation", "study")}
    alone = short.override(shares | held_out | at_source(source_folder))
    write_cohort(open_source(alone.data), alone.data, alone.splits, tmp_path / "cohort")
    cohort = Cohort(tmp_path / "cohort")
    only_training = TrainingData.load(cohort, CPU)
    result = fit_and_refit(only_training, alone.override({"train.epochs": 1}), cohort, 1)
    assert result.refit is None and result.selection_split is None


def test_the_schedule_of_a_refit_is_a_share_of_the_epochs_at_a_lower_rate(params):
    train = params.override({"train.epochs": 30, "train.refit": 0.2}).train
    fit_schedule = TrainingSchedule.of(5000, train)
    refit = fit_schedule.of_refit(5000, train)
    assert (refit.epochs, refit.patience, refit.kl_warmup, refit.stage) == (6, 6, 0.0, "refit")
    assert refit.learning_rate == pytest.approx(fit_schedule.learning_rate / 3)
    assert (
        replace(
            refit,
            epochs=fit_schedule.epochs,
            patience=fit_schedule.patience,
            learning_rate=fit_schedule.learning_rate,
            kl_warmup=fit_schedule.kl_warmup,
            stage="train",
        )
        == fit_schedule
    )


def test_a_refit_has_half_of_the_least_number_of_steps(params):
    train = params.override({"train.min_steps": 300, "train.refit": 0.2}).train
    refit = TrainingSchedule.of(64, train).of_refit(71, train)
    assert 150 <= refit.epochs * -(-71 // refit.batch_size) < 150 + 71 / refit.batch_size + 1
