"""The average of the network and a linear mixed model, as the prediction from metadata.

    prediction = weight * network + (1 - weight) * mixed model

The network learns what is not additive, and needs many samples for it. The mixed model shrinks the
effects of few samples as far as their variances demand. The weight is that with the least squared
error on the selection split. Its conditions are a sample of those to come: with C of them the
weight shrinks towards the mixed model by C / (C + PRIOR_CONDITIONS). Without a selection split
there is no evidence for the network, and the weight is 0.

Afterwards the effects of the mixed model are fitted again, on the training and the selection split.

N samples, G genes.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Data
from pipeline.gem.data.encoder import EncodedGroup, MetadataEncoder, joined_rows
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.mixed.mixed_model import MixedModel, MixedSamples
from pipeline.gem.training.dataset import EncodedRows, EncodedSplit, TrainingData
from pipeline.gem.training.trainer import FitResult

log = logging.getLogger(__name__)

PRIOR_CONDITIONS = 2.0


def blend_with_mixed_model(
    fits: list[FitResult], data: TrainingData, declared: Data
) -> list[FitResult]:
    """The fits with their models blended. Models of counts stay as they are: their decoded values
    are no log-CPM."""
    if any(fit.gem.params.uses_counts for fit in fits):
        return fits
    train = mixed_samples(data.train, data.encoder)
    mixed = MixedModel.fit(data.encoder, declared, train, len(data.genes))
    splits, weights = [train], [0.0] * len(fits)
    if data.validation is not None:
        splits.append(mixed_samples(data.validation, data.encoder))
        weights = [network_weight(fit.gem, mixed, data.validation) for fit in fits]
    log.info(
        "train: weight of the network beside the mixed model: %s",
        ", ".join(f"{weight:.2f}" for weight in weights),
    )
    final = mixed.refit(data.encoder, splits)
    for fit, weight in zip(fits, weights, strict=True):
        fit.gem.network.observation.blend_variance(mixed.variance, weight)
    return [
        replace(fit, gem=replace(fit.gem, mixed=final, network_weight=weight))
        for fit, weight in zip(fits, weights, strict=True)
    ]


def mixed_samples(split: EncodedSplit, encoder: MetadataEncoder) -> MixedSamples:
    """The samples of a split as the mixed model reads them."""

    def blocks() -> Iterator[tuple[np.ndarray, Tensor]]:
        for rows, observed in split.expression.blocks():
            yield rows.cpu().numpy(), observed.expression.cpu()

    return MixedSamples(*joined_rows(_encoded(split, encoder)), blocks)


def _encoded(
    split: EncodedSplit | EncodedRows, encoder: MetadataEncoder
) -> dict[str, EncodedGroup]:
    encoded = {}
    for group in GROUPS:
        columns = encoder.columns(group)
        width = columns[-1].features.stop if columns else 0
        distinct = split.metadata[group].to_sparse(width)
        encoded[group] = EncodedGroup(distinct, split.index[group].cpu().numpy())
    return encoded


@torch.no_grad()
def network_weight(gem: TrainedGEM, mixed: MixedModel, split: EncodedSplit) -> float:
    """In [0, 1]: of the network's mean prediction, shrunk by the number of conditions."""
    numerator = denominator = 0.0
    for samples in split.blocks():
        rows, index = joined_rows(_encoded(samples, gem.metadata))
        linear = mixed.predict(mixed.rows(gem.metadata, rows))[torch.from_numpy(index)]
        linear = linear.to(gem.device)
        difference = _network_mean(gem, samples) - linear
        numerator += float((difference * (samples.observed.expression - linear)).double().sum())
        denominator += float(difference.double().square().sum())
    if denominator == 0:
        return 0.0
    pairs = torch.stack([split.index[group] for group in GROUPS[1:]], dim=1)
    conditions = len(torch.unique(pairs, dim=0))
    best = min(1.0, max(0.0, numerator / denominator))
    return best * conditions / (conditions + PRIOR_CONDITIONS)


def _network_mean(gem: TrainedGEM, samples: EncodedRows) -> Tensor:
    """(B, G) decoded from the mean of the prior."""
    network = gem.network
    prior = network.joint_prior(samples.metadata, samples.index)
    effect = network.target_effect(samples.metadata["perturbation"])
    effect = effect[samples.index["perturbation"]]
    return network.add_target_effect(network.decode(prior.mean), samples.target_gene, effect)
