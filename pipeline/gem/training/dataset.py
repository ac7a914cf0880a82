"""The training and validation samples of a cohort as tensors, loaded and encoded once.

N samples, B of a batch, G genes. Expression is log-CPM.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Data, Params
from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.labels import LabelForm
from pipeline.gem.data.references import ControlGroups, SampleGroups
from pipeline.gem.data.splits import SELECTION_SPLITS, TRAIN, VISIBLE
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.observation import GeneMoments, Observed
from pipeline.gem.model.query import TargetGenes
from pipeline.gem.model.training_support import TrainingSupport
from pipeline.gem.training.expression import Expression, open_expression

_SPREAD_VALUES = 2**22  # in float64, three times
_SPARSE_SAMPLES = 4096
_SPARSE_COUNT, _SHALLOW_COUNT = 5, 0.1  # a median below is sparse; a mean below is too shallow
_TECHNICAL_LATENTS = (64, 512)  # bounds of their number where params.yaml leaves it open


@dataclass(frozen=True)
class EncodedRows:
    """B samples of a split."""

    observed: Observed
    metadata: dict[str, MetadataRows]  # by group: distinct rows
    index: dict[str, Tensor]  # by group: (B,) row of `metadata`
    labels: Tensor  # (B, heads) class index, -1 missing
    target_gene: Tensor  # (B, K) positions of the perturbation's own target genes, -1 without
    totals: Tensor  # (B,) counts


@dataclass(frozen=True)
class EncodedSplit:
    """The N samples of some splits, in the order of the cohort. All but the expression is in
    memory.

    Fields as in EncodedRows.
    """

    expression: Expression
    metadata: dict[str, MetadataRows]
    index: dict[str, Tensor]
    labels: Tensor
    target_gene: Tensor
    totals: Tensor

    def __len__(self) -> int:
        return len(self.totals)

    def rows(self, rows: Tensor, observed: Observed) -> EncodedRows:
        """The samples of rows (B,), whose expression, or that of a rank's share, is `observed`."""
        metadata, index = {}, {}
        for group in GROUPS:
            distinct, index[group] = torch.unique(self.index[group][rows], return_inverse=True)
            metadata[group] = self.metadata[group][distinct]
        of_rows = (part[rows] for part in (self.labels, self.target_gene, self.totals))
        return EncodedRows(observed, metadata, index, *of_rows)

    def blocks(self) -> Iterator[EncodedRows]:
        """All samples in order, block after block."""
        for rows, observed in self.expression.blocks():
            yield self.rows(rows, observed)

    @classmethod
    def load(
        cls, cohort: Cohort, encoder: MetadataEncoder, expression: Expression
    ) -> "EncodedSplit":
        """The samples of `expression`."""

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(expression.device)

        samples = cohort.rows(expression.splits)
        metadata, index = {}, {}
        for group, rows in encoder.encode(samples, unknown="missing").items():
            metadata[group] = MetadataRows.from_sparse(rows.distinct, expression.device)
            index[group] = tensor(rows.index)
        columns = list(encoder.labels(samples).values())
        no_labels = np.zeros((len(samples), 0), dtype=np.int64)
        labels = np.stack(columns, axis=1) if columns else no_labels
        target_gene = TargetGenes.from_cohort(cohort).positions(samples)
        arrays = labels, target_gene, samples["total"].to_numpy()
        return cls(expression, metadata, index, *map(tensor, arrays))


@dataclass(frozen=True)
class TrainingData:
    """The inputs of a fit; shared by all fits of a process."""

    encoder: MetadataEncoder
    genes: np.ndarray  # (G,) gene ids
    targets: TargetGenes
    training_support: TrainingSupport
    label_form: LabelForm
    train: EncodedSplit
    moments: GeneMoments  # of the training samples
    references: "References"
    study_spread: Tensor  # (G,), see `study_spread`
    study_column: str | None
    validation: EncodedSplit | None = None  # the selection split
    selection_split: str | None = None  # for early stopping and model selection
    sparse_counts: bool = False
    refit: bool = False  # with the validation samples

    @classmethod
    def load(
        cls,
        cohort: Cohort,
        device: torch.device,
        with_counts: bool = False,
        memory: float = math.inf,
    ) -> "TrainingData":
        """The training split, and the split for model selection. `with_counts` as in Expression. A
        split whose counts do not fit in `memory` bytes, beside those of the splits before it, is
        streamed."""
        covariates = cohort.declared.covariates
        encoder = MetadataEncoder.fit(cohort.rows([TRAIN]), covariates, cohort.features)
        data = cls._of([TRAIN], cohort, encoder, device, with_counts, memory)
        selection_split = next((split for split in SELECTION_SPLITS if cohort.has(split)), None)
        if selection_split is None:
            return data
        left = memory - data.train.expression.resident_bytes
        expression = open_expression(cohort, [selection_split], device, with_counts, left)
        validation = EncodedSplit.load(cohort, encoder, expression)
        return replace(data, validation=validation, selection_split=selection_split)

    @classmethod
    def load_visible(
        cls,
        cohort: Cohort,
        encoder: MetadataEncoder,
        device: torch.device,
        with_counts: bool = False,
        memory: float = math.inf,
    ) -> "TrainingData":
        """All samples but those of the test, for training; nothing is left for model selection.
        `encoder` is that of the training split, which their labels extend."""
        extended = encoder.extended(cohort.rows(VISIBLE))
        data = cls._of(VISIBLE, cohort, extended, device, with_counts, memory)
        return replace(data, refit=True)

    @classmethod
    def _of(
        cls,
        splits: Sequence[str],
        cohort: Cohort,
        encoder: MetadataEncoder,
        device: torch.device,
        with_counts: bool,
        memory: float,
    ) -> "TrainingData":
        samples, declared = cohort.rows(splits), cohort.declared
        references = References.from_samples(samples, declared, device)
        controls = np.unique(references.rows.cpu().numpy())
        expression = open_expression(cohort, splits, device, with_counts, memory, controls)
        return cls(
            encoder=encoder,
            genes=cohort.genes,
            targets=TargetGenes.from_cohort(cohort),
            training_support=TrainingSupport.from_samples(encoder.without_rare(samples), declared),
            label_form=LabelForm.of(declared),
            train=EncodedSplit.load(cohort, encoder, expression),
            moments=expression.moments(),
            references=references,
            study_spread=study_spread(samples, expression, declared),
            study_column=declared.study_column,
            sparse_counts=has_sparse_counts(cohort),
        )

    def resolve(self, params: Params) -> Params:
        """Sets the observation model, and the number of technical latents to that of the inputs of
        the technical prior, where `params` leaves them open.

        Effects of studies are dense and unrelated: fewer latents than studies cannot hold them all.
        """
        params = _with_observation(params, self.sparse_counts)
        if params.model.latent.technical is not None:
            return params
        lower, upper = _TECHNICAL_LATENTS
        size = min(max(self.encoder.inputs["technical"], lower), upper)
        return params.override({"model.latent.technical": size})


