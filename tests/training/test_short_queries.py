"""Queries of few fields: what the priors of missing fields learn, against closed forms and against averages over full queries."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from support.networks import batch, network
from torch.distributions import Normal, kl_divergence

from pipeline.gem.common.config import GROUPS
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.network import Gaussian
from pipeline.gem.training.dataset import TrainingData
from pipeline.gem.training.trainer import Trainer, fit, hidden_study, mask_fields


@pytest.fixture(scope="module")
def data(cohort) -> TrainingData:
    return TrainingData.load(cohort, torch.device("cpu"))


def normal(prior: Gaussian) -> Normal:
    return Normal(prior.mean, (0.5 * prior.log_variance).exp())


def divergence(made, given, teachers) -> torch.Tensor:
    """By torch.distributions."""
    parts = (
        kl_divergence(teachers[group], normal(made.prior(group, rows)))
        .sum(1)[given.index[group]]
        .mean()
        for group, rows in given.short.items()
    )
    return sum(parts)


def test_the_term_is_the_divergence_of_the_full_prior_from_the_shorter_summed_over_groups(
    small_model,
):
    made, given = network(small_model), batch()
    expected = divergence(
        made,
        given,
        {group: normal(made.prior(group, rows)) for group, rows in given.metadata.items()},
    )
    term = made(given, torch.Generator().manual_seed(0))["kl_partial_metadata"]
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-4)
    assert term > 0


def test_only_the_shorter_query_learns_and_only_in_the_priors(small_model):
    made, given = network(small_model), batch()
    with torch.no_grad():
        teachers = {
            group: normal(made.prior(group, rows)) for group, rows in given.metadata.items()
        }
    weights = dict(made.named_parameters())
    by_hand = torch.autograd.grad(
        divergence(made, given, teachers), list(weights.values()), allow_unused=True
    )
    gradients = torch.autograd.grad(
        made(given, torch.Generator().manual_seed(0))["kl_partial_metadata"],
        list(weights.values()),
        allow_unused=True,
    )
    for name, gradient, expected in zip(weights, gradients, by_hand, strict=True):
        assert (gradient is None) == (expected is None) == (not name.startswith("priors.")), name
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_no_rows_leave_the_term_out(small_model, generator):
    assert "kl_partial_metadata" not in network(small_model)(replace(batch(), short={}), generator)


def test_its_least_value_is_at_the_mean_and_variance_of_the_mixture():
    """Law of total variance: what a query without its field should expect of levels with these priors and shares."""
    mean, variance, share = (
        torch.tensor([-1.0, 0.5, 3.0]),
        torch.tensor([0.3, 1.0, 0.1]),
        torch.tensor([0.5, 0.3, 0.2]),
    )
    mixture = (share * mean).sum()
    spread = (share * (variance + (mean - mixture) ** 2)).sum()
    guess = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([guess], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = (
            share
            * kl_divergence(Normal(mean, variance.sqrt()), Normal(guess[0], (0.5 * guess[1]).exp()))
        ).sum()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(
        guess.detach(), torch.stack([mixture, spread.log()]), rtol=1e-3, atol=1e-3
    )


def test_fields_are_hidden_whole_and_every_number_of_them(generator):
    blocks = [(2, 0), (1, 3), (1, 0)]
    hidden = mask_fields(torch.ones(3000, 7), blocks, generator)
    by_field = torch.stack(
        [part.min(dim=1).values for part in hidden.split([2, 4, 1], dim=1)], dim=1
    )
    assert torch.equal(hidden, by_field.repeat_interleave(torch.tensor([2, 4, 1]), dim=1)), (
        "a field is hidden in part"
    )
    shown = torch.bincount(by_field.sum(dim=1).long(), minlength=4) / 3000
    torch.testing.assert_close(
        shown, torch.full((4,), 0.25), atol=0.04, rtol=0
    )  # uniform share: each number is as likely


def test_hiding_keeps_a_group_without_fields(generator):
    assert mask_fields(torch.zeros(4, 0), [], generator).shape == (4, 0)


def test_training_hides_fields_of_the_rows_of_the_batch(data, params):
    gem = TrainedGEM.build(
        data.genes, data.encoder, data.targets, params.model, hidden_study(data, params)
    )

    def loop(weight):
        return Trainer(
            data,
            params.override({"train.partial_metadata_weight": weight}).train,
            gem,
            torch.Generator().manual_seed(0),
        )

    made = next(loop(1.0)._batches())
    assert set(made.short) == set(GROUPS[1:])  # the technical prior is linear
    for group in made.short:
        kept = made.short[group] != 0
        assert torch.equal(made.short[group][kept], made.metadata[group][kept])
        assert 0.2 < kept.sum() / (made.metadata[group] != 0).sum() < 0.8
    assert next(loop(0.0)._batches()).short == {}


LONGER = {"train.epochs": 40, "train.patience": 40, "model.prior_blocks": 1}


@pytest.fixture(scope="module")
def fits(cohort, params) -> dict[str, TrainedGEM]:
    whole, chosen = TrainingData.load(cohort, torch.device("cpu")), params.override(LONGER)
    return {
        name: fit(whole, chosen.override({"train.partial_metadata_weight": weight}), seed=1).gem
        for name, weight in (("with", 10.0), ("without", 0.0))
    }


def expected(gem: TrainedGEM, samples: pd.DataFrame) -> np.ndarray:
    """(N, L) prior means."""
    return gem.query(samples, unknown="missing").latents.mean.numpy()


def lacking(gem: TrainedGEM, samples: pd.DataFrame, columns: list[str]) -> float:
    """How far what is expected without these columns lies from the mean over what training samples say there: share of its variance."""
    first = samples.drop_duplicates("cell_type").head(4).reset_index(drop=True)
    short = expected(gem, first.drop(columns=columns))
    filled = []
    for row in range(len(first)):
        same = (
            samples[samples["cell_type"] == first["cell_type"][row]]
            if "tissue" in columns
            else samples
        )  # a cell type has one tissue
        told = pd.concat([first.loc[[row]]] * len(same), ignore_index=True).assign(
            **{name: same[name].to_numpy() for name in columns}
        )
        filled.append(expected(gem, told))
    return sum(
        ((one - many.mean(0)) ** 2).mean() for one, many in zip(short, filled, strict=True)
    ) / sum(many.var(0).mean() for many in filled)


def test_a_short_query_expects_the_mean_of_the_experiments_that_it_could_describe(fits, cohort):
    columns, samples = ["tissue", "disease", "age_years", "sex"], cohort.rows([TRAIN])
    off = {name: lacking(gem, samples, columns) for name, gem in fits.items()}
    assert off["with"] < 0.5 * off["without"], off


def test_a_query_without_technical_fields_is_close_to_the_mean_of_all_as_it_is(fits, cohort):
    """What the linear prior says of no level at all."""
    assert (
        lacking(
            fits["with"],
            cohort.rows([TRAIN]),
            ["study", "library_selection", "library_layout", "platform"],
        )
        < 0.15
    )


def test_a_field_that_another_one_implies_may_be_left_out(fits, cohort):
    """A cell type belongs to one tissue, a study has one platform: who names the one need not name the other."""
    samples = cohort.rows(["validation"])
    short = samples.drop(
        columns=["tissue", "library_selection", "library_layout", "platform", "perturbation_type"]
    )
    np.testing.assert_array_equal(expected(fits["with"], short), expected(fits["with"], samples))
