"""The decoder's input for a query, and the decoding of latents drawn for it.

N samples, G genes, L latents. Expression is log-CPM.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.labels import label_texts
from pipeline.gem.model.network import Gaussian, Network


@dataclass(frozen=True)
class TargetGenes:
    """The target gene of each genetic perturbation."""

    column: str | None  # the covariate that names the perturbation
    genes: dict[str, int]  # perturbation to position among the genes

    @classmethod
    def from_cohort(cls, cohort: Cohort) -> "TargetGenes":
        control = cohort.declared.control
        if control is None:
            return cls(None, {})
        positions = {gene: position for position, gene in enumerate(cohort.genes)}
        targets = cohort.targets.items()
        return cls(control.column, {name: positions[g] for name, g in targets if g in positions})

    def positions(self, samples: pd.DataFrame) -> np.ndarray:
        """(N,) int64 position of each sample's target gene, -1 without."""
        if self.column is None or self.column not in samples:
            return np.full(len(samples), -1)
        return label_texts(samples[self.column]).map(self.genes).fillna(-1).to_numpy(dtype=np.int64)


class DecoderInput(NamedTuple):
    """Everything that the decoder needs for N samples."""

    latents: Gaussian  # (N, L)
    target_gene: Tensor  # (N,) position of the perturbation's own target gene, -1 without
    target_effect: Tensor  # (N,) effect on that gene, log-CPM
    source: Tensor  # (N,) LatentSource, which decides the observation noise
    reference_residual: Tensor | None = None  # (N, G) to add to the decoded values, log-CPM
    # (N, 3) number of each group's distinct metadata; None if latents depend on a reference
    metadata_index: Tensor | None = None

    def rows(self, index: slice | Tensor) -> "DecoderInput":
        parts = (None if part is None else part[index] for part in self[1:])
        return DecoderInput(self.latents.rows(index), *parts)


def decode(network: Network, inputs: DecoderInput, latents: Tensor) -> Tensor:
    """(N, G) decoded from latents (N, L), with the offsets of `inputs`."""
    return add_offsets(network.decode(latents), inputs)


def add_offsets(
    decoded: Tensor, inputs: DecoderInput, rows: slice | Tensor = slice(None)
) -> Tensor:
    """Adds to decoded values (B, G) of B rows, in place, the effect on the target gene and the
    reference's residual, which do not depend on the latents."""
    target_gene = inputs.target_gene[rows]
    samples = (target_gene >= 0).nonzero().squeeze(1)
    decoded[samples, target_gene[samples]] += inputs.target_effect[rows][samples]
    if inputs.reference_residual is not None:
        decoded.add_(inputs.reference_residual[rows])
    return decoded