def study_spread(samples: pd.DataFrame, expression: Expression, data: Data) -> Tensor:
    """(G,) standard deviation of study means around their context's mean, of the controls among the
    samples (N,) of `expression`; log-CPM. Of all samples if there are no controls. Zero if no
    context has two studies.

    Of more than _SPREAD_VALUES means of a study in a context, the first in the order of the cohort,
    which is random, are used.
    """
    spread = torch.zeros(expression.genes, device=expression.device)
    if data.study_column is None:
        return spread
    groups = SampleGroups(samples, data)
    used = groups.control.to_numpy()
    used = used if used.any() else ~used
    keys = pd.DataFrame({"context": groups.context, "study": groups.study})[used]
    pairs = keys.groupby(["context", "study"], sort=False).ngroup().to_numpy()
    number = min(pairs.max() + 1, max(2, _SPREAD_VALUES // expression.genes))
    pair_of, context_of = np.full(len(samples), -1), np.empty(number, dtype=np.int64)
    pair_of[used] = np.where(pairs < number, pairs, -1)
    contexts, _ = pd.factorize(keys["context"][pairs < number])
    context_of[pairs[pairs < number]] = contexts
    freedom = number - len(np.unique(context_of))
    if freedom < 1:
        return spread
    pair_of = torch.from_numpy(pair_of).to(expression.device)
    sums = torch.zeros(number, expression.genes, dtype=torch.float64, device=expression.device)
    for rows, observed in expression.blocks():
        pair = pair_of[rows]
        inside = pair >= 0
        sums.index_add_(0, pair[inside], observed.expression[inside].double())
    means = sums.div_(torch.bincount(pair_of[pair_of >= 0], minlength=number)[:, None])
    context_of = torch.from_numpy(context_of).to(expression.device)
    centres = torch.zeros_like(means).index_add_(0, context_of, means)
    centres /= torch.bincount(context_of, minlength=number)[:, None].clamp_min(1)
    return (means.sub_(centres[context_of]).square_().sum(0) / freedom).sqrt().float()


@dataclass(frozen=True)
class References:
    """The best matching controls of each of N training samples, as in ControlGroups.

    A sample without another matching control is its own reference.
    """

    rows: Tensor
    start: Tensor  # (N,)
    size: Tensor  # (N,)
    own: Tensor  # (N,)

    @classmethod
    def from_samples(cls, samples: pd.DataFrame, data: Data, device: torch.device) -> "References":
        arrays = ControlGroups.of(samples, data)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def draw(self, samples: Tensor, generator: torch.Generator) -> Tensor:
        """(B,) row of a random reference for each of the sample rows (B,)."""
        uniform = torch.rand(len(samples), generator=generator, device=samples.device)
        size = self.size[samples]
        position = torch.minimum((uniform * size).long(), size - 1)
        position += position >= self.own[samples]
        if not len(self.rows):
            return samples
        listed = self.rows[self.start[samples] + position.clamp_min(0)]
        return torch.where(size > 0, listed, samples)


def resolve_observation(params: Params, cohort: Cohort) -> Params:
    """Sets the observation model where `params` leaves it open."""
    return _with_observation(params, has_sparse_counts(cohort))


def _with_observation(params: Params, sparse: bool) -> Params:
    if params.model.observation != "auto":
        return params
    return params.override({"model.observation": "negative_binomial" if sparse else "normal"})


def has_sparse_counts(cohort: Cohort) -> bool:
    """Whether the first training samples, which are in random order, have small counts: the mean
    log-CPM of a gene then depends on the depth of its samples. Not if they have hardly any: then
    the logarithm of a fraction is not measured."""
    counts = next(cohort.blocks([TRAIN]))[:_SPARSE_SAMPLES]
    return bool(np.median(counts) < _SPARSE_COUNT and counts.mean() >= _SHALLOW_COUNT)
