"""Log-CPM and counts predicted the plain way, for comparison with batched predictions."""

import numpy as np
import pandas as pd
import torch

from pipeline.gem.data.expression import round_to_totals
from pipeline.gem.model.gem import DEFAULT_CONDITIONING, TrainedGEM
from pipeline.gem.model.normal import sample_normal
from pipeline.gem.model.predictive import decoded_draws
from pipeline.gem.model.query import DecoderInput, decode


@torch.no_grad()
def generate(
    gem: TrainedGEM,
    samples: pd.DataFrame,
    reference: np.ndarray | None = None,
    conditioning: tuple[str, ...] = DEFAULT_CONDITIONING,
    *,
    latents: torch.Generator | None = None,
    noise: torch.Generator | None = None,
    unknown: str = "refuse",
) -> np.ndarray:
    """(N, G) log-CPM. Latents and noise are drawn if they have a generator, else at their mean."""
    inputs = gem.decoder_input(samples, reference, conditioning, unknown)
    z = inputs.latents.mean if latents is None else sample_normal(*inputs.latents, latents)
    decoded, observation = decode(gem.network, inputs, z), gem.network.observation
    if noise is not None:
        decoded = observation.draw_log_cpm(decoded, None, inputs.source, noise)
    return observation.log_cpm(decoded).numpy()


@torch.no_grad()
def expected_log_cpm(gem: TrainedGEM, inputs: DecoderInput, draws: int, seed: int) -> np.ndarray:
    """(N, G) decoded log-CPM, averaged over draws of the latents."""
    generator = torch.Generator().manual_seed(seed)
    decoded = decoded_draws(gem.network, inputs, draws, generator)
    return (sum(map(gem.network.observation.log_cpm, decoded)) / draws).numpy()


def counts_from_log_cpm(expression: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(B, G) whole counts with row sums `totals` (B,), the inverse of log-CPM (B, G) >= 0."""
    linear = np.expm1(np.maximum(np.asarray(expression, dtype=np.float64), 0))
    scale = np.asarray(totals, dtype=np.float64) / linear.sum(axis=1)
    return round_to_totals(linear * scale[:, None], totals)
