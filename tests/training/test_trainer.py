"""The loop: what it learns, that it is reproducible, and what it does when things go wrong."""

import hashlib
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.gem.common.errors import DivergedError, InputError
from pipeline.gem.model.gem import predictive_log_likelihood
from pipeline.gem.model.network import objective
from pipeline.gem.model.observation import Observed
from pipeline.gem.training.dataset import EncodedSplit, TrainingData
from pipeline.gem.training.schedule import Plan, kl_warmup, one_cycle
from pipeline.gem.training.trainer import choose_device, dropout_fields, fit

CPU = torch.device("cpu")
# Enough for the tiny cohort to leave the training mean behind, a few seconds.
SHORT = {"train.epochs": 25, "train.learning_rate": 5e-3, "train.batch_size": 16}


@pytest.fixture(scope="module")
def data(cohort) -> TrainingData:
    return TrainingData.load(cohort, CPU)


@pytest.fixture(scope="module")
def trained(data, params):
    return fit(data, params.override(SHORT), seed=1)


def test_kl_stays_above_zero_in_every_group(trained):
    final = trained.history[-1]
    assert min(final.kl_technical, final.kl_biological, final.kl_perturbation) > 0.1


def test_predictive_likelihood_beats_the_training_mean(trained, data):
    """The floor: a Normal per gene with the mean and variance of the training split."""
    train, validation = data.train.expression, data.validation.expression
    floor = (
        torch.distributions.Normal(train.mean(0), train.std(0)).log_prob(validation).sum(1).mean()
    )
    assert trained.best.validation_predictive_log_likelihood > float(floor) + 5


def test_prediction_from_metadata_beats_the_training_mean_by_half(trained, data):
    floor = float((data.validation.expression - data.train.expression.mean(0)).square().mean())
    assert trained.best.validation_mse < 0.5 * floor


@pytest.mark.parametrize("observation", ["negative_binomial", "multinomial"])
def test_a_model_of_counts_learns_and_prediction_beats_the_training_mean_by_half(
    cohort, params, observation
):
    data = TrainingData.load(cohort, CPU, counted=True)
    found = fit(data, params.override(SHORT | {"model.observation": observation}), seed=1)
    scores = [epoch.validation_predictive_log_likelihood for epoch in found.history]
    assert max(scores) > scores[0]
    assert found.best.validation_mse < 0.5 * float(
        (data.validation.expression - data.train.expression.mean(0)).square().mean()
    )
    assert min(found.best.kl_technical, found.best.kl_biological, found.best.kl_perturbation) > 0.1


def test_a_model_of_counts_without_counts_is_a_mistake_of_the_caller(data, params):
    with pytest.raises(ValueError, match="negative_binomial is one of counts"):
        fit(data, params.override({"model.observation": "negative_binomial"}), seed=1)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(data, params):
    def digest(seed: int) -> str:
        return hashlib.sha256(fit(data, params, seed).gem.to_bytes()).hexdigest()

    assert digest(3) == digest(3)
    assert digest(3) != digest(4)


