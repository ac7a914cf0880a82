"""What a trained GEM says of samples as a distribution: its mean, one draw, and the probability of the counts observed.

N samples, G genes, K draws of the latents. Expression is log-CPM.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.gem.data.expression import log_cpm
from pipeline.gem.model.gem import Query, TrainedGEM, decode
from pipeline.gem.model.normal import sample_normal
from pipeline.gem.model.observation import Observed

_ROWS = 128  # at a time: arrays of 128 x G stay in the cache, seven times as fast as with 512


@dataclass(frozen=True)
class Predictive:
    """The mixture over K draws of the latents; (N, G) where not said otherwise."""

    mean: np.ndarray  # log-CPM
    draw: np.ndarray  # log-CPM of one sample: latents and observation noise drawn
    lower: np.ndarray  # probability of fewer counts than observed
    upper: np.ndarray  # probability of at most the counts observed
    log_likelihood: np.ndarray  # (N,) nats: of all counts of a sample together


@torch.no_grad()
def predictive(
    gem: TrainedGEM, query: Query, counts: np.ndarray, totals: np.ndarray, draws: int, seed: int
) -> Predictive:
    """For N samples as a query, with the noise of the way it is decoded, counts (N, G) and totals (N,)."""
    generator = torch.Generator(gem.device).manual_seed(seed)
    parts = []
    for start in range(0, len(counts), _ROWS):
        rows = slice(start, start + _ROWS)
        observed = Observed(
            *(
                torch.from_numpy(one).to(gem.device)
                for one in (log_cpm(counts[rows], totals[rows]), counts[rows].astype(np.int64))
            )
        )
        parts.append(
            _mixture(
                gem,
                query.rows(rows),
                observed,
                torch.from_numpy(totals[rows]).to(gem.device),
                draws,
                generator,
            )
        )
    return Predictive(*(torch.cat(arrays).cpu().numpy() for arrays in zip(*parts, strict=True)))


def _mixture(
    gem: TrainedGEM,
    query: Query,
    observed: Observed,
    totals: Tensor,
    draws: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    observation = gem.network.observation
    judged = observation.count_probabilities(observed, totals, query.way)
    mean, lower, upper = (torch.zeros_like(observed.expression) for _ in range(3))
    nats = []
    for number in range(draws):
        decoded = decode(gem.network, query, sample_normal(*query.latents, generator))
        if number == 0:
            drawn = observation.draw_log_cpm(decoded, totals, query.way, generator).clamp_min(0)
        mean += observation.expected_log_cpm(decoded, totals, query.way)
        fewer, at_most, log_likelihood = judged(decoded)
        lower += fewer
        upper += at_most
        nats.append(log_likelihood)
    log_likelihood = torch.stack(nats).logsumexp(dim=0) - math.log(draws)
    return mean / draws, drawn, lower / draws, torch.maximum(upper, lower) / draws, log_likelihood
