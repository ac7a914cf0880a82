"""The training loop that people write, as the public reference of GEM-1 (synthesizebio/gem-1) does.

Counts become log-CPM in the forward pass, every sample has a prior of its own, the likelihood is a
torch.distributions.Normal, Adam is not fused, and each step reads three numbers. The terms are the
reference's: reconstruction, and the divergence of three latent groups. Names of modules are the
reference's, so its weights load.

B samples, G genes.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, distributions, nn
from torch.utils.data import DataLoader, Dataset

LATENTS = {"technical": 8, "biological": 12, "perturbation": 8}


class PlainBlock(nn.Module):
    """A residual block: x + W2 relu(W1 layernorm(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.ff = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(x)


def plain_network(inputs: int, width: int, blocks: int, outputs: int) -> nn.Sequential:
    hidden = [PlainBlock(width) for _ in range(blocks)]
    return nn.Sequential(
        nn.Linear(inputs, width), *hidden, nn.LayerNorm(width), nn.Linear(width, outputs)
    )


class PlainGEM(nn.Module):
    """The reference's network, with one categorical covariate per group."""

    def __init__(
        self,
        genes: int,
        levels: Mapping[str, int],
        width: int,
        blocks: int = 1,
        latents: Mapping[str, int] = LATENTS,
    ):
        super().__init__()
        self.levels, self.latents, total = dict(levels), dict(latents), sum(latents.values())
        self.prior_nets = nn.ModuleDict(
            {
                group: plain_network(levels[group], width, blocks, 2 * size)
                for group, size in latents.items()
            }
        )
        self.input_norm = nn.LayerNorm(genes, eps=1.0)
        self.encoder = plain_network(genes, width, blocks, 2 * total)
        self.decoder = plain_network(total, width, blocks, genes)
        self.log_variance = nn.Parameter(torch.zeros(genes))

    def forward(self, counts: Tensor, index: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean losses of counts (B, G) with one level per sample and group (B,)."""
        totals = counts.sum(dim=1, keepdim=True).clamp_min(1.0)
        expression = self.input_norm(torch.log1p(counts / totals * 1e6))
        means, log_variances = self.encoder(expression).chunk(2, dim=1)
        sizes = list(self.latents.values())
        posteriors = zip(means.split(sizes, 1), log_variances.split(sizes, 1), strict=True)
        latents, divergence = [], 0.0
        for group, (mean, log_variance) in zip(self.latents, posteriors, strict=True):
            one_hot = nn.functional.one_hot(index[group], self.levels[group]).float()
            prior_mean, prior_log_variance = self.prior_nets[group](one_hot).chunk(2, dim=1)
            posterior = distributions.Normal(mean, torch.exp(0.5 * log_variance))
            prior = distributions.Normal(prior_mean, torch.exp(0.5 * prior_log_variance))
            divergence = divergence + distributions.kl_divergence(posterior, prior).sum(1).mean()
            latents.append(posterior.rsample())
        decoded = self.decoder(torch.cat(latents, dim=1))
        likelihood = distributions.Normal(decoded, torch.exp(0.5 * self.log_variance))
        reconstruction = -likelihood.log_prob(expression).mean()
        loss = reconstruction + divergence
        return {"loss": loss, "reconstruction": reconstruction, "divergence": divergence}


class PlainDataset(Dataset):
    """Single samples: counts (G,) and one level per group."""

    def __init__(self, counts: np.ndarray, index: Mapping[str, np.ndarray]):
        self.counts = torch.from_numpy(counts.astype(np.float32))
        self.index = {group: torch.from_numpy(rows) for group, rows in index.items()}

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.counts[row], {group: rows[row] for group, rows in self.index.items()}


class PlainLoop:
    """A network with its data and optimiser."""

    def __init__(
        self, counts: np.ndarray, index: Mapping[str, np.ndarray], width: int, batch_size: int
    ):
        """Counts (N, G); `index` by group: one level per sample (N,)."""
        dataset = PlainDataset(counts, index)
        self.batches = DataLoader(dataset, batch_size=batch_size, shuffle=True)
        levels = {group: int(rows.max()) + 1 for group, rows in index.items()}
        self.model = PlainGEM(counts.shape[1], levels, width)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def train_epoch(self) -> dict[str, float]:
        """Mean losses over batches."""
        sums = dict.fromkeys(("loss", "reconstruction", "divergence"), 0.0)
        self.model.train()
        for counts, index in self.batches:
            losses = self.model(counts, index)
            self.optimizer.zero_grad()
            losses["loss"].backward()
            self.optimizer.step()
            for name in sums:
                sums[name] += losses[name].item()
        return {name: value / len(self.batches) for name, value in sums.items()}
