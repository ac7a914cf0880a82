"""One model trained on the same batches by several ranks: the share of each, and the mean of all.

All ranks draw the same batches of B samples, R with a reference, and each works on every `size`-th
sample of them. The expression of these is all that it reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.gem.common.config import Train
from pipeline.gem.model.network import Network
from pipeline.gem.model.objective import Batch, objective, objective_terms
from pipeline.gem.training import distributed


@dataclass(frozen=True)
class Share:
    """The part of a batch of B samples, R with a reference, that one of `size` ranks works on.

    A rank without a sample or reference of its own has a stand-in of weight 0: its gradients exist,
    as DistributedDataParallel expects, and are zero.
    """

    batch: Batch
    weight: float  # size / B times the samples of this rank
    reference_weight: float  # size / R times the references of this rank

    @classmethod
    def of(cls, batch: Batch, rank: int, size: int) -> "Share":
        """Every `size`-th sample from sample `rank`. So the samples with a reference are the first
        of a share, and spread evenly. `batch.observed` and `batch.reference` have only these."""
        rows, weight = share_of(len(batch.target_gene), rank, size)
        references, reference_weight = share_of(len(batch.batch_effect), rank, size)
        metadata, index, used = {}, {}, {}
        for group, of_group in batch.metadata.items():
            used[group], index[group] = torch.unique(batch.index[group][rows], return_inverse=True)
            metadata[group] = of_group[used[group]]
        partial = batch.partial_metadata.items()
        unseen_study = batch.unseen_study
        share = replace(
            batch,
            metadata=metadata,
            index=index,
            target_gene=batch.target_gene[rows],
            labels=batch.labels[rows],
            noise=batch.noise.rows(rows)._replace(reference=batch.noise.reference[references]),
            batch_effect=batch.batch_effect[references],
            unseen_study=unseen_study[used["technical"]] if len(unseen_study) else unseen_study,
            partial_metadata={group: of_group[used[group]] for group, of_group in partial},
        )
        return cls(share, weight, reference_weight)

    def weighted(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms of this rank whose mean over ranks is the mean over the samples of the batch."""
        return {
            name: term * (self.reference_weight if name == "nll_reference" else self.weight)
            for name, term in terms.items()
        }


def share_of(samples: int, rank: int, size: int) -> tuple[slice, float]:
    """(The rows of a rank, `size` / `samples` times their number). A stand-in counts 0."""
    if rank >= samples:
        return slice(0, 1), 0.0
    return slice(rank, None, size), size / samples * len(range(rank, samples, size))


class Objective(nn.Module):
    """The loss of a batch and its unweighted terms: equal numbers on all ranks."""

    def __init__(self, network: Network, params: Train):
        super().__init__()
        self.network, self.params = network, params

    def forward(self, batch: Batch, warmup: float) -> tuple[Tensor, dict[str, Tensor]]:
        """`warmup` as in `objective`. Only the gradients are those of this rank's samples."""
        if distributed.size() == 1:
            terms = objective_terms(self.network, batch)
        else:
            share = Share.of(batch, distributed.rank(), distributed.size())
            terms = _mean_over_ranks(share.weighted(objective_terms(self.network, share.batch)))
        return objective(terms, self.params, warmup), terms


def _mean_over_ranks(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The means over ranks, with the gradients of this rank's terms.

    The objective compares the KL divergence of the whole batch with the free bits.
    """
    local = torch.cat([term.flatten() for term in terms.values()])
    mean = distributed.total(local.detach().clone()) / distributed.size() + (local - local.detach())
    parts = mean.split([term.numel() for term in terms.values()])
    return {
        name: part.reshape(term.shape)
        for (name, term), part in zip(terms.items(), parts, strict=True)
    }


def parallel(module: Objective) -> nn.Module:
    """`module`; of several ranks with gradients that are the mean over them."""
    if distributed.size() == 1:
        return module
    # A network has parameters that a loss without their term does not use, the same in every step.
    return DistributedDataParallel(module, forward_sync_buffers=False, static_graph=True)
