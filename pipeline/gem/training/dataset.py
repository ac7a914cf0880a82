"""The training and validation samples of a cohort as tensors, loaded and encoded once.

N samples, G genes. Expression is log-CPM.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.gem.common.config import Data, Params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder, distinct_rows
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.labels import LabelForm
from pipeline.gem.data.references import SampleGroups, matching_controls
from pipeline.gem.data.splits import SELECTION_SPLITS, TRAIN
from pipeline.gem.model.observation import Observed
from pipeline.gem.model.query import TargetGenes
from pipeline.gem.model.training_support import TrainingSupport

_TECHNICAL_LATENTS = (64, 512)  # bounds of their number where params.yaml leaves it open


@dataclass(frozen=True)
class EncodedSplit:
    """The samples of one split."""

    observed: Observed
    metadata: dict[str, Tensor]  # by group: distinct encoded rows
    index: dict[str, Tensor]  # by group: (N,) row of `metadata`
    labels: Tensor  # (N, heads) class index, -1 missing
    target_gene: Tensor  # (N,) position of the perturbation's own target gene, -1 without
    totals: Tensor  # (N,) counts

    @property
    def expression(self) -> Tensor:
        """(N, G)"""
        return self.observed.expression

    @classmethod
    def load(
        cls,
        cohort: Cohort,
        split: str,
        encoder: MetadataEncoder,
        device: torch.device,
        with_counts: bool = False,
    ) -> "EncodedSplit":
        """`with_counts`: also the integer counts, for observation models of counts."""

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        samples, counts = cohort.rows([split]), cohort.counts([split])
        totals = samples["total"].to_numpy()
        integers = tensor(counts.astype(np.int32)) if with_counts else None
        observed = Observed(tensor(log_cpm(counts, totals)), integers)
        metadata, index = {}, {}
        for group, matrix in encoder.encode(samples, unknown="missing").items():
            first, inverse = distinct_rows(matrix)
            metadata[group], index[group] = tensor(matrix[first]), tensor(inverse)
        columns = list(encoder.labels(samples).values())
        no_labels = np.zeros((len(samples), 0), dtype=np.int64)
        labels = np.stack(columns, axis=1) if columns else no_labels
        target_gene = TargetGenes.from_cohort(cohort).positions(samples)
        return cls(observed, metadata, index, tensor(labels), tensor(target_gene), tensor(totals))


@dataclass(frozen=True)
class TrainingData:
    """The inputs of a fit; shared by all fits of a process."""

    encoder: MetadataEncoder
    genes: np.ndarray  # (G,) gene ids
    targets: TargetGenes
    training_support: TrainingSupport
    label_form: LabelForm
    train: EncodedSplit
    references: "References"
    study_spread: Tensor  # (G,), see `study_spread`
    study_column: str | None
    validation: EncodedSplit | None  # the selection split
    selection_split: str | None  # for early stopping and model selection

    @classmethod
    def load(
        cls, cohort: Cohort, device: torch.device, with_counts: bool = False
    ) -> "TrainingData":
        """`with_counts` as in EncodedSplit.load."""
        samples, declared = cohort.rows([TRAIN]), cohort.declared
        encoder = MetadataEncoder.fit(samples, declared.covariates, cohort.features)
        train = EncodedSplit.load(cohort, TRAIN, encoder, device, with_counts)
        selection_split = next((split for split in SELECTION_SPLITS if cohort.has(split)), None)
        validation = None
        if selection_split:
            validation = EncodedSplit.load(cohort, selection_split, encoder, device, with_counts)
        spread = study_spread(samples, train.expression.cpu().numpy(), declared)
        return cls(
            encoder=encoder,
            genes=cohort.genes,
            targets=TargetGenes.from_cohort(cohort),
            training_support=TrainingSupport.from_samples(samples, declared),
            label_form=LabelForm.of(declared),
            train=train,
            references=References.from_samples(samples, declared, device),
            study_spread=torch.from_numpy(spread).to(device),
            study_column=declared.study_column,
            validation=validation,
            selection_split=selection_split,
        )

    def resolve_latent_sizes(self, params: Params) -> Params:
        """Sets the number of technical latents, where `params` leaves it open, to the number of
        encoded technical columns.

        Effects of studies are dense and unrelated: fewer latents than studies cannot hold them all.
        """
        if params.model.latent.technical is not None:
            return params
        lower, upper = _TECHNICAL_LATENTS
        size = min(max(self.encoder.sizes["technical"], lower), upper)
        return params.override({"model.latent.technical": size})


def study_spread(samples: pd.DataFrame, expression: np.ndarray, data: Data) -> np.ndarray:
    """(G,) float32 standard deviation of study means around their context's mean, from controls
    (N, G); log-CPM. From all samples if there are no controls. Zero if no context has two studies.
    """
    control = SampleGroups(samples, data).control.to_numpy()
    if control.any():
        samples, expression = samples[control], expression[control]
    if data.study_column is None:
        return np.zeros(expression.shape[1], dtype=np.float32)
    groups, levels = SampleGroups(samples, data), ["context", "study"]
    keys = pd.MultiIndex.from_arrays([groups.context, groups.study], names=levels)
    means = pd.DataFrame(expression, index=keys).groupby(level=levels).mean()
    deviations = means - means.groupby(level="context").transform("mean")
    freedom = len(means) - means.index.get_level_values("context").nunique()
    if freedom < 1:
        return np.zeros(expression.shape[1], dtype=np.float32)
    return np.sqrt((deviations**2).sum(axis=0).to_numpy() / freedom).astype(np.float32)


@dataclass(frozen=True)
class References:
    """The best matching controls of each training sample i: `rows[start[i] : start[i] + size[i]]`.

    A sample without another matching control is its own reference.
    """

    rows: Tensor
    start: Tensor  # (N,)
    size: Tensor  # (N,)

    @classmethod
    def from_samples(cls, samples: pd.DataFrame, data: Data, device: torch.device) -> "References":
        matches = matching_controls(samples, samples, data, same=True)
        lists = [rows if len(rows) else np.array([row]) for row, rows in enumerate(matches)]
        sizes = np.array([len(rows) for rows in lists])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        arrays = np.concatenate(lists), starts, sizes
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def draw(self, samples: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) row of a random reference for each of the sample rows (B,)."""
        uniform = torch.rand(len(samples), generator=generator, device=samples.device)
        size = self.size[samples]
        return self.rows[self.start[samples] + torch.minimum((uniform * size).long(), size - 1)]
