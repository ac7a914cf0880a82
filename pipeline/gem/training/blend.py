"""The average of the network and a linear mixed model, as the prediction from metadata.

    prediction = weight * network + (1 - weight) * mixed model

The network learns what is not additive, and needs many samples for it. The mixed model shrinks the
effects of few samples as far as their variances demand. The weight is that with the least squared
error on the selection split. Its conditions are a sample of those to come: with C of them the
weight shrinks towards the mixed model by C / (C + PRIOR_CONDITIONS). Samples at random, whose
conditions training has, are weak evidence for new conditions: then the weight is the smallest one
whose error exceeds the least by no more than its standard error over conditions (the rule of
Breiman et al., 1984), and shrinks by C / (C + PRIOR_KNOWN_CONDITIONS). Without a selection split
there is no evidence for the network, and the weight is 0.

The weight is chosen with a network and a mixed model of the training split. After a refit the
average is that of the network and of a mixed model of all samples outside the test.

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
from pipeline.gem.data.splits import SELECTION_SPLITS, VISIBLE
from pipeline.gem.model.gem import TrainedGEM
from pipeline.gem.model.mixed.fit import MixedFit, MixedSamples
from pipeline.gem.model.mixed.mixed_model import MixedModel
from pipeline.gem.model.observation import LatentSource
from pipeline.gem.training.dataset import EncodedRows, EncodedSplit, TrainingData
from pipeline.gem.training.expression import Expression, open_expression
from pipeline.gem.training.trainer import FitResult

log = logging.getLogger(__name__)

PRIOR_CONDITIONS, PRIOR_KNOWN_CONDITIONS = 2.0, 32.0
WEIGHTS, WEIGHT_SAMPLES = 21, 1024  # candidates, and samples that decide
PRIOR_COUNTS = 0.5
_POOLED = 2**27  # values


def blend_with_mixed_model(
    fits: list[FitResult], data: TrainingData, cohort: Cohort
) -> list[FitResult]:
    """The fits of one data set, each with its last model, blended unless `model.mixed_model` is
    false."""
    if not fits[0].gem.params.mixed_model:
        return [replace(fit, gem=_latest(fit)) for fit in fits]
    # On one thread: the bits do not depend on the cores of the machine.
    with threadpool_limits(1):
        return _blend(fits, data, cohort)


def _latest(fit: FitResult) -> TrainedGEM:
    return fit.refit.gem if fit.refit else fit.gem


def _blend(fits: list[FitResult], data: TrainingData, cohort: Cohort) -> list[FitResult]:
    pooled, gems = fits[0].gem.params.uses_counts, [_latest(fit) for fit in fits]
    mixed = fit_mixed_model(cohort, data.train, data.encoder, pooled)
    weights = [0.0] * len(fits)
    if mixed and data.validation is not None:
        at_random = data.selection_split != SELECTION_SPLITS[0]
        weights = [network_weight(fit.gem, mixed, data.validation, at_random) for fit in fits]
    if mixed and fits[0].refit:
        visible = _visible(cohort, gems[0].metadata, data.train.expression)
        mixed = fit_mixed_model(cohort, visible, gems[0].metadata, pooled)
    if mixed is None:
        log.info("train: too many distinct metadata to pool their counts: the network alone")
        return [replace(fit, gem=gem) for fit, gem in zip(fits, gems, strict=True)]
    log.info(
        "train: weight of the network beside the mixed model: %s",
        ", ".join(f"{weight:.2f}" for weight in weights),
    )
    for gem, weight in zip(gems, weights, strict=True):
        gem.network.observation.blend_variance(mixed.variance, weight)
    return [
        replace(fit, gem=replace(gem, mixed=mixed, network_weight=weight))
        for fit, gem, weight in zip(fits, gems, weights, strict=True)
    ]


def _visible(cohort: Cohort, encoder: MetadataEncoder, like: Expression) -> EncodedSplit:
    """All samples outside the test, streamed."""
    expression = open_expression(cohort, VISIBLE, like.device, like.with_counts, memory=0.0)
    return EncodedSplit.load(cohort, encoder, expression)


def fit_mixed_model(
    cohort: Cohort, split: EncodedSplit, encoder: MetadataEncoder, pooled: bool
) -> MixedModel | None:
    """Of the samples of `split`. `pooled`: of the counts of each metadata row together; None if
    they do not fit into memory."""
    samples = _pooled_samples(split, encoder) if pooled else _samples(split, encoder)
    if samples is None:
        return None
    genes = split.expression.genes
    return MixedFit.of(encoder, cohort.declared, samples, genes).model(encoder, samples)


def _pooled_samples(split: EncodedSplit, encoder: MetadataEncoder) -> MixedSamples | None:
    rows, index = joined_rows(_encoded(split, encoder))
    if rows.shape[0] * split.expression.genes > _POOLED:
        return None
    counts = _pooled_counts(split, index, rows.shape[0])
    fractions = counts.sum(axis=0) / counts.sum()
    library = counts.sum() / len(split)
    of_sample = fractions.clip(1e-9) * library
    # How much the expected log-CPM of a sample follows the logarithm of its expected count.
    weights = (of_sample / (1 + of_sample)) ** 2
    # Of a Poisson count's logarithm, in classes: the genes of one share their equations.
    noise = np.exp2(np.round(-np.log2(of_sample)))
    return _pooled(rows, counts, fractions, library, weights, noise)


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
    prior = PRIOR_KNOWN_CONDITIONS if at_random else PRIOR_CONDITIONS
    shrinkage = len(errors) / (len(errors) + prior)
    errors = errors[np.unique(condition[:number])]
    best = smallest_weight(errors) if at_random else errors.sum(axis=0).argmin()
    return float(grid[best] * shrinkage)


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