def test_a_fit_leaves_the_global_random_state_alone(data, params):
    before = torch.random.get_rng_state()
    fit(data, params.override({"train.epochs": 1}), seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_validation_split_of_combinations_is_where_choices_look(data):
    assert data.selection_split == "validation_combination"


def test_the_best_epoch_is_the_one_with_the_best_score_and_its_weights_are_kept(
    cohort, data, params
):
    finished = fit(
        data, params.override(SHORT | {"train.learning_rate": 0.03, "train.patience": 3}), seed=1
    )
    scores = [epoch.validation_predictive_log_likelihood for epoch in finished.history]
    assert finished.best.validation_predictive_log_likelihood == max(scores)
    assert finished.best.epoch < len(scores), "a later epoch was worse"
    query = finished.gem.query(cohort.rows([data.selection_split]), unknown="missing")
    generator = torch.Generator().manual_seed(0)
    again, _ = predictive_log_likelihood(
        finished.gem.network,
        data.validation.observed,
        query,
        params.train.predictive_draws,
        generator,
    )
    assert float(again.mean()) == pytest.approx(max(scores), rel=1e-6)


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
def test_few_samples_get_smaller_batches_then_more_epochs_until_there_are_enough_steps(
    params, samples, batch_size, epochs, patience
):
    given = params.override(
        {"train.epochs": 30, "train.min_steps": 600, "train.patience": 10, "train.batch_size": 64}
    ).train
    plan = Plan.of(samples, given)
    assert (plan.batch_size, plan.epochs, plan.patience) == (batch_size, epochs, patience)
    assert plan.epochs * math.ceil(samples / plan.batch_size) >= 600
    as_said = Plan.of(samples, given.model_copy(update={"min_steps": 0}))
    assert (as_said.batch_size, as_said.epochs, as_said.patience) == (64, 30, 10)


@pytest.mark.parametrize(("columns", "size"), [(0, 64), (47, 64), (65, 65), (300, 300), (513, 512)])
def test_technical_latents_left_open_are_as_many_as_the_technical_covariates_have_columns(
    data, params, columns, size
):
    encoder = SimpleNamespace(sizes={"technical": columns, "biological": 900, "perturbation": 900})
    found = replace(data, encoder=encoder).resolve_latent_sizes(
        params.override({"model.latent.technical": None})
    )
    assert (
        found.model.latent.technical == size
        and found.model.latent.biological == params.model.latent.biological
    )
    assert replace(data, encoder=encoder).resolve_latent_sizes(params) is params, (
        "a number that is given stands"
    )


def test_a_fit_whose_technical_latents_are_left_open_has_them(data, params):
    fitted = fit(
        data, params.override({"model.latent.technical": None, "train.epochs": 1}), seed=1
    ).gem
    assert fitted.network.sizes["technical"] == fitted.params.latent.technical == 64


def test_few_samples_are_regularised_in_proportion_to_those_that_are_missing(params):
    given = params.override(
        {
            "train.small_cohort": 3000,
            "train.weight_decay": 0.2,
            "train.metadata_dropout": {"technical": 0.0, "biological": 0.3, "perturbation": 0.02},
        }
    ).train
    for samples, scarcity in ((9600, 1), (3000, 1), (1000, 3), (100, 30)):
        plan = Plan.of(samples, given)
        assert plan.weight_decay == pytest.approx(0.2 * scarcity)
        assert plan.metadata_dropout == pytest.approx(
            {"technical": 0.0, "biological": 0.3, "perturbation": min(0.02 * scarcity, 0.15)}
        )
    assert Plan.of(100, given.model_copy(update={"small_cohort": 0})).weight_decay == 0.2


def test_patience_stops_a_fit_that_no_longer_improves(data, params):
    finished = fit(
        data,
        params.override({"train.epochs": 60, "train.patience": 2, "train.learning_rate": 0.05}),
        seed=1,
    )
    assert len(finished.history) == finished.best.epoch + 2 < 60


def test_without_a_validation_split_all_epochs_are_trained_and_the_last_is_kept(data, params):
    from dataclasses import replace

    finished = fit(
        replace(data, validation=None, selection_split=None),
        params.override({"train.epochs": 4, "train.patience": 1}),
        seed=1,
    )
    assert (len(finished.history), finished.best.epoch) == (4, 4)
    assert finished.best.validation_mse is None


def test_divergence_names_the_step_and_the_term(data, params):
    from dataclasses import replace

    expression = data.train.expression.clone()
    expression[5, 3] = float("nan")
    broken = replace(data, train=replace(data.train, observed=Observed(expression)))
    with pytest.raises(DivergedError, match=r"step \d+ of \d+: .*nll_reconstruction.* not finite"):
        fit(broken, params, seed=1)


def test_cuda_is_refused_where_there_is_none(params):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match="device is cuda"):
        choose_device(params.override({"train.device": "cuda"}).train)
    assert choose_device(params.override({"train.device": "auto"}).train) == CPU


def test_kl_warmup_rises_linearly_to_one():
    assert [kl_warmup(step, 100, 0.2) for step in (0, 10, 20, 99)] == [0, 0.5, 1, 1]
    assert kl_warmup(0, 100, 0) == 1


