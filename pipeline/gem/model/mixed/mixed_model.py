"""A linear mixed model of log-CPM on metadata: its effects, and its prediction.

    y_ng = mu_g + sum over columns d of z_nd b_dg + row effect + noise,  b_dg ~ Normal(0, v_term(d))

`fit.py` estimates it. U distinct metadata rows, C columns of the encoded metadata, D of the design,
G genes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.mixed.terms import Design

MIXED_TENSORS = ("intercept", "coefficients", "variance")  # of a model


@dataclass(frozen=True)
class Variances:
    """Of the effects on a class of genes, log-CPM squared."""

    terms: tuple[float, ...]  # of the design
    row: float  # of a metadata row
    noise: float  # of a sample within its row

    def deviations(self, design: Design) -> np.ndarray:
        """(D,) standard deviation of the effect of each column."""
        sizes = [len(term.columns) for term in design.terms]
        return np.sqrt(np.repeat(self.terms, sizes))

    def problems(self, design: Design) -> list[str]:
        """What contradicts the terms of the design."""
        values = [*self.terms, self.row, self.noise]
        if len(self.terms) != len(design.terms):
            return [f"variances of {len(self.terms)} terms, expected {len(design.terms)}"]
        if not all(0 <= value < np.inf for value in values):
            return ["variances that are negative or not finite"]
        return []


@dataclass(frozen=True)
class MixedModel:
    """Predictions of log-CPM from metadata."""

    design: Design
    variances: tuple[Variances, ...]  # of each class of genes
    intercept: Tensor  # (G,)
    coefficients: Tensor  # (D, G)
    variance: Tensor  # (G,) of samples of a new metadata row around the prediction

    def rows(self, encoder: MetadataEncoder, metadata: csr_array) -> MetadataRows:
        """The design of encoded metadata (U, C), as `predict` takes it."""
        matrix = self.design.matrix(encoder, metadata)
        return MetadataRows.from_sparse(matrix, self.coefficients.device)

    def predict(self, rows: MetadataRows) -> Tensor:
        """(U, G) log-CPM"""
        if not len(self.coefficients):
            return self.intercept.expand(len(rows), -1)
        effects = F.embedding_bag(
            rows.columns,
            self.coefficients,
            rows.offsets,
            mode="sum",
            per_sample_weights=rows.values,
            include_last_offset=True,
        )
        return effects.add_(self.intercept)

    def mean_variances(self) -> Mapping[str, float]:
        """Of each term, of a metadata row and of noise: the mean over the classes of genes, which
        have equal sizes."""
        names = [*(term.name for term in self.design.terms), "metadata row", "noise"]
        values = [[*each.terms, each.row, each.noise] for each in self.variances]
        return dict(zip(names, np.mean(values, axis=0).tolist(), strict=True))
