"""The terms of the objective against loops over samples, and their weighted sum."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from support.networks import GENES, METADATA_SIZES, batch, network, sparse
from torch.distributions import Normal, kl_divergence

from pipeline.gem.common.config import GROUPS, KLWeight
from pipeline.gem.model.network import Gaussian, Network
from pipeline.gem.model.objective import (
    Batch,
    LatentNoise,
    cross_entropy,
    objective,
    objective_terms,
)
from pipeline.gem.model.observation import LatentSource, Observed

SOURCES = {
    "nll_reconstruction": LatentSource.POSTERIOR,
    "nll_predictive": LatentSource.PRIOR,
    "nll_reference": LatentSource.REFERENCE,
    "nll_unseen_study": LatentSource.UNSEEN_STUDY,
}
assert_close = torch.testing.assert_close


def rows_of(whole: Batch, rows) -> Batch:
    names = ("reference", "batch_effect", "target_gene", "labels")
    parts = {name: getattr(whole, name)[rows] for name in names}
    index = {group: index[rows] for group, index in whole.index.items()}
    observed, noise = whole.observed.rows(rows), whole.noise.rows(rows)
    return replace(whole, observed=observed, noise=noise, index=index, **parts)


def without_references(whole: Batch, kept: int) -> Batch:
    """The batch with references of its first `kept` samples only."""
    parts = whole.reference[:kept], whole.batch_effect[:kept]
    noise = whole.noise._replace(reference=whole.noise.reference[:kept])
    return replace(whole, reference=parts[0], batch_effect=parts[1], noise=noise)


def without_latents(net: Network) -> Network:
    """The network with outputs that ignore the latents: its terms are deterministic."""
    layers = [net.decoder[-1], net.linear_decoder, net.interaction.program, *net.heads.values()]
    with torch.no_grad():
        for layer in layers:
            layer.weight.zero_()
    return net


# --- the terms ---


@pytest.mark.parametrize("references", [6, 2, 0])
def test_terms_and_gradients_are_those_of_a_loop_over_samples(params, small_model, references):
    """With torch.distributions and no closed form: values to 1e-4, gradients to 1e-4 of the largest
    of a parameter. Terms are sums over genes and latents, averaged over samples once."""
    net, data = network(small_model), without_references(batch(), references)
    train = params.train.model_copy(update={"free_bits": 0.0})
    values, gradients = [], []
    for derive in (objective_terms, terms_by_sample):
        net.zero_grad(set_to_none=True)
        terms = derive(net, data)
        objective(terms, train, 0.7).backward()
        values.append({name: float(value.detach().sum()) for name, value in terms.items()})
        zeros = {name: torch.zeros_like(weight) for name, weight in net.named_parameters()}
        weights = net.named_parameters()
        gradients.append(zeros | {name: w.grad for name, w in weights if w.grad is not None})
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-4)
    for name, gradient in gradients[0].items():
        tolerance = 1e-4 * float(gradients[1][name].abs().max()) + 1e-6
        assert_close(gradient, gradients[1][name], rtol=0, atol=tolerance, msg=name)


def test_products_in_bf16_change_terms_by_two_percent_and_gradients_by_five(params, small_model):
    """Of their length; bf16 has 8 significant bits. Without training they change nothing."""
    model = small_model.model_copy(update={"hidden": 64})
    net, data = network(model, genes=64), batch(size=32, genes=64)
    exact = objective_terms(net, data)
    net.bf16 = True
    for name, value in objective_terms(net, data).items():
        assert_close(value, exact[name], rtol=0, atol=0)
    lengths, differences = {}, {}
    for rounded in (False, True):
        net.train(rounded).zero_grad(set_to_none=True)
        terms = objective_terms(net, data)
        objective(terms, params.train, 1.0).backward()
        gradient = torch.cat([w.grad.flatten() for w in net.parameters() if w.grad is not None])
        lengths[rounded], differences[rounded] = gradient.norm(), gradient
        assert all(value.dtype == torch.float32 for value in terms.values())
        for name, value in terms.items():
            assert float(value.detach().sum()) == pytest.approx(
                float(exact[name].detach().sum()), rel=2e-2, abs=2e-2
            )
    assert (differences[True] - differences[False]).norm() < 0.05 * lengths[False]


def terms_by_sample(net: Network, data: Batch) -> dict[str, torch.Tensor]:
    """The terms from their definitions."""
    size, references = len(data.observed), len(data.reference)
    noise = {name: part for name, part in zip(SOURCES, data.noise, strict=True) if len(part)}
    names = [*noise, "classification", "kl_partial_metadata", *(f"kl_{group}" for group in GROUPS)]
    terms = dict.fromkeys(names, torch.zeros(()))
    for row in range(size):
        index = {group: data.index[group][row] for group in GROUPS}
        priors = {
            group: net.prior(group, data.metadata[group][index[group][None]]) for group in GROUPS
        }
        prior = Gaussian(*(torch.cat(parts, 1) for parts in zip(*priors.values(), strict=True)))
        posterior = net.posterior(data.observed.expression[row][None])
        technical = net.prior("technical", data.unseen_study[index["technical"][None]])
        sources = {"nll_reconstruction": posterior, "nll_predictive": prior}
        if row < references:
            shifted = (data.reference + data.batch_effect)[row][None]
            control = net.posterior(shifted)
            # Technical and biological, the first 5 of 7 latents, are those of the reference.
            sources["nll_reference"] = Gaussian(
                *(torch.cat([c[:, :5], p[:, 5:]], 1) for c, p in zip(control, prior, strict=True))
            )
        sources["nll_unseen_study"] = technical
        latents = {
            name: source.mean + torch.exp(0.5 * source.log_variance) * noise[name][row]
            for name, source in sources.items()
        }
        effect = net.target_effect(data.metadata["perturbation"][index["perturbation"][None]])
        for name, z in latents.items():
            if name == "nll_unseen_study":
                # Only the technical latents differ from the prediction, and have a gradient.
                weight = net.linear_decoder.weight[:, :2]
                others = torch.cat([torch.zeros(1, 2), latents["nll_predictive"][:, 2:]], 1)
                mean = net.decode(others)[0].detach() + weight @ z[0]
            else:
                mean = net.decode(z)[0]
            for gene in data.target_gene[row]:
                if gene >= 0:
                    change = torch.zeros(GENES).index_fill(0, gene, 1.0) * effect
                    mean = mean + (change.detach() if name == "nll_unseen_study" else change)
            if name == "nll_reference":
                mean = mean + net.reference_residual(shifted, net.decode(control.mean))[0]
                mean = mean - data.batch_effect[row]
            deviation = torch.exp(0.5 * net.observation.log_variance(SOURCES[name]))
            log_density = Normal(mean, deviation).log_prob(data.observed.expression[row]).sum()
            rows = references if name == "nll_reference" else size
            terms[name] = terms[name] - log_density / rows
        for head, logits in enumerate(net.classify(latents["nll_reconstruction"]).values()):
            label = data.labels[row, head]
            if label >= 0:
                nats = -logits[0].log_softmax(0)[label]
                terms["classification"] = terms["classification"] + nats / size
        divergence = kl_divergence(distribution(posterior), distribution(prior))[0]
        for group, columns in net.slices().items():
            terms[f"kl_{group}"] = terms[f"kl_{group}"] + divergence[columns].sum() / size
        for group, rows in data.partial_metadata.items():
            teacher = distribution(Gaussian(*(part.detach() for part in priors[group])))
            partial = distribution(net.prior(group, rows[index[group][None]]))
            nats = kl_divergence(teacher, partial).sum()
            terms["kl_partial_metadata"] = terms["kl_partial_metadata"] + nats / size
    return terms


def distribution(gaussian: Gaussian) -> Normal:
    return Normal(gaussian.mean, torch.exp(0.5 * gaussian.log_variance))


def test_terms_without_their_part_of_the_batch_are_left_out(small_model):
    data = replace(without_references(batch(), 0), unseen_study=sparse(torch.zeros(0, 3)))
    terms = objective_terms(network(small_model), data)
    assert not {"nll_reference", "nll_unseen_study"} & set(terms)


def test_terms_of_a_batch_are_the_weighted_means_of_its_parts(small_model):
    net, whole = without_latents(network(small_model)), batch(size=9)
    terms = objective_terms(net, whole)
    first, second = (
        objective_terms(net, rows_of(whole, rows)) for rows in (slice(0, 3), slice(3, 9))
    )
    for name, value in terms.items():
        assert_close(value, (3 * first[name] + 6 * second[name]) / 9, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_terms_do_not_depend_on_the_batch_size_in_expectation(small_model, generator):
    net, data = network(small_model), batch(size=4)

    def draws(repeats, number):
        tiled = rows_of(data, torch.arange(4).repeat(repeats))
        noises = (
            LatentNoise.draw(net, 4 * repeats, generator, 4 * repeats, True) for _ in range(number)
        )
        terms = (objective_terms(net, replace(tiled, noise=noise)) for noise in noises)
        return pd.DataFrame({name: float(t.sum()) for name, t in draw.items()} for draw in terms)

    small, large = draws(20, 200), draws(400, 10)
    difference = (small.mean() - large.mean()).abs()
    error = (small.sem() ** 2 + large.sem() ** 2) ** 0.5
    assert (difference < 5 * error + 1e-4).all()


@torch.no_grad()
def test_duplicated_genes_double_the_likelihood_terms_and_leave_the_divergence(small_model):
    net, double = network(small_model), network(small_model, genes=2 * GENES)
    data = replace(batch(), target_gene=torch.full((6, 1), -1))
    state = net.state_dict()
    for name, value in state.items():
        if value.shape[0] == GENES:
            state[name] = torch.cat([value, value])
        elif name in ("observation.log_variances", "residual_gate"):
            state[name] = torch.cat([value, value], dim=1)
    # The normalised input repeats, so half of each weight twice gives the same encoding.
    state["encoder.0.weight"] = torch.cat([state["encoder.0.weight"]] * 2, dim=1) / 2
    double.load_state_dict(state)
    twice = replace(
        data,
        observed=Observed(torch.cat([data.observed.expression] * 2, 1)),
        reference=torch.cat([data.reference] * 2, 1),
        batch_effect=torch.cat([data.batch_effect] * 2, 1),
    )
    single = objective_terms(net, data)
    both = objective_terms(double, twice)
    for name, value in single.items():
        assert_close(both[name], (2 if name in SOURCES else 1) * value, rtol=1e-4, atol=1e-4)


def test_each_likelihood_term_has_observation_noise_of_its_own(small_model):
    net, data = network(small_model), batch()
    for name, source in SOURCES.items():
        net.zero_grad(set_to_none=True)
        objective_terms(net, data)[name].backward()
        rows = net.observation.log_variances.grad.abs().sum(dim=1).nonzero().flatten().tolist()
        # The residual of a reference is measured against the noise of the posterior.
        residual = [LatentSource.POSTERIOR] if source == LatentSource.REFERENCE else []
        assert rows == [*residual, source]


def test_a_variance_below_the_floor_has_a_gradient_back_to_it(small_model):
    net = network(small_model)
    with torch.no_grad():
        net.observation.log_variances.fill_(net.observation.min_log_variance - 1.0)
    terms = objective_terms(net, batch())
    # The errors of an untrained network are far above the floor: descent raises every variance.
    sum(terms[name] for name in SOURCES).backward()
    assert (net.observation.log_variances.grad < 0).all()


def test_reference_term_trains_no_prior_but_that_of_the_perturbation(small_model):
    net, data = network(small_model), batch()
    data = replace(data, reference=data.reference.requires_grad_())
    objective_terms(net, data)["nll_reference"].backward()
    assert data.reference.grad.abs().sum() > 0
    for name, weight in net.priors.named_parameters():
        trained = weight.grad is not None and bool(weight.grad.abs().sum() > 0)
        assert trained == name.startswith("perturbation"), name


def test_unseen_study_term_trains_technical_weights_only(small_model):
    net = network(small_model)
    objective_terms(net, batch())["nll_unseen_study"].backward()
    trained = {
        name
        for name, weight in net.named_parameters()
        if weight.grad is not None and weight.grad.abs().sum() > 0
    }
    prior = {"priors.technical.weight", "priors.technical.bias"}
    assert trained == prior | {"linear_decoder.weight", "observation.log_variances"}
    technical, gradient = net.slices()["technical"], net.linear_decoder.weight.grad
    assert gradient[:, technical].abs().sum() > 0
    assert gradient[:, technical.stop :].abs().sum() == 0


def test_missing_labels_contribute_nothing(small_model):
    net, data = network(small_model), batch()
    missing = replace(data, labels=torch.full_like(data.labels, -1))
    term = objective_terms(net, missing)["classification"]
    assert term.item() == 0.0
    term.backward()
    gradients = [weight.grad for weight in net.parameters() if weight.grad is not None]
    assert all(gradient.abs().sum() == 0 for gradient in gradients)
    labels = data.labels.clone()
    labels[:, 1] = -1  # sex
    objective_terms(net, replace(data, labels=labels))["classification"].backward()
    tissue, sex = net.heads["biological"].weight.grad.split([3, 2])
    assert sex.abs().sum() == 0
    assert tissue.abs().sum() > 0


@pytest.mark.parametrize("heads", [{}, {"tissue": ("biological", 1)}], ids=["none", "one level"])
def test_classification_is_zero_without_a_choice_of_classes(small_model, heads):
    data = batch(heads=heads)
    data = replace(data, labels=torch.zeros_like(data.labels))
    terms = objective_terms(network(small_model, heads=heads), data)
    assert terms["classification"].item() == 0.0


def test_the_prior_of_a_group_without_covariates_is_trained(small_model):
    sizes = METADATA_SIZES | {"technical": 0}
    net, data = network(small_model, sizes=sizes), batch(sizes=sizes)
    terms = objective_terms(net, data)
    assert all(torch.isfinite(value).all() for value in terms.values())
    terms["kl_technical"].sum().backward()
    assert net.priors["technical"].bias.grad.abs().sum() > 0


def test_cross_entropy_of_heads_side_by_side_is_the_sum_over_heads(generator):
    classes = [3, 1, 2]
    logits = (50 * torch.randn(4, 6, generator=generator)).double().requires_grad_()
    labels = torch.tensor([[2, 0, 1], [0, -1, -1], [-1, 0, 0], [1, 0, 1]])
    parts = zip(logits.split(classes, 1), labels.t(), strict=True)
    expected = sum(F.cross_entropy(*part, ignore_index=-1, reduction="sum") for part in parts) / 4
    assert_close(cross_entropy(logits, labels, classes), expected)
    moderate = (logits / 50).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda of: cross_entropy(of, labels, classes), moderate)


# --- the weighted sum ---


@torch.no_grad()
def test_objective_is_the_weighted_sum_of_its_terms(params, small_model):
    terms = objective_terms(network(small_model), batch())
    weights = {
        "predictive_weight": 7.0,
        "reference_weight": 11.0,
        "unseen_study_weight": 17.0,
        "partial_metadata_weight": 19.0,
        "classifier_weight": 13.0,
    }
    kl_weight = KLWeight(technical=2.0, biological=3.0, perturbation=5.0)
    update = weights | {"kl_weight": kl_weight, "free_bits": 0.0}
    train = params.train.model_copy(update=update)
    sums = {name: float(value.sum()) for name, value in terms.items()}
    for warmup in (0.0, 0.3, 1.0):
        kl = sum(getattr(kl_weight, group) * sums[f"kl_{group}"] for group in GROUPS)
        expected = (
            sums["nll_reconstruction"]
            + 7 * sums["nll_predictive"]
            + 11 * sums["nll_reference"]
            + 17 * sums["nll_unseen_study"]
            + 13 * sums["classification"]
            + 19 * sums["kl_partial_metadata"]
            + warmup * kl
        )
        assert math.isclose(float(objective(terms, train, warmup)), expected, rel_tol=1e-6)


def test_dimensions_below_the_free_bits_have_no_gradient(params):
    kl, zero = torch.tensor([0.1, 0.4, 2.0], requires_grad=True), torch.zeros(())
    terms = dict.fromkeys(("nll_reconstruction", "nll_predictive", "classification"), zero)
    terms |= {"kl_technical": kl, "kl_biological": zero, "kl_perturbation": zero}
    kl_weight = KLWeight(technical=1.0, biological=0.0, perturbation=0.0)
    train = params.train.model_copy(update={"free_bits": 0.5, "kl_weight": kl_weight})
    loss = objective(terms, train, 1.0)
    assert_close(loss, torch.tensor(0.5 + 0.5 + 2.0))
    loss.backward()
    assert kl.grad.tolist() == [0.0, 0.0, 1.0]