def test_one_cycle_starts_low_peaks_once_and_ends_at_zero():
    rates = [one_cycle(step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 250
    assert rates[-1] == pytest.approx(0.0)


def test_objective_weighs_every_term_and_free_bits_act_per_dimension(params):
    train = params.override(
        {
            "train.kl_weight.technical": 2.0,
            "train.kl_weight.biological": 0.0,
            "train.kl_weight.perturbation": 1.0,
            "train.predictive_weight": 3.0,
            "train.reference_weight": 0.5,
            "train.classifier_weight": 0.25,
            "train.free_bits": 0.1,
        }
    ).train
    terms = {
        "nll_reconstruction": torch.tensor(10.0),
        "nll_predictive": torch.tensor(20.0),
        "nll_reference": torch.tensor(40.0),
        "kl_technical": torch.tensor([0.05, 1.0]),
        "kl_biological": torch.tensor([5.0]),
        "kl_perturbation": torch.tensor([0.2, 0.3]),
        "classification": torch.tensor(8.0),
    }
    expected = 10 + 3 * 20 + 0.5 * 40 + 0.5 * (2 * (0.1 + 1.0) + 1 * 0.5) + 0.25 * 8
    assert float(objective(terms, train, warmup=0.5)) == pytest.approx(expected)


def test_metadata_dropout_hides_whole_fields_at_the_requested_rate(generator):
    hidden = dropout_fields(torch.ones(4000, 5), [(2, 0), (3, 0)], 0.3, 0.0, generator)
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert torch.equal(hidden[:, 2], hidden[:, 4])
    assert float((hidden[:, [0, 2]] == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_identity_dropout_hides_the_identity_and_leaves_the_features(generator):
    """A field of 2 features and 3 levels beside one without an identity."""
    shown = dropout_fields(torch.ones(4000, 6), [(2, 3), (1, 0)], 0.0, 0.3, generator)
    assert (shown[:, [0, 1, 5]] == 1).all()
    assert torch.equal(shown[:, 2], shown[:, 3]) and torch.equal(shown[:, 2], shown[:, 4])
    assert float((shown[:, 2] == 0).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_a_hidden_field_hides_its_identity_too_and_the_chances_are_independent(generator):
    shown = dropout_fields(torch.ones(20000, 2), [(1, 1)], 0.4, 0.5, generator)
    features, identity = shown[:, 0] == 1, shown[:, 1] == 1
    assert float(features.float().mean()) == pytest.approx(0.6, abs=0.02)
    assert float(identity.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert not (identity & ~features).any()


@pytest.mark.parametrize(
    ("blocks", "field", "identity"), [([(2, 3)], 0.0, 0.0), ([(5, 0)], 0.0, 0.9), ([], 0.5, 0.5)]
)
def test_where_nothing_can_be_hidden_nothing_is_drawn(generator, blocks, field, identity):
    metadata = torch.ones(7, sum(map(sum, blocks)))
    before = generator.get_state()
    assert dropout_fields(metadata, blocks, field, identity, generator) is metadata
    assert torch.equal(generator.get_state(), before)


def test_references_are_controls_of_the_same_study_and_context(cohort, data, generator):
    samples = cohort.rows(["train"]).reset_index(drop=True)
    rows = torch.arange(len(samples))
    drawn = samples.iloc[data.references.draw(rows, generator).numpy()].reset_index(drop=True)
    place = samples["study"] + samples["tissue"] + samples["cell_type"]
    has_control = place.isin(place[samples["perturbation"] == "control"])
    assert has_control.mean() > 0.9
    assert (drawn["perturbation"][has_control] == "control").all()
    assert (drawn["study"] + drawn["tissue"] + drawn["cell_type"])[has_control].equals(
        place[has_control]
    )
    assert (drawn.index[~has_control] == np.flatnonzero(~has_control)).all()


def test_encoding_points_every_sample_at_its_own_metadata_row(cohort, data):
    samples = cohort.rows(["train"])
    full = data.encoder.encode(samples)
    encoded = EncodedSplit.of(cohort, "train", data.encoder, CPU)
    for group, matrix in full.items():
        assert len(encoded.metadata[group]) < len(matrix)
        assert np.array_equal(encoded.metadata[group][encoded.index[group]].numpy(), matrix)


def test_every_epoch_reports_finite_comparable_figures_under_stable_names(trained):
    names = set(trained.history[0].metrics())
    assert {
        "train/loss",
        "train/kl_technical",
        "validation/predictive_log_likelihood",
        "validation/evidence_lower_bound",
        "validation/mse",
    } <= names
    assert all(
        math.isfinite(value) for epoch in trained.history for value in epoch.metrics().values()
    )
