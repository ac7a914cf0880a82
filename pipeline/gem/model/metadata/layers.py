"""The layers that read sparse metadata: their cost grows with entries, not with columns.

U rows, C columns, H outputs.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.data.encoder import field_columns
from pipeline.gem.model.metadata.rows import MetadataRows


class MetadataLinear(nn.Module):
    """nn.Linear on [values and levels | features of the labels], which are never written out.

    The features of a label are read from a table where they stand once, not from the row. Weights
    start with the distribution of nn.Linear.
    """

    def __init__(self, fields: Sequence[CovariateEncoder], outputs: int):
        super().__init__()
        columns = field_columns(fields)
        self.embeddings = [part for part in columns if part.field.features]
        self.own_columns = columns[-1].own.stop if columns else 0
        # Covariate and label of each row of `weight`; no label for the value of a number.
        self.rows = [
            (part.field.name, label)
            for part in columns
            for label in [*[None] * part.field.first_level, *part.field.levels]
        ]
        bound = 1 / math.sqrt(max(1, sum(field.inputs for field in fields)))

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        # Without covariates: a column of zeros.
        self.weight = parameter(max(1, self.own_columns), outputs)
        self.feature_weights = nn.ParameterList(
            parameter(part.field.features.size, outputs) for part in self.embeddings
        )
        self.bias = parameter(outputs)
        for number, part in enumerate(self.embeddings):
            values = torch.from_numpy(part.field.features.values)
            self.register_buffer(f"features_{number}", values, persistent=False)

    def forward(self, rows: MetadataRows) -> Tensor:
        """(U, H)"""
        if not self.embeddings:
            return _bag(self.weight, rows.columns, rows.values, rows.width) + self.bias
        is_own = rows.columns < self.own_columns
        columns = rows.columns.clamp_max(len(self.weight) - 1)
        output = _bag(self.weight, columns, rows.values * is_own, rows.width) + self.bias
        for number, part in enumerate(self.embeddings):
            label = rows.columns - part.features.start
            table = self.get_buffer(f"features_{number}")
            is_label = (label >= 0) & (label < len(table))
            label = label.clamp(0, len(table) - 1)
            features = _bag(table, label, rows.values * is_label, rows.width)
            output = torch.addmm(output, features, self.feature_weights[number])
        return output


class LinearPrior(MetadataLinear):
    """A linear map of sparse one-hot rows. The gain compensates for weights that rarely have a
    gradient."""

    GAIN = 4.0

    def forward(self, rows: MetadataRows) -> Tensor:
        return super().forward(rows.scale(self.GAIN))


class TargetEffect(nn.Module):
    """The effect of a perturbation on each of its own target genes, from its type (knock-out,
    interference, activation, over-expression), dose and time."""

    WIDTH = 16

    def __init__(self, fields: Sequence[CovariateEncoder], intervention_columns: Sequence[bool]):
        """`intervention_columns` (C,) of the encoded perturbation; none of a covariate with
        features."""
        super().__init__()
        columns = torch.tensor(intervention_columns, dtype=torch.float32)
        self.register_buffer("columns", columns, persistent=False)
        self.widen = MetadataLinear([replace(field, features=None) for field in fields], self.WIDTH)
        self.narrow = nn.Linear(self.WIDTH, 1)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, rows: MetadataRows) -> Tensor:
        """(U,) log-CPM to add to the target genes, for encoded perturbations."""
        if len(self.columns):
            rows = rows.scale(self.columns[rows.columns])
        # The columns of features, which have the value 0 here, lie behind those of `widen`.
        rows = replace(rows, columns=rows.columns.clamp_max(len(self.widen.weight) - 1))
        return self.narrow(F.relu(self.widen(rows))).squeeze(1)


def _bag(weight: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """(U, H) sums of the rows of `weight` (C, H) at `columns` (U * K,), times `values`."""
    return F.embedding_bag(
        columns.view(-1, width),
        weight,
        mode="sum",
        per_sample_weights=values.view(-1, width).to(weight.dtype),
    )
