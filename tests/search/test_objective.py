"""The metrics of a trial, each against its definition."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch
import torch.nn.functional as F
from support.networks import sparse
from support.searches import search_config

from pipeline.gem.common.errors import DivergedError, InputError, StoppedError
from pipeline.gem.common.processes import StopSignal
from pipeline.gem.search import objective
from pipeline.gem.search.objective import ObjectiveFunction, latent_leakage, selection_metrics
from pipeline.gem.search.search_config import DIRECTIONS
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import FitResult, fit


@pytest.fixture(scope="module")
def data(cohort) -> TrainingData:
    return TrainingData.load(cohort, torch.device("cpu"))


@pytest.fixture(scope="module")
def result(data, params) -> FitResult:
    return fit(data, params, 1)


def test_every_metric_is_finite_and_deterministic(result, data):
    metrics = selection_metrics(result, data, tuple(DIRECTIONS))
    assert list(metrics) == list(DIRECTIONS) and np.isfinite(list(metrics.values())).all()
    assert selection_metrics(result, data, tuple(DIRECTIONS)) == metrics
    assert metrics["predictive_log_likelihood"] == result.best.validation_predictive_log_likelihood
    assert 0 <= metrics["latent_leakage"] <= 1


def test_the_reconstruction_exceeds_the_evidence_lower_bound_by_the_kl_divergence(result, data):
    names = ("reconstruction_log_likelihood", "evidence_lower_bound")
    reconstruction, bound = selection_metrics(result, data, names).values()
    rows = torch.arange(len(data.validation))
    posterior = result.gem.network.posterior(data.validation.expression.rows(rows).expression)
    prior = result.gem.network.joint_prior(data.validation.metadata, data.validation.index)
    variance_ratio = (posterior.log_variance - prior.log_variance).exp()
    distance = (posterior.mean - prior.mean) ** 2 / prior.log_variance.exp()
    kl = 0.5 * (variance_ratio + distance - 1 - variance_ratio.log()).sum(dim=1).mean()
    # One posterior draw per sample.
    assert reconstruction - bound == pytest.approx(float(kl.detach()), abs=3.0)


def test_latents_that_encode_the_label_of_another_group_leak_and_noise_does_not(
    result, data, monkeypatch
):
    """One biological label with two levels. Of the two other groups, the technical one encodes it,
    then neither. The latents replace the posterior means."""
    samples = len(data.validation)
    label = torch.arange(samples) % 2
    assert len(data.encoder.groups["biological"][0].levels) >= 2
    metadata = dict.fromkeys(data.validation.metadata, sparse(torch.zeros(samples, 2)))
    metadata["biological"] = sparse(F.one_hot(label, 2).float())
    index = dict.fromkeys(metadata, torch.arange(samples))
    labelled = replace(data, validation=replace(data.validation, metadata=metadata, index=index))
    network = result.gem.network
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(samples, sum(network.sizes.values()), generator=generator)
    encoding = noise.clone()
    encoding[:, network.slices()["technical"].start] = 10.0 * label

    def leakage(means: torch.Tensor) -> float:
        monkeypatch.setattr(objective, "posterior_means", lambda *_: means)
        return latent_leakage(result, labelled)

    assert leakage(encoding) == pytest.approx(0.5 + leakage(noise) / 2, abs=0.15)
    assert leakage(noise) < 0.2


def test_latent_leakage_needs_labels(result, data):
    metadata = {
        group: sparse(torch.zeros(len(rows), 2)) for group, rows in data.validation.metadata.items()
    }
    unlabelled = replace(data, validation=replace(data.validation, metadata=metadata))
    with pytest.raises(InputError, match="latent_leakage cannot be computed"):
        latent_leakage(result, unlabelled)


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (optuna.TrialPruned(), False),
        (DivergedError("nan"), False),
        (None, False),
        (StoppedError("by SIGTERM"), True),
        (OSError(28, "No space left on device"), True),
    ],
)
def test_a_trial_keeps_its_checkpoints_until_it_is_decided(
    data, params, tmp_path, monkeypatch, error, is_kept
):
    def fit(data, params, seed, on_epoch, checkpoint, check) -> None:
        tmp_path.joinpath(checkpoint.path).write_bytes(b"an epoch")
        if error:
            raise error

    monkeypatch.setattr(objective, "fit", fit)
    monkeypatch.setattr(objective, "selection_metrics", lambda *_: {})
    function = ObjectiveFunction(
        "test", search_config(), params, data, "a" * 64, "run", StopSignal(), tmp_path
    )
    with pytest.raises(type(error)) if error else nullcontext():
        function._fit(None, None, params, (1, 2))
    assert any(tmp_path.iterdir()) is is_kept


def test_a_metric_that_is_not_finite_fails_the_trial(result, data):
    broken = replace(result, best=replace(result.best, validation_mse=float("inf")))
    with pytest.raises(DivergedError, match="mse of the selection split is not finite"):
        selection_metrics(broken, data, ("mse",))
