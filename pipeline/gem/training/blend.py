"""The average of the network and a linear mixed model, as the prediction from metadata.

    prediction = weight * network + (1 - weight) * mixed model

The network learns what is not additive, and needs many samples for it. The mixed model shrinks the
effects of few samples as far as their variances demand. The weight is that with the least squared
error on the selection split. Its conditions are a sample of those to come: with C of them the
weight shrinks towards the mixed model by C / (C + PRIOR_CONDITIONS). Samples at random, whose
conditions training has, are weak evidence for new conditions: then the weight is the smallest one
whose error exceeds the least by no more than its standard error over conditions (the rule of
Breiman et al., 1984), and half of it. Without a selection split there is no evidence for the
network, and the weight is 0.

Afterwards the effects of the mixed model are fitted again, with the validation samples given back:
those of the selection split, and those at random.

A Normal averages log-CPM. A model of counts averages logits of gene fractions: its mixed model is
fitted to the counts of all samples with equal metadata together, because the mean log-CPM of cells
depends on their depth.

N samples of U distinct metadata rows, G genes.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipeline.gem.common.config import GROUPS
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import EncodedGroup, MetadataEncoder, joined_rows
from pipeline.gem.data.expression import CPM
from pipeline.gem.data.splits import SELECTION_SPLITS
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.mixed.fit import MixedFit, MixedSamples
from pipeline.gem.model.mixed.mixed_model import MixedModel
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.training.dataset import EncodedRows, EncodedSplit, TrainingData
from pipeline.gem.training.expression import open_expression
from pipeline.gem.training.trainer import FitResult

log = logging.getLogger(__name__)

PRIOR_CONDITIONS = 2.0
RANDOM_EVIDENCE = 0.5
WEIGHTS, WEIGHT_SAMPLES = 21, 1024  # candidates, and samples that decide
PRIOR_COUNTS = 0.5
_POOLED = 2**27  # values


def blend_with_mixed_model(
    fits: list[FitResult], data: TrainingData, cohort: Cohort
) -> list[FitResult]:
    """The fits of one data set with their models blended; unchanged if `model.mixed_model` is
    false."""
    if not fits[0].gem.params.mixed_model:
        return fits
    # On one thread: the bits do not depend on the cores of the machine.
    with threadpool_limits(1):
        return _blend(fits, data, cohort)


def _blend(fits: list[FitResult], data: TrainingData, cohort: Cohort) -> list[FitResult]:
    splits = [data.train, *_validation_splits(data, cohort)]
    samples = mixed_samples(splits, data.encoder, fits[0].gem.params.uses_counts)
    if samples is None:
        log.info("train: too many distinct metadata to pool their counts: the network alone")
        return fits
    variances = MixedFit.of(data.encoder, cohort.declared, samples[0], len(data.genes))
    mixed = variances.model(data.encoder, samples[:1])
    weights = [0.0] * len(fits)
    if data.validation is not None:
        at_random = data.selection_split != SELECTION_SPLITS[0]
        weights = [network_weight(fit.gem, mixed, data.validation, at_random) for fit in fits]
    log.info(
        "train: weight of the network beside the mixed model: %s",
        ", ".join(f"{weight:.2f}" for weight in weights),
    )
    final = variances.model(data.encoder, samples)
    for fit, weight in zip(fits, weights, strict=True):
        fit.gem.network.observation.blend_variance(mixed.variance, weight)
    return [
        replace(fit, gem=replace(fit.gem, mixed=final, network_weight=weight))
        for fit, weight in zip(fits, weights, strict=True)
    ]


def _validation_splits(data: TrainingData, cohort: Cohort) -> list[EncodedSplit]:
    """Those of SELECTION_SPLITS that the cohort has. All but the selection split are streamed."""
    splits, device = [], data.train.expression.device
    for name in filter(cohort.has, SELECTION_SPLITS):
        if name == data.selection_split:
            splits.append(data.validation)
        else:
            with_counts = data.train.expression.with_counts
            expression = open_expression(cohort, name, device, with_counts, 0.0)
            splits.append(EncodedSplit.load(cohort, name, data.encoder, expression))
    return splits


def mixed_samples(
    splits: list[EncodedSplit], encoder: MetadataEncoder, pooled: bool
) -> list[MixedSamples] | None:
    """The samples of each split as the mixed model reads them. `pooled`: the counts of a metadata
    row together; None if they do not fit into memory."""
    if not pooled:
        return [_samples(split, encoder) for split in splits]
    rows = [joined_rows(_encoded(split, encoder)) for split in splits]
    if sum(len(distinct.indptr) for distinct, _ in rows) * splits[0].expression.genes > _POOLED:
        return None
    counts = [
        _pooled_counts(split, index, distinct.shape[0])
        for split, (distinct, index) in zip(splits, rows, strict=True)
    ]
    fractions = counts[0].sum(axis=0) / counts[0].sum()
    library = counts[0].sum() / len(splits[0])
    of_sample = fractions.clip(1e-9) * library
    # How much the expected log-CPM of a sample follows the logarithm of its expected count.
    weights = (of_sample / (1 + of_sample)) ** 2
    # Of a Poisson count's logarithm, in classes: the genes of one share their equations.
    noise = np.exp2(np.round(-np.log2(of_sample)))
    return [
        _pooled(distinct, of_rows, fractions, library, weights, noise)
        for (distinct, _), of_rows in zip(rows, counts, strict=True)
    ]


def _samples(split: EncodedSplit, encoder: MetadataEncoder) -> MixedSamples:
    def blocks() -> Iterator[tuple[np.ndarray, Tensor]]:
        for rows, observed in split.expression.blocks():
            yield rows.cpu().numpy(), observed.expression.cpu()

    distinct, index = joined_rows(_encoded(split, encoder))
    numbers = np.bincount(index, minlength=distinct.shape[0])
    genes = split.expression.genes
    return MixedSamples(distinct, index, blocks, numbers, np.ones(genes), np.zeros(genes))


def _pooled_counts(split: EncodedSplit, index: np.ndarray, rows: int) -> np.ndarray:
    """(rows, G) sums of counts"""
    sums = np.zeros((rows, split.expression.genes))
    for chosen, observed in split.expression.blocks():
        np.add.at(sums, index[chosen.cpu().numpy()], observed.counts.double().cpu().numpy())
    return sums


def _pooled(
    rows: csr_array,
    counts: np.ndarray,
    fractions: np.ndarray,
    library: float,
    gene_weights: np.ndarray,
    gene_noise: np.ndarray,
) -> MixedSamples:
    """One entry per row: the logarithm of its fractions of counts (U, G) per million. They shrink
    towards the `fractions` (G,) of all, as if a mean gene had PRIOR_COUNTS more. A row counts as
    many samples as there are libraries of the mean size in it."""
    genes, totals = len(fractions), counts.sum(axis=1)
    prior = PRIOR_COUNTS * genes * fractions.clip(1e-9)
    values = np.log((counts + prior) / (totals + prior.sum())[:, None] * CPM)

    def blocks() -> Iterator[tuple[np.ndarray, Tensor]]:
        yield np.arange(len(values)), torch.from_numpy(values)

    numbers = (totals / library).clip(1e-3)
    return MixedSamples(rows, np.arange(len(values)), blocks, numbers, gene_weights, gene_noise)


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
def network_weight(
    gem: TrainedGEM, mixed: MixedModel, split: EncodedSplit, at_random: bool
) -> float:
    """In [0, 1]: of the network's mean prediction, shrunk by the number of conditions. `at_random`:
    the split has samples at random, whose conditions training has."""
    observation, grid = gem.network.observation, np.linspace(0, 1, WEIGHTS)
    pairs = torch.stack([split.index[group] for group in GROUPS[1:]], dim=1)
    condition = torch.unique(pairs, dim=0, return_inverse=True)[1].cpu().numpy()
    errors, number = np.zeros((condition.max() + 1, WEIGHTS)), 0
    for samples in split.blocks():
        rows, index = joined_rows(_encoded(samples, gem.metadata))
        linear = mixed.predict(mixed.rows(gem.metadata, rows))[torch.from_numpy(index)]
        linear = linear.to(gem.device)
        network = _network_mean(gem, samples)
        own = condition[number : number + len(samples.totals)]
        for place, weight in enumerate(grid):
            decoded = torch.lerp(linear, network, float(weight))
            mean = observation.expected_log_cpm(decoded, samples.totals, LatentSource.PRIOR)
            error = (mean - samples.observed.expression).double().square().sum(dim=1)
            np.add.at(errors[:, place], own, error.cpu().numpy())
        number += len(samples.totals)
        if number >= WEIGHT_SAMPLES:  # the samples of a cohort lie in random order
            break
    shrinkage = len(errors) / (len(errors) + PRIOR_CONDITIONS)
    errors = errors[np.unique(condition[:number])]
    if at_random:
        return float(RANDOM_EVIDENCE * grid[smallest_weight(errors)] * shrinkage)
    return float(grid[errors.sum(axis=0).argmin()] * shrinkage)


def smallest_weight(errors: np.ndarray) -> int:
    """Position of the first of W increasing weights whose error, of errors (C, W) by condition, is
    within one standard error of the least: that of their difference, paired over conditions. With
    one condition nothing is known of it, and the first weight is chosen."""
    more = errors - errors[:, [errors.sum(axis=0).argmin()]]
    if len(errors) < 2:
        return 0
    deviation = np.sqrt(len(errors) * more.var(axis=0, ddof=1))
    return int(np.argmax(more.sum(axis=0) <= deviation))


def _network_mean(gem: TrainedGEM, samples: EncodedRows) -> Tensor:
    """(B, G) decoded from the mean of the prior."""
    network = gem.network
    prior = network.joint_prior(samples.metadata, samples.index)
    effect = network.target_effect(samples.metadata["perturbation"])
    effect = effect[samples.index["perturbation"]]
    return network.add_target_effect(network.decode(prior.mean), samples.target_gene, effect)
