"""Several ranks: their shares add up to the batch, and their fit is that of one rank."""

import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.networks import batch, network
from support.processes import free_port

from pipeline.gem.common.errors import StoppedError
from pipeline.gem.model.objective import objective, objective_terms
from pipeline.gem.model.observation import Observed
from pipeline.gem.training import distributed
from pipeline.gem.training.checkpoint import Checkpoint
from pipeline.gem.training.distributed import Share
from pipeline.gem.training.trainer import fit

TOLERANCE = 1e-5  # relative: float32 sums in another order
# 271 samples make 8 batches of 32 and one of 15, whose shares are uneven; patience ends the fit.
SHORT = {"train.epochs": 12, "train.patience": 2, "train.learning_rate": 0.05}


def double(whole):
    """The batch in float64."""

    def tensors(parts):
        return {group: part.double() for group, part in parts.items()}

    return replace(
        whole,
        observed=Observed(whole.observed.expression.double()),
        noise=type(whole.noise)(*(part.double() for part in whole.noise)),
        reference=whole.reference.double(),
        batch_effect=whole.batch_effect.double(),
        unseen_study=whole.unseen_study.double(),
        metadata=tensors(whole.metadata),
        partial_metadata=tensors(whole.partial_metadata),
    )


def first_references(whole, number: int):
    noise = whole.noise._replace(reference=whole.noise.reference[:number])
    parts = whole.reference[:number], whole.batch_effect[:number]
    return replace(whole, noise=noise, reference=parts[0], batch_effect=parts[1])


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
    shares = [Share.of(whole, rank, size) for rank in range(size)]
    terms = [share.weighted(objective_terms(net, share.batch)) for share in shares]
    for name, term in expected_terms.items():
        mean = sum(part[name] for part in terms) / size
        torch.testing.assert_close(mean, term, rtol=1e-12, atol=1e-12)
    parts = [gradients(part) for part in terms]
    for name, gradient in expected.items():
        # DistributedDataParallel needs the same parameters on every rank.
        assert all((part[name] is None) == (gradient is None) for part in parts), name
        if gradient is not None:
            mean = sum(part[name] for part in parts) / size
            torch.testing.assert_close(mean, gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_shares_are_disjoint_and_leave_out_unused_metadata():
    whole = batch(9)
    shares = [Share.of(whole, rank, 2).batch for rank in range(2)]
    for rank, share in enumerate(shares):
        assert torch.equal(share.observed.expression, whole.observed.expression[rank::2])
        for group, rows in share.metadata.items():
            assert torch.equal(
                rows[share.index[group]], whole.metadata[group][whole.index[group][rank::2]]
            )
            assert len(rows) == len(share.index[group].unique())


# Two real ranks, forked.


def run_ranks(folder: Path, work, size: int = 2) -> list:
    """The results of `work(rank)` in `size` ranks, or their exceptions."""
    port, children = free_port(), []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        try:
            local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            settings = local | {"RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in settings.items()})
            with distributed.group():
                try:
                    result = work(rank)
                except Exception as error:
                    result = error
                distributed.wait_for_all()
            (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        finally:
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def rows(result) -> list[dict]:
    epochs = [asdict(epoch) for epoch in result.history]
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in epochs]


def fit_with_interruption(data, params, folder: Path, stop_after: int | None):
    """A fit with a checkpoint in `folder`; stopped before step `stop_after`, then resumed."""
    checkpoint = Checkpoint(folder / "fit.safetensors")
    steps = iter(range(10**9))

    def on_step():
        if next(steps) == stop_after:
            raise StoppedError("here")

    if stop_after is not None:
        with pytest.raises(StoppedError):
            fit(data, params, 1, checkpoint=checkpoint, on_step=on_step)
    return fit(data, params, 1, checkpoint=checkpoint)


@pytest.mark.parametrize("changes", [{}, {"train.free_bits": 0.5, "train.reference_weight": 0.0}])
def test_two_ranks_fit_as_one(data, params, tmp_path, changes):
    """Early stopping, an uneven last batch, free bits of the whole batch, a parameter without a
    gradient. An interrupted fit has equal bits."""
    changed = params.override(SHORT | changes)
    one = fit(data, changed, 1)
    first, second = run_ranks(
        tmp_path, lambda rank: fit_with_interruption(data, changed, tmp_path, None)
    )
    assert rows(first) == rows(second)
    assert first.gem.to_bytes() == second.gem.to_bytes()
    assert len(first.history) == len(one.history) < changed.train.epochs
    for epoch, expected in zip(rows(first), rows(one), strict=True):
        assert epoch == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
