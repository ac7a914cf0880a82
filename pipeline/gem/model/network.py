"""GEM: a variational autoencoder whose prior is predicted from metadata, per latent group.

B samples, G genes, D_g encoded metadata of group g, L_g its latent size, L their sum, K classes of a head.
After GEM-1 (bioRxiv 10.1101/2025.09.08.674753); the objective is the corrected one, see `Network.forward`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.gem.common.config import GROUPS, Model, Train
from pipeline.gem.model.normal import LOG_VARIANCE_RANGE, kl_normal, sample_normal
from pipeline.gem.model.observation import Observed, observation

# How a sample's latents came about decides how noisy its decoded expression is: each way has a noise of its own.
LATENT_SOURCES = POSTERIOR, PRIOR, REFERENCE_SAMPLE, UNSEEN_STUDY = tuple(range(4))
INPUT_EPSILON = 1.0  # of the normalisation in front of the encoder


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
    """Linear, residual blocks, LayerNorm, Linear."""

    def __init__(self, inputs: int, outputs: int, blocks: int, params: Model):
        super().__init__(
            nn.Linear(inputs, params.hidden),
            *(
                ResidualBlock(params.hidden, params.expansion, params.dropout)
                for _ in range(blocks)
            ),
            nn.LayerNorm(params.hidden),
            nn.Linear(params.hidden, outputs),
        )


class LinearPrior(nn.Linear):
    """A linear map of sparse one-hot rows; the gain makes up for how seldom each of its weights has a gradient."""

    GAIN = 4.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.GAIN * x)


class Interaction(nn.Module):
    """Programs whose strength the biology decides: W ((1 + U z_biological) * (V z_perturbation)), K programs.

    A pathway responds only where it is expressed: effects of a perturbation differ between contexts by factors.
    """

    def __init__(self, biological: int, perturbation: int, programs: int, genes: int):
        super().__init__()
        self.response = nn.Linear(biological, programs)
        self.loading = nn.Linear(perturbation, programs, bias=False)
        self.program = nn.Linear(programs, genes, bias=False)
        nn.init.ones_(self.response.bias)

    def strength(self, biological: Tensor, perturbation: Tensor) -> Tensor:
        """(B, K) of each program."""
        return self.response(biological) * self.loading(perturbation)

    def forward(self, biological: Tensor, perturbation: Tensor) -> Tensor:
        return self.program(self.strength(biological, perturbation))


class TargetEffect(nn.Module):
    """What a genetic perturbation does to its own target gene: one number from its type, dose and time (knock-down lowers)."""

    WIDTH = 16

    def __init__(self, columns: Tensor):
        """`columns` (D,) bool: those of the encoded perturbation that say how it is done, not which it is."""
        super().__init__()
        self.register_buffer("columns", columns.float(), persistent=False)
        self.widen, self.narrow = (
            nn.Linear(max(len(columns), 1), self.WIDTH),
            nn.Linear(self.WIDTH, 1),
        )
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, metadata: Tensor) -> Tensor:
        """(U,) log-CPM to add to the target gene, for metadata rows (U, D)."""
        told = (
            metadata * self.columns if metadata.shape[1] else metadata.new_zeros(len(metadata), 1)
        )
        return self.narrow(F.relu(self.widen(told))).squeeze(1)


class Gaussian(NamedTuple):
    """A diagonal Normal over the latents of all groups: both (B, L)."""

    mean: Tensor
    log_variance: Tensor

    def rows(self, index: Tensor) -> "Gaussian":
        return Gaussian(self.mean[index], self.log_variance[index])


@dataclass(frozen=True)
class Batch:
    """B training samples. `metadata[g]` holds the distinct rows (U_g, D_g) and `index[g]` (B,) points into them."""

    observed: Observed  # of B samples
    reference: (
        Tensor  # (R, G) log-CPM of references of the first R samples; R = 0 leaves that term out
    )
    shift: Tensor  # (R, G) effect of a virtual study on those samples and their references
    metadata: Mapping[str, Tensor]
    index: Mapping[str, Tensor]
    target: Tensor  # (B,) position of the gene that the perturbation itself hits, -1 without
    new_study: (
        Tensor  # (U, D) the technical rows with the study hidden; no rows leave that term out
    )
    short: Mapping[
        str, Tensor
    ]  # the rows of `metadata` with fields hidden at random; none leave that term out
    labels: Tensor  # (B, heads) class index, -1 missing

    @property
    def expression(self) -> Tensor:
        return self.observed.expression


class Network(nn.Module):
    """The networks of GEM and the terms of its objective."""

    def __init__(
        self,
        genes: int,
        metadata_sizes: Mapping[str, int],
        heads: Mapping[str, tuple[str, int]],
        intervention_columns: tuple[bool, ...],
        params: Model,
    ):
        """`heads`: name to (group, classes); `intervention_columns` (D,): columns of the encoded perturbation that say how it is done, not
        which it is. Weights are drawn from torch's current random state."""
        super().__init__()
        self.sizes = params.latent.model_dump()
        total = sum(self.sizes.values())
        self.priors = nn.ModuleDict(
            {
                group: MLP(max(metadata_sizes[group], 1), 2 * size, params.prior_blocks, params)
                for group, size in self.sizes.items()
            }
        )
        if params.additive_technical:
            # Levels add up from metadata to genes: what is said of a new study is the sum of its known levels.
            self.priors["technical"] = LinearPrior(
                max(metadata_sizes["technical"], 1), 2 * self.sizes["technical"]
            )
        self.encoder = MLP(genes, 2 * total, params.blocks, params)
        # Effects of library and platform multiply counts: they add up on the log scale, whatever the biology.
        self.mlp_start = self.sizes["technical"] if params.additive_technical else 0
        self.decoder = MLP(total - self.mlp_start, genes, params.blocks, params)
        self.linear_decoder = nn.Linear(total, genes, bias=False) if params.linear_decoder else None
        self.target_effect = TargetEffect(torch.tensor(intervention_columns, dtype=torch.bool))
        places = (self.sizes["biological"], self.sizes["perturbation"])
        self.interaction = (
            Interaction(*places, params.interactions, genes) if params.interactions else None
        )
        if self.linear_decoder is not None:
            # Beside a decoder that is linear first and bends later: its last layer starts at zero.
            nn.init.zeros_(self.decoder[-1].weight)
        self.observation = observation(
            params.observation, len(LATENT_SOURCES), genes, params.min_variance
        )
        # Logit of the share of a reference's residual that is carried over: at no surprise, and its slope.
        self.residual_gate = nn.Parameter(torch.tensor([[-2.0], [0.0]]).expand(2, genes).clone())
        self.head_groups = {name: group for name, (group, _) in heads.items()}
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(self.sizes[group], classes)
                for name, (group, classes) in heads.items()
            }
        )

    def start_from(self, expression: Tensor) -> None:
        """Starts the decoder at the training mean of every gene, and the noise at its spread; for training log-CPM (N, G)."""
        with torch.no_grad():
            self.decoder[-1].bias.copy_(self.observation.start(expression))

    def slices(self) -> dict[str, slice]:
        """Where each group stands among the L latent dimensions."""
        starts, result = 0, {}
        for group in GROUPS:
            result[group] = slice(starts, starts + self.sizes[group])
            starts += self.sizes[group]
        return result

    def prior(self, group: str, metadata: Tensor) -> Gaussian:
        """p(z_g | metadata (B, D_g)). A group without covariates has one prior for all samples."""
        if metadata.shape[1] == 0:
            metadata = metadata.new_zeros(len(metadata), 1)
        mean, log_variance = self.priors[group](metadata).chunk(2, dim=1)
        return Gaussian(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def joint_prior(self, metadata: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Gaussian:
        """p(z | m) of all groups for B samples, each network applied to distinct metadata rows only."""
        parts = [self.prior(group, metadata[group]).rows(index[group]) for group in GROUPS]
        return Gaussian(
            torch.cat([part.mean for part in parts], 1),
            torch.cat([part.log_variance for part in parts], 1),
        )

    def posterior(self, expression: Tensor) -> Gaussian:
        """q(z | x) of log-CPM (B, G), normalised on the way in only, without learnt scale."""
        normalised = F.layer_norm(expression, expression.shape[-1:], eps=INPUT_EPSILON)
        # Ordered mean then log variance within a group, group after group.
        parts = self.encoder(normalised).split([2 * self.sizes[group] for group in GROUPS], dim=1)
        means, log_variances = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
        return Gaussian(torch.cat(means, 1), torch.cat(log_variances, 1).clamp(*LOG_VARIANCE_RANGE))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, G) of latents (B, L), on the scale of the observation model: log-CPM, or logits of the genes' shares."""
        decoded = self.decoder(latents[:, self.mlp_start :])
        # Added in place: a third less time than three products and two sums.
        if self.linear_decoder is not None:
            decoded.addmm_(latents, self.linear_decoder.weight.t())
        if self.interaction is not None:
            places = self.slices()
            strength = self.interaction.strength(
                latents[:, places["biological"]], latents[:, places["perturbation"]]
            )
            decoded.addmm_(strength, self.interaction.program.weight.t())
        return decoded

    @staticmethod
    def hit(decoded: Tensor, target: Tensor, change: Tensor) -> Tensor:
        """Decoded (B, G) with a change (B,) added to each sample's target gene (B,), where it has one."""
        there = target >= 0
        return decoded.scatter_add(
            1, target.clamp_min(0)[:, None], torch.where(there, change, 0.0)[:, None]
        )

    def carried(self, reference: Tensor, posterior: Gaussian) -> Tensor:
        """(B, G) to add to what is decoded for a query with a reference (B, G), `posterior` being q(z | reference).

        Latents cannot hold what no training study showed: the dense effect of a new study. It stays in the residual of the
        reference, beside its donor and its count noise. A learnt share per gene is carried over, as in the best linear
        unbiased prediction of a random effect: the more, the larger the residual is against what training leaves.
        """
        residual = reference - self.observation.log_cpm(self.decode(posterior.mean))
        surprise = (
            (residual.square() @ self.observation.precision() / residual.shape[1])
            .clamp_min(1e-6)
            .log()
        )
        return (
            torch.sigmoid(self.residual_gate[0] + self.residual_gate[1] * surprise[:, None])
            * residual
        )

    def classify(self, latents: Tensor) -> dict[str, Tensor]:
        """Logits (B, K) per head from latents (B, L)."""
        slices = self.slices()
        return {
            name: head(latents[:, slices[self.head_groups[name]]])
            for name, head in self.heads.items()
        }

    def conditioned(
        self, prior: Gaussian, reference: Gaussian, conditioning: tuple[str, ...]
    ) -> Gaussian:
        """The reference's posterior for the groups in `conditioning`, the prior for the others."""
        taken = torch.zeros(prior.mean.shape[1], dtype=torch.bool, device=prior.mean.device)
        for group in conditioning:
            taken[self.slices()[group]] = True
        return Gaussian(
            torch.where(taken, reference.mean, prior.mean),
            torch.where(taken, reference.log_variance, prior.log_variance),
        )

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The terms of the objective, each in nats per sample: summed over genes and latents, averaged over the batch once.

        nll_reconstruction: x decoded from its posterior. nll_predictive: from the prior of its metadata.
        nll_reference: technical and biological latents from a reference's posterior, perturbation from the prior, and
        what is carried of the reference's residual; both in the same virtual study.
        kl_<group>: KL(posterior | prior) per latent dimension (L_g,). classification: cross entropy summed over heads.
        """
        observed, size, referred = batch.observed, len(batch.observed), len(batch.reference)
        prior = self.joint_prior(batch.metadata, batch.index)
        shifted = batch.reference + batch.shift
        encoded = self.posterior(torch.cat([observed.expression, shifted]))
        posterior = Gaussian(encoded.mean[:size], encoded.log_variance[:size])
        latents = [sample_normal(*posterior, generator), sample_normal(*prior, generator)]
        if referred:
            reference = Gaussian(encoded.mean[size:], encoded.log_variance[size:])
            of_query = Gaussian(prior.mean[:referred], prior.log_variance[:referred])
            latents.append(
                sample_normal(*self.conditioned(of_query, reference, GROUPS[:2]), generator)
            )
        change = self.target_effect(batch.metadata["perturbation"])[batch.index["perturbation"]]
        decoded = [
            self.hit(part, batch.target[: len(part)], change[: len(part)])
            for part in self.decode(torch.cat(latents)).split([len(part) for part in latents])
        ]
        if referred:
            decoded[REFERENCE_SAMPLE] = (
                decoded[REFERENCE_SAMPLE] + self.carried(shifted, reference) - batch.shift
            )
        ways = ("nll_reconstruction", "nll_predictive", "nll_reference")
        terms = {
            name: -self.observation.log_likelihood(observed.first(len(part)), part, way).mean()
            for way, (name, part) in enumerate(zip(ways, decoded, strict=False))
        }
        if len(batch.new_study):
            terms["nll_unseen_study"] = self._new_study(
                observed, decoded[PRIOR], latents[PRIOR], batch, generator
            )
        divergence = kl_normal(*posterior, *prior).mean(dim=0)
        terms |= {f"kl_{group}": divergence[place] for group, place in self.slices().items()}
        if batch.short:
            terms["kl_partial_metadata"] = self._partial_metadata(batch)
        terms["classification"] = self._classification(latents[0], batch.labels)
        return terms

    def _partial_metadata(self, batch: Batch) -> Tensor:
        """KL(prior of all fields | prior of some), summed over latents: what a query that says little should expect.

        Least where the prior of some fields has the mean and variance of the mixture of all experiments that they could
        describe. The full query is the teacher and has no gradient; no group learns what only another one knows.
        """
        divergence = []
        for group, shorter in batch.short.items():
            with torch.no_grad():
                teacher = self.prior(group, batch.metadata[group])
            divergence.append(
                kl_normal(*teacher, *self.prior(group, shorter))
                .sum(dim=1)[batch.index[group]]
                .mean()
            )
        return torch.stack(divergence).sum()

    def _new_study(
        self,
        observed: Observed,
        decoded: Tensor,
        latents: Tensor,
        batch: Batch,
        generator: torch.Generator,
    ) -> Tensor:
        """Negative log likelihood of the predicted samples with the technical latents of a study that nobody knows.

        Only the technical part has a gradient: if biology had one, it would learn to tell studies apart by age and disease,
        and be wrong where the study is new.
        """
        technical = self.slices()["technical"]
        unknown = self.prior("technical", batch.new_study).rows(batch.index["technical"])
        weight = self.linear_decoder.weight[:, technical]
        known = F.linear(latents[:, technical], weight)
        moved = (decoded - known).detach() + F.linear(sample_normal(*unknown, generator), weight)
        return -self.observation.log_likelihood(observed, moved, UNSEEN_STUDY).mean()

    def _classification(self, latents: Tensor, labels: Tensor) -> Tensor:
        losses = [
            F.cross_entropy(logits, labels[:, position], ignore_index=-1, reduction="sum")
            for position, logits in enumerate(self.classify(latents).values())
        ]
        return torch.stack(losses).sum() / len(labels) if losses else latents.new_zeros(())


def objective(terms: Mapping[str, Tensor], params: Train, warmup: float) -> Tensor:
    """The weighted loss that training minimises, in nats per sample; `warmup` in [0, 1] scales the KL weights."""
    loss = terms["nll_reconstruction"] + params.predictive_weight * terms["nll_predictive"]
    if "nll_reference" in terms:
        loss = loss + params.reference_weight * terms["nll_reference"]
    if "nll_unseen_study" in terms:
        loss = loss + params.unseen_study_weight * terms["nll_unseen_study"]
    if "kl_partial_metadata" in terms:
        loss = loss + params.partial_metadata_weight * terms["kl_partial_metadata"]
    for group in GROUPS:
        weight = warmup * getattr(params.kl_weight, group)
        loss = loss + weight * terms[f"kl_{group}"].clamp_min(params.free_bits).sum()
    return loss + params.classifier_weight * terms["classification"]
