"""Metrics of the selection split that compare across settings: unweighted, and with the same draws
for every epoch and every fit. Nats per sample."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.errors import DivergedError
from pipeline.gem.model.network import Network
from pipeline.gem.model.objective import Batch, LatentNoise, objective_terms
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.model.predictive import predictive_log_likelihood
from pipeline.gem.model.query import DecoderInput
from pipeline.gem.training import distributed
from pipeline.gem.training.data_parallel import Share, share_of
from pipeline.gem.training.dataset import EncodedRows, EncodedSplit

_SEED = 0  # of the prior draws
METRICS = ("predictive_log_likelihood", "evidence_lower_bound", "mse")


@torch.no_grad()
def validation_metrics(network: Network, split: EncodedSplit, draws: int) -> dict[str, float]:
    """METRICS of a split; `mse` is that of the mean prediction, log-CPM squared. Each rank scores
    its share, and all receive the means over all samples.

    DivergedError if one is not finite.
    """
    network.eval()
    generator = torch.Generator(split.expression.device).manual_seed(_SEED)
    sums = sum(_sums(network, samples, draws, generator) for samples in split.blocks())
    means = distributed.total(sums) / len(split)
    metrics = dict(zip(METRICS, means.tolist(), strict=True))
    infinite = [name for name, value in metrics.items() if not math.isfinite(value)]
    if infinite:
        raise DivergedError(
            f"training diverged: validation {', '.join(infinite)} is not finite; "
            "lower train.learning_rate"
        )
    return metrics


def _sums(network: Network, samples: EncodedRows, draws: int, generator: torch.Generator) -> Tensor:
    """(3,) float64 sums of METRICS over this rank's share of a block. All ranks make the draws of
    the whole block, so that their number changes none."""
    rank, size = distributed.rank(), distributed.size()
    rows, weight = share_of(len(samples.observed), rank, size)
    prior = network.joint_prior(samples.metadata, samples.index)
    effects = network.target_effect(samples.metadata["perturbation"])
    effect = effects[samples.index["perturbation"]]
    source = torch.full_like(samples.target_gene[:, 0], LatentSource.PRIOR)
    inputs = DecoderInput(prior, samples.target_gene, effect, source)
    observed, totals = samples.observed.rows(rows), samples.totals[rows]
    score, decoded = predictive_log_likelihood(network, observed, inputs, draws, generator, rows)
    mean = network.observation.expected_log_cpm(decoded, totals, LatentSource.PRIOR)
    batch = replace(_batch(network, samples, generator), observed=observed)
    share = Share.of(batch, rank, size).batch
    terms = objective_terms(network, share)
    # The unweighted bound E_q[log p(x | z)] - KL, one posterior draw per sample.
    bound = -terms["nll_reconstruction"] - sum(terms[f"kl_{group}"].sum() for group in GROUPS)
    error = (mean - observed.expression).square().mean()
    number = weight * len(samples.observed) / size
    return torch.stack([score.mean(), bound, error]).double() * number


def posterior_terms(
    network: Network, samples: EncodedRows, generator: torch.Generator
) -> dict[str, Tensor]:
    """The objective's terms without references and masked metadata, with one posterior draw per
    sample."""
    return objective_terms(network, _batch(network, samples, generator))


def _batch(network: Network, samples: EncodedRows, generator: torch.Generator) -> Batch:
    empty = samples.observed.expression[:0]
    return Batch(
        samples.observed,
        samples.metadata,
        samples.index,
        samples.target_gene,
        samples.labels,
        LatentNoise.draw(network, len(samples.observed), generator),
        reference=empty,
        batch_effect=empty,
        unseen_study=samples.metadata["technical"].none(),
        partial_metadata={},
    )


@torch.no_grad()
def posterior_means(network: Network, split: EncodedSplit) -> Tensor:
    """(N, L) mean latents of all samples of a split."""
    blocks = (observed.expression for _, observed in split.expression.blocks())
    return torch.cat([network.posterior(expression).mean for expression in blocks])
