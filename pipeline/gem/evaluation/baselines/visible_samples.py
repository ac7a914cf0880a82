"""What predictors and metrics need of the samples outside the test, from one pass over their
counts.

The training split comes first: what is selected follows from its sums alone. The sums then go on
with the validation splits. Memory grows with levels, groups of samples and genes, not with samples.

N visible samples, M of them kept, G genes, K leading axes. Expression is log-CPM.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.splits import TRAIN, VALIDATIONS, VISIBLE
from pipeline.gem.evaluation.baselines.profiles import Profiles, ProfileSums
from pipeline.gem.evaluation.baselines.ridge import Design, NormalEquations, NormalSums
from pipeline.gem.evaluation.baselines.selection import Selection

AXES, AXES_SAMPLES = 50, 2**14  # for energy distances


class ExpressionRows:
    """The expression of some rows, block after block."""

    def __init__(self, rows: np.ndarray, genes: int):
        """`rows` (M,) ascending."""
        self.rows, self.values = rows, np.empty((len(rows), genes), dtype=np.float32)
        self._start = 0

    def add(self, block: np.ndarray) -> None:
        """The next rows (B, G) of all."""
        stop = self._start + len(block)
        inside = slice(*np.searchsorted(self.rows, [self._start, stop]))
        self.values[inside] = block[self.rows[inside] - self._start]
        self._start = stop

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(R, G) of rows (R,) that are among these."""
        return self.values[np.searchsorted(self.rows, rows)]


@dataclass(frozen=True)
class VisibleSamples:
    samples: pd.DataFrame  # (N, ...) first those of the training split
    identities: MetadataEncoder  # of levels and numbers, without features
    profiles: Profiles
    equations: NormalEquations  # of `identities`
    selection: Selection
    axes: np.ndarray  # (G, K) as `principal_axes`, of at most AXES_SAMPLES spread over all
    kept: ExpressionRows

    @classmethod
    def read(cls, cohort: Cohort, kept: np.ndarray) -> "VisibleSamples":
        """`kept` (M,): the rows whose expression is kept, ascending."""
        samples, declared, genes = cohort.rows(VISIBLE), cohort.declared, len(cohort.genes)
        # Of all samples: a level of the validation splits alone is a column of zeros in training.
        identities = MetadataEncoder.fit(samples, declared.covariates.identities())
        design = Design(identities, samples)
        profiles = ProfileSums(declared, samples, genes)
        equations = NormalSums(design.rows, design.columns, genes)
        number = min(len(samples), AXES_SAMPLES)
        spread = ExpressionRows(np.arange(number) * len(samples) // number, genes)
        references = ExpressionRows(kept, genes)

        def add(splits: Sequence[str]) -> None:
            for block in cohort.expression_blocks(splits):
                for part in (profiles, equations, spread, references):
                    part.add(block)

        add([TRAIN])
        selection = Selection.of(cohort, identities, profiles, equations)
        add(VALIDATIONS)
        return cls(
            samples,
            identities,
            profiles.profiles(),
            equations.equations(),
            selection,
            principal_axes(spread.values),
            references,
        )


def principal_axes(expression: np.ndarray) -> np.ndarray:
    """(G, K) leading principal axes of expression (N, G)."""
    pca = PCA(min(AXES, *expression.shape), svd_solver="auto", random_state=0)
    return pca.fit(expression).components_.T.astype(np.float64)
