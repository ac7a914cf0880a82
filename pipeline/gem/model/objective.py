"""The training objective of GEM: its terms and their weighted sum, in nats per sample.

Every term is summed over genes and latent dimensions, then averaged over the batch once.
B samples, R of them with a reference, G genes, U distinct metadata rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.gem.common.config import GROUPS, Train
from pipeline.gem.model.metadata.rows import MetadataRows
from pipeline.gem.model.network import Gaussian, Network
from pipeline.gem.model.normal import kl_normal
from pipeline.gem.model.observation import LatentSource, Observed

_LIKELIHOODS = {
    LatentSource.POSTERIOR: "nll_reconstruction",
    LatentSource.PRIOR: "nll_predictive",
    LatentSource.REFERENCE: "nll_reference",
    LatentSource.UNSEEN_STUDY: "nll_unseen_study",
}


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
    metadata: Mapping[str, MetadataRows]  # by group: distinct rows
    index: Mapping[str, Tensor]  # by group: (B,) row of `metadata`
    target_gene: Tensor  # (B, K) positions of the perturbation's own target genes, -1 without
    labels: Tensor  # (B, heads) class index, -1 missing
    noise: LatentNoise
    # Each of the following is empty where the objective leaves its term out.
    reference: Tensor  # (R, G) log-CPM of references of the first R samples
    batch_effect: Tensor  # (R, G) of a simulated study, shared by those samples and references
    unseen_study: MetadataRows  # technical rows without the study
    partial_metadata: Mapping[str, MetadataRows]  # `metadata` with fields masked at random


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
    priors, partial_priors, unseen_study = _priors(network, batch)
    prior = Gaussian.join(priors.values(), dim=1)
    latents, decoded, posterior = _decode_all(network, batch, prior)
    if unseen_study is not None:
        decoded[LatentSource.UNSEEN_STUDY] = _decode_unseen_study(
            network, unseen_study.draw(batch.noise.unseen_study), latents, decoded
        )
    means = network.observation.mean_log_likelihoods(batch.observed, decoded)
    terms = {_LIKELIHOODS[source]: -mean for source, mean in means.items()}
    divergence = kl_normal(*posterior, *prior).mean(dim=0)
    terms |= {f"kl_{group}": divergence[columns] for group, columns in network.slices().items()}
    if batch.partial_metadata:
        terms["kl_partial_metadata"] = _partial_metadata(priors, partial_priors)
    logits = network.head_logits(latents[LatentSource.POSTERIOR])
    terms["classification"] = cross_entropy(logits, batch.labels, network.classes)
    return terms


def _priors(
    network: Network, batch: Batch
) -> tuple[dict[str, Gaussian], dict[str, Gaussian], Gaussian | None]:
    """(priors of the samples by group, those of their partial metadata, that of their technical
    metadata without the study). All rows of a group pass its network together."""
    priors, partial, unseen_study = {}, {}, None
    for group in GROUPS:
        rows, index = [batch.metadata[group]], batch.index[group]
        if group in batch.partial_metadata:
            rows.append(batch.partial_metadata[group])
        if group == "technical" and len(batch.unseen_study):
            rows.append(batch.unseen_study)
        if len(rows) == 1:
            priors[group] = network.prior(group, rows[0], index)
            continue
        indices = [index + number * len(rows[0]) for number in range(len(rows))]
        of_all = network.prior(group, MetadataRows.join(rows), torch.cat(indices))
        priors[group], *others = of_all.split([len(index)] * len(rows))
        if group == "technical" and len(batch.unseen_study):
            unseen_study = others.pop()
        if others:
            partial[group] = others.pop()
    return priors, partial, unseen_study


def _decode_all(
    network: Network, batch: Batch, prior: Gaussian
) -> tuple[dict[LatentSource, Tensor], dict[LatentSource, Tensor], Gaussian]:
    """(latents (B, L) and decoded values (B, G) by source of the batch, the posterior of its
    samples). One encoding, and one decoding: a large product is faster than some small ones."""
    size, references = len(batch.observed), len(batch.reference)
    if not references:
        posterior = network.posterior(batch.observed.expression)
        gaussians, noise = [posterior, prior], torch.cat(batch.noise[:2])
    else:
        reference = batch.reference + batch.batch_effect
        encoded = network.posterior(torch.cat([batch.observed.expression, reference]))
        posterior, reference_posterior = encoded.split([size, references])
        of_first = prior.rows(slice(references))
        mixed = network.condition(of_first, reference_posterior, GROUPS[:2])
        gaussians, noise = [posterior, prior, mixed], torch.cat(batch.noise[:3])
    drawn = Gaussian.join(gaussians, dim=0).draw(noise)
    rows, sizes = drawn, [len(gaussian.mean) for gaussian in gaussians]
    target_gene = torch.cat([batch.target_gene[:length] for length in sizes])
    if references:
        # The references themselves, for their residuals: decoded without a target effect.
        rows, sizes = torch.cat([drawn, reference_posterior.mean]), [*sizes, references]
        target_gene = F.pad(target_gene, (0, 0, 0, references), value=-1)
    index = torch.cat([batch.index["perturbation"][:length] for length in sizes])
    effect = network.target_effect(batch.metadata["perturbation"]).index_select(0, index)
    decoded = network.add_target_effect(network.decode(rows), target_gene, effect).split(sizes)
    if references:
        *decoded, of_reference = decoded
        residual = network.reference_residual(reference, of_reference)
        decoded[-1] = decoded[-1] + (residual - batch.batch_effect)
    latents = dict(zip(LatentSource, drawn.split(sizes[: len(gaussians)]), strict=False))
    return latents, dict(zip(LatentSource, decoded, strict=False)), posterior


def objective(terms: Mapping[str, Tensor], params: Train, warmup: float) -> Tensor:
    """The weighted loss, in nats per sample; `warmup` in [0, 1] scales the KL weights."""
    weights = {
        "nll_reconstruction": 1.0,
        "nll_predictive": params.predictive_weight,
        "nll_reference": params.reference_weight,
        "nll_unseen_study": params.unseen_study_weight,
        "kl_partial_metadata": params.partial_metadata_weight,
        "classification": params.classifier_weight,
    }
    values = [terms[name] for name in weights if name in terms]
    factors = [weight for name, weight in weights.items() if name in terms]
    for group in GROUPS:
        divergence = terms[f"kl_{group}"]
        if params.free_bits:
            divergence = divergence.clamp_min(params.free_bits)
        values.append(divergence.sum())
        factors.append(warmup * getattr(params.kl_weight, group))
    stacked = torch.stack(values)
    return stacked @ stacked.new_tensor(factors)


def _decode_unseen_study(
    network: Network,
    drawn: Tensor,
    latents: Mapping[LatentSource, Tensor],
    decoded: Mapping[LatentSource, Tensor],
) -> Tensor:
    """(B, G) decoded from metadata without the study: the prediction from metadata, with technical
    latents `drawn` without the study.

    Only technical weights have a gradient. Otherwise biology would learn to tell studies apart by
    age and disease, and be wrong for new studies.
    """
    technical = network.slices()["technical"]
    known, values = (part[LatentSource.PRIOR].detach() for part in (latents, decoded))
    weight = network.linear_decoder.weight[:, technical]
    return _Replaced.apply(values, known[:, technical], drawn, weight)


class _Replaced(Function):
    """Decoded values (B, G) after a linear map with `weight` (G, K) of some latents (B, K), with
    other latents in their place. The gradient is that of `new @ weight.t()`, with one product less.
    """

    @staticmethod
    def forward(ctx, decoded: Tensor, old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(new, weight)
        return torch.addmm(decoded, new - old, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        new, weight = ctx.saved_tensors
        return None, None, gradient @ weight, gradient.t() @ new


def _partial_metadata(priors: Mapping[str, Gaussian], partial: Mapping[str, Gaussian]) -> Tensor:
    """KL(prior of all fields | prior of some), summed over latents, for queries with few fields.

    It is least where the prior of some fields has the mean and variance of the mixture of all
    experiments that they describe. The full query is the teacher and has no gradient.
    """
    of_all = Gaussian.join((priors[group] for group in partial), dim=1)
    teacher, student = of_all.detach(), Gaussian.join(partial.values(), dim=1)
    return kl_normal(*teacher, *student).sum() / len(student.mean)


class _CrossEntropy(Function):
    """The arguments and the result of `cross_entropy`."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
        if not classes:
            return logits.new_zeros(())
        parts = [torch.log_softmax(part, 1) for part in logits.split(classes, dim=1)]
        log_probabilities, known = torch.cat(parts, dim=1), labels >= 0
        starts = labels.new_tensor([0, *accumulate(classes[:-1])])
        columns = labels.clamp_min(0) + starts
        nats = torch.where(known, log_probabilities.gather(1, columns), 0.0)
        ctx.save_for_backward(log_probabilities, columns, known)
        ctx.classes = classes
        return nats.sum().div_(-len(labels))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.classes:
            return None, None, None
        log_probabilities, columns, known = ctx.saved_tensors
        weights = known * (gradient / len(known))
        classes = columns.new_tensor(ctx.classes)
        of_classes = weights.repeat_interleave(classes, 1, output_size=log_probabilities.shape[1])
        of_logits = log_probabilities.exp().mul_(of_classes).scatter_add_(1, columns, -weights)
        return of_logits, None, None


def cross_entropy(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Cross entropy of heads whose logits (B, K) stand side by side, summed over heads and divided
    by B. Labels (B, heads), -1 missing; the number of `classes` of each head."""
    return _CrossEntropy.apply(logits, labels, classes)
