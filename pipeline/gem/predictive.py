"""What a trained GEM says of samples as a distribution: its mean, one draw, and the probability of the counts observed.

N samples, G genes, K draws of the latents. Expression is log-CPM.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.gem.expression import CPM
from pipeline.gem.likelihood import sample_normal
from pipeline.gem.trained import GEM, Query, decode

_ROWS = 128  # at a time: arrays of 128 x G stay in the cache, seven times as fast as with 512


@dataclass(frozen=True)
class Predictive:
    """The mixture over K draws of the latents; all (N, G)."""

    mean: np.ndarray    # log-CPM
    draw: np.ndarray    # log-CPM of one sample: latents and observation noise drawn
    lower: np.ndarray   # probability of fewer counts than observed
    upper: np.ndarray   # probability of at most the counts observed


@torch.no_grad()
def predictive(gem: GEM, query: Query, counts: np.ndarray, totals: np.ndarray, draws: int, seed: int) -> Predictive:
    """For N samples as a query, with the noise of the way it is decoded, counts (N, G) and totals (N,)."""
    generator = torch.Generator(gem.device).manual_seed(seed)
    parts = []
    for start in range(0, len(counts), _ROWS):
        rows = slice(start, start + _ROWS)
        edges = _edges(counts[rows], totals[rows], gem.device)
        parts.append(_mixture(gem, query.rows(rows), edges, draws, generator))
    return Predictive(*(torch.cat(arrays).cpu().numpy() for arrays in zip(*parts, strict=True)))


def _edges(counts: np.ndarray, totals: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-CPM between which a Normal rounds to the observed count; nothing lies below a count of zero."""
    scale = (CPM / np.asarray(totals, dtype=np.float64))[:, None]
    below = np.where(counts > 0, np.log1p(np.maximum(counts - 0.5, 0) * scale), -np.inf)
    above = np.log1p((counts + 0.5) * scale)
    return tuple(torch.from_numpy(edge.astype(np.float32)).to(device) for edge in (below, above))


def _mixture(gem: GEM, query: Query, edges: tuple[Tensor, Tensor], draws: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    noise = gem.network.log_variance(query.way)
    scale = torch.exp(-0.5 * noise) / math.sqrt(2)
    edges = tuple(edge * scale for edge in edges)   # in the units of erf, which is the Normal's distribution function but for a half
    mean, lower, upper, place = (torch.zeros_like(edges[1]) for _ in range(4))
    for number in range(draws):
        decoded = decode(gem.network, query, sample_normal(*query.latents, generator))
        if number == 0:
            drawn = sample_normal(decoded, noise, generator)
        mean += decoded / draws
        centre = decoded * scale
        for total, edge in zip((lower, upper), edges, strict=True):
            total += torch.sub(edge, centre, out=place).erf_()
    lower, upper = ((total / draws + 1) / 2 for total in (lower, upper))
    return mean, drawn.clamp_min(0), lower, torch.maximum(upper, lower)
