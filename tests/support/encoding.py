"""Encoded metadata written out, to compare it with matrices written by hand."""

import numpy as np
import pandas as pd

from pipeline.gem.data.encoder import MetadataEncoder


def dense(
    encoder: MetadataEncoder, samples: pd.DataFrame, unknown: str = "refuse"
) -> dict[str, np.ndarray]:
    """(N, inputs) per group: for each covariate [features | value | levels]."""
    encoded, matrices = encoder.encode(samples, unknown), {}
    for group, rows in encoded.items():
        matrix = rows.matrix().toarray()
        parts = [matrix[:, :0]]
        for part in encoder.columns(group):
            if part.field.features:
                parts.append(matrix[:, part.features] @ part.field.features.values)
            parts.append(matrix[:, part.own])
        matrices[group] = np.concatenate(parts, axis=1)
    return matrices
