"""What the baselines select: by a fit to the training split alone, on the selection split."""

from dataclasses import dataclass

import numpy as np

from pipeline.gem.data.cohort import Cohort
from pipeline.gem.data.encoder import MetadataEncoder
from pipeline.gem.data.expression import log_cpm
from pipeline.gem.data.splits import SELECTION_SPLITS
from pipeline.gem.evaluation.baselines.bilinear import (
    DEFAULT,
    Bilinear,
    Complexity,
    perturbation_features,
)
from pipeline.gem.evaluation.baselines.profiles import Profiles, ProfileSums
from pipeline.gem.evaluation.baselines.ridge import DEFAULT_PENALTY, NormalSums, best_penalty

SELECTION_SAMPLES = 2**13


@dataclass(frozen=True)
class Selection:
    """The defaults are for a cohort without a selection split."""

    ridge_penalty: float = DEFAULT_PENALTY
    bilinear: tuple[Complexity, Complexity] = (DEFAULT, DEFAULT)

    @classmethod
    def of(
        cls,
        cohort: Cohort,
        encoder: MetadataEncoder,
        profiles: ProfileSums,
        equations: NormalSums,
    ) -> "Selection":
        """`profiles`, and `equations` of the design of `encoder`: the sums of the training split.

        Of the selection split, the first SELECTION_SAMPLES are used: the order is random.
        """
        split = next(filter(cohort.has, SELECTION_SPLITS), None)
        if split is None:
            return cls()
        rows = cohort.rows([split])
        chosen, samples = np.arange(len(rows)) < SELECTION_SAMPLES, rows.head(SELECTION_SAMPLES)
        expression = log_cpm(cohort.counts([split], chosen), samples["total"].to_numpy())
        penalty = best_penalty(encoder, equations.equations(), samples, expression)
        train = profiles.profiles()
        if not train.has_both:
            return cls(penalty)
        held_out = Profiles.of(cohort.declared, samples, [expression])
        bilinear = Bilinear.fit(train, perturbation_features(cohort), held_out)
        return cls(penalty, bilinear.complexities)
