"""What GEM has for studies, contexts and targets that training never saw together: each part against its definition."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from support.networks import batch, network

from pipeline.gem.data.splits import TRAIN
from pipeline.gem.model.gem import TargetGenes, TrainedGEM
from pipeline.gem.model.network import (
    POSTERIOR,
    PRIOR,
    REFERENCE_SAMPLE,
    UNSEEN_STUDY,
    Gaussian,
    Interaction,
    TargetEffect,
)
from pipeline.gem.model.normal import normal_log_likelihood
from pipeline.gem.training.dataset import TrainingData, study_spread
from pipeline.gem.training.trainer import Trainer, fit, hidden_study


@pytest.fixture(scope="module")
def data(cohort) -> TrainingData:
    return TrainingData.load(cohort, torch.device("cpu"))


def loop(data, params, **train) -> Trainer:
    chosen = params.override({f"train.{name}": value for name, value in train.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gem = TrainedGEM.build(
            data.genes, data.encoder, data.targets, chosen.model, hidden_study(data, chosen)
        )
    return Trainer(data, chosen.train, gem, torch.Generator().manual_seed(0))


# --- technical effects add up ---------------------------------------------------------------------------------------


def test_technical_latents_move_every_sample_alike_whatever_its_biology(small_model, generator):
    made, place = network(small_model), network(small_model).slices()["technical"]
    latents, moved = torch.randn(5, 7, generator=generator), torch.randn(1, 2, generator=generator)
    other = latents.clone()
    other[:, place] += moved
    change = made.decode(other) - made.decode(latents)
    torch.testing.assert_close(change, change[:1].expand_as(change), rtol=1e-4, atol=1e-5)
    assert change.abs().max() > 1e-3


def test_the_technical_prior_is_linear_in_its_levels(small_model):
    made = network(small_model)
    with torch.no_grad():
        none, first, second = (
            made.prior("technical", torch.tensor([row])).mean
            for row in ([0.0, 0, 0], [1.0, 0, 0], [0.0, 1, 0])
        )
        both = made.prior("technical", torch.tensor([[1.0, 1, 0]])).mean
    torch.testing.assert_close(both - none, (first - none) + (second - none), rtol=1e-5, atol=1e-6)


def test_the_new_study_term_is_the_likelihood_with_the_study_hidden_and_reaches_technical_weights_only(
    small_model,
):
    made, given = network(small_model), batch()
    with torch.no_grad():  # priors without noise, so that the term can be computed by hand
        for prior in made.priors.values():
            last = prior if isinstance(prior, torch.nn.Linear) else prior[-1]
            last.bias[last.out_features // 2 :] = -50.0
            last.weight[last.out_features // 2 :] = 0.0
    terms = made(given, torch.Generator().manual_seed(0))
    prior = made.joint_prior(given.metadata, given.index).mean
    hidden = prior.clone()
    hidden[:, made.slices()["technical"]] = made.prior("technical", given.new_study).mean[
        given.index["technical"]
    ]
    decoded = made.hit(
        made.decode(hidden),
        given.target,
        made.target_effect(given.metadata["perturbation"])[given.index["perturbation"]],
    )
    expected = -normal_log_likelihood(
        given.expression, decoded, made.observation.log_variance(UNSEEN_STUDY)
    ).mean()
    assert terms["nll_unseen_study"].item() == pytest.approx(expected.item(), rel=2e-3)
    terms["nll_unseen_study"].backward()
    reached = {
        name
        for name, weight in made.named_parameters()
        if weight.grad is not None and weight.grad.abs().sum() > 0
    }
    assert reached <= {
        "priors.technical.weight",
        "priors.technical.bias",
        "linear_decoder.weight",
        "observation.log_variances",
    }
    gene_side = made.linear_decoder.weight.grad
    assert gene_side[:, made.slices()["technical"]].abs().sum() > 0
    assert gene_side[:, 2:].abs().sum() == 0


def test_training_hides_exactly_the_columns_of_the_study(data, params):
    made = loop(data, params)
    technical = data.train.metadata["technical"]
    hidden = made._new_study(technical)
    width = data.encoder.groups["technical"][0].size
    assert data.encoder.groups["technical"][0].name == "study"
    assert (hidden[:, :width] == 0).all()
    torch.testing.assert_close(hidden[:, width:], technical[:, width:])
    assert len(loop(data, params, unseen_study_weight=0.0)._new_study(technical)) == 0


def test_a_study_never_seen_has_the_noise_learnt_for_one_and_a_reference_its_own(
    data, params, cohort, tmp_path
):
    trained = fit(data, params.override({"train.epochs": 2}), seed=1).gem
    trained.save(tmp_path / "model.pt")
    gem = TrainedGEM.load(tmp_path / "model.pt")
    known, new = cohort.rows([TRAIN]).iloc[:3], cohort.rows(["validation_study"]).iloc[:2]
    asked = pd.concat([known, new, known.drop(columns="study")])
    ways = [PRIOR] * 3 + [UNSEEN_STUDY] * 5
    assert gem.query(asked, unknown="missing").way.tolist() == ways
    noise = gem.network.observation.log_variance(gem.query(asked, unknown="missing").way)
    torch.testing.assert_close(
        noise, torch.stack([gem.network.observation.log_variance(way) for way in ways])
    )
    reference = np.repeat(cohort.expression([TRAIN])[:1], len(asked), axis=0)
    assert set(gem.query(asked, reference, unknown="missing").way.tolist()) == {REFERENCE_SAMPLE}
    # Where training never hid a study, nothing was learnt of one.
    other = fit(
        data, params.override({"train.epochs": 1, "train.unseen_study_weight": 0.0}), seed=1
    ).gem
    assert other.hidden_study is None
    assert set(other.query(asked, unknown="missing").way.tolist()) == {PRIOR}


# --- programs scaled by the biology -----------------------------------------------------------------------------------


def test_an_interaction_is_the_sum_over_programs_of_response_times_loading(generator):
    made = Interaction(3, 2, 4, 6)
    biological, perturbation = (
        torch.randn(2, 3, generator=generator),
        torch.randn(2, 2, generator=generator),
    )
    found = made(biological, perturbation)
    for sample in range(2):
        expected = torch.zeros(6)
        for program in range(4):
            response = (
                made.response.bias[program] + made.response.weight[program] @ biological[sample]
            )
            expected += (
                response
                * (made.loading.weight[program] @ perturbation[sample])
                * made.program.weight[:, program]
            )
        torch.testing.assert_close(found[sample], expected, rtol=1e-4, atol=1e-5)
    assert (made(biological, torch.zeros(2, 2)) == 0).all()


# --- what a perturbation does to its own target -------------------------------------------------------------------------


def test_only_the_target_gene_is_hit(small_model, generator):
    made = network(small_model)
    decoded, change = torch.randn(3, 9, generator=generator), torch.tensor([1.5, -2.0, 4.0])
    found = made.hit(decoded, torch.tensor([4, 0, -1]), change)
    expected = decoded.clone()
    expected[0, 4] += 1.5
    expected[1, 0] -= 2.0
    torch.testing.assert_close(found, expected)


def test_what_is_done_to_a_target_does_not_depend_on_which_perturbation_it_is(generator):
    made = TargetEffect(torch.tensor([False, False, True, True]))
    with torch.no_grad():
        made.narrow.weight.normal_(generator=generator)
    rows = torch.rand(2, 4, generator=generator)
    rows[1, 2:] = rows[0, 2:]
    first, second = made(rows).tolist()
    assert first == pytest.approx(second)


def test_a_short_fit_learns_that_knock_down_lowers_and_over_expression_raises(data, params, cohort):
    gem = fit(data, params.override({"train.epochs": 12, "train.learning_rate": 5e-3}), seed=1).gem
    samples = cohort.rows([TRAIN])
    query = gem.query(samples)
    change, kind = query.change.numpy(), samples["perturbation_type"].to_numpy()
    assert (query.target.numpy() == TargetGenes.of(cohort)(samples)).all()
    for name, sign in (("crispri", -1), ("overexpression", 1)):
        if (kind == name).any():
            assert (sign * change[kind == name]).mean() > 0.3


# --- what a reference tells beyond its latents --------------------------------------------------------------------------


def test_what_is_carried_is_a_share_of_the_residual_that_grows_with_surprise(
    small_model, generator
):
    made = network(small_model)
    with torch.no_grad():
        made.residual_gate[0], made.residual_gate[1] = -1.0, 2.0
    reference = 5 * torch.rand(2, 9, generator=generator)
    posterior = made.posterior(reference)
    residual = reference - made.decode(posterior.mean)
    surprise = torch.stack(
        [(row**2 / made.observation.log_variance(POSTERIOR).exp()).mean().log() for row in residual]
    )
    expected = residual / (1 + torch.exp(1.0 - 2.0 * surprise))[:, None]
    torch.testing.assert_close(made.carried(reference, posterior), expected, rtol=1e-4, atol=1e-5)


def test_a_reference_that_the_latents_explain_carries_nothing(small_model):
    made = network(small_model)
    posterior = Gaussian(torch.zeros(2, 7), torch.zeros(2, 7))
    explained = made.decode(posterior.mean)
    assert made.carried(explained, posterior).abs().max() == 0


def test_the_conditioned_term_carries_the_residual_within_the_same_virtual_study(small_model):
    """The shift is on the reference the encoder sees and on the target, so that carrying it pays."""
    made, given = network(small_model), batch()
    for shift in (0.0, 3.0):
        moved = replace(given, shift=torch.full_like(given.shift, shift))
        seen: dict = {}
        made.carried, kept = (
            lambda reference, posterior, seen=seen: seen.setdefault("reference", reference) * 0,
            made.carried,
        )
        terms = made(moved, torch.Generator().manual_seed(0))
        made.carried = kept
        torch.testing.assert_close(seen["reference"], given.reference + shift)
        assert torch.isfinite(terms["nll_reference"])


def test_virtual_studies_are_the_share_asked_for_with_the_spread_of_real_ones(data, params):
    made = loop(data, params, simulated_batch_effects=0.4)
    drawn = made._virtual_studies(4000)
    moved = drawn.abs().sum(dim=1) > 0
    assert float(moved.float().mean()) == pytest.approx(0.4, abs=0.03)
    # A uniform size from 0 to 1.5 has a mean square of 0.75.
    ratio = drawn[moved].square().mean(dim=0) / data.study_spread.square()
    assert float(ratio.mean()) == pytest.approx(0.75, rel=0.1)
    assert (loop(data, params, simulated_batch_effects=0.0)._virtual_studies(50) == 0).all()


def test_the_spread_of_studies_is_that_of_their_control_means_within_a_context(cohort):
    samples, expression = cohort.rows([TRAIN]), cohort.expression([TRAIN])
    control = (samples["perturbation"] == "control").to_numpy()
    squares, freedom = np.zeros(expression.shape[1]), 0
    for context in set(zip(samples["tissue"][control], samples["cell_type"][control], strict=True)):
        inside = (
            control
            & (samples["tissue"] == context[0]).to_numpy()
            & (samples["cell_type"] == context[1]).to_numpy()
        )
        means = np.array(
            [
                expression[inside & (samples["study"] == study).to_numpy()].mean(axis=0)
                for study in set(samples["study"][inside])
            ]
        )
        squares += ((means - means.mean(axis=0)) ** 2).sum(axis=0)
        freedom += len(means) - 1
    np.testing.assert_allclose(
        study_spread(samples, expression, cohort.declared), np.sqrt(squares / freedom), rtol=1e-4
    )
    alone = cohort.declared.model_copy(update={"study_column": None})
    assert (study_spread(samples, expression, alone) == 0).all()


def test_a_reference_helps_in_a_study_never_seen(data, params, cohort):
    """After a short fit, on validation studies: an error is lower with one control of the study than from metadata alone."""
    from pipeline.gem.data.references import choose_references

    gem = fit(data, params.override({"train.epochs": 30, "train.learning_rate": 5e-3}), seed=1).gem
    samples, expression = cohort.rows(["validation_study"]), cohort.expression(["validation_study"])
    control = (samples["perturbation"] == "control").to_numpy()
    given = control & (np.cumsum(control) % 2 == 1)
    asked = samples[~given]
    known = asked["cell_type"].isin(samples["cell_type"][given]).to_numpy()
    rows = np.flatnonzero(~given)[known]
    asked = samples.iloc[rows]
    chosen = choose_references(asked, samples[given], cohort.declared, seed=0)
    without = gem.expect(gem.query(asked, unknown="missing"), 4, 0)
    having = gem.expect(gem.query(asked, expression[given][chosen], unknown="missing"), 4, 0)
    assert np.mean((having - expression[rows]) ** 2) < 0.9 * np.mean(
        (without - expression[rows]) ** 2
    )


def test_seeds_fitted_side_by_side_are_those_fitted_one_after_another(data, params, cohort):
    from pipeline.gem.training.multi_seed import fit_seeds

    chosen = params.override({"train.seeds": [1, 2], "train.epochs": 2})
    told: list[tuple[int, int]] = []
    found = fit_seeds(
        data, chosen, cohort.folder, lambda seed, epoch: told.append((seed, epoch.epoch)), {}
    )
    alone = [fit(data, chosen, seed) for seed in (1, 2)]
    assert [one.gem.to_bytes() for one in found] == [one.gem.to_bytes() for one in alone]
    assert sorted(told) == [(1, 1), (1, 2), (2, 1), (2, 2)]
