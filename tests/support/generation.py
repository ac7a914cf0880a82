"""Log-CPM of a query, drawn or at the mean: what tests compare the means and counts of predictions with."""

import numpy as np
import pandas as pd
import torch

from pipeline.gem.model.gem import CONDITIONING, TrainedGEM, decode
from pipeline.gem.model.normal import sample_normal


@torch.no_grad()
def generate(
    gem: TrainedGEM,
    samples: pd.DataFrame,
    reference: np.ndarray | None = None,
    conditioning: tuple[str, ...] = CONDITIONING,
    *,
    latents: torch.Generator | None = None,
    noise: torch.Generator | None = None,
    unknown: str = "refuse",
) -> np.ndarray:
    """(N, G) log-CPM of a Normal; latents and noise are drawn where there is a generator."""
    query = gem.query(samples, reference, conditioning, unknown)
    decoded = decode(
        gem.network,
        query,
        query.latents.mean if latents is None else sample_normal(*query.latents, latents),
    )
    if noise is not None:
        decoded = gem.network.observation.draw_log_cpm(decoded, None, query.way, noise)
    return gem.network.observation.log_cpm(decoded).numpy()
