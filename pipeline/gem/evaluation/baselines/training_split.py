"""What predictors and metrics need of the training split, from one pass over its counts.

Memory grows with levels, groups of samples and genes, not with samples.

N training samples, G genes, K leading axes. Expression is log-CPM.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.splits import TRAIN
from pipeline.gem.evaluation.baselines.profiles import Profiles, ProfileSums
from pipeline.gem.evaluation.baselines.ridge import Design, NormalEquations, NormalSums

AXES, AXES_SAMPLES = 50, 2**14  # for energy distances


@dataclass(frozen=True)
class TrainingSplit:
    samples: pd.DataFrame  # (N, ...)
    identities: MetadataEncoder  # of levels and numbers, without features
    profiles: Profiles
    equations: NormalEquations  # of `identities`
    axes: np.ndarray  # (G, K) as `principal_axes`, of the first AXES_SAMPLES: the order is random
    kept: np.ndarray  # (M,) rows, ascending
    kept_expression: np.ndarray  # (M, G) of these

    @classmethod
    def read(cls, cohort: Cohort, kept: np.ndarray) -> "TrainingSplit":
        """`kept` (M,): the rows whose expression is kept, ascending."""
        samples, declared, genes = cohort.rows([TRAIN]), cohort.declared, len(cohort.genes)
        identities = MetadataEncoder.fit(samples, declared.covariates.identities())
        design = Design(identities, samples)
        profiles = ProfileSums(declared, samples, genes)
        equations = NormalSums(design.rows, design.columns, genes)
        kept_expression = np.empty((len(kept), genes), dtype=np.float32)
        first, start = [], 0
        for block in cohort.expression_blocks([TRAIN]):
            profiles.add(block)
            equations.add(block)
            if start < AXES_SAMPLES:
                first.append(block[: AXES_SAMPLES - start])
            rows = slice(*np.searchsorted(kept, [start, start + len(block)]))
            kept_expression[rows] = block[kept[rows] - start]
            start += len(block)
        return cls(
            samples,
            identities,
            profiles.profiles(),
            equations.equations(),
            principal_axes(np.concatenate(first)),
            kept,
            kept_expression,
        )

    def expression(self, rows: np.ndarray) -> np.ndarray:
        """(R, G) of rows (R,) that were kept."""
        return self.kept_expression[np.searchsorted(self.kept, rows)]


def principal_axes(expression: np.ndarray) -> np.ndarray:
    """(G, K) leading principal axes of expression (N, G)."""
    pca = PCA(min(AXES, *expression.shape), svd_solver="auto", random_state=0)
    return pca.fit(expression).components_.T.astype(np.float64)
