"""The controls from which the effect of a held-out condition is taken."""

import numpy as np
import pandas as pd

from pipeline.gem.common.config import Data, Numeric
from pipeline.gem.data.labels import label_texts
from pipeline.gem.data.references import SampleGroups


def matched_controls(samples: pd.DataFrame, pool: pd.DataFrame, data: Data) -> list[np.ndarray]:
    """For each sample the rows of `pool` that are controls of its context, and among them those
    with its time, and so for each number of the perturbation group that some of them share."""
    if data.control is None:
        return [np.empty(0, dtype=np.int64)] * len(samples)
    own, groups = SampleGroups(samples, data), SampleGroups(pool, data)
    covariates = data.covariates.perturbation.items()
    numbers = [name for name, item in covariates if isinstance(item, Numeric)]
    texts = {name: label_texts(pool[name]).to_numpy() for name in numbers}
    contexts, controls = groups.context.to_numpy(), groups.control.to_numpy()
    result = []
    for row, context in enumerate(own.context):
        found = controls & (contexts == context)
        for name in numbers:
            same = found & (texts[name] == label_texts(samples[name]).iloc[row])
            found = same if same.any() else found
        result.append(np.flatnonzero(found))
    return result
