"""The decoder's input for a query, and the decoding of latents drawn for it.

N samples, G genes, L latents. Expression is log-CPM.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.labels import SET_KINDS, label_texts, split_labels
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.mixed.mixed_model import MixedModel
from pipeline.gem.model.network import Gaussian, Network


@dataclass(frozen=True)
class TargetGenes:
    """The target genes of each perturbation: K of one at most."""

    column: str | None  # the covariate that names the perturbation
    genes: dict[str, tuple[int, ...]]  # perturbation to distinct positions among the genes
    sets: bool  # "a|b" has the targets of "a" and of "b"

    @classmethod
    def from_cohort(cls, cohort: Cohort) -> "TargetGenes":
        control = cohort.declared.control
        if control is None:
            return cls(None, {}, sets=False)
        positions = {gene: position for position, gene in enumerate(cohort.genes)}
        genes: dict[str, tuple[int, ...]] = {}
        for name, gene in cohort.targets.items():
            if gene in positions:
                genes[name] = (*genes.get(name, ()), positions[gene])
        covariate = cohort.declared.covariates.all().get(control.column)
        return cls(control.column, genes, covariate is not None and covariate.kind in SET_KINDS)

    def positions(self, samples: pd.DataFrame) -> np.ndarray:
        """(N, K) int64 positions of each sample's target genes; -1 after the last of them."""
        if self.column is None or self.column not in samples:
            return np.full((len(samples), 1), -1)
        code, names = pd.factorize(label_texts(samples[self.column]))
        targets = [self._of(name) for name in names]
        # A row more, for a missing perturbation: code -1.
        table = np.full((len(names) + 1, max(1, *map(len, targets), 1)), -1)
        for row, own in enumerate(targets):
            table[row, : len(own)] = own
        return table[code]

    def _of(self, perturbation: str) -> tuple[int, ...]:
        if perturbation in self.genes or not self.sets:
            return self.genes.get(perturbation, ())
        labels = split_labels(perturbation)
        found = (gene for label in labels for gene in self.genes.get(label, ()))
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class MixedQuery:
    """N samples as the mixed model predicts them."""

    model: MixedModel
    network_weight: float
    metadata: MetadataRows  # distinct rows of the model's design
    index: Tensor  # (N,) row of each sample

    def __getitem__(self, index: slice | Tensor) -> "MixedQuery":
        return replace(self, index=self.index[index])

    @cached_property
    def share(self) -> Tensor:
        """(N, G) the mixed model's part of the prediction, log-CPM."""
        # The mixed model may lie on the processor beside a network on a GPU.
        index = self.index.to(self.metadata.columns.device)
        rows, place = torch.unique(index, return_inverse=True)
        prediction = self.model.predict(self.metadata[rows])
        return prediction.mul_(1 - self.network_weight)[place].to(self.index.device)

    def blend(self, decoded: Tensor) -> Tensor:
        """The network's decoded values (N, G) and the mixed model's, averaged in place."""
        return decoded.mul_(self.network_weight).add_(self.share)


class DecoderInput(NamedTuple):
    """Everything that the decoder needs for N samples."""

    latents: Gaussian  # (N, L)
    target_gene: Tensor  # (N, K) positions of the perturbation's own target genes, -1 without
    target_effect: Tensor  # (N,) effect on each of these genes, log-CPM
    source: Tensor  # (N,) LatentSource, which decides the observation noise
    reference_residual: Tensor | None = None  # (N, G) to add to the decoded values, log-CPM
    # (N, 3) number of each group's distinct metadata; None if latents depend on a reference
    metadata_index: Tensor | None = None
    mixed: MixedQuery | None = None  # to average the decoded values with

    def rows(self, index: slice | Tensor) -> "DecoderInput":
        parts = (None if part is None else part[index] for part in self[1:])
        return DecoderInput(self.latents.rows(index), *parts)


def decode(network: Network, inputs: DecoderInput, latents: Tensor) -> Tensor:
    """(N, G) decoded from latents (N, L), with the offsets of `inputs`."""
    return add_offsets(network.decode(latents), inputs)


def add_offsets(
    decoded: Tensor, inputs: DecoderInput, rows: slice | Tensor = slice(None)
) -> Tensor:
    """Adds to decoded values (B, G) of B rows, in place, what does not depend on the latents: the
    effect on the target genes, the mixed model's prediction, and the reference's residual."""
    target_gene = inputs.target_gene[rows]
    samples, place = (target_gene >= 0).nonzero(as_tuple=True)
    decoded[samples, target_gene[samples, place]] += inputs.target_effect[rows][samples]
    if inputs.mixed is not None:
        whole = isinstance(rows, slice) and rows == slice(None)
        (inputs.mixed if whole else inputs.mixed[rows]).blend(decoded)
    if inputs.reference_residual is not None:
        decoded.add_(inputs.reference_residual[rows])
    return decoded
