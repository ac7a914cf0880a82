"""What a trained GEM says of samples as a distribution: its mean, one draw, and the probability of the counts observed.

N samples, G genes, K draws of the latents. Expression is log-CPM.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.gem.expression import CPM
from pipeline.gem.likelihood import sample_normal
from pipeline.gem.model import Gaussian
from pipeline.gem.trained import GEM

_ROWS = 512  # at a time: each needs a few arrays of K x G


@dataclass(frozen=True)
class Predictive:
    """The mixture over K draws of the latents; all (N, G)."""

    mean: np.ndarray    # log-CPM
    draw: np.ndarray    # log-CPM of one sample: latents and observation noise drawn
    lower: np.ndarray   # probability of fewer counts than observed
    upper: np.ndarray   # probability of at most the counts observed


@torch.no_grad()
def predictive(gem: GEM, latents: Gaussian, way: int, counts: np.ndarray, totals: np.ndarray, draws: int, seed: int) -> Predictive:
    """For samples with latents (N, L) decoded the given `way` (whose noise it has), counts (N, G) and totals (N,)."""
    generator = torch.Generator(gem.device).manual_seed(seed)
    noise = gem.network.log_variance(way)
    parts = []
    for start in range(0, len(counts), _ROWS):
        rows = slice(start, start + _ROWS)
        block = Gaussian(latents.mean[rows], latents.log_variance[rows])
        edges = _edges(counts[rows], totals[rows], gem.device)
        parts.append(_mixture(gem, block, noise, edges, draws, generator))
    return Predictive(*(torch.cat(arrays).cpu().numpy() for arrays in zip(*parts, strict=True)))


def _edges(counts: np.ndarray, totals: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-CPM between which a Normal rounds to the observed count; nothing lies below a count of zero."""
    scale = (CPM / np.asarray(totals, dtype=np.float64))[:, None]
    below = np.where(counts > 0, np.log1p(np.maximum(counts - 0.5, 0) * scale), -np.inf)
    above = np.log1p((counts + 0.5) * scale)
    return tuple(torch.from_numpy(edge.astype(np.float32)).to(device) for edge in (below, above))


def _mixture(gem: GEM, latents: Gaussian, noise: Tensor, edges: tuple[Tensor, Tensor], draws: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    deviation = torch.exp(0.5 * noise)
    mean, lower, upper = (torch.zeros_like(edges[1]) for _ in range(3))
    for number in range(draws):
        decoded = gem.network.decode(sample_normal(*latents, generator))
        if number == 0:
            drawn = sample_normal(decoded, noise.expand_as(decoded), generator)
        mean += decoded / draws
        lower += torch.special.ndtr((edges[0] - decoded) / deviation) / draws
        upper += torch.special.ndtr((edges[1] - decoded) / deviation) / draws
    return mean, drawn.clamp_min(0), lower, torch.maximum(upper, lower)
