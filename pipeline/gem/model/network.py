"""GEM: a variational autoencoder whose prior is predicted from metadata, per latent group.

B samples, G genes, U distinct metadata rows, L_g latent size of group g, L their sum, K classes of
a head. After GEM-1 (bioRxiv 10.1101/2025.09.08.674753), with a corrected
objective (objective.py).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.gem.common.config import GROUPS, Model
from pipeline.gem.data.covariates import CovariateEncoder
from pipeline.gem.model.metadata.layers import LinearPrior, MetadataLinear, TargetEffect
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.normal import LOG_VARIANCE_RANGE, shift_and_scale
from pipeline.gem.model.observation import GeneMoments
from pipeline.gem.model.observation_models import build_observation

INPUT_EPSILON = 1.0  # of the layer norm in front of the encoder


class ResidualBlock(nn.Module):
    """x + W2 dropout(relu(W1 layernorm(x)))."""

    def __init__(self, width: int, expansion: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, width * expansion)
        self.narrow = nn.Linear(width * expansion, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.dropout(F.relu(self.widen(self.norm(x)))))


class MLP(nn.Sequential):
    """A first layer of width `params.hidden`, residual blocks, LayerNorm, Linear."""

    def __init__(self, first: nn.Module, outputs: int, blocks: int, params: Model):
        width = params.hidden
        super().__init__(
            first,
            *(ResidualBlock(width, params.expansion, params.dropout) for _ in range(blocks)),
            nn.LayerNorm(width),
            nn.Linear(width, outputs),
        )


class Interaction(nn.Module):
    """P gene programs, scaled by the biology: W ((1 + U z_biological) * (V z_perturbation)).

    A pathway responds only where it is expressed, so a perturbation's effects differ between
    contexts by factors.
    """

    def __init__(self, biological: int, perturbation: int, programs: int, genes: int):
        super().__init__()
        self.response = nn.Linear(biological, programs)
        self.loading = nn.Linear(perturbation, programs, bias=False)
        self.program = nn.Linear(programs, genes, bias=False)
        nn.init.ones_(self.response.bias)

    def strength(self, biological: Tensor, perturbation: Tensor) -> Tensor:
        """(B, P) activity of each program."""
        return self.response(biological) * self.loading(perturbation)


class Gaussian(NamedTuple):
    """A diagonal Normal over the latents of all groups."""

    mean: Tensor  # (B, L)
    log_variance: Tensor  # (B, L)

    def rows(self, index: slice | Tensor) -> "Gaussian":
        return Gaussian(self.mean[index], self.log_variance[index])

    def detach(self) -> "Gaussian":
        return Gaussian(self.mean.detach(), self.log_variance.detach())

    def split(self, sizes: list[int]) -> list["Gaussian"]:
        """Consecutive rows; the gradients of all parts are one copy."""
        return [
            Gaussian(*parts)
            for parts in zip(self.mean.split(sizes), self.log_variance.split(sizes), strict=True)
        ]

    @classmethod
    def join(cls, parts: Iterable["Gaussian"], dim: int) -> "Gaussian":
        means, log_variances = zip(*parts, strict=True)
        return cls(torch.cat(means, dim), torch.cat(log_variances, dim))

    def draw(self, noise: Tensor) -> Tensor:
        """(B, L) the reparameterised draw that standard Normal `noise` (B, L) makes."""
        return shift_and_scale(noise, *self)


class Network(nn.Module):
    """Prior, encoder, decoder, observation model and label heads of GEM."""

    def __init__(
        self,
        genes: int,
        covariates: Mapping[str, Sequence[CovariateEncoder]],
        heads: Mapping[str, tuple[str, int]],
        intervention_columns: Sequence[bool],
        params: Model,
    ):
        """`covariates` by group. `heads`: name to (group, classes), group after group.
        `intervention_columns`: which columns of the encoded perturbation describe how it is
        applied, not which one it is. Weights are drawn from torch's global random state."""
        super().__init__()
        self.bf16 = False  # whether training multiplies in it; prediction never does
        self.sizes = params.latent.model_dump()
        total = sum(self.sizes.values())
        self.priors = nn.ModuleDict()
        for group, size in self.sizes.items():
            if group == "technical" and params.additive_technical:
                # Levels are additive from metadata to genes: a new study is the sum of known
                # levels.
                self.priors[group] = LinearPrior(covariates[group], 2 * size)
            else:
                first = MetadataLinear(covariates[group], params.hidden)
                self.priors[group] = MLP(first, 2 * size, params.prior_blocks, params)
        self.encoder = MLP(nn.Linear(genes, params.hidden), 2 * total, params.blocks, params)
        # Effects of library and platform multiply counts: additive on the log scale in any biology.
        self.mlp_start = self.sizes["technical"] if params.additive_technical else 0
        first = nn.Linear(total - self.mlp_start, params.hidden)
        self.decoder = MLP(first, genes, params.blocks, params)
        self.linear_decoder = nn.Linear(total, genes, bias=False) if params.linear_decoder else None
        self.target_effect = TargetEffect(covariates["perturbation"], intervention_columns)
        self.interaction = None
        if params.interactions:
            sizes = self.sizes["biological"], self.sizes["perturbation"]
            self.interaction = Interaction(*sizes, params.interactions, genes)
        if self.linear_decoder is not None:
            # The decoder starts linear: the last layer of its nonlinear part starts at zero.
            nn.init.zeros_(self.decoder[-1].weight)
        self.observation = build_observation(params.observation, genes, params.min_variance)
        # Logit of the share of a reference's residual that is kept: intercept and slope per gene.
        self.residual_gate = nn.Parameter(torch.tensor([[-2.0], [0.0]]).expand(2, genes).clone())
        # By group: one matrix for all heads of a group is one product.
        self.head_names = list(heads)
        self.classes = [classes for _, classes in heads.values()]
        totals = Counter()
        for group, classes in heads.values():
            totals[group] += classes
        self.heads = nn.ModuleDict(
            {group: nn.Linear(self.sizes[group], total) for group, total in totals.items()}
        )

    def initialise(self, moments: GeneMoments) -> None:
        """Starts decoder and noise at each gene's mean and variance in the training split."""
        with torch.no_grad():
            self.decoder[-1].bias.copy_(self.observation.initialise(moments))

    def slices(self) -> dict[str, slice]:
        """The position of each group among the L latent dimensions."""
        start, slices = 0, {}
        for group in GROUPS:
            slices[group] = slice(start, start + self.sizes[group])
            start += self.sizes[group]
        return slices

    def prior(self, group: str, metadata: MetadataRows, index: Tensor | None = None) -> Gaussian:
        """p(z_g | metadata) of U rows, or of B samples with `index` (B,) of their rows. Without
        covariates, all samples have the same prior."""
        with self._products(metadata.values.device):
            output = self.priors[group](metadata).float()
        if index is not None:
            output = output.index_select(0, index)
        mean, log_variance = output.chunk(2, dim=1)
        return Gaussian(mean, F.hardtanh(log_variance, *LOG_VARIANCE_RANGE))

    def joint_prior(
        self, metadata: Mapping[str, MetadataRows], index: Mapping[str, Tensor]
    ) -> Gaussian:
        """p(z | m) of B samples, from distinct metadata rows and their index (B,)."""
        parts = (self.prior(group, metadata[group], index[group]) for group in GROUPS)
        return Gaussian.join(parts, dim=1)

    def posterior(self, expression: Tensor) -> Gaussian:
        """q(z | x) of log-CPM (B, G), which the encoder alone normalises."""
        normalised = F.layer_norm(expression, expression.shape[-1:], eps=INPUT_EPSILON)
        with self._products(expression.device):
            output = self.encoder(normalised)
        mean, log_variance = output.float().chunk(2, dim=1)
        return Gaussian(mean, F.hardtanh(log_variance, *LOG_VARIANCE_RANGE))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, G) decoded from latents (B, L), on the scale of the observation model."""
        *first, last = self.decoder
        with self._products(latents.device):
            hidden = latents[:, self.mlp_start :]
            for layer in first:
                hidden = layer(hidden)
            inputs, weights = [hidden], [last.weight]
            if self.linear_decoder is not None:
                inputs.append(latents)
                weights.append(self.linear_decoder.weight)
            if self.interaction is not None:
                slices = self.slices()
                inputs.append(
                    self.interaction.strength(
                        latents[:, slices["biological"]], latents[:, slices["perturbation"]]
                    )
                )
                weights.append(self.interaction.program.weight)
            if self._uses_bf16:
                # One product rounds once. The bias, the mean of a gene, is not rounded at all.
                inputs, weights = (
                    torch.cat([part.bfloat16() for part in parts], 1) for parts in (inputs, weights)
                )
                return F.linear(inputs, weights).float() + last.bias
        # In place: a third less time than three products and two sums.
        decoded = F.linear(hidden, last.weight, last.bias)
        for part, weight in zip(inputs[1:], weights[1:], strict=True):
            decoded.addmm_(part, weight.t())
        return decoded

    @property
    def _uses_bf16(self) -> bool:
        return self.bf16 and self.training

    def _products(self, device: torch.device) -> AbstractContextManager:
        """Matrix products inside are in bf16, in a training in bf16."""
        return torch.autocast(device.type, torch.bfloat16) if self._uses_bf16 else nullcontext()

    @staticmethod
    def add_target_effect(decoded: Tensor, target_gene: Tensor, effect: Tensor) -> Tensor:
        """Decoded (B, G) plus an effect (B,) on each of a sample's target genes (B, K), -1 for
        none; in place."""
        effects = torch.where(target_gene >= 0, effect[:, None], 0.0)
        return decoded.scatter_add_(1, target_gene.clamp_min(0), effects)

    def reference_residual(self, reference: Tensor, decoded: Tensor) -> Tensor:
        """(B, G) to add to predictions from references (B, G) whose posterior means are decoded to
        `decoded` (B, G).

        Latents cannot represent effects that training never showed, such as that of a new study.
        These remain in the reference's residual, beside donor effects and count noise. A learnt
        share per gene is kept, as in the best linear unbiased prediction of a random effect; it
        depends on the size of the residual relative to the residuals of training.
        """
        residual = reference - self.observation.log_cpm(decoded)
        mean_square = residual.square() @ self.observation.precision() / residual.shape[1]
        surprise = mean_square.clamp_min(1e-6).log()[:, None]
        intercept, slope = self.residual_gate
        return torch.addcmul(intercept, slope, surprise).sigmoid_() * residual

    def classify(self, latents: Tensor) -> dict[str, Tensor]:
        """Logits (B, K) per head from latents (B, L)."""
        logits = self.head_logits(latents).split(self.classes, dim=1)
        return dict(zip(self.head_names, logits, strict=True))

    def head_logits(self, latents: Tensor) -> Tensor:
        """Logits (B, sum of K) of all heads from latents (B, L)."""
        slices = self.slices()
        logits = [head(latents[:, slices[group]]) for group, head in self.heads.items()]
        return torch.cat(logits, dim=1) if logits else latents[:, :0]

    def condition(
        self, prior: Gaussian, reference: Gaussian, conditioning: tuple[str, ...]
    ) -> Gaussian:
        """The reference's posterior for the groups in `conditioning`, the prior for the others."""
        mask = torch.zeros(prior.mean.shape[1], dtype=torch.bool, device=prior.mean.device)
        for group in conditioning:
            mask[self.slices()[group]] = True
        return Gaussian(
            torch.where(mask, reference.mean, prior.mean),
            torch.where(mask, reference.log_variance, prior.log_variance),
        )
