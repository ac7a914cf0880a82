"""Several ranks: their shares add up to the batch, and their fit is that of one rank."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from support.networks import batch, network
from support.ranks import metrics_of, run_ranks

from pipeline.gem.common.errors import InputError, StoppedError
from pipeline.gem.model.objective import objective, objective_terms
from pipeline.gem.model.observation import Observed
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.data_parallel import Share, share_of
from pipeline.gem.training.trainer import fit

TOLERANCE = 1e-5  # relative: sums of float32 in another order
# Epoch 2 is worse than the first, and ends the fit.
DIVERGING = {"train.epochs": 10, "train.patience": 1, "train.learning_rate": 0.4}


def double(whole):
    """The batch in float64; latents are float32 all the same."""

    def rows(metadata):
        return replace(metadata, values=metadata.values.double())

    return replace(
        whole,
        observed=Observed(whole.observed.expression.double()),
        noise=type(whole.noise)(*(part.double() for part in whole.noise)),
        reference=whole.reference.double(),
        batch_effect=whole.batch_effect.double(),
        unseen_study=rows(whole.unseen_study),
        metadata={group: rows(part) for group, part in whole.metadata.items()},
        partial_metadata={group: rows(part) for group, part in whole.partial_metadata.items()},
    )


def first_references(whole, number: int):
    noise = whole.noise._replace(reference=whole.noise.reference[:number])
    parts = whole.reference[:number], whole.batch_effect[:number]
    return replace(whole, noise=noise, reference=parts[0], batch_effect=parts[1])


def read_share(whole, rank: int, size: int):
    """The batch as a rank reads it: with the expression of its share."""
    rows, _ = share_of(len(whole.observed), rank, size)
    references, _ = share_of(len(whole.reference), rank, size)
    return replace(whole, observed=whole.observed.rows(rows), reference=whole.reference[references])


@pytest.mark.parametrize(
    ("samples", "references", "size"), [(8, 4, 2), (9, 3, 2), (9, 1, 4), (2, 1, 3), (5, 0, 2)]
)
def test_gradients_of_all_shares_have_the_mean_of_the_whole_batch(
    small_model, params, samples, references, size
):
    """Also where shares are uneven, and where a rank has no sample or no reference."""
    net = network(small_model).double()
    whole = double(first_references(batch(samples), references))
    weights = dict(net.named_parameters())

    def gradients(terms):
        loss = objective(terms, params.train, 0.7)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return dict(zip(weights, found, strict=True))

    expected_terms = objective_terms(net, whole)
    expected = gradients(expected_terms)
    shares = [Share.of(read_share(whole, rank, size), rank, size) for rank in range(size)]
    terms = [share.weighted(objective_terms(net, share.batch)) for share in shares]
    for name, term in expected_terms.items():
        mean = sum(part[name] for part in terms) / size
        torch.testing.assert_close(mean, term, rtol=1e-6, atol=1e-6)
    parts = [gradients(part) for part in terms]
    for name, gradient in expected.items():
        # DistributedDataParallel needs the same parameters on every rank.
        assert all((part[name] is None) == (gradient is None) for part in parts), name
        if gradient is not None:
            mean = sum(part[name] for part in parts) / size
            torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_shares_are_disjoint_and_leave_out_unused_metadata():
    whole = batch(9)
    shares = [Share.of(read_share(whole, rank, 2), rank, 2).batch for rank in range(2)]
    for rank, share in enumerate(shares):
        assert torch.equal(share.observed.expression, whole.observed.expression[rank::2])
        for group, rows in share.metadata.items():
            expected = whole.metadata[group][whole.index[group][rank::2]]
            assert torch.equal(rows[share.index[group]].columns, expected.columns)
            assert len(rows) == len(share.index[group].unique())


def stopped_fit(data, params, checkpoint: Checkpoint, step: int) -> None:
    """A fit that ends before this step."""
    steps = iter(range(step))

    def on_step():
        if next(steps, None) is None:
            raise StoppedError("here")

    with pytest.raises(StoppedError):
        fit(data, params, 1, checkpoint=checkpoint, on_step=on_step)


def test_two_ranks_fit_as_one_and_resume_to_equal_bits(data, params, tmp_path):
    """With an uneven last batch (271 samples, 32 a batch) and free bits, which the whole batch
    decides."""
    changed = params.override({"train.epochs": 3, "train.free_bits": 0.5})
    one, checkpoint = fit(data, changed, 1), Checkpoint(tmp_path / "fit.safetensors")

    def work(rank):
        whole = fit(data, changed, 1)
        stopped_fit(data, changed, checkpoint, 12)
        return whole, fit(data, changed, 1, checkpoint=checkpoint)

    (first, resumed), (second, _) = run_ranks(tmp_path, work)
    assert metrics_of(first) == metrics_of(second) == metrics_of(resumed)
    assert first.gem.to_bytes() == second.gem.to_bytes() == resumed.gem.to_bytes()
    for epoch, expected in zip(metrics_of(first), metrics_of(one), strict=True):
        assert epoch == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_early_stopping_decides_the_same_on_each_rank(data, params, tmp_path):
    fits = run_ranks(tmp_path, lambda rank: fit(data, params.override(DIVERGING), 1))
    assert [len(result.history) for result in fits] == [2, 2]
    assert metrics_of(fits[0]) == metrics_of(fits[1])


def test_a_parameter_without_a_term_does_not_stop_two_ranks(data, params, tmp_path):
    """Without the term of references, their gate has no gradient."""
    changed = params.override({"train.epochs": 1, "train.reference_weight": 0.0})
    first, _ = run_ranks(tmp_path, lambda rank: fit(data, changed, 1))
    (epoch,), (expected,) = metrics_of(first), metrics_of(fit(data, changed, 1))
    assert epoch == pytest.approx(expected, rel=TOLERANCE)


def test_ranks_with_different_checkpoints_are_refused(data, params, tmp_path):
    """As on two machines without a common folder."""
    changed = params.override({"train.epochs": 2})
    stopped_fit(data, changed, Checkpoint(tmp_path / "0.safetensors"), 10)
    checkpoints = [Checkpoint(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    errors = run_ranks(tmp_path, lambda rank: fit(data, changed, 1, checkpoint=checkpoints[rank]))
    assert all("different checkpoints; all machines need the same folder" in str(e) for e in errors)
    assert all(isinstance(error, InputError) for error in errors)


def test_metrics_that_end_a_fit_end_it_in_the_same_epoch_on_each_rank(data, params, tmp_path):
    """As pruning does: `on_epoch` sees equal metrics."""

    def work(rank):
        losses = []

        def on_epoch(epoch):
            losses.append(epoch.loss)
            if len(losses) > 1 and losses[-1] < losses[0]:
                raise InputError(f"pruned after {losses}")

        fit(data, params.override({"train.epochs": 4}), 1, on_epoch)

    first, second = run_ranks(tmp_path, work)
    assert isinstance(first, InputError) and str(first) == str(second)


def test_an_error_of_on_epoch_in_one_rank_ends_the_others(data, params, tmp_path):
    def work(rank):
        def on_epoch(epoch):
            if rank == 0:
                raise InputError("tracking")

        fit(data, params, 1, on_epoch)

    first, second = run_ranks(tmp_path, work)
    assert isinstance(first, InputError)
    assert isinstance(second, StoppedError)


def test_a_rank_whose_peer_is_killed_stops_within_seconds(data, params, tmp_path):
    def work(rank):
        def on_epoch(epoch):
            if rank:
                os.kill(os.getpid(), signal.SIGKILL)

        start = time.monotonic()
        with pytest.raises(StoppedError, match="another of the 2 processes has ended"):
            fit(data, params, 1, on_epoch)
        return time.monotonic() - start

    assert run_ranks(tmp_path, work, expect=1)[0] < 30
