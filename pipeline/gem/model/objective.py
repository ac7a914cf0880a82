"""The training objective of GEM: its terms and their weighted sum, in nats per sample.

Every term is summed over genes and latent dimensions, then averaged over the batch once.
B samples, R of them with a reference, G genes, D_g encoded metadata of group g, U distinct rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.gem.common.config import GROUPS, Train
from pipeline.gem.model.network import Network
from pipeline.gem.model.normal import kl_normal, shift_and_scale
from pipeline.gem.model.observation import LatentSource, Observed


class LatentNoise(NamedTuple):
    """Standard Normal draws, one row per sample, for the latents of each likelihood term."""

    posterior: Tensor  # (B, L)
    prior: Tensor  # (B, L)
    reference: Tensor  # (R, L)
    unseen_study: Tensor  # (B, L_technical); empty without this term

    @classmethod
    def draw(
        cls,
        network: Network,
        samples: int,
        generator: torch.Generator,
        references: int = 0,
        unseen_study: bool = False,
    ) -> "LatentNoise":
        latents, technical = sum(network.sizes.values()), network.sizes["technical"]
        unseen = samples if unseen_study else 0
        shapes = (samples, latents), (samples, latents), (references, latents), (unseen, technical)
        device = generator.device
        return cls(*(torch.randn(shape, generator=generator, device=device) for shape in shapes))

    def rows(self, index: slice) -> "LatentNoise":
        return LatentNoise(*(part[index] for part in self))


@dataclass(frozen=True)
class Batch:
    """B training samples."""

    observed: Observed
    metadata: Mapping[str, Tensor]  # by group: distinct rows (U, D_g)
    index: Mapping[str, Tensor]  # by group: (B,) row of `metadata`
    target_gene: Tensor  # (B,) position of the perturbation's own target gene, -1 without
    labels: Tensor  # (B, heads) class index, -1 missing
    noise: LatentNoise
    # Each of the following is empty where the objective leaves its term out.
    reference: Tensor  # (R, G) log-CPM of references of the first R samples
    batch_effect: Tensor  # (R, G) of a simulated study, shared by those samples and references
    unseen_study: Tensor  # (U, D) technical rows without the study
    partial_metadata: Mapping[str, Tensor]  # `metadata` with fields masked at random


def objective_terms(network: Network, batch: Batch) -> dict[str, Tensor]:
    """The unweighted terms. All randomness but dropout is in the batch.

    nll_reconstruction: samples decoded from their posterior.
    nll_predictive: samples decoded from the prior of their metadata.
    nll_reference: technical and biological latents from a reference, perturbation from the prior,
        plus the reference's residual; sample and reference share a simulated batch effect.
    nll_unseen_study: as nll_predictive, without the study.
    kl_<group>: KL(posterior | prior) per latent dimension (L_g,).
    kl_partial_metadata: KL(prior of all fields | prior of some).
    classification: cross entropy, summed over heads.
    """
    # Gradients add up in the order of these operations: another order changes the last bits.
    observed, size, references = batch.observed, len(batch.observed), len(batch.reference)
    prior = network.joint_prior(batch.metadata, batch.index)
    reference = batch.reference + batch.batch_effect
    encoded = network.posterior(torch.cat([observed.expression, reference]))
    posterior, reference_posterior = encoded.rows(slice(size)), encoded.rows(slice(size, None))
    noise = batch.noise
    latents = [shift_and_scale(noise.posterior, *posterior), shift_and_scale(noise.prior, *prior)]
    if references:
        prior_of_first = prior.rows(slice(references))
        mixed = network.condition(prior_of_first, reference_posterior, GROUPS[:2])
        latents.append(shift_and_scale(noise.reference, *mixed))
    effect = network.target_effect(batch.metadata["perturbation"])[batch.index["perturbation"]]
    decoded = [
        network.add_target_effect(part, batch.target_gene[: len(part)], effect[: len(part)])
        for part in network.decode(torch.cat(latents)).split([len(part) for part in latents])
    ]
    if references:
        residual = network.reference_residual(reference, reference_posterior)
        decoded[LatentSource.REFERENCE] = (
            decoded[LatentSource.REFERENCE] + residual - batch.batch_effect
        )
    names = ("nll_reconstruction", "nll_predictive", "nll_reference")  # as LatentSource
    terms = {
        name: -network.observation.log_likelihood(observed.first(len(part)), part, source).mean()
        for name, source, part in zip(names, LatentSource, decoded, strict=False)
    }
    if len(batch.unseen_study):
        from_prior = latents[LatentSource.PRIOR], decoded[LatentSource.PRIOR]
        terms["nll_unseen_study"] = _unseen_study(network, batch, *from_prior)
    divergence = kl_normal(*posterior, *prior).mean(dim=0)
    terms |= {f"kl_{group}": divergence[columns] for group, columns in network.slices().items()}
    if batch.partial_metadata:
        terms["kl_partial_metadata"] = _partial_metadata(network, batch)
    terms["classification"] = _classification(network, latents[0], batch.labels)
    return terms


def objective(terms: Mapping[str, Tensor], params: Train, warmup: float) -> Tensor:
    """The weighted loss, in nats per sample; `warmup` in [0, 1] scales the KL weights."""
    loss = terms["nll_reconstruction"] + params.predictive_weight * terms["nll_predictive"]
    optional = {
        "nll_reference": params.reference_weight,
        "nll_unseen_study": params.unseen_study_weight,
        "kl_partial_metadata": params.partial_metadata_weight,
    }
    for name, weight in optional.items():
        if name in terms:
            loss = loss + weight * terms[name]
    for group in GROUPS:
        weight = warmup * getattr(params.kl_weight, group)
        loss = loss + weight * terms[f"kl_{group}"].clamp_min(params.free_bits).sum()
    return loss + params.classifier_weight * terms["classification"]


def _unseen_study(network: Network, batch: Batch, latents: Tensor, decoded: Tensor) -> Tensor:
    """Negative log likelihood of the prediction from metadata without the study.

    Only technical weights have a gradient. Otherwise biology would learn to tell studies apart by
    age and disease, and be wrong for new studies.
    """
    technical = network.slices()["technical"]
    prior = network.prior("technical", batch.unseen_study).rows(batch.index["technical"])
    weight = network.linear_decoder.weight[:, technical]
    without_technical = (decoded - F.linear(latents[:, technical], weight)).detach()
    drawn = shift_and_scale(batch.noise.unseen_study, *prior)
    decoded = without_technical + F.linear(drawn, weight)
    log_likelihood = network.observation.log_likelihood(
        batch.observed, decoded, LatentSource.UNSEEN_STUDY
    )
    return -log_likelihood.mean()


def _partial_metadata(network: Network, batch: Batch) -> Tensor:
    """KL(prior of all fields | prior of some), summed over latents, for queries with few fields.

    It is least where the prior of some fields has the mean and variance of the mixture of all
    experiments that they describe. The full query is the teacher and has no gradient.
    """
    divergences = []
    for group, rows in batch.partial_metadata.items():
        with torch.no_grad():
            teacher = network.prior(group, batch.metadata[group])
        divergence = kl_normal(*teacher, *network.prior(group, rows)).sum(dim=1)
        divergences.append(divergence[batch.index[group]].mean())
    return torch.stack(divergences).sum()


def _classification(network: Network, latents: Tensor, labels: Tensor) -> Tensor:
    losses = [
        F.cross_entropy(logits, labels[:, position], ignore_index=-1, reduction="sum")
        for position, logits in enumerate(network.classify(latents).values())
    ]
    return torch.stack(losses).sum() / len(labels) if losses else latents.new_zeros(())
