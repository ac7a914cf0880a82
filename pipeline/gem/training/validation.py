"""Metrics of the selection split that compare across settings: unweighted, and with the same draws
for every epoch and every fit. Nats per sample."""

import math

import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS
from pipeline.gem.common.errors import DivergedError
from pipeline.gem.model.network import Network
from pipeline.gem.model.objective import Batch, LatentNoise, objective_terms
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.model.predictive import predictive_log_likelihood
from pipeline.gem.model.query import DecoderInput
from pipeline.gem.training.dataset import EncodedSplit

_SEED = 0  # of the prior draws
METRICS = ("predictive_log_likelihood", "evidence_lower_bound", "mse")


@torch.no_grad()
def validation_metrics(network: Network, split: EncodedSplit, draws: int) -> dict[str, float]:
    """METRICS of a split; `mse` is that of the mean prediction, log-CPM squared.

    DivergedError if one is not finite.
    """
    network.eval()
    generator = torch.Generator(split.expression.device).manual_seed(_SEED)
    prior = network.joint_prior(split.metadata, split.index)
    effects = network.target_effect(split.metadata["perturbation"])
    effect = effects[split.index["perturbation"]]
    source = torch.full_like(split.target_gene, LatentSource.PRIOR)
    inputs = DecoderInput(prior, split.target_gene, effect, source)
    score, decoded = predictive_log_likelihood(network, split.observed, inputs, draws, generator)
    mean = network.observation.expected_log_cpm(decoded, split.totals, LatentSource.PRIOR)
    values = (
        float(score.mean()),
        evidence_lower_bound(network, split, generator),
        float((mean - split.expression).square().mean()),
    )
    metrics = dict(zip(METRICS, values, strict=True))
    infinite = [name for name, value in metrics.items() if not math.isfinite(value)]
    if infinite:
        raise DivergedError(
            f"training diverged: validation {', '.join(infinite)} is not finite; "
            "lower train.learning_rate"
        )
    return metrics


@torch.no_grad()
def evidence_lower_bound(
    network: Network, split: EncodedSplit, generator: torch.Generator
) -> float:
    """The unweighted bound E_q[log p(x | z)] - KL, one posterior draw per sample, mean over
    samples."""
    terms = posterior_terms(network, split, generator)
    return float(-terms["nll_reconstruction"] - sum(terms[f"kl_{group}"].sum() for group in GROUPS))


def posterior_terms(
    network: Network, split: EncodedSplit, generator: torch.Generator
) -> dict[str, Tensor]:
    """The objective's terms without references and masked metadata, with one posterior draw per
    sample."""
    empty = split.expression[:0]
    batch = Batch(
        split.observed,
        split.metadata,
        split.index,
        split.target_gene,
        split.labels,
        LatentNoise.draw(network, len(split.observed), generator),
        reference=empty,
        batch_effect=empty,
        unseen_study=split.metadata["technical"][:0],
        partial_metadata={},
    )
    return objective_terms(network, batch)
